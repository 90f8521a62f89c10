"""The direction nearest to a given one that hurts no objective, from the Gram matrix, in one launch.

Knows tensors only; arguments come checked, from `mogeo.geometry.ops`. The problem, s = M(w + μ) ≥ 0, μ ≥ 0, μᵀs = 0, is
derived in `mogeo.geometry.exact_harmless`, and so is the bound on the distance to the nearest direction; the pivoting
and its two arithmetics are those of `mogeo.kernels.min_norm`. Here too rows are scaled by powers of two, which round
nothing, and the conditions are certified in double-double.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogeo.kernels.double_double import times_vector, two_sum
from mogeo.kernels.min_norm import MAX_OBJECTIVES, exponent_of, pivoted, power_of_two
from mogeo.kernels.target import Launch, square_side

# Values of `status`: those of `mogeo.Status`.
_OPTIMAL = tl.constexpr(0)
_STALLED = tl.constexpr(1)
_ZERO = tl.constexpr(2)
_NONFINITE = tl.constexpr(3)
_UNDECIDED = tl.constexpr(5)

#: How far an entry M_ij may be from ⟨g_i, g_j⟩, in units of |g_i| |g_j|: sums of fp64 products.
ROUNDING = 2.0**-50
# Residual, in units of |g_k| Σ_j (|w_j| + μ_j) |g_j|, up to which the conditions are certified to hold.
_CERTIFICATE_TOLERANCE = tl.constexpr(1e-13)
# Distance from the nearest direction, in units of |d|, up to which a result is optimal.
_NEAREST_TOLERANCE = tl.constexpr(1e-3)
_LAST_RIDGE = tl.constexpr(1e-3)
_WIDEST = tl.constexpr(1000)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _unit_slopes(A, lengths, y, norms):
    """s_k / |g_k|, and the reach Σ_j (|w_j| + μ_j) |g_j|, which is what their rounding is measured in."""
    x, x_low = two_sum(lengths, y)
    slope, _ = times_vector(A, x, x_low, True)
    return slope / norms, tl.sum(norms * (tl.abs(lengths) + y), axis=0)


@triton.jit
def _holds(slopes, y, takes_part, allowed):
    """Whether s_k ≥ 0, and s_k = 0 where μ_k > 0, up to `allowed` |g_k|."""
    holds = (slopes >= -allowed) & ((y == 0.0) | (slopes <= allowed))
    return tl.min(tl.where(takes_part, holds.to(tl.int32), 1), axis=0) != 0


# --------------------------------------------------------------------------------------------------------------------
# How far from the nearest direction: `_is_nearest` of `mogeo.geometry.exact_harmless`


@triton.jit
def _inverse(C, chosen, ridge, K: tl.constexpr, SIDE: tl.constexpr):
    """Trace and row sums of the inverse of C + `ridge` on the chosen rows; the trace is infinite if not definite."""
    index = tl.arange(0, SIDE)
    row, column = index[:, None], index[None, :]
    pairs = chosen[:, None] & chosen[None, :]
    T = tl.where(pairs, C, 0.0) + tl.where(row == column, tl.where(chosen, ridge, 1.0)[:, None], 0.0)
    definite = tl.full([], 1, tl.int32)
    for at in range(K):
        on_row, on_column = row == at, column == at
        slope = tl.sum(tl.where(on_column, T, 0.0), axis=1)
        entries = tl.sum(tl.where(on_row, T, 0.0), axis=0)
        pivot = tl.sum(tl.where(index == at, slope, 0.0), axis=0)
        definite = tl.where(pivot > 0.0, definite, 0)
        inverse = 1.0 / tl.where(pivot > 0.0, pivot, 1.0)
        new = T - (slope * inverse)[:, None] * entries[None, :]
        new = tl.where(on_column, -(slope * inverse)[:, None], new)
        T = tl.where(on_row, tl.where(on_column, inverse, (entries * inverse)[None, :]), new)
    trace = tl.sum(tl.sum(tl.where((row == column) & pairs, T, 0.0), axis=1), axis=0)
    return tl.where(definite != 0, trace, _INFINITY), tl.sum(tl.where(pairs, T, 0.0), axis=1)


@triton.jit
def _is_nearest(
    C, total, pushes, slopes, reach, near, takes_part, ROUNDING: tl.constexpr, ROOT: tl.constexpr, K: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """Whether the nearest direction is within `near` of Gᵀ(w + μ), for all rows with this Gram up to rounding.

    Args:
        C: cosines.
        total, pushes: (w_k + μ_k) |g_k| and μ_k |g_k|.
        slopes, reach: of `_unit_slopes`.
    """
    doubt = reach * ROUNDING
    pushed = pushes > 0.0
    residuals = tl.where(pushed, tl.abs(slopes), tl.maximum(-slopes, 0.0)) + doubt
    bearing = takes_part & (pushed | (slopes <= 2 * doubt))
    nearest = tl.full([], 0, tl.int32)
    going = tl.full([], 1, tl.int32)
    while going != 0:
        trace, _ = _inverse(C, bearing, 0.0, K, SIDE)
        error = tl.sqrt(2 * trace * tl.sum(tl.where(bearing, residuals * residuals, 0.0), axis=0))
        within = takes_part & (pushed | (slopes <= 2 * doubt + error))
        sound = (trace * (8 * K * ROUNDING) <= 1.0) & (error <= near)
        grown = tl.max((within ^ bearing).to(tl.int32), axis=0) != 0
        nearest = tl.where(sound & (grown == 0), 1, 0)
        going = tl.where(sound & grown, 1, 0)
        bearing = within
    nearest = tl.where(tl.sum(total * slopes, axis=0) + doubt * reach <= near * near, 1, nearest)
    if nearest == 0:
        bearing = takes_part & (pushed | (slopes <= doubt + near))
        trace, way = _inverse(C, bearing, ROOT, K, SIDE)
        span = tl.sum(tl.abs(way), axis=0)
        margins = tl.sum(tl.where(bearing[:, None], C * way[None, :], 0.0), axis=1)
        margin = tl.min(tl.where(bearing, margins, _INFINITY), axis=0) - span * ROUNDING
        usable = (trace < _INFINITY) & (margin > 0.0)
        step = tl.maximum(tl.max(tl.where(takes_part, -slopes, 0.0), axis=0), 0.0) + doubt
        step = step / tl.where(usable, margin, 1.0)
        square = step * step * (tl.sum(margins * way, axis=0) + span * span * ROUNDING)
        push = tl.sum(pushes, axis=0)
        away = tl.abs(tl.sum(pushes * margins, axis=0)) + span * push * ROUNDING
        still = tl.sum(pushes * tl.abs(slopes), axis=0) + doubt * push
        gap = 2 * still + 2 * step * away + square
        nearest = tl.where(usable & (gap <= near * near) & (square <= near * near), 1, 0)
    return nearest != 0


# --------------------------------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def _descent(
    gram, weights, out, correction_out, status_out, K: tl.constexpr, SIDE: tl.constexpr, ROUNDING: tl.constexpr,
    ROOT: tl.constexpr, RIDGE: tl.constexpr,
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
    w = tl.load(weights + problem * K + index, mask=real, other=0.0)
    squares = tl.sum(tl.where(diagonal, M, 0.0), axis=1)
    finite = real & (tl.abs(squares) < _INFINITY) & (tl.abs(w) < _INFINITY)
    strange = tl.where(finite[None, :] & ((tl.abs(M) < _INFINITY) == 0), 1, 0)
    whole = finite & (tl.max(strange, axis=1) == 0)
    takes_part = whole & (squares > 0.0)
    pairs = takes_part[:, None] & takes_part[None, :]

    # Scale by powers of two, exactly: the longest row to a length near 1, the others by b on top of that.
    exponents = tl.where(takes_part, exponent_of(tl.where(takes_part, squares, 1.0)), -4096)
    longest = tl.max(exponents, axis=0)
    longest = tl.where(longest == -4096, 0, longest)
    apart = tl.minimum((longest - exponents) // 2, _WIDEST)
    b = power_of_two(tl.where(takes_part, apart, 0))
    half = -longest // 2
    first, second = power_of_two(half), power_of_two(-longest - half)
    A = tl.where(pairs, M * (b * first)[:, None] * (b * second)[None, :], tl.where(diagonal, 1.0, 0.0))
    norms = tl.sqrt(tl.sum(tl.where(diagonal, A, 0.0), axis=1))
    lengths = tl.where(takes_part, w / b, 0.0)
    # The weights too: their squares must stay finite.
    most = tl.max(tl.abs(lengths), axis=0)
    size = tl.minimum(tl.maximum(exponent_of(tl.where(most > 0.0, most, 1.0)), -_WIDEST), _WIDEST)
    lengths = lengths * power_of_two(-size)

    y = w * 0.0
    slopes, reach = _unit_slopes(A, lengths, y, norms)
    certified = _holds(slopes, y, takes_part, reach * _CERTIFICATE_TOLERANCE)
    beyond_doubt = tl.min(tl.where(takes_part, slopes, _INFINITY), axis=0) >= reach * ROUNDING
    decided = certified & beyond_doubt
    if decided == 0:
        squared = tl.sum(lengths * norms * slopes, axis=0)  # |d|²
        near = tl.maximum(tl.sqrt(tl.maximum(squared, 0.0)) * _NEAREST_TOLERANCE, reach * (4 * ROOT))
        if certified == 0:
            slope, slope_low = times_vector(A, lengths, lengths * 0.0, True)
            scale = w * 0.0 + tl.where(reach > 0.0, reach, 1.0)
            y, _ = pivoted(A, A * 0.0, slope, slope_low, scale, takes_part, K, SIDE, False)
            slopes, reach = _unit_slopes(A, lengths, y, norms)
            certified = _holds(slopes, y, takes_part, reach * _CERTIFICATE_TOLERANCE)
            if certified == 0:
                y, _ = pivoted(A, A * 0.0, slope, slope_low, scale, takes_part, K, SIDE, True)
                slopes, reach = _unit_slopes(A, lengths, y, norms)
                certified = _holds(slopes, y, takes_part, reach * _CERTIFICATE_TOLERANCE)
        C = A / norms[:, None] / norms[None, :]
        if certified:
            decided = _is_nearest(
                C, (lengths + y) * norms, y * norms, slopes, reach, near, takes_part, ROUNDING, ROOT, K, SIDE
            )
        if decided == 0:  # a ridge on the cosines' diagonal, as in `_ridged` there
            slope, slope_low = times_vector(A, lengths, lengths * 0.0, True)
            scale = w * 0.0 + tl.where(reach > 0.0, reach, 1.0)
            ridged = y  # carried before the scalars: the other way round, Triton 3.7.1 fails to compile the loop
            ridge = tl.full([], RIDGE, tl.float64)
            enough = tl.full([], 0, tl.int32)
            while enough == 0:
                steep, steep_low = two_sum(A, tl.where(diagonal, A * ridge, 0.0))
                ridged, _ = pivoted(steep, steep_low, slope, slope_low, scale, takes_part, K, SIDE, False)
                slopes, reach = _unit_slopes(A, lengths, ridged, norms)
                last = certified | (ridge > _LAST_RIDGE / 10)
                enough = tl.where(last | _holds(slopes, ridged, takes_part, reach * (2 * ridge)), 1, 0)
                ridge *= 10.0
            moved = y - ridged
            slope, _ = times_vector(A, moved, moved * 0.0, True)
            span = tl.sum(tl.abs(moved) * norms, axis=0)
            same = tl.sum(moved * slope, axis=0) + span * span * ROUNDING <= near * near
            y = tl.where(certified & same, y, ridged)
    correction = tl.where(takes_part, y * power_of_two(size) * b, 0.0)
    status = tl.where(decided, _OPTIMAL, tl.where(certified, _UNDECIDED, _STALLED))
    nothing = tl.max(takes_part.to(tl.int32), axis=0) == 0
    status = tl.where(nothing, tl.where(tl.max(whole.to(tl.int32), axis=0) != 0, _ZERO, _NONFINITE), status)
    tl.store(out + problem * K + index, w + correction, mask=real)
    tl.store(correction_out + problem * K + index, correction, mask=real)
    tl.store(status_out + problem, status.to(tl.int64))


def descent(gram: Tensor, weights: Tensor, rounding: float = ROUNDING) -> tuple[Tensor, Tensor, Tensor]:
    """w + μ, μ and status of the direction nearest to Gᵀw that hurts no objective, one problem or many, in one launch.

    Args:
        gram: M, fp64 [..., K, K], contiguous, K ≤ 32, symmetric up to rounding (the mean of M and Mᵀ is used).
        weights: w, fp64 [..., K], contiguous.
        rounding: ε with |M_ij − ⟨g_i, g_j⟩| ≤ ε |g_i| |g_j|, > 0 and < 1. Each value is compiled anew.

    Returns:
        fp64 [..., K] twice, and int64 [...], a `mogeo.Status`.

    Raises:
        ValueError: another dtype or shape, or more objectives.
    """
    batch, count = gram.shape[:-2], gram.shape[-1]
    if gram.dtype != torch.float64 or gram.shape[-2:] != (count, count) or not 1 <= count <= MAX_OBJECTIVES:
        raise ValueError(
            f"gram {tuple(gram.shape)} of {gram.dtype}: this kernel takes fp64 [..., K, K], K ≤ {MAX_OBJECTIVES}; "
            "mogeo.descent_weights takes all others too"
        )
    if weights.shape != gram.shape[:-1] or weights.dtype != torch.float64:
        raise ValueError(f"weights {tuple(weights.shape)} of {weights.dtype}: pass fp64 [..., K] beside the Gram")
    for name, given in (("gram", gram), ("weights", weights)):
        if not given.is_contiguous():
            raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")
    corrected, correction = torch.empty_like(weights), torch.empty_like(weights)
    status = torch.empty(batch, dtype=torch.int64, device=gram.device)
    if status.numel():
        launch(gram, weights, corrected, correction, status, rounding).run()
    return corrected, correction, status


def launch(
    gram: Tensor,
    weights: Tensor,
    corrected: Tensor,
    correction: Tensor,
    status: Tensor,
    rounding: float = ROUNDING,
) -> Launch:
    """What `descent` launches."""
    count = gram.shape[-1]
    options: dict[str, Any] = {
        "K": count,
        "SIDE": square_side(count),
        "ROUNDING": rounding,
        "ROOT": rounding**0.5,
        "RIDGE": rounding ** (2 / 3),
        "num_warps": 4 if count > 16 else 1,
        "enable_fp_fusion": False,
    }
    return Launch(_descent, (status.numel(),), [gram, weights, corrected, correction, status], options)
