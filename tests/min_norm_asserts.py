"""Judging min-norm weights: named properties as asserts, evaluated in rational arithmetic. Knows nothing of mogeo.

The units. A Gram entry M_ij is known to about 1e-16 of ‖g_i‖·‖g_j‖, so with the reach ρ(α) = Σ α_i‖g_i‖ the product
(Mα)_i is known to 1e-16·‖g_i‖·ρ(α), and αᵀMα to 1e-16·ρ(α)². Every tolerance below is a multiple of these: they do not
change when a row is rescaled, and so mean the same for norms 1e-12 and 1e12 in one Gram. The left-hand sides are
evaluated in rational arithmetic, from the very bits of the Gram and of the weights.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference import definiteness, exact, high_precision

# A few hundred roundings of fp64: what is left of the optimality conditions, in the units above.
KKT_TOLERANCE = Fraction(1, 10**13)
# The promise: suboptimality relative to the optimum.
RELATIVE = Fraction(1, 10**12)
# The promise holds where the optimum stands this far above ρ², hence 1e12 above the Gram's own rounding.
RESOLVED = Fraction(1, 10**4)


class Judgement(NamedTuple):
    """Given weights on the hull (the rows with a positive finite diagonal), in exact arithmetic."""

    gram: list[list[Fraction]]
    weights: list[Fraction]
    norms: list[Fraction]
    products: list[Fraction]  # (Mα)_i = ⟨d, g_i⟩
    value: Fraction  # αᵀMα = ‖d‖²

    def reach(self, weights: list[Fraction] | None = None) -> Fraction:
        """ρ(α) = Σ α_i‖g_i‖."""
        weights = self.weights if weights is None else weights
        return sum((w * n for w, n in zip(weights, self.norms, strict=True)), start=Fraction(0))


def hull_of(gram: Tensor) -> Tensor:
    """Indices of the rows that take part: positive, finite diagonal."""
    diagonal = gram.diagonal()
    return torch.nonzero((diagonal > 0) & diagonal.isfinite()).flatten()


def judge(gram: Tensor, weights: Tensor) -> Judgement:
    """Evaluate fp64 weights [K] on an fp64 Gram [K, K] exactly."""
    hull = hull_of(gram)
    m = exact.symmetric(gram[hull][:, hull].tolist())
    alpha = exact.on_simplex(weights[hull].tolist())
    norms = [Fraction(math.sqrt(m[i][i])) for i in range(len(m))]
    return Judgement(m, alpha, norms, exact.products(m, alpha), exact.value(m, alpha))


def optimum_of(gram: Tensor) -> tuple[Fraction, list[Fraction]]:
    """The oracles' optimum over the hull: by enumeration while that is quick, else at 120 digits."""
    hull = hull_of(gram)
    inner = gram[hull][:, hull].tolist()
    if len(inner) <= 4:
        return exact.min_norm_point(exact.symmetric(inner))
    best = high_precision.min_norm_point(inner)
    return best.value, best.weights


def assert_on_simplex(gram: Tensor, weights: Tensor) -> None:
    """Weights ≥ 0, of sum 1 within 1e-15·K; none on rows outside the hull. A NaN fails each of these."""
    k = len(gram)
    assert weights.shape == (k,)
    assert weights.dtype == torch.float64
    assert bool((weights >= 0).all()), weights
    assert abs(math.fsum(weights.tolist()) - 1) <= 1e-15 * k
    outside = torch.ones(k, dtype=torch.bool)
    outside[hull_of(gram)] = False
    assert bool((weights[outside] == 0).all()), weights


def assert_kkt(judged: Judgement) -> None:
    """(Mα)_i ≥ αᵀMα for every i of the hull, to the rounding of (Mα)_i: optimal, and no objective is hurt."""
    for product, norm in zip(judged.products, judged.norms, strict=True):
        residual = (judged.value - product) / (norm * judged.reach())
        assert residual <= KKT_TOLERANCE, f"KKT residual {float(residual):.1e}"


def deficiency_of(gram: Tensor) -> Fraction:
    """δ such that M + δ·diag(M) is positive semidefinite on the hull: 1e-15 or so, unless fp32 has left its noise."""
    hull = hull_of(gram)
    return Fraction(definiteness.deficiency(gram[hull][:, hull].numpy()))


def assert_optimal(gram: Tensor, weights: Tensor) -> None:
    """Suboptimality relative to f* ≤ 1e-12 wherever f* ≥ 1e-4 ρ(α*)², hence far above the Gram's own rounding.

    Below that (the hull passes through zero, or nearly) f* consists of the Gram's rounding and may be negative, and the
    Gram may have other minima than the global one, which fits that noise. There the bound is the larger of 1e-12·f* and
    what the optimality conditions imply: with (Mα)_i ≥ f(α) - τ‖g_i‖ρ(α) and M + δ·diag(M) positive semidefinite,
    expanding f(α*) about α gives f(α) - f* ≤ 2τ·ρ(α)ρ(α*) + δ(ρ(α)² + ρ(α*)²). The same where fp32 has left its noise
    (δ ≥ 1e-13): minimising that globally has a price exponential in K, and is worth nothing.
    """
    judged, (best, best_weights), delta = judge(gram, weights), optimum_of(gram), deficiency_of(gram)
    reach, best_reach = judged.reach(), judged.reach(best_weights)
    allowed = RELATIVE * max(best, Fraction(0))
    if best < RESOLVED * best_reach**2 or delta >= KKT_TOLERANCE:
        allowed = max(allowed, 2 * KKT_TOLERANCE * reach * best_reach + delta * (reach**2 + best_reach**2))
    excess = judged.value - best
    assert excess <= allowed, f"f(α) - f* = {float(excess):.2e}, allowed {float(allowed):.2e}, f* = {float(best):.2e}"


def assert_gap_is_true(judged: Judgement, gap: Tensor) -> None:
    """The reported gap is αᵀMα - min (Mα)_i of these weights, to the rounding of its terms, and never negative."""
    true = judged.value - min(judged.products)
    rounding = KKT_TOLERANCE * max(judged.norms) * judged.reach()
    assert gap.shape == ()
    assert gap.dtype == torch.float64
    assert gap.item() >= 0
    assert abs(Fraction(gap.item()) - true) <= rounding


def assert_same_direction(gram: Tensor, first: Tensor, second: Tensor) -> None:
    """‖Gᵀα - Gᵀβ‖ ≤ 1e-7 ρ, plus what the Gram's own noise can turn: optima may differ, directions may not."""
    a, b = judge(gram, first), judge(gram, second)
    difference = [x - y for x, y in zip(a.weights, b.weights, strict=True)]
    noise = Fraction(1, 10**14) + 4 * deficiency_of(gram)
    assert exact.value(a.gram, difference) <= noise * max(a.reach(), b.reach()) ** 2
