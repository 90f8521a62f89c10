"""Weights that rest on the geometry as far as there is evidence, and on the preference for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mogeo.decide.evidence import Evidenced
from mogeo.geometry.tracking import MeanGradients
from mogeo.weightings import Weighting, resolve
from tests.profiles import examples

shares = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3)
evidences = st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)
GRAM = torch.tensor([[1.0, -0.4, 0.2], [-0.4, 2.0, 0.1], [0.2, 0.1, 0.5]], dtype=torch.float64)
LOSSES = torch.tensor([0.7, 0.5, 0.9], dtype=torch.float64)


class Told(MeanGradients):
    """Averages that are said to be this evident."""

    def __init__(self, evidence: list[float]) -> None:
        super().__init__(0.9)
        self._told = torch.tensor(evidence, dtype=torch.float64)

    @property
    def evidence(self) -> Tensor:
        return self._told


class Given(Weighting):
    """These weights, whatever comes."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        return self.weights


def found(inner: Any, evidence: list[float], preference: list[float] | None = None, gram: Tensor = GRAM) -> Tensor:
    return Evidenced(inner, Told(evidence), preference).solve(gram, LOSSES).weights


@pytest.mark.parametrize("name", ["mgda-decoupled", "mgda-normalized", "upgrad", "gapo(0.5)"])
def test_with_all_evidence_no_bit_changes(name: str) -> None:
    weighting = resolve(name)
    assert torch.equal(found(weighting, [1.0, 1.0, 1.0], [1.0, 5.0, 2.0]), weighting.solve(GRAM, LOSSES).weights)


@given(shares, shares)
@examples(50)
def test_without_evidence_weights_are_the_preference(weights: list[float], preference: list[float]) -> None:
    result = found(Given(weights), [0.0, 0.0, 0.0], preference)
    expected = torch.tensor(preference, dtype=torch.float64) / sum(preference) * sum(weights)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        found(Given(weights), [0.0, 0.0, 0.0]), torch.full((3,), sum(weights) / 3, dtype=torch.float64)
    )


@given(shares, evidences, shares)
@examples(100)
def test_the_sum_stays_and_no_share_leaves_what_lies_between(
    weights: list[float], evidence: list[float], preference: list[float]
) -> None:
    """Each objective keeps at least what is preferred of it in proportion to the lack of evidence."""
    result = found(Given(weights), evidence, preference)
    total = sum(weights)
    torch.testing.assert_close(result.sum(), torch.tensor(total, dtype=torch.float64))
    kept = [(1 - e) * p / sum(preference) for e, p in zip(evidence, preference, strict=True)]
    assert bool((result / total >= torch.tensor(kept, dtype=torch.float64) - 1e-12).all())


@given(shares, shares)
@examples(50)
def test_who_is_unknown_leaves_the_proportions_of_the_others(weights: list[float], preference: list[float]) -> None:
    result = found(Given(weights), [1.0, 0.0, 1.0], preference)
    torch.testing.assert_close(result[0] / result[2], torch.tensor(weights[0] / weights[2], dtype=torch.float64))
    expected = preference[1] / sum(preference) * sum(weights)
    torch.testing.assert_close(result[1], torch.tensor(expected, dtype=torch.float64))


@given(shares, evidences)
@examples(50)
def test_a_little_more_evidence_changes_weights_a_little(weights: list[float], evidence: list[float]) -> None:
    more = [min(1.0, e + 1e-7) for e in evidence]
    torch.testing.assert_close(found(Given(weights), more), found(Given(weights), evidence), rtol=1e-3, atol=1e-4)


def test_who_takes_no_part_has_no_share_of_the_preference() -> None:
    gram = GRAM.clone()
    gram[1], gram[:, 1] = 0.0, 0.0
    result = found(Given([0.5, 0.0, 0.5]), [0.0, 0.0, 0.0], [1.0, 7.0, 3.0], gram)
    torch.testing.assert_close(result, torch.tensor([0.25, 0.0, 0.75], dtype=torch.float64))


@pytest.mark.parametrize("weights", [[-0.5, 1.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
def test_weights_that_are_no_shares_stay(weights: list[float]) -> None:
    assert found(Given(weights), [0.5, 0.0, 1.0]).tolist() == weights


def test_evident_objectives_without_weight_keep_what_is_preferred() -> None:
    result = found(Given([0.0, 1.0, 0.0]), [1.0, 0.0, 1.0])
    torch.testing.assert_close(result, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_before_anything_was_looked_at_the_weighting_decides() -> None:
    fresh = Evidenced(Given([0.2, 0.3, 0.5]), MeanGradients(0.9), None)
    assert fresh(GRAM, LOSSES).tolist() == [0.2, 0.3, 0.5]


def test_state_is_that_of_the_weighting_inside() -> None:
    inner = resolve("group-dro")
    outer = Evidenced(inner, MeanGradients(0.9), None)
    inner(None, LOSSES)
    saved = outer.state_dict()
    assert saved == inner.state_dict()
    outer.load_state_dict(saved)
    assert repr(outer) == repr(inner)
