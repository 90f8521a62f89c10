"""`refresh_every`: a solve now and then, and the weighted sum of the losses in between. All ways of making a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mogeo import MultiObjectiveOptimizer
from tests.deciders import QUICK_WAYS, WAYS, let_decide
from tests.nets import (
    NAMES,
    Net,
    callables,
    flat_grad,
    gradient_rows,
    inputs,
    poisoned,
    separate_losses,
    shared_losses,
    wrapped,
)
from tests.profiles import slow_but

FORMS = [shared_losses, separate_losses, callables]


@pytest.fixture(autouse=True, params=slow_but(WAYS, *QUICK_WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file holds however a step is made."""
    let_decide(request.param, monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighting", ["mgda-decoupled", "group-dro(0.5)"])
def test_weights_hold_in_between(weighting: str, form: Callable[..., dict]) -> None:
    net = Net()
    optimizer = wrapped(net, weighting, refresh_every=3, max_grad_norm=0.7)
    weights: list[Tensor] = []
    for step in range(7):
        x = inputs(step)
        rows, losses = gradient_rows(net, x), torch.stack(list(separate_losses(net, x).values())).detach()
        optimizer.zero_grad()
        optimizer.backward(form(net, x))
        report = optimizer.combine()
        torch.testing.assert_close(flat_grad(net), report.clip_factor * (report.weights @ rows))
        torch.testing.assert_close(report.direction_norm, (report.weights @ rows).norm())
        torch.testing.assert_close(report.losses, losses)
        assert report.age == step % 3 == report.to_dict()["age"]
        assert net.unused.weight.grad is None
        if step % 3:
            assert report.gram is None
            torch.testing.assert_close(report.weights, weights[-1])
        elif weighting == "mgda-decoupled":
            torch.testing.assert_close(report.gram, rows @ rows.T)
            assert not weights or not torch.allclose(report.weights, weights[-1])
        weights.append(report.weights)
        optimizer.step()


def test_one_ordinary_backward_in_between() -> None:
    net, backwards = Net(), 0
    optimizer = wrapped(net, refresh_every=4)

    def backward(loss: Tensor, **options: Any) -> None:
        nonlocal backwards
        backwards += 1
        loss.backward(**options)

    for _ in range(2):
        before = backwards
        optimizer.backward(shared_losses(net, inputs()), backward=backward)
        optimizer.step()
    assert (before, backwards) == (before, before + 1)


def test_micro_batches_are_weighed_alike() -> None:
    net = Net()
    optimizer = wrapped(net, refresh_every=2, objectives=NAMES)
    for step in range(2):
        optimizer.zero_grad()
        for seed in (0, 1):
            for name, loss in callables(net, inputs(seed)).items():
                optimizer.backward(loss, objective=name)
        report = optimizer.combine()
        assert report.age == step
        torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, inputs(0), inputs(1)))


@pytest.mark.parametrize("copied", [copy.deepcopy, None], ids=["deepcopy", "state_dict"])
def test_a_run_goes_on_from_its_state(copied: Any) -> None:
    """Held weights, their age and what smoothing remembers are part of it, bit for bit."""
    options = {"refresh_every": 3, "smoothing": 0.5, "preference": {"help": 2.0, "honesty": 1.0, "truth": 1.0}}

    def steps(net: Net, optimizer: MultiObjectiveOptimizer, first: int, last: int) -> Tensor:
        for step in range(first, last):
            optimizer.zero_grad()
            optimizer.backward(shared_losses(net, inputs(step)))
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    net = Net()
    optimizer = wrapped(net, **options)
    steps(net, optimizer, 0, 5)
    if copied:
        twin_net, twin = copied((net, optimizer))
    else:
        twin_net = copy.deepcopy(net)
        twin = wrapped(twin_net, **options)
        twin.load_state_dict(optimizer.state_dict())
    assert torch.equal(steps(net, optimizer, 5, 9), steps(twin_net, twin, 5, 9))
    assert optimizer.report is not None
    assert twin.report is not None
    assert optimizer.report.age == twin.report.age == 2


def test_other_settings_than_saved_are_told() -> None:
    net = Net()
    optimizer = wrapped(net, refresh_every=3)
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()
    other = wrapped(net, min_weight=0.1)
    with pytest.warns(UserWarning, match=r"saved with refresh_every=3, min_weight=0.0; this optimizer keeps its own"):
        other.load_state_dict(optimizer.state_dict())
    assert other.refresh_every == 1


def test_a_new_weighting_solves_at_once() -> None:
    net = Net()
    optimizer = wrapped(net, refresh_every=10)
    for _ in range(2):
        optimizer.backward(shared_losses(net, inputs()))
        optimizer.step()
    optimizer.backward(shared_losses(net, inputs()))
    with pytest.raises(RuntimeError, match="do not suit"):
        optimizer.weighting = "mgda"
    optimizer.step()
    optimizer.weighting = "mgda"
    optimizer.backward(shared_losses(net, inputs()))
    assert optimizer.combine().age == 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_in_between(what: str, way: str) -> None:
    """As with constant weights: a loss is left out, a gradient spoils the step. Neither is held on to."""
    net, x = Net(), inputs()
    optimizer = wrapped(net, refresh_every=5)
    optimizer.backward(shared_losses(net, x))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="honesty"):
        optimizer.backward(poisoned(net, x, "honesty", what))
        report = optimizer.combine()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, x))
    assert report.nonfinite[1]
    if what == "loss" and way != "device":
        assert report.weights[1] == 0
        assert report.weights[0] > 0
    report = optimizer.combine()
    assert report.age == 2
    assert report.weights.isfinite().all()
    torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, x))


def test_who_was_left_out_of_the_solve_is_not_starved_until_the_next() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, refresh_every=5)
    with pytest.warns(RuntimeWarning, match="honesty"):
        optimizer.backward(poisoned(net, x, "honesty", "loss"))
        solved = optimizer.combine()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    assert solved.weights[1] == 0
    assert report.weights[1].item() == pytest.approx(solved.weights[[0, 2]].mean().item())
    torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, x))


def test_a_solve_that_nobody_took_part_in_is_tried_again() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, refresh_every=5)
    with pytest.warns(RuntimeWarning, match="truth"):
        optimizer.backward({name: loss * math.nan for name, loss in shared_losses(net, x).items()})
        optimizer.step()
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    assert report.age == 0
    torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, x))


def test_a_guarantee_holds_where_weights_are_solved() -> None:
    net, x = Net(), inputs()

    def only_first(gram: Tensor, losses: Tensor) -> Tensor:
        return torch.eye(len(losses), dtype=torch.float64)[0]

    optimizer = wrapped(net, only_first, guarantee_descent=True, refresh_every=2)
    optimizer.backward(shared_losses(net, x))
    solved = optimizer.combine()
    assert solved.correction is not None
    optimizer.zero_grad()
    optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    assert report.correction is None
    torch.testing.assert_close(report.weights, solved.weights)
