"""The direction nearest to a given one that hurts no objective, exactly, from a Gram matrix.

d = Gᵀw hurts objective k, to first order, where ⟨d, g_k⟩ = (Mw)_k < 0. The directions that hurt nobody form the dual
cone {v : ⟨v, g_k⟩ ≥ 0 for all k}; the point of it that is nearest to d is v = Gᵀ(w + μ), where μ solves the linear
complementarity problem

    s = M(w + μ) ≥ 0,   μ ≥ 0,   μᵀs = 0

(the optimality conditions of min ‖v − d‖² over the cone, μ being its multipliers). It is solved as that of the min-norm
point is, by principal pivoting on rows of unit length, in floats that are certified, and in 80-digit decimals where
they are not. Knows Python numbers only, for the reasons told in `mogeo.geometry.exact_min_norm`.

The conditions are those of the matrix given, whose entries are rounded products of rows. Where some gradients balance
out, a change of the last digit of an entry may open or close the cone, and the nearest direction jumps. So a second
certificate, `_is_nearest`, bounds how far the direction can be from that of any rows with this Gram to its rounding; it
is derived in docs/solver.md.
"""

from __future__ import annotations

import decimal
import math
from operator import mul

from mogeo.geometry.exact_min_norm import (
    CERTIFICATE_TOLERANCE,
    DECIMAL_CONTEXT,
    DECIMALS,
    FLOATS,
    Arithmetic,
    Status,
    complementarity,
)

#: How far an entry M_ij may be from ⟨g_i, g_j⟩, in units of |g_i| |g_j|: sums of fp64 products.
ROUNDING = 2.0**-50
#: Distance from the nearest direction, relative to |d|, up to which a result is `OPTIMAL`.
NEAREST_TOLERANCE = 1e-3
# A ridge is added to the diagonal of the cosines where nothing else decides: the first that suffices, up to this one.
_LAST_RIDGE = 1e-3


def nearest_descent(
    gram: list[list[float]], weights: list[float], rounding: float = ROUNDING
) -> tuple[list[float], Status]:
    """μ ≥ 0 of the direction nearest to Gᵀ weights that hurts no objective.

    Where the weights hurt nobody beyond rounding, μ = 0 exactly. Rows whose diagonal is not positive, and rows that are
    not finite, take no part: nothing can hurt an objective without a gradient.

    Args:
        gram: M, symmetric positive semi-definite up to rounding, [K][K].
        weights: w, [K].
        rounding: ε with |M_ij − ⟨g_i, g_j⟩| ≤ ε |g_i| |g_j|, > 0 and < 1.

    Returns:
        μ [K], and a status. With d = Gᵀw, v = Gᵀ(w + μ), and v* what v would be if M were G Gᵀ to the last digit:

        - `OPTIMAL`: |v − v*| ≤ max(1e-3 |d|, 4 √ε Σ_j |w_j| |g_j|), whatever rows have this Gram up to `rounding`; and
          the conditions hold to 1e-13 |g_k| Σ_j (|w_j| + μ_j) |g_j|.
        - `UNDECIDED`: there may be rows with this Gram up to `rounding` for which v* is another direction, because some
          of the gradients balance out. Either the conditions hold as above; or, where that solution depends on the last
          digits of M, those with a ridge ε^⅔ on the cosines' diagonal do, which is the same in any order of objectives,
          and hurts nobody by more than ½ ε^⅓ |d|, 5e-6 |d|.
        - `STALLED`: M is not positive semi-definite, as the Gram of fp32 rows may be; the conditions then hold to about
          as much as it lacks, and v* may be another direction.
        - `ZERO` and `NONFINITE` as for `min_norm`.
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
    # Nor does one of the weights, whose squares must stay finite.
    shift = max(math.frexp(weights[i])[1] + math.frexp(matrix[a][a])[1] // 2 for a, i in enumerate(live))
    inner, status = _solve(matrix, [math.ldexp(weights[i], -shift) for i in live], rounding)
    for i, value in zip(live, inner, strict=True):
        correction[i] = math.ldexp(value, shift)
    return correction, status


def _solve(matrix: list[list[float]], weights: list[float], rounding: float) -> tuple[list[float], Status]:
    """`nearest_descent` for a finite matrix with a positive diagonal."""
    norms = [math.sqrt(row[i]) for i, row in enumerate(matrix)]
    correction = [0.0] * len(weights)
    slopes, reach = _slopes(matrix, norms, weights, correction, FLOATS)
    certified = _holds(slopes, correction, CERTIFICATE_TOLERANCE * reach)
    if certified and min(slopes) >= rounding * reach:
        return correction, Status.OPTIMAL  # beyond doubt, d is in the cone
    squared = math.fsum(w * norm * slope for w, norm, slope in zip(weights, norms, slopes, strict=True))  # |d|²
    near = max(NEAREST_TOLERANCE * math.sqrt(max(squared, 0.0)), 4 * math.sqrt(rounding) * reach)
    if not certified:
        correction = _corrected(matrix, weights, FLOATS)
        slopes, reach = _slopes(matrix, norms, weights, correction, FLOATS)
        certified = _holds(slopes, correction, CERTIFICATE_TOLERANCE * reach)
    if not certified:
        with decimal.localcontext(DECIMAL_CONTEXT):
            correction = _corrected(matrix, weights, DECIMALS)
            slopes, reach = _slopes(matrix, norms, weights, correction, DECIMALS)
            certified = _holds(slopes, correction, CERTIFICATE_TOLERANCE * reach)
    if certified and _is_nearest(matrix, norms, weights, correction, slopes, reach, near, rounding):
        return correction, Status.OPTIMAL
    return _ridged(matrix, norms, weights, correction, certified, near, rounding)


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


def _slopes(
    matrix: list[list[float]],
    norms: list[float],
    weights: list[float],
    correction: list[float],
    arithmetic: Arithmetic,
) -> tuple[list[float], float]:
    """s_k / |g_k| [K], and the reach Σ_j (|w_j| + μ_j) |g_j|, which is what their rounding is measured in."""
    number = arithmetic.number
    total = [number(w) + number(m) for w, m in zip(weights, correction, strict=True)]
    slopes = [
        float(arithmetic.total(number(entry) * value for entry, value in zip(row, total, strict=True))) / norm
        for row, norm in zip(matrix, norms, strict=True)
    ]
    # Of |w| + μ, not of |w + μ|: their sum is known to no more than that.
    return slopes, math.fsum((abs(w) + m) * norm for w, m, norm in zip(weights, correction, norms, strict=True))


def _holds(slopes: list[float], correction: list[float], allowed: float) -> bool:
    """Whether s_k ≥ 0, and s_k = 0 where μ_k > 0, up to `allowed` |g_k|."""
    return all(
        slope >= -allowed and (multiplier == 0.0 or slope <= allowed)
        for slope, multiplier in zip(slopes, correction, strict=True)
    )


# --------------------------------------------------------------------------------------------------------------------
# How far from the nearest direction


def _is_nearest(
    matrix: list[list[float]],
    norms: list[float],
    weights: list[float],
    correction: list[float],
    slopes: list[float],
    reach: float,
    near: float,
    rounding: float,
) -> bool:
    """Whether v* is within `near` of v = Gᵀ(w + μ), for all rows G with this Gram up to `rounding`.

    One of three bounds has to be small enough; docs/solver.md has the proofs. With unit rows ĝ_k = g_k / |g_k|, their
    cosines C, s in units of |g_k|, and `doubt`, what s is known to:

    - the rows T that can bear on v*, if they are independent: |v − v*| ≤ |(|s| + doubt)_T| / √λ, λ the smallest
      eigenvalue of C_TT. T are those with μ > 0, and those that a step of this length may reach.
    - the zero vector is in every cone: |v − v*| ≤ |v|.
    - where T depends on itself, a way z into the cone, ⟨z, ĝ_k⟩ = m_k > 0 on T: y = v + δz is in the cone for
      δ = max (doubt − s_k) / m_k, and |v − v*|² ≤ |v|² − 2⟨d, y⟩ + |y|².
    """
    doubt = rounding * reach
    residuals = [
        (abs(slope) if multiplier else max(-slope, 0.0)) + doubt
        for slope, multiplier in zip(slopes, correction, strict=True)
    ]
    bearing = [k for k, slope in enumerate(slopes) if correction[k] or slope <= 2 * doubt]
    least = 8 * len(norms) * rounding  # below which an eigenvalue cannot be told from zero
    thorough = False
    while True:
        factor = _cholesky(_cosines(matrix, norms, bearing), 0.0)
        if factor is None:
            break
        # λ ≥ det / e, for the other eigenvalues sum to no more than n; and λ ≥ 1 / trace of the inverse, which is
        # nearer to it, and dearer.
        smallest = 1 / _inverse(factor)[0] if thorough else _determinant(factor) / math.e
        error = math.sqrt(2 * math.fsum(residuals[k] * residuals[k] for k in bearing) / max(smallest, least))
        within = [k for k, slope in enumerate(slopes) if correction[k] or slope <= 2 * doubt + error]
        if smallest > least and error <= near and len(within) == len(bearing):
            return True
        if not thorough:
            thorough = True
        elif smallest > least and error <= near:
            bearing = within
        else:
            break

    total = [(w + m) * norm for w, m, norm in zip(weights, correction, norms, strict=True)]
    if math.fsum(map(mul, total, slopes)) + doubt * reach <= near * near:
        return True

    bearing = [k for k, slope in enumerate(slopes) if correction[k] or slope <= doubt + near]
    cosines = _cosines(matrix, norms, bearing)
    # Least squares for m = 1 on T; the ridge keeps the coefficients of z to a size at which m is known.
    factor = _cholesky(cosines, math.sqrt(rounding))
    if factor is None:
        return False
    _, way = _inverse(factor)
    span = math.fsum(map(abs, way))
    margins = [math.fsum(map(mul, row, way)) for row in cosines]
    margin = min(margins) - rounding * span
    if margin <= 0:
        return False
    step = (max(0.0, -min(slopes)) + doubt) / margin
    square = step * step * (math.fsum(map(mul, margins, way)) + rounding * span * span)  # |δz|²
    pushes = [correction[k] * norms[k] for k in bearing]
    push = math.fsum(pushes)
    away = math.fsum(map(mul, pushes, margins))  # ⟨v − d, z⟩
    still = math.fsum(push_k * abs(slopes[k]) for push_k, k in zip(pushes, bearing, strict=True)) + doubt * push
    gap = 2 * still + 2 * step * (abs(away) + rounding * span * push) + square
    return gap <= near * near and square <= near * near


def _cosines(matrix: list[list[float]], norms: list[float], chosen: list[int]) -> list[list[float]]:
    return [[matrix[i][j] / norms[i] / norms[j] for j in chosen] for i in chosen]


def _cholesky(matrix: list[list[float]], ridge: float) -> list[list[float]] | None:
    """L with LLᵀ = a symmetric matrix + `ridge`, [n][n], row i of length i + 1; None if that is not definite."""
    factor: list[list[float]] = []
    for i, row in enumerate(matrix):
        lower: list[float] = []
        for j, other in enumerate(factor):
            lower.append((row[j] - math.fsum(map(mul, lower, other))) / other[j])
        pivot = row[i] + ridge - math.fsum(map(mul, lower, lower))
        if not pivot > 0.0:
            return None
        lower.append(math.sqrt(pivot))
        factor.append(lower)
    return factor


def _determinant(factor: list[list[float]]) -> float:
    """Of LLᵀ."""
    return math.prod(row[-1] * row[-1] for row in factor)


def _inverse(factor: list[list[float]]) -> tuple[float, list[float]]:
    """Trace and row sums [n] of the inverse of LLᵀ."""
    columns: list[list[float]] = []  # of L⁻¹, from the diagonal down
    for j in range(len(factor)):
        column = [1 / factor[j][j]]
        for row in factor[j + 1 :]:
            column.append(-math.fsum(map(mul, row[j:], column)) / row[-1])
        columns.append(column)
    sums = [math.fsum(columns[j][i - j] for j in range(i + 1)) for i in range(len(factor))]  # L⁻¹ 1
    trace = math.fsum(value * value for column in columns for value in column)
    return trace, [math.fsum(map(mul, column, sums[j:])) for j, column in enumerate(columns)]


def _ridged(
    matrix: list[list[float]],
    norms: list[float],
    weights: list[float],
    correction: list[float],
    certified: bool,
    near: float,
    rounding: float,
) -> tuple[list[float], Status]:
    """What is returned where M does not decide: `correction` itself, or μ with a ridge on the cosines' diagonal.

    A ridge η bounds what the last digits of M can do to the direction, by about Kε/η of |d|, and what it leaves of a
    conflict by ½√η |d|: ε^⅔ is where they meet. Where M is not positive semi-definite, there may be no solution
    without it, and what looks like one may be huge; the conditions then hold but for the ridge, once it suffices.
    """
    ridge = rounding ** (2 / 3)
    while True:
        ridged = _corrected(matrix, weights, FLOATS, ridge)
        slopes, reach = _slopes(matrix, norms, weights, ridged, FLOATS)
        if certified or ridge > _LAST_RIDGE / 10 or _holds(slopes, ridged, 2 * ridge * reach):
            break
        ridge *= 10
    if not certified:
        return ridged, Status.STALLED
    difference = [a - b for a, b in zip(correction, ridged, strict=True)]
    moved = list(map(mul, difference, norms))
    slopes = [math.fsum(map(mul, row, difference)) / norm for row, norm in zip(matrix, norms, strict=True)]
    reach = math.fsum(map(abs, moved))
    if math.fsum(map(mul, moved, slopes)) + rounding * reach * reach <= near * near:
        return correction, Status.UNDECIDED
    return ridged, Status.UNDECIDED
