"""The functional core: gram, combine, min_norm_weights. Checks its arguments; the one place that chooses an
implementation.

Knows tensors, no optimizer and no weighting. Every device runs the PyTorch implementations of `mogeo.cpu` and the
scalar solver of `mogeo.min_norm`; away from the CPU the solve therefore copies K² numbers to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mogeo import cpu
from mogeo.min_norm import min_norm

_ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MinNorm(NamedTuple):
    """A min-norm point in the convex hull of K gradients."""

    weights: Tensor  #: fp64 [K], on the simplex
    gap: Tensor  #: fp64 [], the duality gap aᵀMa − min_i (Ma)_i over the hull, in units of the Gram matrix
    status: Tensor  #: int64 [], a `mogeo.Status`


def gram(rows: Tensor) -> Tensor:
    """Inner products of gradient rows.

    Args:
        rows: [K, N], fp64, fp32, bf16 or fp16, one flattened gradient per row.

    Returns:
        G Gᵀ, fp64 [K, K], exactly symmetric, on the device of `rows`. Each entry is within 1e-6 of the largest diagonal
        entry for any N (4e-6 if all elements have one magnitude, so that roundings add up). A row with NaN or infinity
        spoils its own row and column only.

    Raises:
        TypeError: `rows` is no tensor of one of these dtypes.
        ValueError: `rows` is not two-dimensional, or has no row.
    """
    _check_rows(rows)
    with torch.autocast(rows.device.type, enabled=False):
        return cpu.gram(rows.detach())


def combine(rows: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The weighted sum wᵀ rows.

    Args:
        rows: [K, N], fp64, fp32, bf16 or fp16.
        weights: [K], any real dtype. A row whose weight is 0 is not read, so it may hold NaN.
        out: where to write, [N], dtype and device of `rows`. `rows[0]` works in place; any other row does not.

    Returns:
        `out`, or a new tensor. Half-precision rows are accumulated in fp32 and rounded once.

    Raises:
        TypeError: a dtype is not supported, or `out` has another dtype than `rows`.
        ValueError: shapes do not fit, or `out` overlaps a row other than the first.
    """
    _check_rows(rows)
    count, columns = rows.shape
    if weights.shape != (count,):
        raise ValueError(f"weights have shape {tuple(weights.shape)} for {count} rows: pass one weight per row")
    rows = rows.detach()
    if out is None:
        out = torch.empty(columns, dtype=rows.dtype, device=rows.device)
    elif out.dtype != rows.dtype:
        raise TypeError(f"out is {out.dtype}, but the rows are {rows.dtype}: pass out in the rows' dtype")
    elif out.shape != (columns,) or out.device != rows.device:
        raise ValueError(
            f"out has shape {tuple(out.shape)} on {out.device}, but the rows have {columns} columns on {rows.device}"
        )
    elif _overlaps_later_row(out, rows):
        raise ValueError("out overlaps a row other than the first, and would overwrite it unread: use rows[0]")
    cpu.combine(rows, weights.tolist(), out)
    return out


def min_norm_weights(gram: Tensor) -> MinNorm:
    """The min-norm point of the convex hull of K gradients, from their Gram matrix: argmin over the simplex of aᵀ M a.

    Exact (an active-set method in float64, see `mogeo.min_norm`), deterministic, and the same on every machine.
    Objectives whose gradient is zero (diagonal ≤ 0) or not finite are left out of the hull and get weight 0.

    Args:
        gram: M [K, K], a real floating dtype, symmetric positive semi-definite up to rounding. The mean of M and Mᵀ is
            used.

    Returns:
        `MinNorm(weights, gap, status)` on the device of `gram`.

    Raises:
        TypeError: `gram` is not floating point.
        ValueError: `gram` is not square, or empty.

    Source: Désidéri, *Multiple-gradient descent algorithm (MGDA)*, 2012.
    """
    if not gram.is_floating_point():
        raise TypeError(f"gram is {gram.dtype}: pass a real floating-point Gram matrix")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram has shape {tuple(gram.shape)}: pass a square matrix [K, K], K ≥ 1")
    matrix = gram.detach().to(torch.float64)
    weights, gap, status = min_norm((matrix / 2 + matrix.T / 2).tolist())
    return MinNorm(
        torch.tensor(weights, dtype=torch.float64, device=gram.device),
        torch.tensor(gap, dtype=torch.float64, device=gram.device),
        torch.tensor(int(status), device=gram.device),
    )


def _check_rows(rows: Tensor) -> None:
    if rows.dtype not in _ROW_DTYPES:
        raise TypeError(f"rows are {rows.dtype}: pass fp64, fp32, bf16 or fp16")
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ValueError(f"rows have shape {tuple(rows.shape)}: pass [K, N], one flattened gradient per row, K ≥ 1")


def _overlaps_later_row(out: Tensor, rows: Tensor) -> bool:
    if out.numel() == 0 or out.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr():
        return False
    if out.data_ptr() == rows[0].data_ptr() and out.stride() == rows[0].stride() and rows.stride(0) != 0:
        return False
    first = rows.data_ptr()
    last = rows[-1, -1:].data_ptr()
    return out.data_ptr() <= last and out[-1:].data_ptr() >= first
