"""The nearest direction that hurts nobody: its definition, in rational arithmetic, on every family and backend."""

from __future__ import annotations

import itertools
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume
from torch import Tensor

import mogeo
from mogeo.geometry.exact_min_norm import Status
from tests.backends import Backend, everywhere
from tests.min_norm_asserts import deficiency_of, hull_of
from tests.reference import exact
from tests.strategies import FAMILIES, any_grams, grams, integer_grams

TOLERANCE = Fraction(1, 10**13)
#: Families whose Gram is positive semi-definite but for the rounding of fp64.
DEFINITE = tuple(name for name in FAMILIES if name not in ("indefinite by rounding", "nearly opposed"))


def weights_for(gram: Tensor, seed: int, signed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(gram), dtype=torch.float64, generator=generator)
    return 2 * drawn - 1 if signed else drawn


def slopes_of(gram: Tensor, weights: list[Fraction]) -> tuple[list[Fraction], list[Fraction]]:
    """(M w)_k and ‖g_k‖, for the rows that have a gradient."""
    hull = hull_of(gram).tolist()
    m = exact.symmetric(gram[hull][:, hull].tolist())
    inside = [weights[k] for k in hull]
    norms = [Fraction(float(gram[k, k]) ** 0.5) for k in hull]
    return exact.products(m, inside), norms


def fractions(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.tolist()]


def assert_nearest(gram: Tensor, weights: Tensor, found: mogeo.Descent, tolerance: Fraction = TOLERANCE) -> None:
    """μ ≥ 0, s = M(w + μ) ≥ 0 and s_k = 0 where μ_k > 0, each to the rounding of row k."""
    assert bool((found.correction >= 0).all())
    assert torch.equal(found.weights, weights + found.correction)
    w, mu = fractions(weights), fractions(found.correction)
    hull = hull_of(gram).tolist()
    slopes, norms = slopes_of(gram, [a + b for a, b in zip(w, mu, strict=True)])
    spans = [abs(w[k]) + mu[k] for k in hull]
    reach = sum((span * norm for span, norm in zip(spans, norms, strict=True)), start=Fraction(0))
    for k, slope, norm in zip(hull, slopes, norms, strict=True):
        assert slope >= -tolerance * norm * reach
        assert mu[k] == 0 or slope <= tolerance * norm * reach


@everywhere
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("signed", [False, True], ids=["weights", "signed"])
def test_hurts_nobody_and_is_the_nearest(backend: Backend, family: str, signed: bool) -> None:
    @backend.check(40, grams((family,), min_k=2, max_k=backend.max_k), st.integers(0, 1000))
    def check(gram: Tensor, seed: int) -> None:
        weights = weights_for(gram, seed, signed)
        found = backend.descent_weights(gram, weights)
        # Where fp32 has left its noise on the Gram, nothing is known better than that.
        noise = 0 if family in DEFINITE else 20 * deficiency_of(gram)
        assert_nearest(gram, weights, found, TOLERANCE + noise)
        assert family not in DEFINITE or found.status == Status.OPTIMAL


@everywhere
def test_is_the_projection_that_enumeration_finds(backend: Backend) -> None:
    @backend.check(150, integer_grams(min_k=2, max_k=4), st.lists(st.integers(0, 3), min_size=4, max_size=4))
    def check(gram: Tensor, drawn: list[int]) -> None:
        weights = torch.tensor(drawn[: len(gram)], dtype=torch.float64)
        assume(bool(weights.any()))
        found = backend.descent_weights(gram, weights)
        expected = by_enumeration(gram, fractions(weights))
        # μ is not unique where gradients depend on each other, the direction is.
        difference = [a - b for a, b in zip(fractions(found.weights), expected, strict=True)]
        slopes, norms = slopes_of(gram, difference)
        reach = sum((b * n for b, n in zip(expected, norms, strict=True)), start=Fraction(0))
        assert all(abs(slope) <= TOLERANCE * norm * reach for slope, norm in zip(slopes, norms, strict=True))


def by_enumeration(gram: Tensor, weights: list[Fraction]) -> list[Fraction]:
    """w + μ, trying every set of multipliers: rational arithmetic, integer Grams without a zero row."""
    m = exact.symmetric(gram.tolist())
    start = exact.products(m, weights)
    size = len(m)
    for count in range(size + 1):
        for active in itertools.combinations(range(size), count):
            solved = solve([[m[i][j] for j in active] for i in active], [-start[i] for i in active])
            if solved is None or min(solved, default=Fraction(0)) < 0:
                continue
            total = list(weights)
            for k, value in zip(active, solved, strict=True):
                total[k] += value
            if min(exact.products(m, total)) >= 0:
                return total
    raise AssertionError("no set of multipliers fits")


def solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """Gauss; None for a singular matrix."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next((r for r in range(i, len(rows)) if rows[r][i] != 0), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for r in range(len(rows)):
            if r != i:
                rows[r] = [a - rows[r][i] * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


@everywhere
def test_mgda_is_left_alone_and_so_is_what_was_corrected_before(backend: Backend) -> None:
    @backend.check(200, grams(DEFINITE, max_k=backend.max_k), st.integers(0, 1000))
    def check(gram: Tensor, seed: int) -> None:
        point = mogeo.min_norm_weights(gram).weights
        found = backend.descent_weights(gram, point)
        assert torch.equal(found.weights, point)
        assert not found.correction.any()
        once = backend.descent_weights(gram, weights_for(gram, seed))
        twice = backend.descent_weights(gram, once.weights)
        assert torch.equal(twice.weights, once.weights)


@everywhere
def test_a_power_of_two_changes_no_bit(backend: Backend) -> None:
    @backend.check(60, any_grams(max_k=backend.max_k), st.integers(0, 1000), st.integers(-20, 20))
    def check(gram: Tensor, seed: int, power: int) -> None:
        weights = weights_for(gram, seed)
        plain = backend.descent_weights(gram, weights)
        assert torch.equal(backend.descent_weights(gram * 4.0**power, weights).correction, plain.correction)
        scaled = backend.descent_weights(gram, weights * 2.0**power)
        assert torch.equal(scaled.correction, plain.correction * 2.0**power)


@everywhere
def test_objectives_without_a_gradient_take_no_part(backend: Backend) -> None:
    gram = torch.tensor(
        [[1.0, -2.0, 0.0, torch.nan], [-2.0, 4.5, 0.0, 0.0], [0.0] * 4, [torch.nan, 0.0, 0.0, torch.inf]]
    )
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    found = backend.descent_weights(gram.double(), weights)
    inner = backend.descent_weights(gram[:2, :2].double(), weights[:2])
    assert inner.correction.any()
    assert found.correction.tolist() == [*inner.correction.tolist(), 0.0, 0.0]
    nothing = backend.descent_weights(torch.zeros(2, 2, dtype=torch.float64), weights[:2])
    assert (nothing.weights.tolist(), int(nothing.status)) == ([1.0, 1.0], Status.ZERO)


@everywhere
def test_a_batch_is_its_problems(backend: Backend) -> None:
    problems = torch.stack([torch.from_numpy(FAMILIES["gaussian, N = K + 1"](torch_rng(s), 3)) for s in range(4)])
    weights = torch.stack([weights_for(gram, 7) for gram in problems])
    together = backend.descent_weights(problems.reshape(2, 2, 3, 3), weights.reshape(2, 2, 3))
    assert together.status.shape == (2, 2)
    for at, (gram, given) in enumerate(zip(problems, weights, strict=True)):
        alone = backend.descent_weights(gram, given)
        assert torch.equal(together.weights.reshape(4, 3)[at], alone.weights)


def torch_rng(seed: int):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.random.default_rng(seed)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(TypeError, match="real floating-point"):
        mogeo.descent_weights(torch.ones(2, 2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match="square"):
        mogeo.descent_weights(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"weights have shape \(3,\)"):
        mogeo.descent_weights(torch.eye(2), torch.ones(3))
