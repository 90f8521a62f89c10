"""Conflict-averse weights: their definition, in rational arithmetic, on every family and backend."""

from __future__ import annotations

import itertools
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

from mogeo.geometry.exact_min_norm import Status
from mogeo.geometry.ops import ConflictAverse, conflict_averse_weights
from tests.backends import FAST_BACKENDS, Backend, everywhere
from tests.min_norm_asserts import hull_of
from tests.reference import conflict_averse, exact
from tests.strategies import FAMILIES, WELL_POSED, any_grams, grams, integer_grams, rational_grams, row_families

# In units of ‖g_k‖ Σ_j w_j ‖g_j‖: what `OPTIMAL` promises, with its own rounding.
TOLERANCE = Fraction(11, 10**14)
# Below this share of Σ_k p_k ‖g_k‖, squared, g_p counts as zero.
BALANCED = 1e-6
#: Families where gradients may balance out, or rounding has made the Gram indefinite.
DOUBTFUL = (
    "hull through zero", "indefinite by rounding", "integer ties", "low rank", "low rank, norms apart",
    "nearly opposed", "graded spectrum", "tight cone",
)  # fmt: skip
RADII = st.sampled_from([0.05, 0.4, 0.5, 1.0, 3.0])


def base_for(gram: Tensor, seed: int) -> Tensor:
    """Uniform for every other seed."""
    drawn = torch.rand(len(gram), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.ones_like(drawn) if seed % 2 else drawn + 0.1


class Judged:
    """Weights of CAGrad, on who takes part, from their very bits: without rounding but for square roots."""

    def __init__(self, gram: Tensor, base: Tensor, c: float, weights: Tensor) -> None:
        hull = hull_of(gram)
        self.gram = exact.symmetric(gram[hull][:, hull].tolist())
        self.base = exact.on_simplex(base[hull].tolist())
        self.norms = [conflict_averse.root(self.gram[i][i]) for i in range(len(self.gram))]
        self.c = Fraction(c)
        self.weights = [Fraction(w) for w in weights[hull].tolist()]
        added = [max(w - v, Fraction(0)) for w, v in zip(self.weights, self.base, strict=True)]
        #: ‖d − g₀‖² and s².
        self.squared_distance = exact.value(self.gram, added)
        self.squared_radius = self.c**2 * exact.value(self.gram, self.base)
        self.p = [y / sum(added) for y in added] if any(added) else self.base
        #: ⟨d, g_k⟩, and the unit in which each is known.
        self.slopes = exact.products(self.gram, self.weights)
        reach = sum((w * n for w, n in zip(self.weights, self.norms, strict=True)), start=Fraction(0))
        self.units = [norm * reach for norm in self.norms]

    def assert_reaches(self, value: Fraction, tolerance: Fraction = TOLERANCE) -> None:
        """Every objective gains as much as the optimum of the dual, along a direction that lies in the ball."""
        assert self.squared_distance <= self.squared_radius * (1 + Fraction(1, 10**7))
        for slope, unit in zip(self.slopes, self.units, strict=True):
            assert slope >= value - tolerance * unit, f"{float((value - slope) / unit):.1e}"


def solved(backend: Backend, gram: Tensor, seed: int, c: float) -> tuple[ConflictAverse, Judged]:
    base = base_for(gram, seed)
    found = backend.conflict_averse_weights(gram, base, c)
    return found, Judged(gram, base, c, found.weights)


# --------------------------------------------------------------------------------------------------------------------
# CAGrad's direction


@everywhere
@pytest.mark.parametrize("family", FAMILIES)
def test_the_objective_that_gains_least_gains_as_much_as_it_can(backend: Backend, family: str) -> None:
    """By weak duality: no direction in the ball makes the least gain larger than f(p), whatever p is."""

    @backend.check(20, grams((family,), max_k=backend.max_k // 2), st.integers(0, 1000), RADII)
    def check(gram: Tensor, seed: int, c: float) -> None:
        found, judged = solved(backend, gram, seed, c)
        if found.status == Status.OPTIMAL:
            value = conflict_averse.objective(judged.gram, judged.base, judged.c, judged.p)
            judged.assert_reaches(value)
            assert abs(Fraction(float(found.gap)) - (value - min(judged.slopes))) <= TOLERANCE * max(judged.units)
            assert found.gap >= 0
        else:
            assert family in DOUBTFUL
            assert found.status == Status.UNDECIDED or family == "indefinite by rounding"


@everywhere
def test_reaches_the_optimum_that_enumeration_finds(backend: Backend) -> None:
    @backend.check(150, st.one_of(integer_grams(), rational_grams()), st.integers(0, 1000), RADII)
    def check(gram: Tensor, seed: int, c: float) -> None:
        found, judged = solved(backend, gram, seed, c)
        best = conflict_averse.minimum(judged.gram, judged.base, judged.c)
        if found.status == Status.UNDECIDED:
            # d = g₀, since 0 is in the hull: of what has a direction, nothing is better than that.
            assert judged.weights == pytest.approx(judged.base, rel=1e-15)
            assert best.value >= -Fraction(BALANCED) * max(judged.norms) ** 2
        else:
            assert found.status == Status.OPTIMAL
            judged.assert_reaches(best.value)


@everywhere
def test_two_objectives_have_a_closed_form(backend: Backend) -> None:
    """Squared, stationarity of δλ + s √(q₂λ² + q₁λ + q₀) is a quadratic equation."""

    @backend.check(100, grams(WELL_POSED, min_k=2, max_k=2), st.integers(0, 1000), RADII)
    def check(gram: Tensor, seed: int, c: float) -> None:
        base = base_for(gram, seed)
        v = (base / base.sum()).numpy()
        m = gram.numpy()
        b = m @ v
        s = c * np.sqrt(v @ b)
        delta, q2, q1, q0 = b[0] - b[1], m[0, 0] + m[1, 1] - 2 * m[0, 1], 2 * (m[0, 1] - m[1, 1]), m[1, 1]
        quadratic = [
            delta**2 * q2 - s**2 * q2**2,
            delta**2 * q1 - s**2 * q1 * q2,
            delta**2 * q0 - s**2 * q1**2 / 4,
        ]
        candidates = [0.0, 1.0, *(x.real for x in np.roots(quadratic) if abs(x.imag) < 1e-9 and 0 < x.real < 1)]

        def f(x: float) -> float:
            p = np.array([x, 1 - x])
            return float(b @ p + s * np.sqrt(p @ m @ p))

        best = min(candidates, key=f)
        p = np.array([best, 1 - best])
        found = backend.conflict_averse_weights(gram, base, c)
        direction = v + s * p / np.sqrt(p @ m @ p)
        difference = found.weights.numpy() - direction
        reach = direction @ np.sqrt(np.diagonal(m))
        assert difference @ m @ difference <= (1e-6 * reach) ** 2


@everywhere
def test_no_sampled_direction_in_the_ball_is_better(backend: Backend) -> None:
    """The problem as the paper states it, on rows: a check of the formulas, for it needs no dual."""

    @backend.check(40, row_families(("conflicting", "gaussian, N = K + 1"), max_k=backend.max_k), st.integers(0, 1000))
    def check(rows: Tensor, seed: int) -> None:
        base = base_for(rows, seed)
        found = backend.conflict_averse_weights(rows @ rows.T, base, 0.5)
        mean = base / base.sum() @ rows
        radius = 0.5 * mean.norm()
        direction = found.weights @ rows
        assert float((direction - mean).norm()) == pytest.approx(float(radius), rel=1e-9)
        least = (rows @ direction).min()
        generator = torch.Generator().manual_seed(seed)
        around = torch.randn(200, rows.shape[1], dtype=torch.float64, generator=generator)
        for spread in (1.0, 0.1):  # anywhere on the ball, and near what was found
            away = (1 - spread) * (direction - mean) / radius + spread * around / around.norm(dim=1, keepdim=True)
            others = mean + radius * away / away.norm(dim=1, keepdim=True)
            assert bool(((others @ rows.T).min(dim=1).values <= least + 1e-9 * rows.norm() ** 2).all())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_larger_ball_makes_the_least_gain_larger(backend: Backend) -> None:
    @backend.check(40, grams(WELL_POSED, max_k=16), st.integers(0, 1000))
    def check(gram: Tensor, seed: int) -> None:
        least = [min(solved(backend, gram, seed, c)[1].slopes) for c in (0.0, 0.01, 0.4, 0.9, 1.5, 10.0)]
        for smaller, larger in itertools.pairwise(least):
            assert larger >= smaller - Fraction(1, 10**12) * Fraction(float(gram.diagonal().max())) * 10


@everywhere
def test_without_a_ball_the_direction_is_the_mean(backend: Backend) -> None:
    @backend.check(40, any_grams(max_k=backend.max_k), st.integers(0, 1000), st.booleans())
    def check(gram: Tensor, seed: int, clipped: bool) -> None:
        base = base_for(gram, seed)
        found = backend.conflict_averse_weights(gram, base, 0.0, clipped=clipped)
        live = gram.diagonal() > 0
        expected = torch.where(live, base, 0.0) / base[live].sum()
        torch.testing.assert_close(found.weights, expected, rtol=1e-15, atol=0)
        assert found.status == Status.OPTIMAL


@everywhere
@pytest.mark.parametrize("clipped", [False, True], ids=["cagrad", "raco"])
def test_one_objective_is_followed_further(backend: Backend, clipped: bool) -> None:
    """d = g₀ + c‖g₀‖ g₁/‖g₁‖, g₀ = g₁."""
    found = backend.conflict_averse_weights(torch.tensor([[9.0]]), torch.tensor([0.3]), 0.5, clipped=clipped)
    assert found.weights.item() == pytest.approx(1.5, rel=1e-15)
    assert (found.gap, found.status) == (0, Status.OPTIMAL)


# --------------------------------------------------------------------------------------------------------------------
# RACO's


@everywhere
def test_the_clipped_direction_is_its_formula(backend: Backend) -> None:
    """From the p that enumeration finds."""

    @backend.check(80, grams(WELL_POSED[:3], max_k=4), st.integers(0, 1000), RADII)
    def check(gram: Tensor, seed: int, c: float) -> None:
        base = base_for(gram, seed)
        judged = Judged(gram, base, c, base)
        best = conflict_averse.minimum(judged.gram, judged.base, judged.c)
        p = [min(a, v) for a, v in zip(best.weights, judged.base, strict=True)]
        factor = conflict_averse.root(judged.squared_radius / exact.value(judged.gram, p))
        expected = [float(v + factor * a) for v, a in zip(judged.base, p, strict=True)]
        found = backend.conflict_averse_weights(gram, base, c, clipped=True)
        assert found.status == Status.OPTIMAL
        torch.testing.assert_close(found.weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@everywhere
def test_clipping_changes_no_certificate_and_no_length(backend: Backend) -> None:
    @backend.check(60, any_grams(max_k=backend.max_k), st.integers(0, 1000), RADII)
    def check(gram: Tensor, seed: int, c: float) -> None:
        base = base_for(gram, seed)
        plain = backend.conflict_averse_weights(gram, base, c)
        found = backend.conflict_averse_weights(gram, base, c, clipped=True)
        assert torch.equal(found.gap, plain.gap)
        assert found.status in (plain.status, Status.UNDECIDED)
        if found.status == Status.OPTIMAL:
            judged = Judged(gram, base, c, found.weights)
            assert float(judged.squared_distance) == pytest.approx(float(judged.squared_radius), rel=1e-7, abs=0)


# --------------------------------------------------------------------------------------------------------------------
# Whatever the method


@everywhere
def test_a_power_of_two_changes_no_bit(backend: Backend) -> None:
    @backend.check(60, any_grams(max_k=backend.max_k), st.integers(0, 1000), st.integers(-200, 200))
    def check(gram: Tensor, seed: int, power: int) -> None:
        base = base_for(gram, seed)
        plain = backend.conflict_averse_weights(gram, base, 0.4)
        scaled = backend.conflict_averse_weights(gram * 4.0**power, base, 0.4)
        assert torch.equal(scaled.weights, plain.weights)
        assert torch.equal(scaled.gap, plain.gap * 4.0**power)
        assert scaled.status == plain.status


@everywhere
def test_the_order_of_objectives_does_not_matter(backend: Backend) -> None:
    @backend.check(60, grams(WELL_POSED, max_k=backend.max_k), st.integers(0, 1000), RADII, st.booleans())
    def check(gram: Tensor, seed: int, c: float, clipped: bool) -> None:
        base = base_for(gram, seed)
        order = torch.randperm(len(gram), generator=torch.Generator().manual_seed(seed))
        found = backend.conflict_averse_weights(gram, base, c, clipped=clipped)
        permuted = backend.conflict_averse_weights(gram[order][:, order], base[order], c, clipped=clipped)
        assert found.status == permuted.status == Status.OPTIMAL
        moved = found.weights[order] - permuted.weights
        reach = found.weights @ gram.diagonal().sqrt()
        assert float(moved @ gram[order][:, order] @ moved) <= (1e-6 * float(reach)) ** 2


@everywhere
@pytest.mark.parametrize("clipped", [False, True], ids=["cagrad", "raco"])
def test_gradients_that_balance_out_leave_the_mean(backend: Backend, clipped: bool) -> None:
    """Two that are opposite but for a thousandth of a thousandth; and the third is not asked."""
    rows = torch.tensor([[1.0, 1e-6, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    base = torch.ones(3, dtype=torch.float64)
    found = backend.conflict_averse_weights(rows @ rows.T, base, 0.4, clipped=clipped)
    assert found.status == Status.UNDECIDED
    torch.testing.assert_close(found.weights, base / 3, rtol=1e-15, atol=0)
    assert 0 <= found.gap <= 1e-5
    decided = torch.tensor([[1.0, 0.1, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert backend.conflict_averse_weights(decided @ decided.T, base, 0.4, clipped=clipped).status == Status.OPTIMAL


@everywhere
def test_objectives_without_a_gradient_take_no_part(backend: Backend) -> None:
    gram = torch.tensor(
        [[1.0, -0.5, 0.0, torch.nan], [-0.5, 4.0, 0.0, 0.0], [0.0] * 4, [torch.nan, 0.0, 0.0, torch.inf]],
        dtype=torch.float64,
    )
    base = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    for clipped in (False, True):
        found = backend.conflict_averse_weights(gram, base, 0.4, clipped=clipped)
        inner = backend.conflict_averse_weights(gram[:2, :2], base[:2], 0.4, clipped=clipped)
        assert found.weights.tolist() == [*inner.weights.tolist(), 0.0, 0.0]
        assert (found.gap, found.status) == (inner.gap, Status.OPTIMAL)
    nothing = backend.conflict_averse_weights(torch.zeros(2, 2, dtype=torch.float64), base[:2], 0.4)
    assert nothing.status == Status.ZERO
    assert nothing.weights.tolist() == pytest.approx([1 / 3, 2 / 3], rel=1e-15)
    lost = backend.conflict_averse_weights(torch.full((2, 2), torch.nan, dtype=torch.float64), base[:2], 0.4)
    assert (lost.status, lost.weights.tolist()) == (Status.NONFINITE, [0.0, 0.0])


@everywhere
def test_a_batch_is_its_problems(backend: Backend) -> None:
    stacked = torch.stack([torch.from_numpy(FAMILIES[name](np.random.default_rng(0), 3)) for name in WELL_POSED[:4]])
    bases = torch.rand(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    together = backend.conflict_averse_weights(stacked.view(2, 2, 3, 3), bases, 0.4)
    assert (together.gap.shape, together.status.shape) == ((2, 2), (2, 2))
    for position, (gram, base) in enumerate(zip(stacked, bases.view(4, 3), strict=True)):
        alone = backend.conflict_averse_weights(gram, base, 0.4)
        for all_of_them, this in zip(together, alone, strict=True):
            assert torch.equal(all_of_them.flatten(0, 1)[position], this)
    assert backend.conflict_averse_weights(stacked[:0], bases.view(4, 3)[:0], 0.4).weights.shape == (0, 3)


@everywhere
@pytest.mark.parametrize(("k", "seed"), [(5, 33), (6, 1), (6, 9), (6, 10)])
def test_what_fp64_cannot_certify_is_solved_with_more_digits(backend: Backend, k: int, seed: int) -> None:
    """Rank 2, norms eight decades apart, and f is zero from the origin to the far side of a ball that touches it."""
    gram = torch.from_numpy(FAMILIES["low rank, norms apart"](np.random.default_rng([seed, k]), k))
    found = backend.conflict_averse_weights(gram, torch.ones(k, dtype=torch.float64), 1.0)
    assert found.status in (Status.OPTIMAL, Status.UNDECIDED)


@pytest.mark.parametrize("k", [33, 64])
def test_more_objectives_than_a_kernel_takes(k: int) -> None:
    gram = torch.from_numpy(FAMILIES["gaussian, N = K + 1"](np.random.default_rng(0), k))
    found = conflict_averse_weights(gram, torch.ones(k), 0.4)
    assert found.status == Status.OPTIMAL
    judged = Judged(gram, torch.ones(k), 0.4, found.weights)
    judged.assert_reaches(conflict_averse.objective(judged.gram, judged.base, judged.c, judged.p))


def test_a_matrix_that_is_no_gram_is_told() -> None:
    gram = torch.tensor([[1.0, -3.0, 0.2], [-3.0, 1.0, 0.1], [0.2, 0.1, 1.0]], dtype=torch.float64)
    found = conflict_averse_weights(gram, torch.tensor([1.0, 1.0, 8.0]), 0.4)
    assert found.status in (Status.STALLED, Status.UNDECIDED)
    assert bool(found.weights.isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.eye(2).long(), torch.ones(2), 0.4), TypeError, "gram is torch.int64"),
        ((torch.eye(3)[:2], torch.ones(2), 0.4), ValueError, "pass a square matrix"),
        ((torch.eye(2), torch.ones(3), 0.4), ValueError, r"weights have shape \(3,\)"),
        ((torch.eye(2), torch.ones(2), -0.1), ValueError, "c=-0.1: pass a finite number ≥ 0"),
        ((torch.eye(2), torch.ones(2), float("nan")), ValueError, "c=nan"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple[Tensor, Tensor, float], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        conflict_averse_weights(*arguments)
