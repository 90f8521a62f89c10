"""CAGrad and RACO as weightings: what they hand to the solver, and a step on host and device.

What the solver does with it is held to its definition in tests/geometry/test_exact_cagrad.py.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import triton
from hypothesis import given
from torch import Tensor

from mogeo import Status
from mogeo.decide.steering import Steering
from mogeo.geometry.ops import conflict_averse_weights
from mogeo.weightings import RACO, CAGrad, Weighting, cagrad, resolve
from tests import backends
from tests.decide.test_on_device import kernels_unwatched, nothing_waits
from tests.deciders import DECIDERS, let_decide
from tests.nets import Net, assert_direction, gradient_rows, inputs, shared_losses, wrapped
from tests.profiles import examples
from tests.strategies import WELL_POSED, any_grams, grams

BOTH = pytest.mark.parametrize("weighting", [CAGrad(0.5), RACO(0.5)], ids=repr)


def problem(gram: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Losses, which must not count, and a preference of mean 1."""
    drawn = torch.rand(2, len(gram), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.2
    return drawn[0] - 0.5, drawn[1] / drawn[1].mean()


@BOTH
@examples(20)
@given(gram=any_grams(), seed=st.integers(0, 99))
def test_the_mean_is_uniform_or_the_preference(weighting: CAGrad, gram: Tensor, seed: int) -> None:
    losses, preference = problem(gram, seed)
    clipped = isinstance(weighting, RACO)
    for v, found in [
        (torch.ones(len(gram)), weighting.solve(gram, losses)),
        (preference, Steering(preference.tolist()).weigh(weighting, gram, losses)),
    ]:
        expected = conflict_averse_weights(gram, v, 0.5, clipped=clipped)
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-9)
        assert found.gap is not None
        assert found.status == expected.status
    assert torch.equal(weighting(gram, losses), weighting.solve(gram, losses).weights)
    assert torch.equal(
        weighting.preferring(preference, gram, losses), weighting.steered(preference, 0.0, gram, losses).weights
    )


@BOTH
@given(gram=grams(WELL_POSED, min_k=2), seed=st.integers(0, 99))
def test_descends_on_the_preferred_mean(weighting: CAGrad, gram: Tensor, seed: int) -> None:
    """⟨d, g₀⟩ ≥ (1 − c) ‖g₀‖² for c < 1, and ‖d‖ between (1 ∓ c) ‖g₀‖."""
    losses, preference = problem(gram, seed)
    mean = preference / preference.sum()
    weights = Steering(preference.tolist()).weigh(weighting, gram, losses).weights
    length = mean @ gram @ mean
    assert float(weights @ gram @ mean) >= (0.5 - 1e-9) * float(length)
    assert 0.5 - 1e-9 <= float((weights @ gram @ weights / length).sqrt()) <= 1.5 + 1e-9


@BOTH
@given(gram=grams(["zero rows"], min_k=2), seed=st.integers(0, 99))
def test_a_solved_objective_has_no_say(weighting: CAGrad, gram: Tensor, seed: int) -> None:
    losses, preference = problem(gram, seed)
    live = gram.diagonal() > 0
    weights = weighting.preferring(preference, gram, losses)
    others = weighting.preferring(preference[live], gram[live][:, live], losses[live])
    assert torch.equal(weights[live], others)
    assert not weights[~live].any()


@pytest.mark.parametrize("weighting", ["cagrad(0.4)", "raco(0.4)"])
@pytest.mark.parametrize("decider", DECIDERS)
def test_a_step_follows_its_weights(weighting: str, decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    if decider == "device":
        monkeypatch.setattr(cagrad, "conflict_averse_weights", backends.TRITON.conflict_averse_weights)
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting, preference=(1.0, 2.0, 3.0))
    optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    rows = gradient_rows(net, x)
    assert_direction(net, report, rows)
    mean = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 6
    expected = conflict_averse_weights(rows @ rows.T, mean, 0.4, clipped=weighting.startswith("raco"))
    torch.testing.assert_close(report.weights, expected.weights, rtol=1e-9, atol=1e-12)
    assert report.status == Status.OPTIMAL
    assert report.to_dict()["status"] == Status.OPTIMAL


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="tests/test_gpu.py asks the GPU itself")
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cagrad, "conflict_averse_weights", backends.TRITON.conflict_averse_weights)
    gram, losses = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    steering = Steering([1.0, 2.0, 3.0], 0.05, 0.5)
    steering.weigh(RACO(), gram, losses)  # constants are copied to the device once
    with kernels_unwatched(monkeypatch), nothing_waits(monkeypatch):
        steering.weigh(RACO(), gram, losses)


@BOTH
def test_without_a_gram_matrix_it_says_so(weighting: CAGrad) -> None:
    with pytest.raises(ValueError, match=r"(cagrad|raco)\(0.5\) needs the Gram matrix of the gradients, got None"):
        weighting(None, torch.ones(2))


@pytest.mark.parametrize("c", [-1e-9, float("inf"), float("nan")])
def test_a_radius_out_of_range_is_named(c: float) -> None:
    with pytest.raises(ValueError, match=r"c=.*: pass a finite number ≥ 0"):
        CAGrad(c)


def test_both_are_deterministic_so_that_ranks_need_not_ask() -> None:
    for name in ("cagrad", "raco"):
        weighting = resolve(name)
        assert isinstance(weighting, Weighting)
        assert weighting.deterministic
        assert weighting.constant(3) is None
