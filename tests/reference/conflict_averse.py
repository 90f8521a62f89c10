"""CAGrad's problem without rounding: bᵀp + s √(pᵀMp) over the simplex, b = Mv, s² = c² vᵀMv, by enumerating the faces.

On a face everything is rational but one square root, which is taken at 120 digits. Knows nothing of mogeo.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

import mpmath
from mpmath import mpf

from tests.reference import exact
from tests.reference.exact import Matrix
from tests.reference.high_precision import DIGITS, NEGLIGIBLE, as_fraction


class Optimum(NamedTuple):
    """The minimum over the simplex and a point that attains it, to 120 digits."""

    value: Fraction
    weights: list[Fraction]


def root(x: Fraction) -> Fraction:
    """√x to 120 digits, 0 for what rounding made negative."""
    with mpmath.workdps(DIGITS):
        return as_fraction(mpmath.sqrt(mpf(max(x.numerator, 0)) / x.denominator))


def objective(m: Matrix, base: Sequence[Fraction], c: Fraction, p: Sequence[Fraction]) -> Fraction:
    """bᵀp + s √(pᵀMp)."""
    linear = sum((a * b for a, b in zip(exact.products(m, base), p, strict=True)), start=Fraction(0))
    return linear + c * root(exact.value(m, base) * exact.value(m, p))


def minimum(m: Matrix, base: Sequence[Fraction], c: Fraction) -> Optimum:
    """The minimum for a positive semi-definite M, v = `base` on the simplex and c ≥ 0.

    Take a minimiser of smallest support. Rows of the support are affinely independent, for else it could be moved along
    a dependency, which changes no g_p, until a weight vanishes. There it is stationary: b + κ⁻¹Mp = const, with
    κ = ‖g_p‖ / s. So p = p₀ + κp₁, where p₀ is the min-norm point of the affine hull and g_p₁ ⟂ g_p₀; and
    ‖g_p‖² = κ²s² gives κ² = ‖g_p₀‖² / (s² − ‖g_p₁‖²).
    """
    k = len(m)
    slopes = exact.products(m, base)
    squared_radius = c * c * exact.value(m, base)
    best: Optimum | None = None
    for size in range(1, k + 1):
        for support in combinations(range(k), size):
            bordered = [[*(m[i][j] for j in support), Fraction(-1)] for i in support]
            bordered.append([Fraction(1)] * size + [Fraction(0)])
            still = exact.solve(bordered, [*[Fraction(0)] * size, Fraction(1)])
            moving = exact.solve(bordered, [*(-slopes[i] for i in support), Fraction(0)])
            if still is None or moving is None:
                continue
            start, way = ([Fraction(0)] * k for _ in range(2))
            for position, i in enumerate(support):
                start[i], way[i] = still[position], moving[position]
            square, room = exact.value(m, start), squared_radius - exact.value(m, way)
            if size == 1:
                pace = Fraction(0)
            elif square < 0 or room <= 0:
                continue
            else:
                pace = root(square / room)
            p = [a + pace * b for a, b in zip(start, way, strict=True)]
            if min(p) < -as_fraction(NEGLIGIBLE):
                continue
            found = objective(m, base, c, p)
            if best is None or found < best.value:
                best = Optimum(found, p)
    assert best is not None  # the vertices
    return best
