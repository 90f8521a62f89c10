"""SumAsTheyCome: parameters outside the base optimizer get the plain sum of all gradients, whatever the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mogeo import MultiObjectiveOptimizer
from mogeo.losses.shared_graphs import leaves_reached
from tests.deciders import QUICK_WAYS, WAYS, let_decide
from tests.profiles import slow_but

NAMES = ("a", "b", "c")


class Split(nn.Module):
    """An embedding that another optimizer trains, and a head that the base trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outside = nn.Linear(4, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 3, dtype=torch.float64)

    def losses(self, seed: int) -> dict[str, Tensor]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y = self.head(torch.tanh(self.outside(x)))
        values = ((y[:, 0] - 1).square(), (y[:, 1] + 2).square(), (y[:, 2] + y[:, 0]).square())
        return {name: value.mean() for name, value in zip(NAMES, values, strict=True)}

    def callables(self, seed: int) -> dict[str, Callable[[], Tensor]]:
        return {name: (lambda name=name: self.losses(seed)[name]) for name in NAMES}


def plain_sum(net: Split, seed: int) -> list[Tensor]:
    return list(torch.autograd.grad(sum(net.losses(seed).values()), list(net.outside.parameters())))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["losses", "callables"])
@pytest.mark.parametrize(
    ("weighting", "options"),
    [
        ("mgda", {}),
        ("uniform", {}),
        ("linear(1, 0, 3)", {}),  # a weight of zero is one for the base alone
        ("mgda", {"refresh_every": 2}),
        ("group-dro", {}),
    ],
)
@pytest.mark.parametrize("way", slow_but(WAYS, *QUICK_WAYS))
def test_outside_the_base_gradients_add_up_as_autograd_has_them(
    way: str, weighting: str, options: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_decide(way, monkeypatch)
    net = Split()
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.head.parameters(), lr=0.0), weighting, **options)
    for seed in range(3):
        net.zero_grad()
        expected = [2 * grad for grad in plain_sum(net, seed)]
        for _ in range(2):  # micro-batches
            optimizer.backward(getattr(net, form)(seed))
        report = optimizer.combine()
        for parameter, grad in zip(net.outside.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        inside = [torch.autograd.grad(net.losses(seed)[name], list(net.head.parameters())) for name in NAMES]
        for k, parameter in enumerate(net.head.parameters()):
            direction = sum(w * rows[k] for w, rows in zip(report.weights, inside, strict=True))
            torch.testing.assert_close(parameter.grad, 2 * direction)  # type: ignore[arg-type]


def test_one_backward_where_no_loss_reaches_outside() -> None:
    """Frozen embeddings whose output requires grad (`enable_input_require_grads`) are no parameter of anybody."""
    net, backwards = Split(), 0
    for parameter in net.outside.parameters():
        parameter.requires_grad_(False)
    net.outside.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    def backward(loss: Tensor, **options: Any) -> None:
        nonlocal backwards
        backwards += 1
        loss.backward(**options)

    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.head.parameters(), lr=0.0), "uniform")
    optimizer.backward(net.losses(0), backward=backward)
    assert backwards == 1


def test_leaves_reached_are_those_of_the_graph_each_once() -> None:
    net = Split()
    losses = list(net.losses(0).values())
    reached = leaves_reached(losses, lambda parameter: False)
    assert {id(p) for p in reached} == {id(p) for p in net.parameters()}
    assert len(reached) == len(list(net.parameters()))
    inside = {id(p) for p in net.head.parameters()}
    outside = leaves_reached(losses, lambda parameter: id(parameter) in inside)
    assert {id(p) for p in outside} == {id(p) for p in net.outside.parameters()}
    assert leaves_reached([net.head.weight.sum()], lambda parameter: id(parameter) in inside) == []


@pytest.mark.parametrize("way", slow_but(WAYS, *QUICK_WAYS))
@pytest.mark.parametrize("weighting", ["uniform", "mgda"])
def test_reentrant_checkpoints_hide_no_parameter(weighting: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(way, monkeypatch)
    inside, outside = (nn.Parameter(torch.ones(5)) for _ in range(2))

    def scaled(x: Tensor) -> Tensor:
        return checkpoint(lambda y: y * outside, x, use_reentrant=True)  # type: ignore[no-any-return]

    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([inside], lr=0.0), weighting, refresh_every=2)
    for _ in range(2):
        outside.grad = None
        optimizer.zero_grad()
        optimizer.backward([scaled(inside).sum(), 2 * scaled(inside).sum() + inside.square().sum()])
        optimizer.combine()
        assert outside.grad is not None
        assert outside.grad.tolist() == [3.0] * 5
