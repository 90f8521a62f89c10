"""The nearest positive semi-definite matrix on the device: eigenvalues below zero set to zero, in one launch.

Knows tensors only; arguments come checked, from `mogeo.geometry.ops`. A program takes a matrix, and nothing here needs
the host, which an eigendecomposition by the vendor's library does.

Method: Jacobi's rotations in fp64. In round r of a sweep, i is rotated with j where i + j = r modulo K: every pair once
in K rounds, K / 2 of them at a time. That amounts to going through the pairs row by row, which converges: pair i < j
then is due in round i + j, and the next sweep may begin before all are through (Luk and Park, *On parallel Jacobi
orderings*, 1989). What is negligible beside the largest entry is left as it is: among eigenvalues that coincide,
rotating rounding errors would not end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogeo.kernels.min_norm import MAX_OBJECTIVES, exponent_of, power_of_two
from mogeo.kernels.target import Launch, square_side

# Size off the diagonal, in units of the largest entry, up to which nothing is rotated: half of that one's rounding.
_NEGLIGIBLE = tl.constexpr(2.0**-54)
# Sweeps after which it is left as it is: several times as many as any matrix took that was tried. Most are taken by
# those whose eigenvalues all but coincide.
_MOST_SWEEPS = tl.constexpr(60)
# Times K and the largest: how far below 0 an eigenvalue counts as 0. That of `mogeo.geometry.torch_backend`.
_ROUNDING = tl.constexpr(4 * 2.0**-52)
_WIDEST = tl.constexpr(1000)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _diagonal(matrix):
    """Diagonal [SIDE] of [SIDE, SIDE]."""
    index = tl.arange(0, matrix.shape[0])
    return tl.sum(tl.where(index[:, None] == index[None, :], matrix, 0.0), axis=1)


@triton.jit
def _eigen(A, K: tl.constexpr, SIDE: tl.constexpr):
    """Eigenvalues [SIDE] of a symmetric A [SIDE, SIDE], and the eigenvectors, which are columns."""
    index = tl.arange(0, SIDE)
    row, column = index[:, None], index[None, :]
    V = (row == column).to(tl.float64)
    negligible = tl.max(tl.max(tl.abs(A), axis=1), axis=0) * _NEGLIGIBLE
    rounds = tl.full([], 0, tl.int32)
    idle = tl.full([], 0, tl.int32)  # rounds since something turned
    while (idle < K) & (rounds < K * _MOST_SWEEPS):
        partner = tl.where(index < K, (rounds + K - index % K) % K, index)
        to_the_side, below = partner[None, :] + row * 0, partner[:, None] + column * 0
        swapped = tl.gather(A, to_the_side, 1)
        beside = _diagonal(swapped)
        # The mean of A_ij and A_ji, which rounding lets differ: i and j must turn by the same angle.
        beside = tl.where(partner == index, 0.0, 0.5 * (beside + tl.gather(beside, partner, 0)))
        turns = tl.abs(beside) > negligible
        idle = tl.where(tl.max(turns.to(tl.int32), axis=0) != 0, 0, idle + 1)
        if idle == 0:
            values = _diagonal(A)
            # Tangent of the angle, of at most 45°, at which A_ij vanishes.
            ratio = (tl.gather(values, partner, 0) - values) / (2.0 * tl.where(turns, beside, 1.0))
            tangent = 1.0 / (tl.abs(ratio) + tl.sqrt(1.0 + ratio * ratio))
            forward = (ratio > 0.0) | ((ratio == 0.0) & (index < partner))
            tangent = tl.where(turns, tl.where(forward, tangent, -tangent), 0.0)
            cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sine = tangent * cosine
            A = A * cosine[None, :] - swapped * sine[None, :]
            A = A * cosine[:, None] - tl.gather(A, below, 0) * sine[:, None]
            A = tl.where((column == below) & turns[:, None], 0.0, A)
            A = tl.where(row == column, (values - tangent * beside)[:, None], A)
            V = V * cosine[None, :] - tl.gather(V, to_the_side, 1) * sine[None, :]
        rounds += 1
    return _diagonal(A), V


@triton.jit
def _psd_part(matrices, out, K: tl.constexpr, SIDE: tl.constexpr):
    problem = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SIDE)
    row, column = index[:, None], index[None, :]
    both = (row < K) & (column < K)
    entries = matrices + problem * K * K
    # Halved first: the sum of two of the largest numbers would overflow.
    S = tl.load(entries + row * K + column, mask=both, other=0.0) * 0.5
    S += tl.load(entries + column * K + row, mask=both, other=0.0) * 0.5
    size = tl.abs(S)
    largest = tl.max(tl.max(tl.where(size < _INFINITY, size, _INFINITY), axis=1), axis=0)
    finite = largest < _INFINITY

    # Scaled by a power of two, exactly: the difference of two of the largest numbers would overflow as well.
    exponent = exponent_of(tl.where(finite & (largest > 0.0), largest, 1.0))
    exponent = tl.minimum(tl.maximum(exponent, -_WIDEST), _WIDEST)
    values, V = _eigen(tl.where(finite, S, 0.0) * power_of_two(-exponent), K, SIDE)

    rounding = tl.max(tl.abs(values), axis=0) * (K * _ROUNDING)
    is_psd = (tl.min(values, axis=0) >= -rounding) & (tl.min(_diagonal(S), axis=0) >= 0.0)
    if is_psd == 0:
        R = tl.zeros([SIDE, SIDE], tl.float64)
        for k in range(K):
            v = tl.sum(tl.where(column == k, V, 0.0), axis=1)
            value = tl.sum(tl.where(index == k, values, 0.0), axis=0)
            R += tl.maximum(value, 0.0) * (v[:, None] * v[None, :])
        S = R * power_of_two(exponent)
    tl.store(out + problem * K * K + row * K + column, tl.where(finite, S, float("nan")), mask=both)


def psd_part(matrix: Tensor) -> Tensor:
    """The positive semi-definite matrix nearest to (M + Mᵀ)/2, one or many, in one launch.

    Args:
        matrix: M, fp64 [..., K, K], contiguous, K ≤ 32.

    Returns:
        fp64 [..., K, K], as `mogeo.geometry.ops.psd_part` says.

    Raises:
        ValueError: another dtype or shape, or a larger matrix.
    """
    count = matrix.shape[-1]
    if matrix.dtype != torch.float64 or matrix.shape[-2:] != (count, count) or not 1 <= count <= MAX_OBJECTIVES:
        raise ValueError(
            f"matrix {tuple(matrix.shape)} of {matrix.dtype}: this kernel takes fp64 [..., K, K], "
            f"K ≤ {MAX_OBJECTIVES}; mogeo.geometry.ops.psd_part takes all others too"
        )
    if not matrix.is_contiguous():
        raise ValueError("matrix is not contiguous: pass matrix.contiguous()")
    out = torch.empty_like(matrix)
    if out.numel():
        launch(matrix, out).run()
    return out


def launch(matrix: Tensor, out: Tensor) -> Launch:
    """What `psd_part` launches."""
    count = matrix.shape[-1]
    options: dict[str, Any] = {
        "K": count,
        "SIDE": square_side(count),
        "num_warps": 4 if count > 8 else 1,
        "enable_fp_fusion": False,
    }
    return Launch(_psd_part, (matrix.numel() // count**2,), [matrix, out], options)
