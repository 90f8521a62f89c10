"""The direction nearest to a given one that hurts no objective, from the Gram matrix, in one launch.

Knows tensors only; arguments come checked, from `mogeo.geometry.ops`. The problem, s = M(w + μ) ≥ 0, μ ≥ 0, μᵀs = 0, is
derived in `mogeo.geometry.exact_harmless`; the pivoting and its two arithmetics are those of `mogeo.kernels.min_norm`.
Here too rows are scaled by powers of two, which round nothing, and the result is certified in double-double.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogeo.kernels.double_double import fine_total, multiply, two_sum
from mogeo.kernels.min_norm import MAX_OBJECTIVES, exponent_of, pivoted, power_of_two
from mogeo.kernels.target import Launch, square_side

# Values of `status`: those of `mogeo.Status`.
_OPTIMAL = tl.constexpr(0)
_STALLED = tl.constexpr(1)
_ZERO = tl.constexpr(2)
_NONFINITE = tl.constexpr(3)

# Residual, in units of |g_k| Σ_j (|w_j| + μ_j) |g_j|, up to which the conditions are certified to hold.
_CERTIFICATE_TOLERANCE = tl.constexpr(1e-13)
_FIRST_RIDGE = tl.constexpr(1e-12)
_LAST_RIDGE = tl.constexpr(1e-3)
_WIDEST = tl.constexpr(1000)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _slopes(A, x, x_low):
    """A x, in double-double."""
    p, p_low = multiply(A, A * 0.0, x[None, :] + A * 0.0, x_low[None, :] + A * 0.0, True)
    return fine_total(p, p_low, 1)


@triton.jit
def _certified(A, lengths, y, norms, takes_part, tolerance):
    """Whether s_k ≥ 0, and s_k = 0 where μ_k > 0, to the rounding of row k."""
    x, x_low = two_sum(lengths, y)
    slope, _ = _slopes(A, x, x_low)
    allowed = norms * tl.sum(norms * (tl.abs(lengths) + y), axis=0) * tolerance
    holds = (slope >= -allowed) & ((y == 0.0) | (slope <= allowed))
    return tl.min(tl.where(takes_part, holds.to(tl.int32), 1), axis=0) != 0


@triton.jit
def _descent(gram, weights, out, correction_out, status_out, K: tl.constexpr, SIDE: tl.constexpr):
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

    y = w * 0.0
    certified = _certified(A, lengths, y, norms, takes_part, _CERTIFICATE_TOLERANCE)
    if certified == 0:
        slope, slope_low = _slopes(A, lengths, lengths * 0.0)
        reach = tl.sum(norms * tl.abs(lengths), axis=0)
        scale = w * 0.0 + tl.where(reach > 0.0, reach, 1.0)
        y, _ = pivoted(A, A * 0.0, slope, slope_low, scale, takes_part, K, SIDE, False)
        certified = _certified(A, lengths, y, norms, takes_part, _CERTIFICATE_TOLERANCE)
        if certified == 0:
            y, _ = pivoted(A, A * 0.0, slope, slope_low, scale, takes_part, K, SIDE, True)
            certified = _certified(A, lengths, y, norms, takes_part, _CERTIFICATE_TOLERANCE)
            # Not positive semi-definite: see `mogeo.geometry.exact_harmless`. Its ridges, on rows of length 1, are
            # these.
            ridge = tl.full([], _FIRST_RIDGE, tl.float64)
            enough = certified
            while (enough == 0) & (ridge < _LAST_RIDGE):
                ridged, ridged_low = two_sum(A, tl.where(diagonal, A * ridge, 0.0))
                y, _ = pivoted(ridged, ridged_low, slope, slope_low, scale, takes_part, K, SIDE, False)
                enough = _certified(A, lengths, y, norms, takes_part, 2 * ridge)
                ridge *= 10.0
    correction = tl.where(takes_part, y * b, 0.0)
    status = tl.where(certified, _OPTIMAL, _STALLED)
    nothing = tl.max(takes_part.to(tl.int32), axis=0) == 0
    status = tl.where(nothing, tl.where(tl.max(whole.to(tl.int32), axis=0) != 0, _ZERO, _NONFINITE), status)
    tl.store(out + problem * K + index, w + correction, mask=real)
    tl.store(correction_out + problem * K + index, correction, mask=real)
    tl.store(status_out + problem, status.to(tl.int64))


def descent(gram: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w + μ, μ and status of the direction nearest to Gᵀw that hurts no objective, one problem or many, in one launch.

    Args:
        gram: M, fp64 [..., K, K], contiguous, K ≤ 32, symmetric up to rounding (the mean of M and Mᵀ is used).
        weights: w, fp64 [..., K], contiguous.

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
        launch(gram, weights, corrected, correction, status).run()
    return corrected, correction, status


def launch(gram: Tensor, weights: Tensor, corrected: Tensor, correction: Tensor, status: Tensor) -> Launch:
    """What `descent` launches."""
    count = gram.shape[-1]
    options: dict[str, Any] = {
        "K": count,
        "SIDE": square_side(count),
        "num_warps": 4 if count > 16 else 1,
        "enable_fp_fusion": False,
    }
    return Launch(_descent, (status.numel(),), [gram, weights, corrected, correction, status], options)
