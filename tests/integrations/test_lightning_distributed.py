"""Lightning and Fabric on two processes, each with half of every batch, train as one process does on the whole."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.runner import run
from tests.integrations.test_lightning import Module, by_manual_backward, fit, plain_loop, plain_step, two_lines


@lru_cache
def on_two_processes() -> list[dict[str, list[Tensor]]]:
    """Both at once: most of the time goes into importing Lightning."""
    return run(2, train_on_a_share, timeout=240.0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Lightning", "Lightning, two lines", "Fabric"])
def test_ddp(how: str) -> None:
    first, second = on_two_processes()
    for p, q, r in zip(first[how], second[how], plain_loop(plain_step).parameters(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r.detach(), rtol=0, atol=2e-6)


def train_on_a_share() -> dict[str, list[Tensor]]:
    from lightning.fabric import Fabric

    from tests.integrations.test_fabric import by_fabrics_backward, fabric_loop

    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # so that Lightning takes the processes as they are
    logging.getLogger("lightning").setLevel(logging.ERROR)
    rank = int(os.environ["RANK"])
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2}

    trained: dict[str, nn.Module] = {}
    for how, step in {"Lightning": by_manual_backward, "Lightning, two lines": two_lines}.items():
        module = Module(lambda module, optimizer, batch, step=step: step(module, optimizer, batch.chunk(2)[rank]))
        fit(module, use_distributed_sampler=False, **options)
        trained[how] = module.net
    fabric = Fabric(accelerator="cpu", **options)
    fabric.launch()
    trained["Fabric"], _ = fabric_loop(
        lambda fabric, model, optimizer, batch: by_fabrics_backward(fabric, model, optimizer, batch.chunk(2)[rank]),
        fabric=fabric,
    )
    return {how: [p.detach() for p in net.parameters()] for how, net in trained.items()}
