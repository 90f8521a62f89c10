"""The min-norm point of a convex hull, exactly: argmin over the simplex of aᵀ M a, for a Gram matrix M of a few rows.

Knows Python numbers only, no tensors: at K ≤ 64 a tensor library costs more than the arithmetic, and scalar arithmetic
gives the same bits on every machine (LAPACK does not), so ranks that solve the same problem agree.

Method. Adding c·11ᵀ to M adds the constant c to the objective on the simplex: the minimiser stays, and M' = M + c·11ᵀ
is positive definite as soon as the gradients are affinely independent, even where their hull contains the origin. With
x = a / (aᵀM'a) the optimality conditions become a linear complementarity problem

    w = M'x − 1 ≥ 0,   x ≥ 0,   xᵀw = 0,   a = x / Σx,

which principal pivoting solves in finitely many steps (Cottle, Pang & Stone, *The Linear Complementarity Problem*,
1992, section 4.2): one variable is driven until its w vanishes; a basic x that would turn negative on the way leaves
first. Rows are scaled to a unit diagonal, so that gradient norms many orders of magnitude apart share one tableau.

The optimality conditions then certify the result. Where floats cannot decide them (norms far apart), decimals do; where
they do not hold (gradients that cancel to the last digits), the same pivoting runs again in 80-digit decimals, which
takes milliseconds instead of microseconds.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from enum import IntEnum
from typing import Any, NamedTuple

# KKT residual, in units of |g_i| Σ_j a_j |g_j|, up to which a result is certified as optimal.
CERTIFICATE_TOLERANCE = 1e-13


class Status(IntEnum):
    """What `min_norm`, `nearest_descent` of `exact_harmless` and `conflict_averse` of `exact_cagrad` say of a result.

    docs/solver.md has what each promises.
    """

    OPTIMAL = 0  #: the optimality conditions hold to rounding; and the direction is right for any rows with this Gram
    STALLED = 1  #: they do not, for the matrix is no Gram matrix to rounding; weights are the best of those tried
    ZERO = 2  #: every gradient is zero: nothing is left to descend, and the direction is zero
    NONFINITE = 3  #: no objective has a finite gradient; the weights of `min_norm` are zero
    NONPOSITIVE_LOSS = 4  #: a loss that divides is not positive; its objective has weight 0 (found on a GPU only)
    UNDECIDED = 5  #: some gradients balance out, and the Gram's rounding hides which direction is the right one


class Arithmetic(NamedTuple):
    """Numbers to pivot with: float, or Decimal under `DECIMALS`."""

    number: Callable[[float], Any]
    sqrt: Callable[[Any], Any]
    total: Callable[[Iterable[Any]], Any]  # fsum for floats: builtin sum rounds differently from Python 3.12 on
    multiplier_tolerance: Any  # relative size below which a multiplier counts as non-negative
    pivot_tolerance: Any  # 1 − squared correlation with the rows already in, below which a row depends on them
    rounding: Any  # bound on the relative rounding of a sum of 64 products


FLOATS = Arithmetic(float, math.sqrt, math.fsum, 1e-14, 1e-13, 2.0**-49)
DECIMALS = Arithmetic(Decimal, Decimal.sqrt, sum, Decimal("1e-40"), Decimal("1e-50"), Decimal("1e-70"))
DECIMAL_CONTEXT = decimal.Context(prec=80)


def min_norm(gram: list[list[float]]) -> tuple[list[float], float, Status]:
    """Minimise aᵀ M a over the simplex.

    Rows whose diagonal is not positive (solved objectives) and rows that are not finite are left out of the hull, with
    weight 0: inside the hull, a zero row would be the minimiser and freeze every other objective.

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
        weights = [1.0 / len(finite) if i in finite else 0.0 for i in range(size)]
        return weights, 0.0, Status.ZERO if finite else Status.NONFINITE

    # An exact power of two centres the diagonal on 1: a common scale then changes no bit of the weights.
    exponents = [math.frexp(gram[i][i])[1] for i in hull]
    exponent = -((min(exponents) + max(exponents)) // 2)
    matrix = [[math.ldexp(gram[i][j], exponent) for j in hull] for i in hull]
    inner, gap, status = _solve(matrix) if len(hull) > 1 else ([1.0], 0.0, Status.OPTIMAL)

    weights = [0.0] * size
    for i, weight in zip(hull, inner, strict=True):
        weights[i] = weight
    return weights, math.ldexp(gap, -exponent), status


def _solve(matrix: list[list[float]]) -> tuple[list[float], float, Status]:
    """`min_norm` for a finite matrix with a positive diagonal."""
    weights = _pivoted(matrix, FLOATS)
    gap, certified = _certify(matrix, weights, FLOATS)
    if not certified:
        with decimal.localcontext(DECIMAL_CONTEXT):
            gap, certified = _certify(matrix, weights, DECIMALS)
            if not certified:
                weights = _pivoted(matrix, DECIMALS)
                gap, certified = _certify(matrix, weights, DECIMALS)
    return weights, gap, Status.OPTIMAL if certified else Status.STALLED


def _pivoted(matrix: list[list[float]], arithmetic: Arithmetic) -> list[float]:
    """Weights on the simplex, by principal pivoting on the shifted and scaled matrix."""
    indices = range(len(matrix))
    exact = [[arithmetic.number(value) for value in row] for row in matrix]
    norms = [arithmetic.sqrt(exact[i][i]) for i in indices]
    shift = min(norms)
    # Row i of M + c·11ᵀ, c = shift², has the diagonal ‖g_i‖² + c = (‖g_i‖ · stretch_i)², in steps that never overflow.
    stretch = [arithmetic.sqrt(1 + (shift / norm) * (shift / norm)) for norm in norms]
    unit = [shift / norm / factor for norm, factor in zip(norms, stretch, strict=True)]
    length = [norm * factor for norm, factor in zip(norms, stretch, strict=True)]
    scaled = [[exact[i][j] / length[i] / length[j] + unit[i] * unit[j] for j in indices] for i in indices]
    solution = complementarity(scaled, [-value for value in unit], unit, arithmetic)

    weights = [float(value * scale) if value > 0 else 0.0 for value, scale in zip(solution, unit, strict=True)]
    total = math.fsum(weights)
    if total == 0.0:  # rounding hid every row from the others: any vertex is as good, and the certificate will say so
        weights[norms.index(shift)] = total = 1.0
    return [weight / total for weight in weights]


def complementarity(matrix: list[list[Any]], start: list[Any], scale: list[Any], arithmetic: Arithmetic) -> list[Any]:
    """Solve w = A y + q ≥ 0, y ≥ 0, yᵀw = 0 for A with unit diagonal, positive semi-definite up to rounding.

    The tableau holds z = q + T u: u are the non-basic variables (zero but for the driving one), z the basic ones.
    Variable i is y_i where `support[i]`, else w_i.

    Args:
        matrix: A.
        start: q.
        scale: > 0, what each w_i is measured in.
        arithmetic: of all these numbers.
    """
    size = len(start)
    indices = range(size)
    zero = arithmetic.number(0.0)
    tableau = [row[:] for row in matrix]
    constant = start[:]
    support = [False] * size
    dependent = [False] * size
    driving = -1
    reached = zero  # value that the driving variable has reached behind earlier blocks

    for _ in range(16 * size + 64):
        if driving < 0:
            worst = -arithmetic.multiplier_tolerance
            for i in indices:
                if not support[i] and not dependent[i] and constant[i] < worst * scale[i]:
                    worst = constant[i] / scale[i]
                    driving = i
            if driving < 0:
                break
            reached = zero

        block, blocker = None, -1
        for i in indices:
            slope = tableau[i][driving]
            if support[i] and slope < 0:
                ratio = max(max(constant[i], zero) / -slope, reached)
                if block is None or ratio < block:
                    block, blocker = ratio, i
        pivot = tableau[driving][driving]
        independent = pivot > arithmetic.pivot_tolerance
        if independent and (block is None or -constant[driving] / pivot <= block):
            exchange(tableau, constant, driving)
            support[driving] = True
            driving = -1
        elif block is not None:
            exchange(tableau, constant, blocker)
            support[blocker] = False
            reached = block
        else:
            dependent[driving] = True  # the hull already holds this row: entering it would only amplify rounding
            driving = -1

    return [constant[i] if support[i] else zero for i in indices]


def exchange(tableau: list[list[Any]], constant: list[Any], index: int) -> None:
    """Exchange basic and non-basic variable `index`, in place.

    A column after those of the variables changes as the constants do.
    """
    row = tableau[index]
    inverse = 1 / row[index]
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


def _certify(matrix: list[list[float]], weights: list[float], arithmetic: Arithmetic) -> tuple[float, bool]:
    """The duality gap, and whether (Ma)_i ≥ aᵀMa beyond doubt for every i, to the rounding of row i."""
    number = arithmetic.number
    inside = [(j, number(weight)) for j, weight in enumerate(weights) if weight > 0.0]
    slopes = [arithmetic.total(number(row[j]) * weight for j, weight in inside) for row in matrix]
    value = arithmetic.total(slopes[j] * weight for j, weight in inside)
    norms = [arithmetic.sqrt(number(row[i])) for i, row in enumerate(matrix)]
    radius = arithmetic.total(norms[j] * weight for j, weight in inside)
    # aᵀMa is known to the rounding of its longest rows, which short rows cannot be held to.
    doubt = arithmetic.rounding * radius * radius
    tolerance = number(CERTIFICATE_TOLERANCE) * radius
    certified = all(value - slope + doubt <= tolerance * norm for slope, norm in zip(slopes, norms, strict=True))
    return max(float(value - min(slopes)), 0.0), certified
