"""`guarantee_descent`: no step hurts an objective; where none would, nothing changes. Both ways of deciding a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer
from mogeo.geometry.exact_min_norm import Status
from tests.deciders import DECIDERS, let_decide
from tests.nets import NAMES, WEIGHTINGS, Net, callables, flat_grad, inputs, poisoned, shared_losses, wrapped

decided_by = pytest.mark.parametrize("decider", DECIDERS)


def only_first(gram: Tensor, losses: Tensor) -> Tensor:
    """A weighting that looks after the first objective alone."""
    return torch.eye(len(losses), dtype=torch.float64)[0]


class Linear(nn.Module):
    """Losses ⟨g_k, p⟩ + 1: their gradients are the rows g_k."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.point = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))

    def losses(self) -> dict[str, Tensor]:
        return dict(zip(NAMES, self.rows @ self.point + 1, strict=True))


def conflicting(seed: int) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    rows[1] -= 1.5 * rows[0]
    return Linear(rows)


@decided_by
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, only_first])
def test_no_step_hurts_an_objective(weighting: Any, decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    corrected = 0
    for seed in range(8 if decider == "host" else 3):
        net = conflicting(seed)
        plain = wrapped(net, weighting)
        plain.backward(net.losses())
        before = plain.combine()
        plain.zero_grad()
        guarded = wrapped(net, weighting, guarantee_descent=True)
        guarded.backward(net.losses())
        report = guarded.combine()
        torch.testing.assert_close(flat_grad(net), report.weights @ net.rows, rtol=1e-10, atol=1e-12)
        assert ((net.rows @ flat_grad(net)) >= -1e-10).all()
        assert report.correction is not None
        assert report.correction_status == Status.OPTIMAL
        assert (report.correction >= 0).all()
        if weighting != "group-dro":  # which has moved on
            torch.testing.assert_close(report.weights - report.correction, before.weights)
        hurt = bool(((net.rows @ (before.weights @ net.rows)) < -1e-10).any())
        assert hurt == bool(report.correction.any())
        corrected += hurt
    assert corrected > 0 or weighting in (
        "mgda",
        "mgda-normalized",
        "gapo(0.5)",
        "group-dro",
        "uniform",
        "mgda-decoupled",
    )
    assert not (corrected and weighting == "mgda")


@decided_by
def test_where_nobody_is_hurt_the_step_is_the_same(decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    grads = []
    for guarantee in (False, True):
        net = Net()
        optimizer = wrapped(net, "mgda", guarantee_descent=guarantee)
        optimizer.backward(callables(net, inputs()))
        optimizer.combine()
        grads.append(flat_grad(net).clone())
    assert torch.equal(*grads)


@decided_by
def test_an_objective_left_out_is_not_guarded(decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    net, x = Net(), inputs()
    optimizer = wrapped(net, only_first, guarantee_descent=True)
    with pytest.warns(RuntimeWarning, match="honesty"):
        optimizer.backward(poisoned(net, x, "honesty", "gradient"))
        report = optimizer.combine()
        optimizer.step()
        optimizer.backward(shared_losses(net, x))
    assert report.correction[1] == 0  # type: ignore[index]
    assert report.weights.isfinite().all()


@decided_by
def test_it_is_clipped_as_a_whole(decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    net = conflicting(0)
    optimizer = wrapped(net, only_first, guarantee_descent=True, max_grad_norm=0.25)
    optimizer.backward(net.losses())
    report = optimizer.combine()
    assert flat_grad(net).norm() == pytest.approx(0.25)
    assert ((net.rows @ flat_grad(net)) >= -1e-10).all()
    assert report.to_dict()["correction"].keys() == set(NAMES)


def test_micro_batches_are_guarded_together() -> None:
    net = conflicting(1)
    optimizer = wrapped(net, "linear(1, 0, 0)", guarantee_descent=True)
    for share in (0.25, 0.75):
        optimizer.backward({name: share * loss for name, loss in net.losses().items()})
    report = optimizer.combine()
    torch.testing.assert_close(flat_grad(net), report.weights @ net.rows)
    assert ((net.rows @ flat_grad(net)) >= -1e-10).all()
    assert report.correction.any()  # type: ignore[union-attr]


def test_it_is_off_by_default_and_says_so() -> None:
    net = Net()
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(shared_losses(net, inputs()))
    assert optimizer.combine().correction is None
