"""The min-norm point of a convex hull, exactly: argmin over the simplex of aᵀ M a, for a Gram matrix M of a few rows.

Knows Python floats only, no tensors: at K ≤ 64 a tensor library costs more than the arithmetic, and scalar IEEE
double arithmetic gives the same bits on every machine (LAPACK does not), so ranks that solve the same problem agree.

Method. Adding c·11ᵀ to M adds the constant c to the objective on the simplex: the minimiser stays, and M' = M + c·11ᵀ
is positive definite as soon as the gradients are affinely independent, even where their hull contains the origin. With
x = a / (aᵀM'a) the optimality conditions become a linear complementarity problem

    w = M'x − 1 ≥ 0,   x ≥ 0,   xᵀw = 0,   a = x / Σx,

which principal pivoting solves in finitely many steps (Cottle, Pang & Stone, *The Linear Complementarity Problem*,
1992, section 4.2): one variable is driven until its w vanishes; a basic x that would turn negative on the way leaves
first. Rows are scaled to a unit diagonal, so that gradient norms twelve orders of magnitude apart share one tableau.
"""

from __future__ import annotations

import math
from enum import IntEnum

# Relative size below which a multiplier counts as non-negative: a few hundred roundings of the tableau.
_MULTIPLIER_TOLERANCE = 1e-14
# A pivot (1 − the squared correlation with the rows already in) below this is a linear dependence, not information.
_PIVOT_TOLERANCE = 1e-13
# KKT residual, in units of each row's own rounding scale, up to which a result is certified as optimal.
_CERTIFICATE_TOLERANCE = 1e-11


class Status(IntEnum):
    """What `min_norm` says of its result."""

    OPTIMAL = 0  #: the optimality conditions hold to rounding
    STALLED = 1  #: they do not: the weights are on the simplex, and the gap tells how far from optimal they are
    ZERO = 2  #: every gradient is zero: nothing is left to descend; weights are uniform, the direction is zero
    NONFINITE = 3  #: no objective has a finite gradient; weights are uniform and mean nothing


def min_norm(gram: list[list[float]]) -> tuple[list[float], float, Status]:
    """Minimise aᵀ M a over the simplex.

    Rows whose diagonal is zero (solved objectives) and rows that are not finite are left out of the hull, with weight
    0: inside the hull, a zero row would be the minimiser and freeze every other objective.

    Args:
        gram: symmetric positive semi-definite up to rounding, [K][K].

    Returns:
        The weights a [K]; the duality gap aᵀMa − min_i (Ma)_i over the hull, in units of `gram`; and the status.
    """
    size = len(gram)
    finite = [i for i in range(size) if math.isfinite(gram[i][i])]
    finite = [i for i in finite if all(math.isfinite(gram[i][j]) for j in finite)]
    hull = [i for i in finite if gram[i][i] > 0.0]
    if not hull:
        return [1.0 / size] * size, 0.0, Status.ZERO if finite else Status.NONFINITE

    # An exact power of two brings the smallest row to about 1: a common scale then changes no bit of the weights.
    exponent = -math.frexp(min(gram[i][i] for i in hull))[1]
    matrix = [[math.ldexp(gram[i][j], exponent) for j in hull] for i in hull]
    inner, gap, status = _solve(matrix) if len(hull) > 1 else ([1.0], 0.0, Status.OPTIMAL)

    weights = [0.0] * size
    for i, weight in zip(hull, inner, strict=True):
        weights[i] = weight
    return weights, math.ldexp(gap, -exponent), status


def _solve(matrix: list[list[float]]) -> tuple[list[float], float, Status]:
    """`min_norm` for a finite matrix with a positive diagonal."""
    indices = range(len(matrix))
    shift = min(matrix[i][i] for i in indices)
    scale = [math.sqrt(shift / (matrix[i][i] + shift)) for i in indices]
    scaled = [[(matrix[i][j] / shift + 1.0) * scale[i] * scale[j] for j in indices] for i in indices]
    solution = _complementarity(scaled, scale)

    weights = [max(value, 0.0) * unit for value, unit in zip(solution, scale, strict=True)]
    total = math.fsum(weights)
    weights = [weight / total for weight in weights]
    return weights, *_certify(matrix, weights)


def _complementarity(matrix: list[list[float]], bound: list[float]) -> list[float]:
    """Solve w = A y − b ≥ 0, y ≥ 0, yᵀw = 0 for A with unit diagonal, positive semi-definite up to rounding; b > 0.

    The tableau holds z = q + T u: u are the non-basic variables (zero but for the driving one), z the basic ones.
    Variable i is y_i where `support[i]`, else w_i.
    """
    size = len(bound)
    indices = range(size)
    tableau = [row[:] for row in matrix]
    constant = [-value for value in bound]
    support = [False] * size
    dependent = [False] * size
    driving = -1
    reached = 0.0  # value that the driving variable has reached behind earlier blocks

    for _ in range(8 * size + 32):
        if driving < 0:
            worst = -_MULTIPLIER_TOLERANCE
            for i in indices:
                if not support[i] and not dependent[i] and constant[i] < worst * bound[i]:
                    worst = constant[i] / bound[i]
                    driving = i
            if driving < 0:
                break
            reached = 0.0

        block, blocker = math.inf, -1
        for i in indices:
            slope = tableau[i][driving]
            if support[i] and slope < 0.0:
                ratio = max(max(constant[i], 0.0) / -slope, reached)
                if ratio < block:
                    block, blocker = ratio, i
        pivot = tableau[driving][driving]
        independent = pivot > _PIVOT_TOLERANCE
        if independent and -constant[driving] / pivot <= block:
            _pivot(tableau, constant, driving)
            support[driving] = True
            driving = -1
        elif blocker >= 0:
            _pivot(tableau, constant, blocker)
            support[blocker] = False
            reached = block
        else:
            dependent[driving] = True  # the hull already holds this row: entering it would only amplify rounding
            driving = -1

    return _refine(matrix, bound, tableau, constant, support)


def _pivot(tableau: list[list[float]], constant: list[float], index: int) -> None:
    """Exchange basic and non-basic variable `index`, in place."""
    row = tableau[index]
    inverse = 1.0 / row[index]
    start = constant[index]
    for i, other in enumerate(tableau):
        if i != index:
            factor = other[index] * inverse
            tableau[i] = [value - factor * entry for value, entry in zip(other, row, strict=True)]
            tableau[i][index] = factor
            constant[i] -= factor * start
    tableau[index] = [-entry * inverse for entry in row]
    tableau[index][index] = inverse
    constant[index] = -start * inverse


def _refine(
    matrix: list[list[float]],
    bound: list[float],
    tableau: list[list[float]],
    constant: list[float],
    support: list[bool],
) -> list[float]:
    """Refine A_SS y_S = b_S twice: the tableau's block on the support S is A_SS⁻¹ up to rounding."""
    chosen = [i for i, inside in enumerate(support) if inside]
    solution = [constant[i] if inside else 0.0 for i, inside in enumerate(support)]
    for _ in range(2):
        residual = [bound[i] - math.fsum(matrix[i][j] * solution[j] for j in chosen) for i in chosen]
        for i in chosen:
            row = tableau[i]
            solution[i] += math.fsum(row[j] * rest for j, rest in zip(chosen, residual, strict=True))
    return solution


def _certify(matrix: list[list[float]], weights: list[float]) -> tuple[float, Status]:
    """The duality gap, and whether every optimality condition holds to the rounding of its own row."""
    slopes = [math.fsum(entry * weight for entry, weight in zip(row, weights, strict=True)) for row in matrix]
    value = math.fsum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    floor = min(matrix[i][i] for i in range(len(matrix)))
    optimal = True
    for row, weight, slope in zip(matrix, weights, slopes, strict=True):
        rounding = floor + math.fsum(abs(entry) * other for entry, other in zip(row, weights, strict=True))
        excess = abs(slope - value) if weight > 0.0 else value - slope
        optimal = optimal and excess <= _CERTIFICATE_TOLERANCE * rounding
    return max(value - min(slopes), 0.0), Status.OPTIMAL if optimal else Status.STALLED
