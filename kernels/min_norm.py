"""The min-norm point of a convex hull on the device: argmin over the simplex of αᵀ A α, exactly, in one launch.

Knows tensors only; arguments come checked, from `mogeo.geometry.ops`. A program solves a problem: it normalises the
Gram matrix, leaves out what is zero or not finite, pivots, certifies the result, and writes weights, gap, status and
iteration count to device memory. Nothing here needs the host.

Method: that of `mogeo.geometry.exact_min_norm`, where it is derived. With every row scaled by a power of two, so that
all norms lie between 1 and √2 of each other, and shifted by bbᵀ (a constant on the simplex, before the scaling b), the
optimality conditions are the linear complementarity problem w = Ay − b ≥ 0, y ≥ 0, yᵀw = 0, which principal pivoting
solves. Powers of two round nothing, so A is known to the last bit.

Arithmetic: fp64 first; fp32 is not enough. The optimality conditions are then evaluated in double-double (pairs of fp64
whose sum carries 106 bits), and where they do not hold, the same pivoting runs again in double-double. Its error terms
are exact only if no product is fused with a sum behind our back: launches turn fusion off, and ask for `tl.fma` where
they want it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogeo.kernels.double_double import add, divide, fine_total, less, multiply, subtract_product, two_product, two_sum
from mogeo.kernels.target import Launch, square_side

MAX_OBJECTIVES = 32

# Values of `status`: those of `mogeo.Status`.
_OPTIMAL = tl.constexpr(0)
_STALLED = tl.constexpr(1)
_ZERO = tl.constexpr(2)
_NONFINITE = tl.constexpr(3)
_NONPOSITIVE_LOSS = tl.constexpr(4)

# Relative size below which a multiplier counts as non-negative; and 1 − squared correlation with the rows already in
# the hull, below which a row depends on them. In fp64, and in double-double.
_MULTIPLIER_TOLERANCE = tl.constexpr(1e-14)
_PIVOT_TOLERANCE = tl.constexpr(1e-13)
_FINE_MULTIPLIER_TOLERANCE = tl.constexpr(1e-24)
_FINE_PIVOT_TOLERANCE = tl.constexpr(1e-25)
# KKT residual, in units of |g_i| Σ_j α_j |g_j|, up to which a result is certified as optimal.
_CERTIFICATE_TOLERANCE = tl.constexpr(1e-13)
# Bound on the relative rounding of a double-double sum of 32 products.
_ROUNDING = tl.constexpr(1e-28)
# Norms further apart than this power of two are treated as this far apart: their inverses must stay finite.
_WIDEST = tl.constexpr(1000)
_INFINITY = tl.constexpr(float("inf"))


# --------------------------------------------------------------------------------------------------------------------
# Powers of two


@triton.jit
def power_of_two(exponent):
    """2^exponent, for an integer exponent between −1022 and 1023."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(x):
    """e with 2^(e−1) ≤ x < 2^e, for x > 0 and finite."""
    small = x < 1e-300  # subnormal, perhaps: its exponent field says nothing
    bits = tl.where(small, x * 1.8014398509481984e16, x).to(tl.int64, bitcast=True)
    return (((bits >> 52) & 0x7FF) - 1022 - tl.where(small, 54, 0)).to(tl.int32)


# --------------------------------------------------------------------------------------------------------------------
# Pivoting: the tableau holds z = q + T u, u being the non-basic variables


@triton.jit
def exchange_factors(T, T_low, at, happens, FINE: tl.constexpr):
    """What the exchange of basic and non-basic variable `at` takes: column `at` over its pivot [SIDE], and 1 / pivot.

    Where nothing `happens`, these are anything.
    """
    index = tl.arange(0, T.shape[0])
    is_column = index[None, :] == at
    slope = tl.sum(tl.where(is_column, T, 0.0), axis=1)
    slope_low = tl.sum(tl.where(is_column, T_low, 0.0), axis=1)
    pivot = tl.where(happens, tl.sum(tl.where(index == at, slope, 0.0), axis=0), 1.0)
    pivot_low = tl.where(happens, tl.sum(tl.where(index == at, slope_low, 0.0), axis=0), 0.0)
    one = tl.full([], 1.0, tl.float64)
    inverse, inverse_low = divide(one, one * 0.0, pivot, pivot_low, FINE)
    factor, factor_low = multiply(slope, slope_low, inverse, inverse_low, FINE)
    return factor, factor_low, inverse, inverse_low


@triton.jit
def exchanged(T, T_low, at, happens, factor, factor_low, inverse, inverse_low, FINE: tl.constexpr):
    """T after the exchange of basic and non-basic variable `at`, where that `happens`."""
    index = tl.arange(0, T.shape[0])
    on_row, on_column = index[:, None] == at, index[None, :] == at
    entries = tl.sum(tl.where(on_row, T, 0.0), axis=0)
    entries_low = tl.sum(tl.where(on_row, T_low, 0.0), axis=0)
    turned, turned_low = multiply(-entries, -entries_low, inverse, inverse_low, FINE)
    new, new_low = subtract_product(
        T, T_low, factor[:, None], factor_low[:, None], entries[None, :], entries_low[None, :], FINE
    )
    new = tl.where(on_row, tl.where(on_column, inverse, turned[None, :]), tl.where(on_column, factor[:, None], new))
    new_low = tl.where(
        on_row,
        tl.where(on_column, inverse_low, turned_low[None, :]),
        tl.where(on_column, factor_low[:, None], new_low),
    )
    return tl.where(happens, new, T), tl.where(happens, new_low, T_low)


@triton.jit
def exchanged_column(q, q_low, at, happens, factor, factor_low, inverse, inverse_low, FINE: tl.constexpr):
    """A column beside T, such as q, after the same exchange."""
    here = tl.arange(0, q.shape[0]) == at
    start = tl.sum(tl.where(here, q, 0.0), axis=0)
    start_low = tl.sum(tl.where(here, q_low, 0.0), axis=0)
    turned, turned_low = multiply(-start, -start_low, inverse, inverse_low, FINE)
    new, new_low = subtract_product(q, q_low, factor, factor_low, start, start_low, FINE)
    new, new_low = tl.where(here, turned, new), tl.where(here, turned_low, new_low)
    return tl.where(happens, new, q), tl.where(happens, new_low, q_low)


# --------------------------------------------------------------------------------------------------------------------
# The linear complementarity problem


@triton.jit
def pivoted(A, A_low, q, q_low, scale, takes_part, K: tl.constexpr, SIDE: tl.constexpr, FINE: tl.constexpr):
    """y [SIDE] with w = A y + q ≥ 0, y ≥ 0, yᵀw = 0, for A with diagonal near 1, positive semi-definite up to rounding.

    Each w_i is measured in units of scale_i > 0.

    The tableau holds z = q + T u: u are the non-basic variables (zero but for the driving one), z the basic ones.
    Variable i is y_i where `support`, else w_i.
    """
    index = tl.arange(0, SIDE)
    row, column = index[:, None], index[None, :]
    T, T_low = A, A_low
    support = index < 0
    dependent = takes_part == 0
    driving = tl.full([], -1, tl.int32)
    zero = tl.full([], 0.0, tl.float64)
    reached, reached_low = zero, zero  # value that the driving variable has reached behind earlier blocks
    iterations = tl.full([], 0, tl.int32)
    if FINE:
        multiplier_tolerance, pivot_tolerance = zero + _FINE_MULTIPLIER_TOLERANCE, zero + _FINE_PIVOT_TOLERANCE
        most = 16 * K + 64
    else:  # rounding may send it in circles: more pivots than ever needed, and the other arithmetic takes over
        multiplier_tolerance, pivot_tolerance = zero + _MULTIPLIER_TOLERANCE, zero + _PIVOT_TOLERANCE
        most = 4 * K + 16
    done = tl.full([], 0, tl.int32)

    while (done == 0) & (iterations < most):
        # Which w is most negative: its variable drives, unless one is on its way already.
        ratio = tl.where(support | dependent | (q >= -multiplier_tolerance * scale), _INFINITY, q / scale)
        worst = tl.min(ratio, axis=0)
        chosen = tl.min(tl.where(ratio == worst, index, SIDE), axis=0)
        fresh = driving < 0
        done = tl.where(fresh & (worst == _INFINITY), 1, 0)
        reached = tl.where(fresh, 0.0, reached)
        reached_low = tl.where(fresh, 0.0, reached_low)
        driving = tl.where(fresh, tl.where(done != 0, 0, chosen), driving)

        # How far it may go: until its own w vanishes, or until a basic y does.
        is_driving = index == driving
        slope = tl.sum(tl.where(column == driving, T, 0.0), axis=1)
        slope_low = tl.sum(tl.where(column == driving, T_low, 0.0), axis=1)
        pivot = tl.sum(tl.where(is_driving, slope, 0.0), axis=0)
        pivot_low = tl.sum(tl.where(is_driving, slope_low, 0.0), axis=0)
        start = tl.sum(tl.where(is_driving, q, 0.0), axis=0)
        start_low = tl.sum(tl.where(is_driving, q_low, 0.0), axis=0)
        blocking = support & (slope < 0.0)
        positive = q > 0.0
        block, block_low = divide(
            tl.where(positive, q, 0.0), tl.where(positive, q_low, 0.0),
            tl.where(blocking, -slope, 1.0), tl.where(blocking, -slope_low, 0.0), FINE,
        )  # fmt: skip
        behind = less(block, block_low, reached, reached_low)
        block = tl.where(blocking, tl.where(behind, reached, block), _INFINITY)
        block_low = tl.where(blocking, tl.where(behind, reached_low, block_low), 0.0)
        nearest = tl.min(block, axis=0)
        nearest_low = tl.min(tl.where(block == nearest, block_low, _INFINITY), axis=0)
        blocker = tl.min(tl.where((block == nearest) & (block_low == nearest_low), index, SIDE), axis=0)
        blocked = nearest < _INFINITY

        independent = pivot > pivot_tolerance
        goal, goal_low = divide(
            -start, -start_low, tl.where(independent, pivot, 1.0), tl.where(independent, pivot_low, 0.0), FINE
        )
        enters = independent & (less(nearest, nearest_low, goal, goal_low) == 0)
        # A dependent row that nothing blocks: the hull already holds it, and entering would only amplify rounding.
        stuck = (enters == 0) & (blocked == 0)
        exchange = (done == 0) & (stuck == 0)

        # Exchange basic and non-basic variable `at`, as `exchanged` does: in this order, nothing spills at K = 16.
        at = tl.where(enters, driving, tl.where(blocked, blocker, 0))
        here = index == at
        slope = tl.sum(tl.where(column == at, T, 0.0), axis=1)
        slope_low = tl.sum(tl.where(column == at, T_low, 0.0), axis=1)
        entries = tl.sum(tl.where(row == at, T, 0.0), axis=0)
        entries_low = tl.sum(tl.where(row == at, T_low, 0.0), axis=0)
        pivot = tl.where(exchange, tl.sum(tl.where(here, slope, 0.0), axis=0), 1.0)
        pivot_low = tl.where(exchange, tl.sum(tl.where(here, slope_low, 0.0), axis=0), 0.0)
        start = tl.sum(tl.where(here, q, 0.0), axis=0)
        start_low = tl.sum(tl.where(here, q_low, 0.0), axis=0)
        inverse, inverse_low = divide(zero + 1.0, zero, pivot, pivot_low, FINE)
        factor, factor_low = multiply(slope, slope_low, inverse, inverse_low, FINE)
        turned, turned_low = multiply(-entries, -entries_low, inverse, inverse_low, FINE)
        turned_start, turned_start_low = multiply(-start, -start_low, inverse, inverse_low, FINE)
        new, new_low = subtract_product(
            T, T_low, factor[:, None], factor_low[:, None], entries[None, :], entries_low[None, :], FINE
        )
        new_q, new_q_low = subtract_product(q, q_low, factor, factor_low, start, start_low, FINE)
        on_row, on_column = row == at, column == at
        new = tl.where(on_row, tl.where(on_column, inverse, turned[None, :]), tl.where(on_column, factor[:, None], new))
        new_low = tl.where(
            on_row,
            tl.where(on_column, inverse_low, turned_low[None, :]),
            tl.where(on_column, factor_low[:, None], new_low),
        )
        T = tl.where(exchange, new, T)
        T_low = tl.where(exchange, new_low, T_low)
        q = tl.where(exchange, tl.where(here, turned_start, new_q), q)
        q_low = tl.where(exchange, tl.where(here, turned_start_low, new_q_low), q_low)
        support = support ^ (here & exchange)
        dependent = dependent | ((index == driving) & stuck & (done == 0))

        settled = enters | stuck
        reached = tl.where(settled, 0.0, nearest)
        reached_low = tl.where(settled, 0.0, nearest_low)
        driving = tl.where(settled, -1, driving)
        iterations += 1
    inside = support & (q > 0.0)
    return tl.where(inside, q, 0.0), iterations


@triton.jit
def on_simplex(y, b, norms):
    """α = by / Σ by. Rounding may have hidden every row from the others: then the shortest one."""
    index = tl.arange(0, y.shape[0])
    raw = y * b
    shortest = tl.min(norms, axis=0)
    first = tl.min(tl.where(norms == shortest, index, y.shape[0]), axis=0)
    nothing = tl.max(raw, axis=0) == 0.0
    raw = tl.where(nothing, tl.where(index == first, 1.0, 0.0), raw)
    total, _ = fine_total(raw, raw * 0.0, 0)
    return raw / total


@triton.jit
def _certified(A, weights, b, takes_part):
    """The gap αᵀMα − min_i (Mα)_i, and whether (Mα)_i ≥ αᵀMα for every i to the rounding of row i; in double-double.

    In units where the shortest row is about 1 long; `A` is scaled but not shifted: M_ij = A_ij / (b_i b_j).
    """
    scaled = weights / b  # exact
    p, p_low = two_product(A, scaled[None, :] + A * 0.0)
    slope, slope_low = fine_total(p, p_low, 1)  # (Mα)_i b_i
    p, p_low = multiply(slope, slope_low, scaled, scaled * 0.0, True)
    value, value_low = fine_total(p, p_low, 0)
    index = tl.arange(0, weights.shape[0])
    norms = tl.sqrt(tl.sum(tl.where(index[:, None] == index[None, :], A, 0.0), axis=1))  # |g_i| b_i
    reach = tl.sum(norms * scaled, axis=0)
    # (αᵀMα − (Mα)_i) b_i ≤ tolerance · |g_i| b_i · reach
    p, p_low = multiply(b, b * 0.0, value, value_low, True)
    excess, excess_low = add(p, p_low, -slope, -slope_low, True)
    doubt = b * (reach * reach * _ROUNDING)
    holds = excess + excess_low + doubt <= norms * reach * _CERTIFICATE_TOLERANCE
    certified = tl.min(tl.where(takes_part, holds.to(tl.int32), 1), axis=0) != 0
    gaps = tl.where(takes_part, excess / b + excess_low / b, 0.0)
    return tl.maximum(tl.max(gaps, axis=0), 0.0), certified


# --------------------------------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def _normalizers(squares, losses, positive, LOSS: tl.constexpr, NORM: tl.constexpr, POWER: tl.constexpr):
    """What divides each gradient: (L^LOSS ‖g‖^NORM)^POWER; 1 where there is no gradient to divide."""
    base = squares * 0.0 + 1.0
    if LOSS:
        base = losses
    if NORM:
        base = base * tl.sqrt(tl.where(positive, squares, 1.0))
    base = tl.where(positive, base, 1.0)
    if POWER == 1.0:
        result = base
    else:
        result = tl.exp(tl.log(base) * POWER)
    return result


@triton.jit
def _min_norm(
    gram, losses, absent, weights_out, gap_out, status_out, iterations_out, nonfinite_out,
    K: tl.constexpr, SIDE: tl.constexpr, LOSSES: tl.constexpr, ABSENT: tl.constexpr, LOSS: tl.constexpr,
    NORM: tl.constexpr, POWER: tl.constexpr, NORMALIZED: tl.constexpr, PROPAGATE: tl.constexpr,
    ITERATIONS: tl.constexpr, NONFINITE: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SIDE)
    row, column = index[:, None], index[None, :]
    real = index < K
    diagonal = row == column
    entries = gram + problem * K * K
    both = (row < K) & (column < K)
    # Halved first: the sum of two of the largest numbers would overflow.
    M = tl.load(entries + row * K + column, mask=both, other=0.0).to(tl.float64) * 0.5
    M += tl.load(entries + column * K + row, mask=both, other=0.0).to(tl.float64) * 0.5
    squares = tl.sum(tl.where(diagonal, M, 0.0), axis=1)

    present = real
    if ABSENT:
        present = real & (tl.load(absent + problem * K + index, mask=real, other=1) == 0)
    finite = present & (tl.abs(squares) < _INFINITY)
    L = squares * 0.0 + 1.0
    if LOSSES:
        L = tl.load(losses + problem * K + index, mask=real, other=1.0).to(tl.float64)
        finite = finite & (tl.abs(L) < _INFINITY)
    # What stands beside a row left out may be anything; between rows that are finite, nothing else may be.
    strange = tl.where(finite[None, :] & ((tl.abs(M) < _INFINITY) == 0), 1, 0)
    whole = finite & (tl.max(strange, axis=1) == 0)
    takes_part = whole & (squares > 0.0)
    bad_loss = index < 0
    if LOSS:
        bad_loss = takes_part & (L <= 0.0)
        takes_part = takes_part & (bad_loss == 0)
    pairs = takes_part[:, None] & takes_part[None, :]

    n = _normalizers(squares, L, takes_part, LOSS, NORM, POWER)
    M = tl.where(pairs, M / (n[:, None] * n[None, :]), 0.0)
    squares = tl.sum(tl.where(diagonal, M, 0.0), axis=1)
    # Normalisation may have under- or overflowed: such a row has nothing left to say.
    sound = takes_part & (squares > 0.0) & (squares < _INFINITY)
    takes_part = sound
    pairs = takes_part[:, None] & takes_part[None, :]
    M = tl.where(pairs, M, 0.0)

    # Scale by powers of two, exactly: the shortest row to a length near 1, the others by b on top of that.
    exponents = tl.where(takes_part, exponent_of(tl.where(takes_part, squares, 1.0)), 4096)
    shortest = tl.min(exponents, axis=0)
    shortest = tl.where(shortest == 4096, 0, shortest)
    apart = tl.minimum((exponents - shortest) // 2, _WIDEST)
    b = power_of_two(-tl.where(takes_part, apart, 0))
    half = -shortest // 2
    first, second = power_of_two(half), power_of_two(-shortest - half)
    plain = tl.where(pairs, M * (b * first)[:, None] * (b * second)[None, :], tl.where(diagonal, 1.0, 0.0))
    norms = tl.where(takes_part, squares, _INFINITY)

    # Shifting by bbᵀ makes A definite as soon as the gradients are affinely independent.
    shift = tl.where(pairs, b[:, None] * b[None, :], 0.0)
    A, A_low = two_sum(plain, shift)
    y, iterations = pivoted(A, A_low, -b, b * 0.0, b, takes_part, K, SIDE, False)
    weights = tl.where(takes_part, on_simplex(y, b, norms), 0.0)
    gap, certified = _certified(plain, weights, b, takes_part)
    if certified == 0:
        y, more = pivoted(A, A_low, -b, b * 0.0, b, takes_part, K, SIDE, True)
        weights = tl.where(takes_part, on_simplex(y, b, norms), 0.0)
        gap, certified = _certified(plain, weights, b, takes_part)
        iterations += more
    gap = gap / first / second

    count = tl.sum(takes_part.to(tl.int32), axis=0)
    n_zero = tl.sum((whole & (bad_loss == 0)).to(tl.int32), axis=0)
    status = tl.where(certified, _OPTIMAL, _STALLED)
    empty = count == 0
    status = tl.where(empty, tl.where(n_zero > 0, _ZERO, _NONFINITE), status)
    uniform = tl.where(whole & (bad_loss == 0), 1.0 / tl.maximum(n_zero, 1).to(tl.float64), 0.0)
    weights = tl.where(empty, uniform, weights)
    gap = tl.where(empty, 0.0, gap)
    if LOSS:
        status = tl.where(tl.max(bad_loss.to(tl.int32), axis=0) != 0, _NONPOSITIVE_LOSS, status)
    if NORMALIZED:
        weights = tl.where(weights != 0.0, weights / n, 0.0)
    nonfinite = present & (finite == 0)
    if PROPAGATE:
        weights = tl.where(tl.max(nonfinite.to(tl.int32), axis=0) != 0, float("nan"), weights)
    tl.store(weights_out + problem * K + index, weights, mask=real)
    tl.store(gap_out + problem, gap)
    tl.store(status_out + problem, status.to(tl.int64))
    if ITERATIONS:
        tl.store(iterations_out + problem, iterations.to(tl.int64))
    if NONFINITE:
        tl.store(nonfinite_out + problem * K + index, nonfinite.to(tl.uint8), mask=real)


# --------------------------------------------------------------------------------------------------------------------
# Launch

Normalization = Literal["none", "l2", "loss", "loss+"]


def min_norm(
    gram: Tensor,
    losses: Tensor | None = None,
    *,
    normalize: Normalization = "none",
    power: float = 1.0,
    apply_to: Literal["raw", "normalized"] = "raw",
    absent: Tensor | None = None,
    propagate: bool = False,
    nonfinite: Tensor | None = None,
    iterations: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights on the raw gradients by the MGDA family, one problem or many, in one launch.

    α minimises αᵀ[M_ij / (n_i n_j)]α over the simplex; the normalisers n, and whether w = α or w = α / n, are those of
    `mogeo.weightings.MGDA`. Left out of the hull, with weight 0: gradients that are zero or not finite, objectives
    whose loss is not finite, and those that are `absent`.

    Args:
        gram: M, fp64 [..., K, K], contiguous, K ≤ 32, symmetric up to rounding (the mean of M and Mᵀ is used).
        losses: L, fp64 [..., K], contiguous. Needed by the normalisations "loss" and "loss+".
        normalize: n_i = 1, ‖g_i‖^power, L_i^power or (L_i ‖g_i‖)^power.
        power: exponent of the normaliser.
        apply_to: "raw": w = α; "normalized": w = α / n.
        absent: bool [..., K], contiguous: objectives that take no part, and are not counted as non-finite.
        propagate: make all weights of a problem NaN if one of its objectives is not finite.
        nonfinite: bool [..., K] to write: which present objectives have a loss or gradient that is not finite.
        iterations: int64 [...] to write: pivots, of both arithmetics.

    Returns:
        weights, fp64 [..., K]; the duality gap, fp64 [...], in units of the normalised Gram matrix; status, int64
        [...], a `mogeo.Status`. A loss ≤ 0 that would divide gives `NONPOSITIVE_LOSS`, and its objective weight 0.

    Raises:
        ValueError: another dtype or shape, more objectives, or a normalisation without its losses.
    """
    batch, count = gram.shape[:-2], gram.shape[-1]
    if gram.dtype != torch.float64 or gram.shape[-2:] != (count, count) or not 1 <= count <= MAX_OBJECTIVES:
        raise ValueError(
            f"gram {tuple(gram.shape)} of {gram.dtype}: this kernel takes fp64 [..., K, K], K ≤ {MAX_OBJECTIVES}; "
            "mogeo.min_norm_weights takes all others too"
        )
    if losses is None and normalize in ("loss", "loss+"):
        raise ValueError(f"normalize={normalize!r} divides by the losses: pass them")
    for name, given in (("gram", gram), ("losses", losses), ("absent", absent)):
        if given is not None and not given.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    weights = torch.empty(*batch, count, dtype=torch.float64, device=gram.device)
    gap = torch.empty(batch, dtype=torch.float64, device=gram.device)
    status = torch.empty(batch, dtype=torch.int64, device=gram.device)
    if gap.numel():
        outputs = (weights, gap, status, iterations, nonfinite)
        launch(gram, losses, absent, outputs, normalize, power, apply_to, propagate).run()
    return weights, gap, status


def launch(
    gram: Tensor,
    losses: Tensor | None,
    absent: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    normalize: Normalization,
    power: float,
    apply_to: Literal["raw", "normalized"],
    propagate: bool,
) -> Launch:
    """What `min_norm` launches."""
    count = gram.shape[-1]
    weights, gap, status, iterations, nonfinite = outputs
    arguments = [gram, losses, _bytes(absent), weights, gap, status, iterations, _bytes(nonfinite)]
    options: dict[str, Any] = {
        "K": count,
        "SIDE": square_side(count),
        "LOSSES": losses is not None,
        "ABSENT": absent is not None,
        "LOSS": normalize in ("loss", "loss+"),
        "NORM": normalize in ("l2", "loss+"),
        "POWER": float(power),
        "NORMALIZED": apply_to == "normalized",
        "PROPAGATE": propagate,
        "ITERATIONS": iterations is not None,
        "NONFINITE": nonfinite is not None,
        "num_warps": 4 if count > 16 else 1,
        "enable_fp_fusion": False,
    }
    return Launch(_min_norm, (gap.numel(),), arguments, options)


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)
