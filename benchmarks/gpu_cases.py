"""What a run on a GPU gives to the kernels: rows in every layout, and every kernel once. Judges nothing, times nothing.

The same calls run on the device (`gpu_stages.py`), under Triton's interpreter, and on tensors without data (device
"meta"), where they tell what has to be compiled (`gpu_cache.py`). So nothing here asks for a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.geometry import triton_backend
from mogeo.geometry.projection import SignedSketch
from mogeo.kernels import combine as combine_kernels
from mogeo.kernels import gram as gram_kernels
from mogeo.kernels import sketch as sketch_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

Work = Callable[[torch.device], object]
"""Calls of kernels on a device."""


class Sizes(NamedTuple):
    """How much of everything."""

    counts: tuple[int, ...]  #: K, the most telling first
    columns: int  #: of rows that are judged: chunks of several tiles
    repeats: int  #: runs that have to give the same bits
    sketches: tuple[tuple[int, int], ...]  #: elements and buckets
    widths: tuple[int, ...]  #: N of rows that are timed
    timed: tuple[int, ...]  #: K of these
    variants: int  #: N for which variants are timed
    step: tuple[int, int]  #: elements of the model whose step is timed, and objectives
    long: tuple[int, ...]  #: N on either side of what 32 bits count
    rounds: int


REAL = Sizes(
    counts=(4, 2, 8, 16, 32, 7, 10, 1),
    columns=1 << 22,
    repeats=20,
    sketches=((1 << 22, 1 << 18), (300_001, 4096), (70_000, 1000)),
    widths=(10**8, 10**7, 10**6),
    timed=(4, 2, 8, 16, 32),
    variants=10**8,
    step=(494_032_768, 4),
    long=(2**31 - 3, 2**31 + 37),
    rounds=10,
)
#: For a CPU: does it run?
TOY = Sizes((2, 4), 640, 1, ((3000, 1024),), (3000,), (2,), 1024, (4096, 2), (1500,), 2)


class Case(NamedTuple):
    """Rows [K, N]."""

    count: int
    dtype: str
    columns: int
    layout: str  #: one of `LAYOUTS`

    @property
    def name(self) -> str:
        """For tables."""
        return f"K={self.count} {self.dtype} N={self.columns} {self.layout}"


LAYOUTS = ("aligned", "odd length", "offset", "every second")


def cases(sizes: Sizes) -> Iterator[Case]:
    """All that are judged, those that are used most first."""
    for layout in LAYOUTS:
        for count in sizes.counts if layout == "aligned" else sizes.counts[:3]:
            for dtype in DTYPES if layout == "aligned" else ("fp32", "bf16"):
                yield Case(count, dtype, sizes.columns - 3 * (layout == "odd length"), layout)


def rows_of(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    """Gaussian rows; without data on the device "meta"."""
    count, columns, dtype = case.count, case.columns, DTYPES[case.dtype]
    if case.layout == "offset":  # by one element
        rows = torch.empty(count * columns + 1, dtype=dtype, device=device)[1:].view(count, columns)
    elif case.layout == "every second":
        rows = torch.empty(count, 2 * columns, dtype=dtype, device=device)[:, ::2]
    else:
        rows = torch.empty(count, columns, dtype=dtype, device=device)
    return rows if rows.is_meta else rows.normal_(generator=torch.Generator(device).manual_seed(seed))


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN wherever nothing is written."""
    return torch.full(shape, math.nan, dtype=dtype, device=device)


class Made(NamedTuple):
    """What the kernels made of rows."""

    gram: Tensor  #: [K, K]
    segments: Tensor  #: [3, K, K], of two segments and of all
    weights: Tensor  #: min-norm, divided by the losses' normaliser
    gap: Tensor
    status: Tensor
    nonfinite: Tensor
    corrected: Tensor  #: weights of the direction that hurts nobody
    descent_status: Tensor
    psd: Tensor  #: [K, K], the PSD part of `estimate_of` the Gram matrix
    combined: Tensor  #: [N], unclipped
    clipped: Tensor  #: [N], to half its length, by the Gram matrix
    measured: Tensor  #: [N], the same without a Gram matrix: by the norm as measured
    by_gram: Any  #: squared norm and factor of the former
    by_measure: Any  #: of the latter


def weights_of(count: int, device: torch.device) -> Tensor:
    """Convex, none alike."""
    weights = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    return weights / (count * (count + 1) / 2)


def losses_of(count: int, device: torch.device) -> Tensor:
    """Positive, none alike."""
    return torch.linspace(0.5, 2.0, count, dtype=torch.float64, device=device)


def estimate_of(gram: Tensor) -> Tensor:
    """A Gram matrix less the mean of its diagonal: of Gaussian rows, about half of its eigenvalues are negative."""
    return gram - gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def boundaries_of(columns: int) -> list[int]:
    """Two segments, cut where no chunk ends."""
    return [0, columns // 3 + 1, columns]


def max_norm_of(count: int, columns: int) -> float:
    """Half the length that wᵀG has on average for Gaussian rows: known without looking."""
    squares = [k * k for k in range(1, count + 1)]
    return 0.5 * math.sqrt(columns * sum(squares)) / (count * (count + 1) / 2)


def make_all(rows: Tensor) -> Made:
    """Every kernel that a step may need; into outputs that were poisoned."""
    (count, columns), device = rows.shape, rows.device
    weights, losses = weights_of(count, device), losses_of(count, device)
    if rows.is_meta and rows.dtype == torch.float64:  # PyTorch's operations: nothing to compile
        gram, segments = (torch.empty(*n, count, count, device=device, dtype=rows.dtype) for n in ((), (3,)))
    else:
        gram, segments = triton_backend.gram(rows), triton_backend.gram_by_segment(rows, boundaries_of(columns))
    nonfinite = torch.ones(count, dtype=torch.bool, device=device)
    solved, gap, status = triton_backend.min_norm(gram, losses, "loss", 1.0, "raw", nonfinite=nonfinite)
    corrected, _, descent_status = triton_backend.descent(gram, weights)
    psd = triton_backend.psd_part(estimate_of(gram))
    outs = [poisoned(columns, dtype=rows.dtype, device=device) for _ in range(3)]
    triton_backend.combine(rows, weights, outs[0])
    limit = max_norm_of(count, columns)
    by_gram = triton_backend.direction_([rows], weights, [outs[1]], gram=gram, max_norm=limit)
    by_measure = triton_backend.direction_([rows], weights, [outs[2]], gram=None, max_norm=limit)
    return Made(
        gram, segments, solved, gap, status, nonfinite, corrected, descent_status, psd, *outs, by_gram, by_measure
    )  # fmt: skip


def sketch_of(gradient: Tensor, dimension: int, chosen: Any = None) -> Tensor:
    """S g, fp32 (fp64 of fp64) [d], by the kernel."""
    device = gradient.device
    drawn = SignedSketch([gradient.numel()], dimension, device=torch.device("cpu"))
    signs, (chunks,) = sketch_kernels.tables(drawn.signs.to(torch.int8), drawn.chunks, device)
    row = torch.zeros(dimension, dtype=torch.promote_types(gradient.dtype, torch.float32), device=device)
    sketch_kernels.sketch_(row, gradient, chunks, signs, chosen=chosen)
    return row


# --------------------------------------------------------------------------------------------------------------------
# What has to be compiled


def work_of(sizes: Sizes) -> Iterator[tuple[str, Work]]:
    """Calls that launch whatever the stages do, and perhaps more: of each stage in its own order.

    Most of it is correctness, so all but its first cases come last: what is compiled until time is up serves all.
    """
    judged = list(cases(sizes))
    first = 3 * len(DTYPES)
    for case in judged[:first]:
        yield "correctness", partial(_judged, case)
    yield from _of_other_stages(sizes)
    for case in judged[first:]:
        yield "correctness", partial(_judged, case)


def _of_other_stages(sizes: Sizes) -> Iterator[tuple[str, Work]]:
    for dtype in DTYPES:
        for size, dimension in sizes.sketches:
            yield "correctness", partial(_sketched, size, dimension, dtype, None)
    for columns in sizes.widths:
        for count in sizes.timed:
            for dtype in ("bf16", "fp32"):
                yield "bandwidth", partial(_timed, count, columns, dtype)
    for columns in sizes.widths:
        for dtype in ("bf16", "fp32"):
            yield "bandwidth", partial(_sketched, columns, 1 << 18, dtype, None)
    for count in sizes.timed:
        yield "solver", partial(_solved, count)
    for count, dtype in ((count, dtype) for count in sizes.timed for dtype in ("bf16", "fp32")):
        yield "variants", partial(_varied, count, sizes.variants, dtype)
    for dtype in ("bf16", "fp32"):
        for chosen in sketch_kernels.candidates(DTYPES[dtype])[1:]:
            yield "variants", partial(_sketched, sizes.variants, 1 << 18, dtype, chosen)
    yield "step", partial(_stepped, *sizes.step)
    for columns in sizes.long:
        yield "long", partial(_judged, Case(2, "bf16", columns, "aligned"))
        yield "long", partial(_sketched, columns, 1 << 20, "bf16", None)


def _judged(case: Case, device: torch.device) -> None:
    make_all(rows_of(case, device))


def _timed(count: int, columns: int, dtype: str, device: torch.device) -> None:
    """In place as well: row 0 is the output then."""
    rows = torch.empty(count, columns, dtype=DTYPES[dtype], device=device)
    triton_backend.gram(rows)
    triton_backend.combine(rows, weights_of(count, device), rows[0])


def _solved(count: int, device: torch.device) -> None:
    gram = torch.empty(count, count, dtype=torch.float64, device=device)
    triton_backend.min_norm(gram, None, "none", 1.0, "raw")
    triton_backend.psd_part(gram)
    _timed(count, 10**6, "bf16", device)


def _varied(count: int, columns: int, dtype: str, device: torch.device) -> None:
    rows = torch.empty(count, columns, dtype=DTYPES[dtype], device=device)
    for gram_variant in gram_kernels.candidates(count, rows.dtype):
        gram_kernels.gram(rows, chosen=gram_variant)
    for combine_variant in combine_kernels.candidates(count, rows.dtype):
        combine_kernels.combine_(rows, weights_of(count, device), chosen=combine_variant)


def _sketched(size: int, dimension: int, dtype: str, chosen: Any, device: torch.device) -> None:
    sketch_of(torch.empty(size, dtype=DTYPES[dtype], device=device), dimension, chosen)


def _stepped(columns: int, count: int, device: torch.device) -> None:
    """A step of mgda-decoupled, and one of constant weights: as `mogeo.decide.on_device` launches them."""
    rows = torch.empty(count, columns, device=device)
    gram = triton_backend.gram(rows)
    nonfinite = torch.empty(count, dtype=torch.bool, device=device)
    weights, _, _ = triton_backend.min_norm(
        gram, losses_of(count, device), "loss", 1.0, "raw", absent=None, propagate=False, nonfinite=nonfinite
    )
    triton_backend.direction_([rows], weights, [rows[0]], gram=gram, max_norm=None, discard=True)
    triton_backend.gram(rows[:1])  # the norm of a sum whose weights were known
    squares, one = (torch.empty(1, dtype=torch.float64, device=device) for _ in range(2))
    triton_backend.finish_([rows[0]], squares, one, None, None, discard=True)
