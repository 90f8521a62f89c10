"""The shared direction d = wᵀ G of gradient rows G [K, N], its norm, and its clipping: nothing leaves the device.

Knows tensors only; arguments come checked, from `mogeo.geometry.ops`. One pass reads each row once and writes d,
commonly over row 0; it clips as it writes, by min(1, c/‖d‖) with ‖d‖² = wᵀMw from the Gram matrix M, and sums the
squares of what it wrote. A second kernel, of one program, adds these up. Where the gradients cancel so far that wᵀMw
has lost its digits, or where there is no M, the factor follows from the measured norm instead, and a third kernel
applies it; else that one finds the factor 1 in device memory and returns at once.

A row whose weight is zero is not read, so it may hold NaN. Half precision is accumulated in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogeo.kernels.target import Launch, square_side, stages, threads_per_warp

MAX_ROWS = 32
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Programs of a pass, at most: enough for every GPU, few enough for one program to add up what they measured.
_MOST_PROGRAMS = 4096
_THREADS = 128
_SETTLE_BLOCK = 1024

# Below this share of (Σ w_k ‖g_k‖)², wᵀMw has cancelled down to the rounding of a Gram matrix summed in fp32.
_CANCELLED = tl.constexpr(1e-4)
# Weights outside this range (and zero) are no normal fp32 numbers: rows are then combined in fp64.
_LARGEST_FP32 = tl.constexpr(3.4e38)
_SMALLEST_FP32 = tl.constexpr(1.2e-38)


class Variant(NamedTuple):
    """How the pass over the rows works on K rows of one dtype."""

    threads: int  #: vectors of 16 bytes of a tile
    stages: int  #: tiles in shared memory or on their way there, plus one; 1: tiles go straight to registers

    @property
    def name(self) -> str:
        """For tables: "128 threads, 3 stages"."""
        return f"{self.threads} threads, {self.stages} stage" + "s" * (self.stages > 1)


def variant(count: int, dtype: torch.dtype) -> Variant:
    """The variant for K = `count` rows. What speaks for it: docs/kernels.md."""
    return candidates(count, dtype)[0]


def candidates(count: int, dtype: torch.dtype) -> tuple[Variant, ...]:
    """Variants between which only hardware can decide, for K = `count` rows; the first is the one in use.

    All compute the same bits: they differ in when they ask for a row.
    """
    direct, copied = Variant(128, stages=1), Variant(128, stages=3)
    if count == 1 or count > 8 or dtype == torch.float64:
        return (direct,)
    return (copied, direct)


class Direction(NamedTuple):
    """What there is to know of a direction; fp64 [] on the device."""

    squared_norm: Tensor  #: ‖d‖² before clipping: wᵀMw, or as measured
    clip_factor: Tensor  #: min(1, max_norm / ‖d‖); 0 where d was not finite and `discard` made it zero


@triton.jit
def _norm_from_gram(weights, gram, K: tl.constexpr, SIDE: tl.constexpr):
    """‖d‖² = wᵀMw, and whether enough digits are left of it. Rows of weight zero do not count, whatever M says."""
    k = tl.arange(0, SIDE)
    w = tl.load(weights + k, mask=k < K, other=0.0)
    used = w != 0.0
    m = tl.load(gram + k[:, None] * K + k[None, :], mask=used[:, None] & used[None, :], other=0.0)
    squared_norm = tl.sum(tl.sum(m * w[None, :], axis=1) * w, axis=0)
    squares = tl.sum(tl.where(k[:, None] == k[None, :], m, 0.0), axis=1)
    reach = tl.sum(tl.abs(w) * tl.sqrt(squares), axis=0)
    return squared_norm, squared_norm >= reach * reach * _CANCELLED


@triton.jit
def _clip_factor(squared_norm, known, max_norm):
    """min(1, max_norm / ‖d‖); 1 where that is not known, zero, or not finite: clipping must not hide an overflow."""
    usable = known & (squared_norm > 0.0) & (squared_norm < float("inf"))
    factor = max_norm / tl.sqrt(tl.where(usable, squared_norm, 1.0))
    return tl.where(usable & (factor < 1.0), factor, 1.0)


@triton.jit
def _combine(
    rows, out, weights, gram, squares, columns, row_stride, col_stride, out_stride, max_norm: tl.float64,
    K: tl.constexpr, SIDE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    CLIP: tl.constexpr, MEASURE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    stride = tl.cast(row_stride, tl.int64)
    BLOCK: tl.constexpr = THREADS * WIDTH
    columns_of_tile = tl.arange(0, THREADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    step = tl.cast(BLOCK, tl.int64)
    out_step = step
    lanes = columns_of_tile
    out_lanes = columns_of_tile
    if not UNIT:
        step = BLOCK * tl.cast(col_stride, tl.int64)
        out_step = BLOCK * tl.cast(out_stride, tl.int64)
        lanes = columns_of_tile.to(tl.int64) * col_stride
        out_lanes = columns_of_tile.to(tl.int64) * out_stride

    factor = tl.full([], 1.0, tl.float64)
    if CLIP:
        squared_norm, known = _norm_from_gram(weights, gram, K, SIDE)
        factor = _clip_factor(squared_norm, known, max_norm)
    k = tl.arange(0, SIDE)
    sizes = tl.abs(tl.load(weights + k, mask=k < K, other=0.0) * factor)
    in_range = (sizes == 0.0) | ((sizes >= _SMALLEST_FP32) & (sizes <= _LARGEST_FP32)) | (sizes != sizes)
    if out.dtype.element_ty == tl.float64:
        in_range = sizes < 0.0
    wide = tl.min(in_range.to(tl.int32), axis=0) == 0

    if wide == 0:
        squared = _combine_tiles(
            rows, out, weights, factor, columns, step, out_step, stride, lanes, out_lanes, columns_of_tile,
            K, BLOCK, MEASURE, tl.float32, STAGES,
        )  # fmt: skip
    else:
        squared = _combine_tiles(
            rows, out, weights, factor, columns, step, out_step, stride, lanes, out_lanes, columns_of_tile,
            K, BLOCK, MEASURE, tl.float64, 1,
        )  # fmt: skip
    if MEASURE:
        tl.store(squares + tl.program_id(0), tl.sum(squared, axis=0))


@triton.jit
def _combine_tiles(
    rows, out, weights, factor, columns, step, out_step, row_stride, lanes, out_lanes, columns_of_tile,
    K: tl.constexpr, BLOCK: tl.constexpr, MEASURE: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Combine the tiles of one program in DTYPE; the squares of what was written, per thread."""
    program = tl.program_id(0).to(tl.int64)
    n_programs = tl.num_programs(0)
    squared = tl.zeros([columns_of_tile.shape[0]], tl.float64)
    # Before the loop, or every tile waits for them first.
    scaled = ()
    for k in tl.static_range(K):
        scaled = scaled + ((tl.load(weights + k) * factor).to(DTYPE),)
    # An argument below 2³¹ is an int32 to Triton: made wider before anything is added to it.
    whole = tl.cast(columns, tl.int64) // BLOCK
    for t in tl.range(program, whole, n_programs, num_stages=STAGES):
        result = _weighted_sum(rows + t * step, scaled, row_stride, lanes, columns_of_tile >= 0, out, K, False, DTYPE)
        tl.store(out + t * out_step + out_lanes, result)
        if MEASURE:
            squared += _squares(result)
    if (whole % n_programs == program) & (whole * BLOCK < columns):
        mask = whole * BLOCK + columns_of_tile < columns
        result = _weighted_sum(rows + whole * step, scaled, row_stride, lanes, mask, out, K, True, DTYPE)
        tl.store(out + whole * out_step + out_lanes, result, mask=mask)
        if MEASURE:
            squared += _squares(result)
    return squared


@triton.jit
def _weighted_sum(
    tile, weights, row_stride, lanes, mask, out, K: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr
):
    """Σ_k w_k g_k of one tile, accumulated in DTYPE, in the dtype of `out`."""
    total = tl.zeros(mask.shape, DTYPE)
    for k in tl.static_range(K):
        read = tl.where(weights[k] != 0.0, 1, 0) > 0
        if MASKED:
            row = tl.load(tile + k * row_stride + lanes, mask=mask & read, other=0.0)
        else:
            row = tl.load(tile + k * row_stride + lanes, mask=read, other=0.0)
        total += weights[k] * row.to(DTYPE)
    return total.to(out.dtype.element_ty)


@triton.jit
def _squares(values):
    """Σ v² of each thread's vector."""
    values = values.to(tl.float64)
    return tl.sum(values * values, axis=1)


@triton.jit
def _settle(
    squares, n_squares, weights, gram, out, max_norm: tl.float64,
    K: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, CLIP: tl.constexpr, GRAM: tl.constexpr,
    DISCARD: tl.constexpr,
):  # fmt: skip
    """‖d‖² before clipping, the clip factor, and what is left of it to multiply d by."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for at in range(0, n_squares, BLOCK):
        sums += tl.load(squares + at + lane, mask=at + lane < n_squares, other=0.0)
    squared_norm = tl.sum(sums, axis=0)
    measured = squared_norm  # of what lies in memory
    known = squared_norm < 0.0
    factor = tl.full([], 1.0, tl.float64)
    rest = factor
    if GRAM:
        from_gram, known = _norm_from_gram(weights, gram, K, SIDE)
        if CLIP:
            factor = _clip_factor(from_gram, known, max_norm)
        squared_norm = tl.where(known, from_gram, squared_norm)
    if CLIP:
        rest = _clip_factor(measured, known == 0, max_norm)
    if DISCARD:
        rest = tl.where(measured < float("inf"), rest, 0.0)
    tl.store(out, squared_norm)
    tl.store(out + 1, factor * rest)
    tl.store(out + 2, rest)


@triton.jit
def _scale(values, settled, columns, stride, THREADS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Multiply by what is left; by zero without reading, since what is there may not be finite."""
    rest = tl.load(settled + 2)
    if rest != 1.0:
        read = tl.where(rest != 0.0, 1, 0) > 0
        BLOCK: tl.constexpr = THREADS * WIDTH
        lane = tl.arange(0, BLOCK)
        step = tl.cast(stride, tl.int64)
        tiles = (tl.cast(columns, tl.int64) + BLOCK - 1) // BLOCK
        for t in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
            column = t * BLOCK + lane
            place = values + column * step if not UNIT else values + column
            value = tl.load(place, mask=(column < columns) & read, other=0.0)
            scaled = value.to(tl.float64) * rest
            tl.store(place, scaled.to(values.dtype.element_ty), mask=column < columns)


# --------------------------------------------------------------------------------------------------------------------
# Launch


def combine_(
    rows: Tensor,
    weights: Tensor,
    *,
    gram: Tensor | None = None,
    max_norm: float | None = None,
    chosen: Variant | None = None,
) -> Tensor:
    """Overwrite row 0 of rows [K, N], K ≤ 32, fp64, fp32, bf16 or fp16, with min(1, max_norm/√(wᵀMw)) · wᵀ rows.

    Args:
        rows: of any strides; 128-bit accesses need what `mogeo.kernels.gram.gram` says.
        weights: w, fp64 [K], contiguous, on the device of the rows.
        gram: M, fp64 [K, K], contiguous. Without it and `max_norm` nothing is clipped, and nothing where wᵀMw has
            cancelled below 1e-4 (Σ w_k ‖g_k‖)²: `direction_` measures there.
        max_norm: the length to clip to.
        chosen: one of `candidates`, in place of the first.

    Returns:
        Row 0.

    Raises:
        ValueError: other dtypes, or more rows: `mogeo.combine` takes those.
    """
    return combine_into(rows, weights, rows[0], gram=gram, max_norm=max_norm, chosen=chosen)


def combine_into(
    rows: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    gram: Tensor | None = None,
    max_norm: float | None = None,
    chosen: Variant | None = None,
) -> Tensor:
    """As `combine_`, into `out` [N] of any of these dtypes, which is row 0 or overlaps no row."""
    _check(rows, weights)
    if out.numel():
        launch(rows, weights, out, gram, max_norm, None, chosen or variant(len(rows), rows.dtype)).run()
    return out


def direction_(
    blocks: Sequence[Tensor],
    weights: Tensor,
    outs: Sequence[Tensor] | None = None,
    *,
    gram: Tensor | None = None,
    max_norm: float | None = None,
    discard: bool = True,
) -> Direction:
    """Write the clipped direction of rows in blocks [K, N_b], and measure it.

    Args:
        blocks: rows of one list of gradients, split by dtype; all on one device.
        weights: as for `combine_`.
        outs: where to, [N_b] each, as `out` of `combine_into`; by default over row 0 of each block.
        gram: M of all blocks together. Where it is missing, or has cancelled, a second pass clips by the measured norm.
        max_norm: the length to clip to, over all blocks together; None for no clipping.
        discard: where a direction is not finite (fp16 that overflows), write zeros in its place.
    """
    variants = [variant(len(block), block.dtype) for block in blocks]
    grids = [_grid(block, chosen) if block.shape[1] else 0 for block, chosen in zip(blocks, variants, strict=True)]
    squares = torch.empty(sum(grids), dtype=torch.float64, device=weights.device)
    outs = [block[0] for block in blocks] if outs is None else outs
    for block, out, part, chosen in zip(blocks, outs, squares.split(grids), variants, strict=True):
        _check(block, weights)
        if block.shape[1]:
            launch(block, weights, out, gram, max_norm, part, chosen).run()
    return finish_(outs, squares, weights, gram, max_norm, discard=discard)


def finish_(
    parts: Sequence[Tensor],
    squares: Tensor,
    weights: Tensor,
    gram: Tensor | None,
    max_norm: float | None,
    *,
    discard: bool,
) -> Direction:
    """Add up what was measured of a direction that lies in `parts`, and clip or discard what is left to.

    Args:
        parts: [N_b] each, the direction by dtype.
        squares: fp64 [n], contiguous, which sum to ‖d‖² as it lies in memory.
        weights: what it was combined with; `gram`: what its clipping followed, if anything.
    """
    settled = torch.empty(3, dtype=torch.float64, device=weights.device)
    launch_settle(squares, weights, gram, settled, max_norm, discard=discard).run()
    for part in parts:
        if part.numel() and (max_norm is not None or discard):
            launch_scale(part, settled).run()
    return Direction(settled[0], settled[1])


def launch(
    rows: Tensor,
    weights: Tensor,
    out: Tensor,
    gram: Tensor | None,
    max_norm: float | None,
    squares: Tensor | None,
    chosen: Variant,
) -> Launch:
    """One pass over the rows."""
    count, columns = rows.shape
    clip = gram is not None and max_norm is not None
    arguments: list[Any] = [rows, out, weights, gram if clip else None, squares, columns]
    arguments += [rows.stride(0), rows.stride(1), out.stride(0), max_norm if clip else 0.0]
    options: dict[str, Any] = {
        "K": count,
        "SIDE": square_side(count),
        "THREADS": chosen.threads,
        "WIDTH": 16 // rows.element_size(),
        "UNIT": rows.stride(1) == 1 and out.stride(0) == 1,
        "CLIP": clip,
        "MEASURE": squares is not None,
        "STAGES": stages(chosen.stages),
        "num_warps": chosen.threads // threads_per_warp(),
        "enable_fp_fusion": True,  # no longer Triton's default from 3.10 on
    }
    return Launch(_combine, (_grid(rows, chosen),), arguments, options)


def launch_settle(
    squares: Tensor, weights: Tensor, gram: Tensor | None, settled: Tensor, max_norm: float | None, *, discard: bool
) -> Launch:
    """The sum of what was measured, and what follows from it: fp64 [3] in `settled`."""
    options: dict[str, Any] = {
        "K": len(weights),
        "SIDE": square_side(len(weights)),
        "BLOCK": _SETTLE_BLOCK,
        "CLIP": max_norm is not None,
        "GRAM": gram is not None,
        "DISCARD": discard,
        "num_warps": 4,
        "enable_fp_fusion": True,  # no longer Triton's default from 3.10 on
    }
    return Launch(_settle, (1,), [squares, squares.numel(), weights, gram, settled, max_norm or 0.0], options)


def launch_scale(part: Tensor, settled: Tensor) -> Launch:
    """The last pass. Few programs: most often they find nothing to do."""
    block = _THREADS * 16 // part.element_size()
    grid = max(1, min(_MOST_PROGRAMS // 4, -(-part.numel() // block)))
    options: dict[str, Any] = {
        "THREADS": _THREADS,
        "WIDTH": 16 // part.element_size(),
        "UNIT": part.stride(0) == 1,
        "num_warps": _THREADS // threads_per_warp(),
        "enable_fp_fusion": True,  # no longer Triton's default from 3.10 on
    }
    return Launch(_scale, (grid,), [part, settled, part.numel(), part.stride(0)], options)


def _check(rows: Tensor, weights: Tensor) -> None:
    if rows.dtype not in DTYPES or not 1 <= len(rows) <= MAX_ROWS:
        raise ValueError(
            f"rows [{len(rows)}, …] of {rows.dtype}: this kernel takes 1 to {MAX_ROWS} rows of fp64, fp32, bf16 or "
            "fp16; mogeo.combine takes more"
        )
    if weights.dtype != torch.float64 or weights.shape != (len(rows),) or not weights.is_contiguous():
        raise ValueError(
            f"weights {tuple(weights.shape)} of {weights.dtype}: pass fp64 [{len(rows)}], contiguous; mogeo.combine "
            "takes any real dtype"
        )


def _grid(rows: Tensor, chosen: Variant) -> int:
    return max(1, min(_MOST_PROGRAMS, -(-rows.shape[1] // (chosen.threads * 16 // rows.element_size()))))
