"""Signed sketches: row += S g for a gradient g of N elements and a row of d buckets, in one pass, without atomics.

Knows tensors only; arguments come checked, and what is random comes drawn, from `mogeo.geometry.projection`, which says
what S is. A program owns a tile of buckets and goes over chunks of the gradient. In chunk c these buckets gather the
elements (b − r_c) mod d, which lie side by side but where the chunk wraps around: so a warp reads whole lines, and sums
stay in registers. Where few tiles are to be had, chunks are dealt to several programs per tile, whose sums a second
kernel adds up in their order. How they are dealt depends on N and d alone, not on the device: same bits on every run.

Signs come from a table with a byte per place, which holds the eight signs that a thread needs of a chunk. Gradients in
half precision are accumulated in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mogeo.kernels.target import Launch, threads_per_warp

# A tile of buckets is eight slices with a bucket of each thread, so that the signs of a thread fill a byte.
_SLICES = 8
_THREADS = 128
_TILE = _SLICES * _THREADS
# Chunks below which a further program is not worth its partial sums.
_FEWEST_CHUNKS = 32
# Kernels count chunks, and some beyond the last, in 32 bits.
MOST_CHUNKS = 2**31 - 2**10


class Variant(NamedTuple):
    """How the pass over a gradient works. The number of its rows plays no part: a sketch takes one at a time."""

    unroll: int  #: chunks whose elements are asked for together
    programs: int  #: programs beyond which tiles share their chunks with no further one

    @property
    def name(self) -> str:
        """For tables: "4 chunks, 2048 programs"."""
        return f"{self.unroll} chunks, {self.programs} programs"


def variant(dtype: torch.dtype) -> Variant:
    """The variant for a gradient of this dtype. What speaks for it: docs/kernels.md."""
    return candidates(dtype)[0]


def candidates(dtype: torch.dtype) -> tuple[Variant, ...]:
    """Variants between which only hardware can decide, for a gradient of this dtype; the first is the one in use.

    Their sums differ in the last digits where they deal chunks to other numbers of programs.
    """
    two, three = Variant(2, 4096), Variant(3, 4096)  # of bf16, two chunks' elements are too few bytes
    default, other = (three, two) if dtype == torch.bfloat16 else (two, three)
    return (default, other, default._replace(programs=1024))


@triton.jit(do_not_specialize=["n_chunks", "tail"])  # or every shape of a model's tensors compiles its own
def _sketch(
    gradient, chunks, signs, sums, dimension, n_chunks, tail,
    SLICES: tl.constexpr, THREADS: tl.constexpr, UNROLL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Buckets of one tile, of the chunks of one part: added to `sums` [d], or written to `sums` [parts, d]."""
    TILE: tl.constexpr = SLICES * THREADS
    first_bucket = tl.program_id(0) * TILE
    part = tl.program_id(1)
    n_parts = tl.num_programs(1)
    first = (part * tl.cast(n_chunks, tl.int64) // n_parts).to(tl.int32)
    last = ((part + 1) * tl.cast(n_chunks, tl.int64) // n_parts).to(tl.int32)
    lane = tl.arange(0, THREADS)

    # A group of chunks is asked for an iteration before it is added, and what was drawn for it, one before that: all
    # that a warp waits for has been under way together. The first iteration adds nothing, and the last one asks for
    # nothing.
    totals = _zeros(SLICES, THREADS, sums.dtype.element_ty)
    values = _nothing(gradient, lane, SLICES * UNROLL)
    columns = _zeros(UNROLL, THREADS, tl.int32)
    flips = ()
    for _ in tl.static_range(UNROLL):
        flips = flips + (first * 0,)
    drawn = _drawn(chunks, first, last, UNROLL)
    for group in range(first, last + UNROLL, UNROLL):
        totals = _add(totals, values, columns, flips, gradient.dtype.element_ty, SLICES, UNROLL)
        whole = (group + UNROLL <= last) & (first_bucket + TILE <= dimension)
        heads = ()
        columns = ()
        flips = ()
        for u in tl.static_range(UNROLL):
            head, column, flip = _placed(signs, drawn[u], first_bucket, lane, dimension)
            whole = whole & (head + TILE <= tl.where(group + u == n_chunks - 1, tail, dimension))
            heads = heads + (head,)
            columns = columns + (column,)
            flips = flips + (flip,)
        drawn = _drawn(chunks, group + UNROLL, last, UNROLL)
        if whole:  # no chunk ends, or wraps around, in this tile
            place = gradient + group * tl.cast(dimension, tl.int64)
            values = _side_by_side(place, heads, lane, dimension, SLICES, UNROLL)
        else:
            for chunk in range(group, tl.minimum(group + UNROLL, last)):
                totals = _add_cut_tile(
                    totals, gradient, chunks, signs, chunk, last, first_bucket, lane, dimension, n_chunks, tail, SLICES
                )
            values = _nothing(gradient, lane, SLICES * UNROLL)

    place = sums + part * tl.cast(dimension, tl.int64) + first_bucket + lane
    for s in tl.static_range(SLICES):
        mask = first_bucket + s * THREADS + lane < dimension
        total = totals[s]
        if ADD:
            total += tl.load(place + s * THREADS, mask=mask, other=0.0)
        tl.store(place + s * THREADS, total, mask=mask)


@triton.jit
def _zeros(SLICES: tl.constexpr, THREADS: tl.constexpr, DTYPE: tl.constexpr):
    totals = ()
    for _ in tl.static_range(SLICES):
        totals = totals + (tl.zeros([THREADS], DTYPE),)
    return totals


@triton.jit
def _drawn(chunks, group, last, UNROLL: tl.constexpr):
    """What was drawn for each chunk of a group: the entries of its row of the table, as one number."""
    both = chunks.to(tl.pointer_type(tl.int64))
    drawn = ()
    for u in tl.static_range(UNROLL):
        drawn = drawn + (tl.load(both + tl.cast(tl.minimum(group + u, last - 1), tl.int64)),)
    return drawn


@triton.jit
def _placed(signs, drawn, first_bucket, lane, dimension):
    """Which element of a chunk falls into the first bucket of a tile, a byte of signs per lane, and whether to turn it.

    That is −1 if so, else 0.
    """
    turned = drawn.to(tl.int32)
    window = (drawn >> 32).to(tl.int32)
    head = first_bucket - (turned >> 1)
    head = tl.where(head < 0, head + dimension, head)
    return head, tl.load(signs + window + first_bucket + lane).to(tl.int32), -(turned & 1)


@triton.jit
def _side_by_side(place, heads, lane, dimension, SLICES: tl.constexpr, UNROLL: tl.constexpr):
    """The elements of a tile of buckets in each chunk of a group, slice by slice, as `_carried`."""
    values = ()
    for i in tl.static_range(UNROLL * SLICES):
        first = place + i // SLICES * tl.cast(dimension, tl.int64) + heads[i // SLICES] + i % SLICES * lane.shape[0]
        values = values + (_carried(tl.load(first + lane)),)
    return values


@triton.jit
def _nothing(gradient, lane, COUNT: tl.constexpr):
    """As many zeros, in place of elements."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (_carried(tl.zeros([lane.shape[0]], gradient.dtype.element_ty)),)
    return values


@triton.jit
def _add_cut_tile(
    totals, gradient, chunks, signs, chunk, last, first_bucket, lane, dimension, n_chunks, tail, SLICES: tl.constexpr
):
    """Totals with a tile of a chunk that ends, or wraps around, in the tile; or the tile reaches beyond the buckets."""
    (drawn,) = _drawn(chunks, chunk, last, 1)
    head, column, flip = _placed(signs, drawn, first_bucket, lane, dimension)
    length = tl.where(chunk == n_chunks - 1, tail, dimension)
    place = gradient + chunk * tl.cast(dimension, tl.int64)
    added = ()
    for s in tl.static_range(SLICES):
        offset = s * lane.shape[0] + lane
        element = head + offset
        element = tl.where(element < dimension, element, element - dimension)
        mask = (first_bucket + offset < dimension) & (element < length)
        value = tl.load(place + element, mask=mask, other=0.0)
        added = added + (totals[s] + _signed(value.to(totals[s].dtype), column ^ flip, s),)
    return added


@triton.jit
def _carried(values):
    """Values as they go from one iteration to the next: half precision in a register of its own.

    Else two would be packed into one, as soon as they are there, and all would be waited for.
    """
    carried = values
    if values.dtype.primitive_bitwidth == 16:
        carried = values.to(tl.uint16, bitcast=True).to(tl.uint32)
    return carried


@triton.jit
def _restored(carried, DTYPE: tl.constexpr):
    """What `_carried` was given; bf16 as fp32, of which it is the upper half."""
    values = carried
    if DTYPE.is_bf16():
        values = (carried << 16).to(tl.float32, bitcast=True)
    elif DTYPE.is_fp16():
        values = carried.to(tl.uint16).to(tl.float16, bitcast=True)
    return values


@triton.jit
def _add(totals, values, columns, flips, DTYPE: tl.constexpr, SLICES: tl.constexpr, UNROLL: tl.constexpr):
    """Totals with the elements of a group, chunk by chunk."""
    added = ()
    for s in tl.static_range(SLICES):
        total = totals[s]
        for u in tl.static_range(UNROLL):
            value = _restored(values[u * SLICES + s], DTYPE).to(total.dtype)
            total += _signed(value, columns[u] ^ flips[u], s)
        added = added + (total,)
    return added


@triton.jit
def _signed(values, column, s: tl.constexpr):
    """Values with their signs: bit s of a lane's byte is set where its sign in slice s is −1."""
    return tl.where((column & (1 << s)) != 0, -values, values)


@triton.jit
def _sketch_reduce(partials, row, dimension, n_parts, SLICES: tl.constexpr, THREADS: tl.constexpr):
    """Add the sums of all parts to the row."""
    bucket = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    slices = tl.arange(0, SLICES)[:, None]
    total = tl.zeros([SLICES, THREADS], row.dtype.element_ty)
    for part in range(0, n_parts, SLICES):
        place = (part + slices).to(tl.int64) * dimension + bucket[None, :]
        mask = (part + slices < n_parts) & (bucket < dimension)[None, :]
        total += tl.load(partials + place, mask=mask, other=0.0)
    before = tl.load(row + bucket, mask=bucket < dimension, other=0.0)
    tl.store(row + bucket, before + tl.sum(total, axis=0), mask=bucket < dimension)


# --------------------------------------------------------------------------------------------------------------------
# Launch


def tables(signs: Tensor, chunks: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """What `sketch_` reads, on the device.

    Args:
        signs: the table of signs ±1, int8 [n].
        chunks: per tensor int32 [C, 3], a chunk's rotation r, the first entry of its window t, and its sign σ.

    Returns:
        The signs, uint8 [n + 1024]: bit s of byte i is set where entry i + 128·s is −1. Per tensor int32 [C, 2], 2r and
        t, with one added to 2r where σ = −1.
    """
    padded = torch.cat([signs, signs.new_ones(2 * _TILE)])
    count = len(signs) + _TILE
    packed = torch.zeros(count, dtype=torch.uint8)
    for s in range(_SLICES):
        packed |= (padded[s * _THREADS : s * _THREADS + count] < 0).to(torch.uint8) << s
    rotations, windows, flips = torch.cat([*chunks, torch.empty(0, 3, dtype=torch.int32)]).T
    drawn = torch.stack([2 * rotations + (flips < 0), windows], dim=1).to(device)
    # Apart, so that all are aligned alike, and one kernel serves them.
    return packed.to(device), [part.clone() for part in drawn.split([len(of_tensor) for of_tensor in chunks])]


def sketch_(row: Tensor, gradient: Tensor, chunks: Tensor, signs: Tensor, *, chosen: Variant | None = None) -> None:
    """row += S gradient.

    Args:
        row: fp32 or fp64 [d], d ≤ 2³⁰, contiguous.
        gradient: fp64 (into fp64 only), fp32, bf16 or fp16, of any shape and strides; one that is not contiguous is
            copied.
        chunks: of this gradient, and `signs`: as `tables` returned them.
        chosen: one of `candidates`, in place of the first.

    Raises:
        ValueError: 2³¹ chunks or more, or almost.
    """
    if len(chunks) > MOST_CHUNKS:
        raise ValueError(
            f"{gradient.numel()} elements in {len(row)} buckets are {len(chunks)} chunks: use more buckets"
        )
    flat = gradient.reshape(-1).contiguous()  # a flat view may have strides, too
    if not len(flat):
        return
    chosen = chosen or variant(gradient.dtype)
    n_parts = parts(len(chunks), len(row), chosen)
    if n_parts == 1:
        launch(flat, chunks, signs, row, chosen).run()
        return
    partials = row.new_empty(n_parts, len(row))
    launch(flat, chunks, signs, partials, chosen).run()
    launch_reduce(partials, row).run()


def parts(n_chunks: int, dimension: int, chosen: Variant) -> int:
    """How many programs share the chunks of a tile."""
    tiles = -(-dimension // _TILE)
    return max(1, min(n_chunks // _FEWEST_CHUNKS, chosen.programs // tiles))


def launch(flat: Tensor, chunks: Tensor, signs: Tensor, sums: Tensor, chosen: Variant) -> Launch:
    """The pass over the gradient [N]: adds to `sums` [d] if that is the row itself, else overwrites [parts, d]."""
    dimension = sums.shape[-1]
    n_parts = 1 if sums.ndim == 1 else len(sums)
    options: dict[str, Any] = {
        "SLICES": _SLICES,
        "THREADS": _THREADS,
        "UNROLL": chosen.unroll,
        "ADD": sums.ndim == 1,
        "num_warps": _THREADS // threads_per_warp(),
    }
    tail = len(flat) - (len(chunks) - 1) * dimension
    arguments = [flat, chunks, signs, sums, dimension, len(chunks), tail]
    return Launch(_sketch, (-(-dimension // _TILE), n_parts), arguments, options)


def launch_reduce(partials: Tensor, row: Tensor) -> Launch:
    """The sum of the parts."""
    n_parts, dimension = partials.shape
    options: dict[str, Any] = {"SLICES": _SLICES, "THREADS": _THREADS, "num_warps": _THREADS // threads_per_warp()}
    return Launch(_sketch_reduce, (-(-dimension // _THREADS),), [partials, row, dimension, n_parts], options)
