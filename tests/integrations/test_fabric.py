"""Lightning's Fabric trains with the optimizer as its users write it; each run is held against a plain loop.

`fabric.setup` returns a proxy whose class inherits from the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn

from mogeo import MultiObjectiveOptimizer
from tests.integrations.test_lightning import (
    assert_equal_nets,
    batches,
    losses_of,
    make_net,
    make_optimizer,
    plain_loop,
    plain_step,
)


def fabric_loop(
    step: Callable[[Fabric, nn.Module, Any, Any], None], steps: int = 10, fabric: Fabric | None = None, **options: Any
) -> tuple[nn.Module, MultiObjectiveOptimizer]:
    """The trained model as it was made, and the optimizer as it was made."""
    fabric = fabric or Fabric(accelerator="cpu")
    net = make_net()
    made = make_optimizer(net, **options)
    model, optimizer = fabric.setup(net, made)
    assert optimizer is not made
    assert isinstance(optimizer, MultiObjectiveOptimizer)
    for k in range(steps):
        step(fabric, model, optimizer, batches().split(8)[k % 5])
    return net, made


def two_lines(fabric: Fabric, model: nn.Module, optimizer: Any, batch: Any) -> None:
    plain_step(model, optimizer, batch)


def by_fabrics_backward(fabric: Fabric, model: nn.Module, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, batch), backward=fabric.backward)
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"sketch": 64}, {"refresh_every": 3}, {"several": True}], ids=str)
@pytest.mark.parametrize("step", [two_lines, by_fabrics_backward])
def test_a_loop_is_a_plain_loop(step: Callable[..., None], options: dict[str, Any]) -> None:
    net, _ = fabric_loop(step, **options)
    assert_equal_nets(net, plain_loop(plain_step, **options))


def test_optimizers_that_are_set_up_alone() -> None:
    net = make_net()
    optimizer = Fabric(accelerator="cpu").setup_optimizers(make_optimizer(net))
    for batch in batches().split(8):
        plain_step(net, optimizer, batch)
    assert_equal_nets(net, plain_loop(plain_step, steps=5))


def test_what_is_read_and_set_on_the_proxy_is_the_optimizers() -> None:
    reports: list[Any] = []

    def step(fabric: Fabric, model: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.max_grad_norm = 0.1
        by_fabrics_backward(fabric, model, optimizer, batch)
        reports.append(optimizer.report)

    net, made = fabric_loop(step)
    assert made.max_grad_norm == 0.1
    assert made.report is reports[-1]
    assert made.objectives == ("left", "right")
    assert_equal_nets(net, plain_loop(plain_step, max_grad_norm=0.1))


def test_clipping_by_fabric_takes_combine_first() -> None:
    def step(fabric: Fabric, model: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch), backward=fabric.backward)
        optimizer.combine()
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()

    net, _ = fabric_loop(step)
    for p, q in zip(net.parameters(), plain_loop(plain_step, max_grad_norm=0.1).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_fp16_with_a_scaler_takes_combine_first() -> None:
    def fp16() -> Fabric:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    def step(fabric: Fabric, model: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch), backward=fabric.backward)
        optimizer.combine()
        optimizer.step()

    net, _ = fabric_loop(step, fabric=fp16(), nonfinite="propagate")
    for p, q in zip(net.parameters(), plain_loop(plain_step).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.005)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):  # torch's, and not silence
        fabric_loop(by_fabrics_backward, fabric=fp16())


def test_checkpoints_resume_where_they_were(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weighting": "group-dro(0.5)", "refresh_every": 2}
    fabric = Fabric(accelerator="cpu")
    net = make_net()
    model, optimizer = fabric.setup(net, make_optimizer(net, **options))
    for batch in batches().split(8):
        by_fabrics_backward(fabric, model, optimizer, batch)
    fabric.save(tmp_path / "five.ckpt", {"model": model, "optimizer": optimizer})

    other_net = make_net()
    other_model, other = fabric.setup(other_net, make_optimizer(other_net, **options))
    fabric.load(tmp_path / "five.ckpt", {"model": other_model, "optimizer": other})
    assert other.objectives == ("left", "right")
    for batch in batches().split(8):
        by_fabrics_backward(fabric, other_model, other, batch)
    assert_equal_nets(other_net, plain_loop(plain_step, **options))
