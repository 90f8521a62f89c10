"""Conflict-averse weights, CAGrad's and RACO's, from the Gram matrix, in one launch.

Knows tensors only; arguments come checked, from `mogeo.geometry.ops`. The problem, and how its solution is followed
from kink to kink until its length is s, is derived in `mogeo.geometry.exact_cagrad`; the exchange of variables and both
arithmetics are those of `mogeo.kernels.min_norm`. Here too rows are scaled by powers of two, which round nothing, and
the optimality conditions are certified in double-double.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogeo.kernels.double_double import (
    add,
    divide,
    fine_total,
    less,
    multiply,
    times_vector,
    total,
    two_product,
    two_sum,
)
from mogeo.kernels.min_norm import (
    MAX_OBJECTIVES,
    exchange_factors,
    exchanged,
    exchanged_column,
    exponent_of,
    on_simplex,
    power_of_two,
)
from mogeo.kernels.target import Launch, square_side

# Values of `status`: those of `mogeo.Status`.
_OPTIMAL = tl.constexpr(0)
_STALLED = tl.constexpr(1)
_ZERO = tl.constexpr(2)
_NONFINITE = tl.constexpr(3)
_UNDECIDED = tl.constexpr(5)

# ‖g_p‖², in units of (Σ_k p_k |g_k|)², up to which gradients are taken to balance out.
_BALANCED = tl.constexpr(1e-6)
# What the optimality conditions hold to, in units of |g_k| Σ_j w_j |g_j|, where they are certified.
_CERTIFICATE_TOLERANCE = tl.constexpr(1e-13)
# Bound on the relative rounding of a double-double sum of 32 products.
_ROUNDING = tl.constexpr(1e-28)
# Those of `mogeo.kernels.min_norm`, in fp64 and in double-double.
_MULTIPLIER_TOLERANCE = tl.constexpr(1e-14)
_PIVOT_TOLERANCE = tl.constexpr(1e-13)
_FINE_MULTIPLIER_TOLERANCE = tl.constexpr(1e-24)
_FINE_PIVOT_TOLERANCE = tl.constexpr(1e-25)
_WIDEST = tl.constexpr(1000)
_INFINITY = tl.constexpr(float("inf"))


# --------------------------------------------------------------------------------------------------------------------
# The path


@triton.jit
def _step_to(A, y, y_low, growth, growth_low, squared, squared_low, FINE: tl.constexpr):
    """The least t ≥ 0 at which |y + t · growth|², in the metric A, is `squared`; infinity if there is none."""
    slope, slope_low = times_vector(A, y, y_low, FINE)
    p, p_low = multiply(y, y_low, slope, slope_low, FINE)
    length, length_low = total(p, p_low, 0, FINE)
    missing, _ = add(squared, squared_low, -length, -length_low, FINE)
    p, p_low = multiply(growth, growth_low, slope, slope_low, FINE)
    linear, _ = total(p, p_low, 0, FINE)
    slope, slope_low = times_vector(A, growth, growth_low, FINE)
    p, p_low = multiply(growth, growth_low, slope, slope_low, FINE)
    quadratic, _ = total(p, p_low, 0, FINE)
    missing = tl.maximum(missing, 0.0)
    linear = tl.maximum(linear, 0.0)
    discriminant = linear * linear + quadratic * missing
    pace = linear + tl.sqrt(tl.maximum(discriminant, 0.0))
    never = (discriminant < 0.0) | (pace <= 0.0)
    step = tl.where(never, _INFINITY, missing / tl.where(never, 1.0, pace))
    return tl.where(missing == 0.0, 0.0, step)


@triton.jit
def _followed(
    A, means, means_low, unit, squared, squared_low, takes_part, K: tl.constexpr, SIDE: tl.constexpr, FINE: tl.constexpr
):  # fmt: skip
    """Where the path ends: p up to a factor, y at its last kink, and whether it reached the length s before.

    All three in units of rows as A scales them; M + shift² is A + unit unitᵀ there, and ν is in units of the shift.
    """
    index = tl.arange(0, SIDE)
    column = index[None, :]
    diagonal = index[:, None] == column
    T, T_low = two_sum(A, tl.where(takes_part[:, None] & takes_part[None, :], unit[:, None] * unit[None, :], 0.0))
    # The basic variables, y_i where `support` and else the surplus of condition i, are q + ν r.
    q, q_low = means, means_low
    r, r_low = tl.where(takes_part, -unit, 0.0), unit * 0.0
    support = index < 0
    reached = tl.min(tl.where(takes_part, means / unit, _INFINITY), axis=0)
    reached_low = reached * 0.0
    if FINE:
        multiplier_tolerance, pivot_tolerance = unit * _FINE_MULTIPLIER_TOLERANCE, reached_low + _FINE_PIVOT_TOLERANCE
        most = 16 * K + 64
    else:  # rounding may send it in circles: more pivots than ever needed, and the other arithmetic takes over
        multiplier_tolerance, pivot_tolerance = unit * _MULTIPLIER_TOLERANCE, reached_low + _PIVOT_TOLERANCE
        most = 4 * K + 16
    y, y_low, growth = means * 0.0, means * 0.0, means * 0.0
    step = reached_low
    iterations = tl.full([], 0, tl.int32)
    done = tl.full([], 0, tl.int32)

    while (done == 0) & (iterations < most):
        # ν where the next variable vanishes. A row that depends on those already in has no surplus but theirs.
        independent = tl.sum(tl.where(diagonal, T, 0.0), axis=1) > pivot_tolerance
        falls = takes_part & tl.where(support, r < 0.0, independent & (r < -multiplier_tolerance))
        kinks, kinks_low = divide(q, q_low, tl.where(falls, -r, 1.0), tl.where(falls, -r_low, 0.0), FINE)
        behind = less(kinks, kinks_low, reached, reached_low)
        kinks = tl.where(falls, tl.where(behind, reached, kinks), _INFINITY)
        kinks_low = tl.where(falls, tl.where(behind, reached_low, kinks_low), 0.0)
        kink = tl.min(kinks, axis=0)
        kink_low = tl.min(tl.where(kinks == kink, kinks_low, _INFINITY), axis=0)
        at = tl.min(tl.where((kinks == kink) & (kinks_low == kink_low), index, SIDE), axis=0)
        straight_on = kink == _INFINITY

        p, p_low = multiply(r, r_low, reached, reached_low, FINE)
        y, y_low = add(q, q_low, p, p_low, FINE)
        inside = support & (y > 0.0)
        y, y_low = tl.where(inside, y, 0.0), tl.where(inside, y_low, 0.0)
        growth, growth_low = tl.where(support, r, 0.0), tl.where(support, r_low, 0.0)
        step = _step_to(A, y, y_low, growth, growth_low, squared, squared_low, FINE)
        goal, goal_low = tl.where(straight_on, reached, kink), tl.where(straight_on, reached_low, kink_low)
        ahead, _ = add(goal, goal_low, -reached, -reached_low, FINE)
        begun = tl.max(support.to(tl.int32), axis=0) != 0
        done = tl.where(begun & (straight_on | (step <= ahead)), 1, 0)

        happens = done == 0
        at = tl.where(happens, at, 0)
        factor, factor_low, inverse, inverse_low = exchange_factors(T, T_low, at, happens, FINE)
        T, T_low = exchanged(T, T_low, at, happens, factor, factor_low, inverse, inverse_low, FINE)
        q, q_low = exchanged_column(q, q_low, at, happens, factor, factor_low, inverse, inverse_low, FINE)
        r, r_low = exchanged_column(r, r_low, at, happens, factor, factor_low, inverse, inverse_low, FINE)
        support = support ^ ((index == at) & happens)
        reached = tl.where(happens, kink, reached)
        reached_low = tl.where(happens, kink_low, reached_low)
        iterations += 1
    found = step < _INFINITY
    end = tl.where(found, y + tl.where(found, step, 0.0) * growth, growth)
    end = tl.where(tl.max(end, axis=0) > 0.0, end, growth)  # s = 0: p is where y would set out to
    return tl.maximum(end, 0.0), y, found


# --------------------------------------------------------------------------------------------------------------------
# The end of the path


@triton.jit
def _added(A, norms, x, radius):
    """x s / |g_x|; |g_x|; and whether that is as good as zero."""
    slope, slope_low = times_vector(A, x, x * 0.0, True)
    p, p_low = multiply(x, x * 0.0, slope, slope_low, True)
    squared, _ = fine_total(p, p_low, 0)
    squared = tl.maximum(squared, 0.0)
    norm = tl.sqrt(squared)
    factor = tl.where(norm > 0.0, radius / tl.where(norm > 0.0, norm, 1.0), 0.0)
    reach = tl.sum(norms * x, axis=0)
    return factor * x, norm, squared <= reach * reach * _BALANCED


@triton.jit
def _certified(A, norms, b, lengths, means, means_low, p, y, norm, radius, balanced, takes_part):
    """The gap f(p) − min_k ⟨d, g_k⟩, and whether it is nothing but the rounding of each row k; in double-double."""
    w = lengths + y
    slope, slope_low = times_vector(A, w, w * 0.0, True)
    x, x_low = multiply(p, p * 0.0, means, means_low, True)
    value, value_low = fine_total(x, x_low, 0)
    x, x_low = two_product(radius, norm)
    value, value_low = add(value, value_low, x, x_low, True)
    x, x_low = multiply(b, b * 0.0, value, value_low, True)
    excess, excess_low = add(x, x_low, -slope, -slope_low, True)
    # f(p) is known to the rounding of its longest rows, and what balances out to `_BALANCED` no better than that.
    reach = tl.sum(norms * w, axis=0)
    doubt = b * (tl.sum(norms * p, axis=0) * reach * _ROUNDING)
    tolerance = reach * tl.where(balanced, _BALANCED, _CERTIFICATE_TOLERANCE)
    holds = excess + excess_low + doubt <= norms * tolerance
    certified = tl.min(tl.where(takes_part, holds.to(tl.int32), 1), axis=0) != 0
    return tl.maximum(tl.max(tl.where(takes_part, excess / b, -_INFINITY), axis=0), 0.0), certified


@triton.jit
def _ended(A, norms, squares, unit, b, lengths, means, means_low, radius, end, kinked, found, takes_part):
    """p / b on the simplex, the gap, whether the conditions are certified, and whether gradients balance out in p."""
    p = tl.where(takes_part, on_simplex(end, unit, squares), 0.0) / b
    y, norm, balanced = _added(A, norms, p, radius)
    y = tl.where(balanced & (found == 0), kinked, y)
    gap, certified = _certified(A, norms, b, lengths, means, means_low, p, y, norm, radius, balanced, takes_part)
    return p, y, gap, certified, balanced


# --------------------------------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def _cagrad(
    gram, base, weights_out, gap_out, status_out, K: tl.constexpr, SIDE: tl.constexpr, C: tl.constexpr,
    CLIPPED: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SIDE)
    row, column = index[:, None], index[None, :]
    real = index < K
    diagonal = row == column
    entries = gram + problem * K * K
    both = (row < K) & (column < K)
    # Halved first: the sum of two of the largest numbers would overflow.
    M = tl.load(entries + row * K + column, mask=both, other=0.0) * 0.5
    M += tl.load(entries + column * K + row, mask=both, other=0.0) * 0.5
    v = tl.load(base + problem * K + index, mask=real, other=0.0)
    squares = tl.sum(tl.where(diagonal, M, 0.0), axis=1)
    finite = real & (tl.abs(squares) < _INFINITY) & (tl.abs(v) < _INFINITY)
    strange = tl.where(finite[None, :] & ((tl.abs(M) < _INFINITY) == 0), 1, 0)
    whole = finite & (tl.max(strange, axis=1) == 0)
    takes_part = whole & (squares > 0.0)
    pairs = takes_part[:, None] & takes_part[None, :]
    nothing = tl.max(takes_part.to(tl.int32), axis=0) == 0
    v = tl.where(tl.where(nothing, whole, takes_part), v, 0.0)
    sum_of_base, _ = fine_total(v, v * 0.0, 0)
    v = v / tl.where(sum_of_base > 0.0, sum_of_base, 1.0)

    # Scale by powers of two, exactly: the longest row to a length near 1, the others by b on top of that.
    exponents = tl.where(takes_part, exponent_of(tl.where(takes_part, squares, 1.0)), -4096)
    longest = tl.max(exponents, axis=0)
    longest = tl.where(nothing, 0, longest)
    apart = tl.where(takes_part, tl.minimum((longest - exponents) // 2, _WIDEST), 0)
    b = power_of_two(apart)
    unit = power_of_two(apart - tl.max(apart, axis=0))
    half = -longest // 2
    first, second = power_of_two(half), power_of_two(-longest - half)
    A = tl.where(pairs, M * (b * first)[:, None] * (b * second)[None, :], tl.where(diagonal, 1.0, 0.0))
    norms = tl.sqrt(tl.sum(tl.where(diagonal, A, 0.0), axis=1))
    squares = tl.where(takes_part, squares, _INFINITY)
    lengths = tl.where(takes_part, v / b, 0.0)

    # b = Mv, and s² = c² vᵀMv.
    means, means_low = times_vector(A, lengths, lengths * 0.0, True)
    p, p_low = multiply(lengths, lengths * 0.0, means, means_low, True)
    squared, squared_low = fine_total(p, p_low, 0)
    squared_low = tl.where(squared > 0.0, squared_low, 0.0)
    squared = tl.maximum(squared, 0.0)
    c = tl.full([], C, tl.float64)
    radius = c * tl.sqrt(squared)
    p, p_low = two_product(c, c)
    squared, squared_low = multiply(squared, squared_low, p, p_low, True)

    end, kinked, found = _followed(A, means, means_low, unit, squared, squared_low, takes_part, K, SIDE, False)
    p, y, gap, certified, balanced = _ended(
        A, norms, squares, unit, b, lengths, means, means_low, radius, end, kinked, found, takes_part
    )
    if certified == 0:
        end, kinked, found = _followed(A, means, means_low, unit, squared, squared_low, takes_part, K, SIDE, True)
        p, y, gap, certified, balanced = _ended(
            A, norms, squares, unit, b, lengths, means, means_low, radius, end, kinked, found, takes_part
        )
    if CLIPPED:
        y, _, also = _added(A, norms, tl.minimum(p, lengths), radius)
        balanced = balanced | also
    weights = tl.where(balanced | nothing, v, v + y * b)
    status = tl.where(certified, tl.where(balanced, _UNDECIDED, _OPTIMAL), _STALLED)
    status = tl.where(nothing, tl.where(tl.max(whole.to(tl.int32), axis=0) != 0, _ZERO, _NONFINITE), status)
    tl.store(weights_out + problem * K + index, weights, mask=real)
    tl.store(gap_out + problem, tl.where(nothing, 0.0, gap / first / second))
    tl.store(status_out + problem, status.to(tl.int64))


def cagrad(gram: Tensor, base: Tensor, c: float, clipped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, gap and status of CAGrad's direction or RACO's, one problem or many, in one launch.

    Args:
        gram: M, fp64 [..., K, K], contiguous, K ≤ 32, symmetric up to rounding (the mean of M and Mᵀ is used).
        base: v, fp64 [..., K], contiguous, > 0, up to a factor.
        c: radius of the ball around g₀ in units of ‖g₀‖, ≥ 0. Each value is compiled anew.
        clipped: RACO's.

    Returns:
        What `mogeo.geometry.exact_cagrad.conflict_averse` returns: the weights, fp64 [..., K]; the duality gap, fp64
        [...]; status, int64 [...].

    Raises:
        ValueError: another dtype or shape, or more objectives.
    """
    batch, count = gram.shape[:-2], gram.shape[-1]
    if gram.dtype != torch.float64 or gram.shape[-2:] != (count, count) or not 1 <= count <= MAX_OBJECTIVES:
        raise ValueError(
            f"gram {tuple(gram.shape)} of {gram.dtype}: this kernel takes fp64 [..., K, K], K ≤ {MAX_OBJECTIVES}"
        )
    if base.shape != gram.shape[:-1] or base.dtype != torch.float64:
        raise ValueError(f"weights {tuple(base.shape)} of {base.dtype}: pass fp64 [..., K] beside the Gram")
    for name, given in (("gram", gram), ("weights", base)):
        if not given.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    weights = torch.empty_like(base)
    gap = torch.empty(batch, dtype=torch.float64, device=gram.device)
    status = torch.empty(batch, dtype=torch.int64, device=gram.device)
    if gap.numel():
        launch(gram, base, weights, gap, status, c, clipped).run()
    return weights, gap, status


def launch(gram: Tensor, base: Tensor, weights: Tensor, gap: Tensor, status: Tensor, c: float, clipped: bool) -> Launch:
    """What `cagrad` launches."""
    count = gram.shape[-1]
    options: dict[str, Any] = {
        "K": count,
        "SIDE": square_side(count),
        "C": float(c),
        "CLIPPED": clipped,
        "num_warps": 8 if count > 16 else 4 if count > 8 else 1,  # with fewer, registers spill
        "enable_fp_fusion": False,
    }
    return Launch(_cagrad, (gap.numel(),), [gram, base, weights, gap, status], options)
