"""The min-norm problem at 120 digits, for Grams too large to enumerate, with a certificate of its own.

An active-set method that keeps a stationary support and drives one weight at a time up from zero (the symmetric
principal pivoting of van de Panne and Whinston), solving each linear system afresh: slow and plain. What it returns is
worth its KKT gap, computed here too, and no more: for a positive semidefinite Gram the gap bounds the suboptimality
(f(α) - f* ≤ 2·gap); for a Gram that rounding made indefinite the point is stationary, hence a minimum up to that
rounding. Knows nothing of mogeo.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import mpmath
from mpmath import mpf

DIGITS = 120
# A Gram entry has 16 digits, and entries may lie 48 decades apart: both fit in 120 with a margin of 50.
NEGLIGIBLE = mpf(10) ** -50


class Certified(NamedTuple):
    """A KKT point: its value αᵀMα, its weights, and the gap αᵀMα - min (Mα)_i, relative to ‖g_i‖·Σα_j‖g_j‖."""

    value: Fraction
    weights: list[Fraction]
    relative_gap: float


def as_fraction(x: mpf) -> Fraction:
    """The same number."""
    sign, mantissa, exponent, _ = x._mpf_
    return Fraction(int(mantissa) * (-1) ** sign) * Fraction(2) ** exponent


def _response(m: mpmath.matrix, support: list[int], entering: int) -> tuple[list[mpf], mpf]:
    """How the weights of `support` move as that of `entering` grows by one: stationarity and the sum are kept.

    Returns the velocities v on the support (Σv = -1) and the curvature of f along the motion.
    """
    n = len(support)
    bordered = mpmath.matrix(n + 1, n + 1)
    right = mpmath.matrix(n + 1, 1)
    for a, i in enumerate(support):
        for b, j in enumerate(support):
            bordered[a, b] = m[i, j]
        bordered[a, n], bordered[n, a], right[a] = -1, 1, -m[i, entering]
    right[n] = -1
    solution = mpmath.lu_solve(bordered, right)
    velocity = [solution[a] for a in range(n)]
    pull = sum(m[entering, i] * v for i, v in zip(support, velocity, strict=True))
    return velocity, m[entering, entering] + pull - solution[n]


def min_norm_point(gram: Sequence[Sequence[float | Fraction]], max_pivots: int = 10_000) -> Certified:
    """A KKT point of min αᵀMα over the simplex for an fp64 or rational Gram [k, k] with a positive diagonal."""
    with mpmath.workdps(DIGITS):
        k = len(gram)
        m = mpmath.matrix(k, k)
        for i in range(k):
            for j in range(k):
                both = Fraction(gram[i][j]) + Fraction(gram[j][i])
                m[i, j] = mpf(both.numerator) / both.denominator / 2
        norms = [mpmath.sqrt(m[i, i]) for i in range(k)]
        start = min(range(k), key=lambda i: m[i, i])
        alpha = [mpf(0)] * k
        alpha[start] = mpf(1)
        support = [start]
        entering: int | None = None

        for _ in range(max_pivots):
            push = [sum(m[i, j] * alpha[j] for j in range(k) if alpha[j]) for i in range(k)]
            level = sum(alpha[i] * push[i] for i in range(k))
            reach = sum(alpha[i] * norms[i] for i in range(k))
            deficit = [(push[i] - level) / (norms[i] * reach) for i in range(k)]
            if entering is None:
                entering = min(range(k), key=deficit.__getitem__)
                if deficit[entering] >= -NEGLIGIBLE:
                    return Certified(as_fraction(level), [as_fraction(w) for w in alpha], float(-min(deficit)))
            if not support:  # all others have been driven out: the vertex of the entering weight is stationary
                support, entering = [entering], None
                continue
            # The common push λ of the support differs from the level once the entering weight is positive.
            slope = push[entering] - push[support[0]]
            velocity, curvature = _response(m, support, entering)
            # A curvature lost in the 120 digits is none: then only the boundary stops the motion.
            stop = -slope / curvature if curvature > NEGLIGIBLE * m[entering, entering] else mpmath.inf
            blocking = None
            for i, v in zip(support, velocity, strict=True):
                if v < 0 and -alpha[i] / v < stop:
                    stop, blocking = -alpha[i] / v, i
            for i, v in zip(support, velocity, strict=True):
                alpha[i] += stop * v
            alpha[entering] += stop
            if blocking is None:
                support, entering = [*support, entering], None
            else:
                alpha[blocking] = mpf(0)
                support.remove(blocking)
        raise RuntimeError(f"no KKT point of this {k}×{k} Gram after {max_pivots} pivots")
