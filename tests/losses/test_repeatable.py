"""Repeatable: a second evaluation is the first one again."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mogeo.losses.repeatable import Repeatable


def test_random_numbers_are_those_of_the_first_time() -> None:
    torch.manual_seed(1)
    torch.rand(3)
    loss = Repeatable("a", lambda: torch.rand(5))
    first = loss()
    between = torch.rand(2)
    torch.manual_seed(1)
    torch.rand(8)
    assert torch.equal(torch.rand(2), between)  # what the first evaluation left to others
    torch.rand(4)
    state = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(loss(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_is_that_of_the_first_time() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    inside, outside = Repeatable("a", lambda: layer(x)), Repeatable("a", lambda: layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert inside().dtype == torch.bfloat16
    assert outside().dtype == torch.float32
    assert inside().dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert outside().dtype == torch.float32
        with torch.autocast("cpu", torch.float16):
            assert inside().dtype == torch.bfloat16
        assert layer(x).dtype == torch.bfloat16


def test_dropout_repeats_its_mask() -> None:
    dropout = nn.Dropout(0.5)
    x = torch.ones(64, requires_grad=True)

    def gradient(loss: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, x)
        return grad

    loss = Repeatable("a", lambda: dropout(x).sum())
    first = gradient(loss())
    assert 0 < int((first == 0).sum()) < 64
    assert torch.equal(gradient(loss()), first)


def batch_norm() -> nn.BatchNorm1d:
    torch.manual_seed(0)
    return nn.BatchNorm1d(4)


WAYS_TO_RUN: dict[str, Callable[[nn.Module, Tensor], Callable[[], Tensor]]] = {
    "called": lambda net, x: lambda: net(x).square().mean(),
    "forward called": lambda net, x: lambda: net.forward(x).square().mean(),
    "compiled function": lambda net, x: torch.compile(lambda: net(x).square().mean(), backend="eager"),
    "compiled module": lambda net, x: functools.partial(
        lambda module: module(x).square().mean(), torch.compile(net, backend="eager")
    ),
    "compiled in place": lambda net, x: net.compile(backend="eager") or (lambda: net(x).square().mean()),  # type: ignore[func-returns-value]
    "functional": lambda net, x: (
        lambda: (
            torch.func.functional_call(net, (dict(net.named_parameters()), dict(net.named_buffers())), (x,))
            .square()
            .mean()
        )
    ),
    "partial": lambda net, x: functools.partial(lambda module, y: module(y).square().mean(), net, x),
    "out of reach": lambda net, x: functools.partial(lambda made: next(made)(x).square().mean(), itertools.repeat(net)),
}


@pytest.mark.parametrize("way", WAYS_TO_RUN)
def test_buffers_move_once_however_a_module_is_run(way: str) -> None:
    net, x = batch_norm(), torch.randn(8, 4) + 1
    loss = Repeatable("a", WAYS_TO_RUN[way](net, x))
    first = loss()
    after = {name: buffer.clone() for name, buffer in net.named_buffers()}
    tensors = dict(net.named_buffers())
    assert after["num_batches_tracked"] == 1
    for _ in range(2):
        torch.testing.assert_close(loss(), first)
    for name, buffer in net.named_buffers():
        assert buffer is tensors[name]
        assert torch.equal(buffer, after[name]), name


def test_what_is_not_the_same_twice_names_the_objective() -> None:
    values = iter([1.0, 1.01, float("nan")])
    loss = Repeatable("honesty", lambda: torch.tensor(next(values), requires_grad=True))
    loss()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the loss of objective 'honesty' was 1,"):
            loss()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0])
def test_values_without_a_scale_are_equal_to_themselves(value: float) -> None:
    loss = Repeatable("a", lambda: torch.tensor(value, requires_grad=True))
    loss()
    loss()
