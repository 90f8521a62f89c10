"""The nearest direction that hurts nobody, from the rows themselves: their exact Gram matrix, and 150 digits.

Lawson and Hanson's active-set method for non-negative least squares (*Solving Least Squares Problems*, 1974, chapter
23), min ‖d + Gᵀμ‖ over μ ≥ 0, whose residual is that direction. Every fp64 number is a fraction, so rows have an exact
Gram matrix, also where they balance out to their last digits. Knows nothing of mogeo.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction

import mpmath
from mpmath import mpf

from tests.reference.exact import Matrix
from tests.reference.high_precision import as_fraction

DIGITS = 150
# What rows of 53 bits leave of each other is some 1e-40 of them in the Gram; the rest of the digits is rounding.
NEGLIGIBLE = mpf(10) ** -70


def inner_products(rows: Sequence[Sequence[float]]) -> list[list[Fraction]]:
    """⟨g_i, g_j⟩ of fp64 rows, exactly, [k, k]."""
    # As integers over one power of two: a hundred times faster than sums of fractions.
    unit = max(value.as_integer_ratio()[1] for row in rows for value in row)
    whole = [[int(Fraction(value) * unit) for value in row] for row in rows]
    return [[Fraction(sum(map(operator.mul, g, h)), unit * unit) for h in whole] for g in whole]


def multipliers(gram: Matrix, weights: Sequence[float]) -> list[Fraction]:
    """μ ≥ 0 [k] with s = M(w + μ) ≥ 0 and μᵀs = 0, to 1e-70, for an exact Gram with a positive diagonal.

    Where the rows depend on each other μ is one of many; Gᵀ(w + μ) is the direction, and unique.
    """
    with mpmath.workdps(DIGITS):
        indices = range(len(gram))
        exact = [[mpf(value.numerator) / value.denominator for value in row] for row in gram]
        norms = [mpmath.sqrt(exact[i][i]) for i in indices]
        cosines = [[exact[i][j] / norms[i] / norms[j] for j in indices] for i in indices]
        lengths = [mpf(weight) * norm for weight, norm in zip(weights, norms, strict=True)]
        start = [mpmath.fdot(row, lengths) for row in cosines]
        reach = mpmath.fsum(abs(length) for length in lengths)
        pushes = [mpf(0)] * len(gram)
        active: list[int] = []
        for _ in range(100 * len(gram)):
            slopes = [start[i] + mpmath.fdot(cosines[i], pushes) for i in indices]
            hurt = [i for i in indices if i not in active and slopes[i] < -NEGLIGIBLE * reach]
            if not hurt:
                return [as_fraction(push / norm) for push, norm in zip(pushes, norms, strict=True)]
            active.append(min(hurt, key=slopes.__getitem__))
            pushes = _settled(cosines, start, pushes, active)
        raise RuntimeError(f"no nearest direction for this {len(gram)}×{len(gram)} Gram")


def _settled(cosines: list[list[mpf]], start: list[mpf], pushes: list[mpf], active: list[int]) -> list[mpf]:
    """The pushes ≥ 0 that are least squares on `active`, from which those that would turn negative are dropped."""
    while active:
        matrix = mpmath.matrix([[cosines[i][j] for j in active] for i in active])
        solved = mpmath.lu_solve(matrix, mpmath.matrix([-start[i] for i in active]))
        goal = dict(zip(active, solved, strict=True))
        if min(goal.values()) > 0:
            return [goal.get(i, mpf(0)) for i in range(len(pushes))]
        stop = min(pushes[i] / (pushes[i] - value) for i, value in goal.items() if value <= 0)
        moved = {i: pushes[i] + stop * (value - pushes[i]) for i, value in goal.items()}
        active[:] = [i for i in active if moved[i] > NEGLIGIBLE]
        pushes = [moved[i] if i in active else mpf(0) for i in range(len(pushes))]
    return [mpf(0)] * len(pushes)
