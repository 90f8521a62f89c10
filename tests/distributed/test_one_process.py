"""Engines that run on one process, as in a trial run: gradients that they write back count once, not twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mogeo import MultiObjectiveOptimizer, arrivals
from tests.distributed.runner import run

ENGINES = ("ddp", "ddp, bucket views", "ddp, unused", "fsdp2")


def grams_of_two_windows(least: int, options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """By engine, the Gram matrices of a window of two micro-batches and of one that follows; and the right ones."""
    arrivals._LEAST = least
    found = {}
    for engine in ENGINES:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        x = torch.randn(2, 4, 8, dtype=torch.float64)
        exact = []
        for micro_batches in (x, x[:1]):
            rows = []
            for k in range(3):
                loss = torch.stack([(net(part)[:, k] - k).square().mean() for part in micro_batches]).sum()
                rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(net.parameters()))]))
            exact.append(torch.stack(rows) @ torch.stack(rows).T)
        module: Any = net
        if engine == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(net)
        else:
            module = DistributedDataParallel(
                net,
                gradient_as_bucket_view=engine == "ddp, bucket views",
                find_unused_parameters=engine == "ddp, unused",
            )
        optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), "mgda", **options)
        grams = []
        for micro_batches in (x, x[:1]):
            for part in micro_batches:
                optimizer.backward(
                    [lambda k=k, x=part, module=module: (module(x)[:, k] - k).square().mean() for k in range(3)]
                )
            gram = optimizer.combine().gram
            assert gram is not None
            grams.append(gram)
            optimizer.zero_grad()
        found[engine] = (torch.stack(grams), torch.stack(exact))
    return found


@pytest.mark.parametrize("least", [0, 1 << 20], ids=["hooks on all", "hooks on none"])
@pytest.mark.parametrize("options", [{}, {"sketch": 1 << 16}], ids=str)
def test_what_an_engine_writes_back_is_not_added_again(least: int, options: dict[str, Any]) -> None:
    ((found),) = run(1, grams_of_two_windows, least, options)
    for engine, (grams, exact) in found.items():
        torch.testing.assert_close(grams, exact, msg=lambda text, engine=engine: f"{engine}: {text}")
