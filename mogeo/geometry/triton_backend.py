"""Gram matrix, combination, min-norm point, direction, PSD part, sketches on a GPU: Triton kernels, and what else.

Knows tensors only, and takes its arguments as checked: `mogeo.geometry.ops` is the door. Everything stays on the
device, and nothing waits for it. Where the kernels do not reach, PyTorch operations serve: for the Gram of fp64 rows,
whose products they would have to sum in fp64, and for more than 32 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mogeo.geometry import torch_backend
from mogeo.kernels import cagrad as cagrad_kernel
from mogeo.kernels import combine as combine_kernels
from mogeo.kernels import descent as descent_kernel
from mogeo.kernels import gram as gram_kernels
from mogeo.kernels import min_norm as min_norm_kernel
from mogeo.kernels import psd as psd_kernel
from mogeo.kernels import sketch as sketch_kernels

#: Objectives, or rows, up to which everything is decided on the device.
MOST_ROWS = min(gram_kernels.MAX_ROWS, combine_kernels.MAX_ROWS, min_norm_kernel.MAX_OBJECTIVES)


def direction_(blocks: Sequence[Tensor], weights: Tensor, outs: Sequence[Tensor], **options: Any) -> Any:
    """`mogeo.kernels.combine.direction_`."""
    return combine_kernels.direction_(blocks, weights, outs, **options)


def finish_(parts: Sequence[Tensor], squares: Tensor, *arguments: Any, **options: Any) -> Any:
    """`mogeo.kernels.combine.finish_`."""
    return combine_kernels.finish_(parts, squares, *arguments, **options)


def gram(rows: Tensor) -> Tensor:
    """G Gᵀ for rows G [K, N] → fp64 [K, K], exactly symmetric."""
    result: Tensor = gram_kernels.gram(rows) if _suits(rows) else torch_backend.gram(rows)
    return result


def gram_of_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """The sum of the Grams of all blocks [K, N_b], fp64 [K, K]."""
    total = gram(blocks[0])
    for block in blocks[1:]:
        if _suits(block):
            gram_kernels.gram(block, add_to=total)
        else:
            total += torch_backend.gram(block)
    return total


def gram_by_segment(rows: Tensor, boundaries: Sequence[int]) -> Tensor:
    """The Gram of each segment, columns b_s … b_{s+1} − 1, and last that of all: fp64 [S + 1, K, K]."""
    code = gram_kernels if _suits(rows) else torch_backend
    result: Tensor = code.gram_by_segment(rows, boundaries)
    return result


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """wᵀ rows → `out` [N], which may be rows[0]. Each row is read once; a row with weight 0 is not read at all."""
    if len(rows) > MOST_ROWS:
        return torch_backend.combine(rows, weights, out)
    combine_kernels.combine_into(rows, weights.contiguous(), out)
    return out


def min_norm(
    gram: Tensor, losses: Tensor | None, normalize: Any, power: float, apply_to: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights fp64 [..., K], gap fp64 [...] and status int64 [...] of the MGDA family, from a Gram fp64 [..., K, K].

    `options` as in `mogeo.kernels.min_norm.min_norm`, for up to 32 objectives.
    """
    if gram.shape[-1] > MOST_ROWS:
        return torch_backend.min_norm(gram, losses, normalize, power, apply_to, **options)
    losses = None if losses is None else losses.to(torch.float64).contiguous()
    weights, gap, status = min_norm_kernel.min_norm(
        gram.contiguous(), losses, normalize=normalize, power=power, apply_to=apply_to, **options
    )
    return weights, gap, status


def descent(gram: Tensor, weights: Tensor, rounding: float = descent_kernel.ROUNDING) -> tuple[Tensor, Tensor, Tensor]:
    """w + μ and μ, fp64 [..., K], and status int64 [...], from a Gram fp64 [..., K, K] and weights w fp64 [..., K].

    `rounding` as in `mogeo.descent_weights`.
    """
    if gram.shape[-1] > MOST_ROWS:
        return torch_backend.descent(gram, weights, rounding)
    weights, correction, status = descent_kernel.descent(gram.contiguous(), weights.contiguous(), rounding)
    return weights, correction, status


def cagrad(gram: Tensor, weights: Tensor, c: float, clipped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights fp64 [..., K], gap fp64 [...], status int64 [...], from a Gram fp64 [..., K, K] and v fp64 [..., K].

    As `mogeo.geometry.exact_cagrad.conflict_averse`.
    """
    if gram.shape[-1] > MOST_ROWS:
        return torch_backend.cagrad(gram, weights, c, clipped)
    made, gap, status = cagrad_kernel.cagrad(gram.contiguous(), weights.contiguous(), c, clipped)
    return made, gap, status


def psd_part(matrix: Tensor) -> Tensor:
    """The positive semi-definite matrix nearest to (M + Mᵀ)/2, fp64 [..., K, K], from M likewise."""
    if matrix.shape[-1] > MOST_ROWS:
        return torch_backend.psd_part(matrix)
    result: Tensor = psd_kernel.psd_part(matrix.contiguous())
    return result


sketch_tables = sketch_kernels.tables


def sketch_(row: Tensor, gradient: Tensor, chunks: Tensor, signs: Tensor) -> None:
    """row += S gradient, with what `sketch_tables` returned; or of K rows [K, d] and gradients [K, n]."""
    pairs = [(row, gradient)] if row.ndim == 1 else zip(row, gradient, strict=True)
    for target, source in pairs:
        sketch_kernels.sketch_(target, source, chunks, signs)


def _suits(rows: Tensor) -> bool:
    return len(rows) <= MOST_ROWS and rows.dtype in gram_kernels.DTYPES
