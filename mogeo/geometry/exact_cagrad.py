"""Conflict-averse weights, exactly, from a Gram matrix: CAGrad's direction, and RACO's.

Of all directions within c‖g₀‖ of a weighted mean g₀ = Σ_k v_k g_k, CAGrad takes the one along which the objective that
gains least gains most. Its dual is a problem over the simplex, with b = Mv and s = c‖g₀‖,

    p = argmin f(p),   f(p) = bᵀp + s √(pᵀMp),   d = g₀ + s g_p / ‖g_p‖,   g_p = Σ_k p_k g_k,

and f(p) is what the objective that gains least then gains, min_k ⟨d, g_k⟩. Knows Python numbers only, for the reasons
told in `mogeo.geometry.exact_min_norm`.

Method. For y = p s / ‖g_p‖, the weights that are added to v, the optimality conditions read

    M(v + y) − ν ≥ 0,   y ≥ 0,   yᵀ(M(v + y) − ν) = 0,   yᵀMy = s².

But for the last of them, this is a linear complementarity problem for each ν. Its solution y(ν) is piecewise linear and
√(yᵀMy) never falls with ν: 0 where ν is the least b_k, at most infinite. So y is followed from there, an objective
entering or leaving at each kink, until the length is s, which is where a quadratic equation has its root. (Finance
follows a portfolio along its efficient frontier like this: Markowitz's critical line.) As for the min-norm point, a
constant added to all entries of M makes it definite; it changes ν, and nothing else.

Each pivot is exact but for rounding, there are about as many as objectives, and the optimality conditions certify the
result: in floats, and where these do not suffice in 80-digit decimals.
"""

from __future__ import annotations

import decimal
import math
from typing import Any, NamedTuple

from mogeo.geometry.exact_min_norm import (
    CERTIFICATE_TOLERANCE,
    DECIMAL_CONTEXT,
    DECIMALS,
    FLOATS,
    Arithmetic,
    Status,
    exchange,
)

# ‖g_p‖², in units of (Σ_k p_k ‖g_k‖)², up to which gradients are taken to balance out. An entry of the Gram matrix of
# fp32 or half-precision rows is known to this (`mogeo.geometry.ops.gram`): below, g_p has a measured length that says
# nothing, and g_p / ‖g_p‖ might be any number of times too long.
BALANCED = 1e-6


class _Mixture(NamedTuple):
    """Where the path ends."""

    weights: list[float]  # p, on the simplex
    added: list[float] | None  # y where the path never reaches the length s; else None, for it is p s / ‖g_p‖


class _Ending(NamedTuple):
    """What becomes of p, and how well it solves the problem."""

    weights: list[float]
    gap: float
    certified: bool
    balanced: bool


def conflict_averse(
    gram: list[list[float]], weights: list[float], c: float, clipped: bool = False
) -> tuple[list[float], float, Status]:
    """Weights of CAGrad's direction on the raw gradients; or RACO's, where p is clipped.

    Rows whose diagonal is not positive (solved objectives) and rows that are not finite take no part, and v is scaled
    to the sum 1 over the others.

    Args:
        gram: M, symmetric positive semi-definite up to rounding, [K][K].
        weights: v [K] > 0, up to a factor.
        c: radius of the ball around g₀, ≥ 0, in units of ‖g₀‖.
        clipped: take min(p, v) in place of p in d, as RACO does.

    Returns:
        The weights v + s p / ‖g_p‖ [K], 0 for who takes no part; the duality gap f(p) − min_k ⟨d, g_k⟩ of d before
        clipping, ≥ f(p) − min f, in units of `gram`; and the status:

        - `OPTIMAL`: no ⟨d, g_k⟩ is below f(p) by more than 1e-13 ‖g_k‖ Σ_j w_j ‖g_j‖, w being the weights of d.
        - `UNDECIDED`: gradients balance out, as at a Pareto-stationary point: g_p (or its clipped like) is zero to the
          rounding of a Gram matrix (`BALANCED`), and has no direction that is known. The weights are v.
        - `STALLED`: M is not positive semi-definite; the weights are those of the p that was found.
        - `ZERO`: no objective has a gradient; v. `NONFINITE`: none has a finite one; zeros.
    """
    size = len(gram)
    finite = [i for i in range(size) if math.isfinite(gram[i][i]) and math.isfinite(weights[i])]
    finite = [i for i in finite if all(math.isfinite(gram[i][j]) for j in finite)]
    live = [i for i in finite if gram[i][i] > 0.0]
    taking_part = live or finite
    total = math.fsum(weights[i] for i in taking_part)
    found = [weights[i] / total if i in taking_part else 0.0 for i in range(size)]
    if not live:
        return found, 0.0, Status.ZERO if finite else Status.NONFINITE

    # An exact power of two centres the diagonal on 1: a common scale then changes no bit of the weights.
    exponents = [math.frexp(gram[i][i])[1] for i in live]
    exponent = -((min(exponents) + max(exponents)) // 2)
    matrix = [[math.ldexp(gram[i][j], exponent) for j in live] for i in live]
    inner, gap, status = _solve(matrix, [found[i] for i in live], c, clipped)
    for i, weight in zip(live, inner, strict=True):
        found[i] = weight
    return found, math.ldexp(gap, -exponent), status


def _solve(matrix: list[list[float]], base: list[float], c: float, clipped: bool) -> tuple[list[float], float, Status]:
    """`conflict_averse` for a finite matrix with a positive diagonal, and v on the simplex."""
    mixture = _followed(matrix, base, c, FLOATS)
    ending = _ended(matrix, base, c, mixture, clipped, FLOATS)
    if not ending.certified:
        with decimal.localcontext(DECIMAL_CONTEXT):
            ending = _ended(matrix, base, c, mixture, clipped, DECIMALS)
            if not ending.certified:
                mixture = _followed(matrix, base, c, DECIMALS)
                ending = _ended(matrix, base, c, mixture, clipped, DECIMALS)
    status = Status.UNDECIDED if ending.balanced else Status.OPTIMAL
    return ending.weights, ending.gap, status if ending.certified else Status.STALLED


def _followed(matrix: list[list[float]], base: list[float], c: float, arithmetic: Arithmetic) -> _Mixture:
    """p, by following y(ν) until its length is s."""
    indices = range(len(matrix))
    zero, total = arithmetic.number(0.0), arithmetic.total
    exact = [[arithmetic.number(value) for value in row] for row in matrix]
    means = [total(entry * arithmetic.number(v) for entry, v in zip(row, base, strict=True)) for row in exact]
    mean_squared = total(arithmetic.number(v) * b for v, b in zip(base, means, strict=True))
    squared_radius = arithmetic.number(c) * arithmetic.number(c) * max(mean_squared, zero)

    # M + shift², its rows scaled to a unit diagonal; ν is measured in units of `shift`.
    norms = [arithmetic.sqrt(exact[i][i]) for i in indices]
    shift = min(norms)
    stretch = [arithmetic.sqrt(1 + (shift / norm) * (shift / norm)) for norm in norms]
    unit = [shift / norm / factor for norm, factor in zip(norms, stretch, strict=True)]
    length = [norm * factor for norm, factor in zip(norms, stretch, strict=True)]
    scaled = [[exact[i][j] / length[i] / length[j] for j in indices] for i in indices]
    # The basic variables, y_i where `support[i]` and else the surplus of condition i, are `constant` + ν times the last
    # column of the tableau.
    tableau = [[*(scaled[i][j] + unit[i] * unit[j] for j in indices), -unit[i]] for i in indices]
    constant = [means[i] / length[i] for i in indices]
    support = [False for _ in indices]
    reached = min(means) / shift  # ν

    for _ in range(16 * len(matrix) + 64):
        growth = [row[-1] for row in tableau]
        kink, at = None, -1  # ν where the next variable vanishes
        for i in indices:
            # A row that depends on those already in has no surplus but theirs, which is rounding.
            independent = tableau[i][i] > arithmetic.pivot_tolerance
            if growth[i] < 0 if support[i] else independent and growth[i] < -arithmetic.multiplier_tolerance * unit[i]:
                value = max(constant[i] / -growth[i], reached)
                if kink is None or value < kink:
                    kink, at = value, i
        inside = [i for i in indices if support[i]]
        y = {i: max(constant[i] + reached * growth[i], zero) for i in inside}
        step = _step_to(squared_radius, scaled, y, growth, arithmetic)
        if inside and (kink is None or (step is not None and reached + step <= kink)):
            break
        exchange(tableau, constant, at)
        support[at] = not support[at]
        reached = kink

    end = growth if step is None else [y.get(i, zero) + step * growth[i] for i in indices]
    if not any(end[i] > 0 for i in inside):  # s = 0: p is where y would set out to
        end = growth
    mixed = [max(end[i], zero) / length[i] if i in y else zero for i in indices]
    whole = total(mixed)
    if not whole > 0:  # rounding hid every row from the others: any vertex is as good, and the certificate will say so
        mixed[norms.index(shift)] = whole = arithmetic.number(1.0)
    added = [float(y.get(i, zero) / length[i]) for i in indices] if step is None else None
    return _Mixture([float(value / whole) for value in mixed], added)


def _step_to(
    squared: Any, scaled: list[list[Any]], y: dict[int, Any], growth: list[Any], arithmetic: Arithmetic
) -> Any:
    """The least t ≥ 0 at which xᵀMx, x = y + t · growth, is `squared`; None if there is none.

    Args:
        squared: s², not below yᵀMy but for rounding.
        scaled: M, scaled as y and its growth are, [K][K].
        y: by the indices that take part.
        growth: what y grows by, [K], so that xᵀMx does not fall.
        arithmetic: of all these numbers.
    """
    total, zero = arithmetic.total, arithmetic.number(0.0)
    slopes = {i: total(scaled[i][j] * value for j, value in y.items()) for i in y}
    missing = squared - total(value * slopes[i] for i, value in y.items())
    if missing <= 0:
        return zero
    linear = max(total(growth[i] * slope for i, slope in slopes.items()), zero)
    quadratic = total(growth[i] * scaled[i][j] * growth[j] for i in y for j in y)
    discriminant = linear * linear + quadratic * missing
    if discriminant < 0 or linear + arithmetic.sqrt(discriminant) <= 0:
        return None
    return missing / (linear + arithmetic.sqrt(discriminant))


def _ended(
    matrix: list[list[float]],
    base: list[float],
    c: float,
    mixture: _Mixture,
    clipped: bool,
    arithmetic: Arithmetic,
) -> _Ending:
    """The weights that p makes, and whether the optimality conditions hold beyond doubt, to the rounding of row i."""
    number, total = arithmetic.number, arithmetic.total

    def products(x: list[Any]) -> list[Any]:
        return [total(number(entry) * value for entry, value in zip(row, x, strict=True)) for row in matrix]

    def product(x: list[Any], y: list[Any]) -> Any:
        return total(a * b for a, b in zip(x, y, strict=True))

    norms = [arithmetic.sqrt(number(row[i])) for i, row in enumerate(matrix)]
    v, p = [number(value) for value in base], [number(value) for value in mixture.weights]
    means = products(v)
    radius = number(c) * arithmetic.sqrt(max(product(v, means), number(0.0)))

    def added(x: list[Any]) -> tuple[list[Any], Any, bool]:
        """x s / ‖g_x‖; ‖g_x‖; and whether that is as good as zero."""
        squared = max(product(x, products(x)), number(0.0))
        norm = arithmetic.sqrt(squared)
        factor = radius / norm if norm > 0 else norm
        return [factor * value for value in x], norm, squared <= number(BALANCED) * product(norms, x) ** 2

    y, norm, balanced = added(p)
    if mixture.added is not None and balanced:
        y = [number(value) for value in mixture.added]
    # Of weights as they are returned, rounded.
    w = [number(float(a + b)) for a, b in zip(v, y, strict=True)]
    slopes = products(w)
    value = product(p, means) + radius * norm
    lengths, length = product(norms, p), product(norms, w)
    # What balances out to `BALANCED` is not known any better; and f(p) is known to the rounding of its longest rows.
    tolerance = number(BALANCED if balanced else CERTIFICATE_TOLERANCE) * length
    doubt = arithmetic.rounding * lengths * length
    certified = all(value - slope + doubt <= tolerance * unit for slope, unit in zip(slopes, norms, strict=True))
    gap = max(float(value - min(slopes)), 0.0)
    if clipped:
        y, _, also = added([min(a, b) for a, b in zip(p, v, strict=True)])
        balanced = balanced or also
    weights = base if balanced else [float(a + b) for a, b in zip(v, y, strict=True)]
    return _Ending(weights, gap, certified, balanced)
