"""The direction nearest to a given one that hurts no objective, exactly, from a Gram matrix.

d = Gᵀw hurts objective k, to first order, where ⟨d, g_k⟩ = (Mw)_k < 0. The directions that hurt nobody form the dual
cone {v : ⟨v, g_k⟩ ≥ 0 for all k}; the point of it that is nearest to d is v = Gᵀ(w + μ), where μ solves the linear
complementarity problem

    s = M(w + μ) ≥ 0,   μ ≥ 0,   μᵀs = 0

(the optimality conditions of min ‖v − d‖² over the cone, μ being its multipliers). It is solved as that of the min-norm
point is, by principal pivoting on rows of unit length, in floats that are certified, and in 80-digit decimals where
they are not. Knows Python numbers only, for the reasons told in `mogeo.geometry.exact_min_norm`.
"""

from __future__ import annotations

import decimal
import math
from typing import Any

from mogeo.geometry.exact_min_norm import (
    CERTIFICATE_TOLERANCE,
    DECIMAL_CONTEXT,
    DECIMALS,
    FLOATS,
    Arithmetic,
    Status,
    complementarity,
)

# Added to the diagonal of the cosines where they are not positive semi-definite: the first that suffices.
_RIDGES = tuple(10.0**power for power in range(-12, -3))


def nearest_descent(gram: list[list[float]], weights: list[float]) -> tuple[list[float], Status]:
    """μ ≥ 0 of the direction nearest to Gᵀ weights that hurts no objective.

    Where the weights hurt nobody beyond rounding, μ = 0 exactly. Rows whose diagonal is not positive, and rows that are
    not finite, take no part: nothing can hurt an objective without a gradient.

    Args:
        gram: M, symmetric positive semi-definite up to rounding, [K][K].
        weights: w, [K].

    Returns:
        μ [K], and a status. `OPTIMAL`: the conditions hold to rounding, 1e-13 |g_k| Σ_j (|w_j| + μ_j) |g_j|. `STALLED`:
        they do not, because M is not positive semi-definite, as the Gram of fp32 rows may be; they then hold to about
        as much as it lacks. `ZERO` and `NONFINITE` as for `min_norm`.
    """
    size = len(gram)
    finite = [i for i in range(size) if math.isfinite(gram[i][i]) and math.isfinite(weights[i])]
    finite = [i for i in finite if all(math.isfinite(gram[i][j]) for j in finite)]
    live = [i for i in finite if gram[i][i] > 0.0]
    correction = [0.0] * size
    if not live:
        return correction, Status.ZERO if finite else Status.NONFINITE
    exponent = -(math.frexp(max(gram[i][i] for i in live))[1] // 2) * 2  # a common scale changes no bit of μ
    matrix = [[math.ldexp(gram[i][j], exponent) for j in live] for i in live]
    given = [weights[i] for i in live]
    inner, status = _solve(matrix, given)
    for i, value in zip(live, inner, strict=True):
        correction[i] = value
    return correction, status


def _solve(matrix: list[list[float]], weights: list[float]) -> tuple[list[float], Status]:
    """`nearest_descent` for a finite matrix with a positive diagonal."""
    nothing = [0.0] * len(weights)
    if _certify(matrix, weights, nothing, FLOATS):
        return nothing, Status.OPTIMAL
    correction = _corrected(matrix, weights, FLOATS)
    if _certify(matrix, weights, correction, FLOATS):
        return correction, Status.OPTIMAL
    with decimal.localcontext(DECIMAL_CONTEXT):
        correction = _corrected(matrix, weights, DECIMALS)
        if _certify(matrix, weights, correction, DECIMALS):
            return correction, Status.OPTIMAL
    # Not positive semi-definite: there may be no solution, and what looks like one may be huge. A ridge on the diagonal
    # makes it definite, and the conditions then hold but for the ridge.
    for ridge in _RIDGES:
        correction = _corrected(matrix, weights, FLOATS, ridge)
        if _certify(matrix, weights, correction, FLOATS, 2 * ridge):
            break
    return correction, Status.STALLED


def _corrected(
    matrix: list[list[float]], weights: list[float], arithmetic: Arithmetic, ridge: float = 0.0
) -> list[float]:
    """μ, by pivoting on the rows scaled to unit length, with `ridge` added to their cosines' diagonal."""
    indices = range(len(matrix))
    exact = [[arithmetic.number(value) for value in row] for row in matrix]
    norms = [arithmetic.sqrt(exact[i][i]) for i in indices]
    lengths = [arithmetic.number(weight) * norm for weight, norm in zip(weights, norms, strict=True)]
    cosines = [[exact[i][j] / norms[i] / norms[j] for j in indices] for i in indices]
    slopes = [arithmetic.total(cosines[i][j] * lengths[j] for j in indices) for i in indices]
    reach = arithmetic.total(abs(length) for length in lengths)
    if not reach:
        return [0.0] * len(matrix)
    for i in indices:
        cosines[i][i] += arithmetic.number(ridge)
    solution = complementarity(cosines, slopes, [reach] * len(matrix), arithmetic)
    return [float(value / norm) if value > 0 else 0.0 for value, norm in zip(solution, norms, strict=True)]


def _certify(
    matrix: list[list[float]],
    weights: list[float],
    correction: list[float],
    arithmetic: Arithmetic,
    tolerance: float = CERTIFICATE_TOLERANCE,
) -> bool:
    """Whether s_k ≥ 0, and s_k = 0 where μ_k > 0, to the rounding of row k."""
    number = arithmetic.number
    total = [number(w) + number(m) for w, m in zip(weights, correction, strict=True)]
    norms = [arithmetic.sqrt(number(row[i])) for i, row in enumerate(matrix)]
    # Of |w| + μ, not of |w + μ|: their sum is known to no more than that.
    spans = [number(abs(w)) + number(m) for w, m in zip(weights, correction, strict=True)]
    allowed = number(tolerance) * arithmetic.total(span * norm for span, norm in zip(spans, norms, strict=True))

    def holds(row: list[float], norm: Any, multiplier: float) -> bool:
        slope = arithmetic.total(number(entry) * value for entry, value in zip(row, total, strict=True))
        return bool(slope >= -allowed * norm and (multiplier == 0.0 or slope <= allowed * norm))

    return all(map(holds, matrix, norms, correction))
