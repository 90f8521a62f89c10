"""SketchThenReplay: what is evaluated twice must be the same twice, and leave nothing behind twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer, Sketch
from tests.nets import NAMES, Net, callables, flat_grad, gradient_rows, inputs, shared_losses, wrapped

DIMENSIONS = pytest.mark.parametrize("d", [8, 4096], ids=["replayed", "held whole"])


@DIMENSIONS
def test_batchnorm_advances_once(d: int) -> None:
    def run(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), **options)
        for step in range(4):
            x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step)) + 1
            losses: dict[str, Callable[[], Tensor]] = {
                "a": lambda x=x: net(x)[:, 0].square().mean() + 0.1,
                "b": lambda x=x: (net(x)[:, 1] - 1).square().mean(),
            }
            optimizer.backward(losses)
            optimizer.step()
            optimizer.zero_grad()
        return net[1]

    exact, sketched = run(), run(memory=Sketch(d))
    assert exact.num_batches_tracked == sketched.num_batches_tracked == 8
    if d > 100:
        torch.testing.assert_close(exact.running_mean, sketched.running_mean)


def test_spectral_norm_sees_the_vectors_of_the_first_time() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), sketch=16)
    optimizer.backward(
        {"a": lambda: net(x)[:, 0].square().mean() + 0.1, "b": lambda: (net(x)[:, 1] - 1).square().mean()}
    )
    optimizer.combine()


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "python": random.random,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_shared_generators_repeat_and_go_on(draw: Callable[[], Any]) -> None:
    net, x = Net(), inputs()

    def rest(**options: Any) -> float:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        optimizer = wrapped(net, **options)
        losses = {name: (lambda loss=loss: loss() * (1 + float(draw()))) for name, loss in callables(net, x).items()}
        optimizer.backward(losses)
        optimizer.combine()
        return float(draw())

    assert rest(sketch=8) == rest()


@pytest.mark.parametrize("what", ["batch", "own generator"])
def test_a_callable_that_is_not_the_same_twice_is_named(what: str) -> None:
    net = Net()
    batches: Iterator[Tensor] = (inputs(seed) for seed in range(100))
    generator = torch.Generator().manual_seed(0)
    losses = callables(net, inputs())
    drawing = dict(losses)
    if what == "batch":
        drawing["honesty"] = lambda: callables(net, next(batches))["honesty"]()
        next(batches)
    else:
        drawing["honesty"] = lambda: losses["honesty"]() * torch.rand((), generator=generator)
    optimizer = wrapped(net, sketch=8)
    optimizer.backward(drawing)
    with pytest.raises(RuntimeError, match=r"the loss of objective 'honesty' was .*Draw the batch before"):
        optimizer.step()
    assert flat_grad(net).abs().max() == 0
    optimizer.backward(losses)  # nothing is left of it
    report = optimizer.combine()
    torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, inputs()))
    wrapped(net, sketch=4096).backward(drawing)  # evaluated once: nothing to complain of


def test_other_gradients_of_equal_losses_are_noticed() -> None:
    """As where DPO begins: every loss is ln 2, whatever the batch."""
    parameter = nn.Parameter(torch.zeros(500, dtype=torch.float64))
    batches = (
        torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(9)
    )
    fixed = torch.randn(500, dtype=torch.float64)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), "mgda", sketch=64)
    logistic = nn.functional.softplus
    optimizer.backward({"a": lambda: logistic(-(parameter @ next(batches))), "b": lambda: logistic(parameter @ fixed)})
    with pytest.raises(RuntimeError, match="'a', 'b' were evaluated twice.*gradients were not the same"):
        optimizer.step()
    assert parameter.grad is None
    optimizer.backward({"a": lambda: logistic(-(parameter @ fixed.flip(0))), "b": lambda: logistic(parameter @ fixed)})
    optimizer.step()


CHANGES: dict[str, Callable[[Net, MultiObjectiveOptimizer], None]] = {
    "frozen": lambda net, optimizer: net.trunk.bias.requires_grad_(False),  # type: ignore[dict-item, return-value]
    "unfrozen": lambda net, optimizer: net.heads[0].bias.requires_grad_(True),  # type: ignore[dict-item, return-value]
    "added": lambda net, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]}),
    "trained by another": lambda net, optimizer: optimizer.base.param_groups[0]["params"].remove(net.trunk.weight),
}


@pytest.mark.parametrize("form", [shared_losses, callables])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_parameters_that_change_before_the_second_pass_are_refused(change: Any, form: Any) -> None:
    net = Net()
    net.heads[0].bias.requires_grad_(False)
    # By identity: `list.remove` compares tensors by value.
    base = torch.optim.SGD([p for p in net.parameters() if p is not net.trunk.weight], lr=0.1)
    if change is CHANGES["trained by another"]:
        base.param_groups[0]["params"].insert(0, net.trunk.weight)
    optimizer = MultiObjectiveOptimizer(base, sketch=8)
    optimizer.backward(form(net, inputs()))
    if change is CHANGES["trained by another"]:
        del optimizer.base.param_groups[0]["params"][0]
    else:
        change(net, optimizer)
    with pytest.raises(RuntimeError, match="added, removed, frozen or unfrozen between backward"):
        optimizer.step()
    optimizer.backward(form(net, inputs()))
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.objectives == NAMES


@DIMENSIONS
def test_half_precision_is_close_enough_to_agree(d: int) -> None:
    """Gradients in bf16 are rounded when they are weighed and summed: that is no other batch."""
    net = Net(torch.bfloat16)
    x = inputs(dtype=torch.bfloat16)
    optimizer = wrapped(net, sketch=d)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(4):
            optimizer.backward(callables(net, x))
        optimizer.step()
    assert flat_grad(net).isfinite().all()


def test_bf16_micro_batches_that_nearly_cancel_are_no_contradiction() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(64, 64, bias=False).bfloat16(), torch.randn(8, 64).bfloat16()
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "mgda", sketch=512)
    for sign in (1.0, -0.997):
        losses: dict[str, Callable[[], Tensor]] = {
            "a": lambda sign=sign: sign * net(x).float().sum(),
            "b": lambda sign=sign: sign * net(x).float().square().mean(),
        }
        optimizer.backward(losses)
    optimizer.step()


def test_several_bases_notice_a_group_that_comes_too_late() -> None:
    p, q, r = (nn.Parameter(torch.ones(5)) for _ in range(3))
    optimizer = MultiObjectiveOptimizer([torch.optim.SGD([p], lr=0.1), torch.optim.SGD([r], lr=0.1)], "mgda", sketch=2)
    optimizer.backward({"a": (p * q * r).sum(), "b": (p * q * r).square().sum()})
    optimizer.base.bases[0].add_param_group({"params": [q]})
    with pytest.raises(RuntimeError, match="added, removed, frozen or unfrozen"):
        optimizer.step()


def test_losses_of_the_report_are_no_views_of_the_users() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    losses = shared_losses(net, x)
    expected = torch.stack(list(losses.values())).detach().clone()
    optimizer.backward(losses)
    total = losses["help"].detach()
    total += 10.0
    torch.testing.assert_close(optimizer.combine().losses, expected)


def test_an_interrupt_just_after_the_pack_was_filled_leaves_nothing_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, sketch=8)
    add, interrupts = torch._foreach_add_, iter([True])

    def interrupted(*arguments: Any, **options: Any) -> None:
        add(*arguments, **options)
        if next(interrupts, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "_foreach_add_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(callables(net, inputs(1)))
    optimizer.backward(callables(net, x))
    report = optimizer.combine()
    fresh = wrapped(net, sketch=8)
    net.zero_grad()
    fresh.backward(callables(net, x))
    torch.testing.assert_close(report.gram, fresh.combine().gram)
