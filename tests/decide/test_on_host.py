"""Directions that the host decides: who is left out, what raises, when nothing moves. GPUs: test_on_device.py."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import mogeo
from mogeo import MultiObjectiveOptimizer
from tests.nets import (
    NAMES,
    WEIGHTINGS,
    Net,
    assert_direction,
    assert_left_out,
    flat_grad,
    gradient_rows,
    inputs,
    poisoned,
    shared_losses,
    wrapped,
)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("weighting", ["mgda", "mgda-normalized", "mgda-decoupled", "gapo(0.5)"])
def test_skip_leaves_out_what_is_not_finite(weighting: str, how: str) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting)
    with pytest.warns(RuntimeWarning, match="left objective 'honesty' out of a step"):
        optimizer.backward(poisoned(net, x, "honesty", how))
        report = optimizer.combine()
    assert_left_out(net, x, report)
    # the second time it only counts, and the row recovers
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(poisoned(net, x, "honesty", how))
        assert optimizer.combine().nonfinite_counts.tolist() == [0, 2, 0]
    optimizer.zero_grad()
    optimizer.backward(shared_losses(net, x))
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


@pytest.mark.parametrize("weighting", ["uniform", "group-dro"])
def test_without_a_gram_skip_leaves_out_losses_one_by_one_and_gradients_all_at_once(weighting: str) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting)
    with pytest.warns(RuntimeWarning, match="left objective 'honesty' out"):
        optimizer.backward(poisoned(net, x, "honesty", "loss"))
        report = optimizer.combine()
    torch.testing.assert_close(flat_grad(net), report.weights[[0, 2]] @ gradient_rows(net, x)[[0, 2]])
    before = flat_grad(net).clone()
    optimizer.backward(poisoned(net, x, "honesty", "gradient"))
    assert optimizer.combine().skipped == NAMES
    assert torch.equal(flat_grad(net), before)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_when_nothing_is_finite_nothing_moves(weighting: str) -> None:
    net = Net()
    optimizer = MultiObjectiveOptimizer(torch.optim.AdamW(net.parameters(), weight_decay=0.5), weighting)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.warns(RuntimeWarning, match="left objective"):
        optimizer.backward({name: loss * math.inf for name, loss in shared_losses(net, inputs()).items()})
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert optimizer.report.skipped == NAMES  # type: ignore[union-attr]


def test_a_direction_that_overflows_fp16_is_not_finite() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), lambda gram, losses: [1.0, 1.0])
    with pytest.warns(RuntimeWarning, match="left objective '0', '1'"):
        optimizer.backward([(parameter.float() * 5e4).sum() + 1, (parameter.float() * 4e4).sum() + 1])
        assert optimizer.combine().skipped == ("0", "1")
    assert parameter.grad is None


def test_a_loss_that_fails_later_in_the_window_takes_a_sum_with_it() -> None:
    """Constant weights sum during backward: what is in cannot be taken out again."""
    net, x = Net(), inputs()
    optimizer = wrapped(net, "uniform")
    optimizer.backward(shared_losses(net, x))
    optimizer.backward(poisoned(net, x, "honesty", "loss"))
    with pytest.warns(RuntimeWarning, match="left objective"):
        report = optimizer.combine()
    assert report.skipped == NAMES
    assert flat_grad(net).abs().max() == 0


def test_a_nonpositive_loss_names_the_objective_and_loses_nothing() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    losses = shared_losses(net, x)
    losses["honesty"] = losses["honesty"] - 100
    optimizer.backward(losses)
    with pytest.raises(ValueError, match=r"objective 'honesty' has loss -.*; mgda-decoupled divides by the loss"):
        optimizer.step()
    assert flat_grad(net).abs().max() == 0
    optimizer.weighting = mogeo.weightings.resolve("mgda-normalized")  # the cure it names works on what was captured
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


@pytest.mark.parametrize("bad", [[1.0, 2.0], [math.nan, 0.0, 0.0]])
def test_a_weighting_must_return_one_finite_weight_per_objective(bad: list[float]) -> None:
    net = Net()
    optimizer = wrapped(net, lambda gram, losses: bad)
    optimizer.backward(shared_losses(net, inputs()))
    with pytest.raises(RuntimeError, match="must return one finite weight per objective"):
        optimizer.combine()
