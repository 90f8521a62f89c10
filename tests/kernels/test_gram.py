"""The Gram kernels where test_ops.py does not reach: chunks of several tiles, and what only a launch decides.

A chunk is several tiles long from a million columns on. Here the tiles of a chunk, or the chunks, are few by decree.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tests.backends import KERNEL_DEVICE, elsewhere, needs_kernels
from tests.profiles import slow_but
from tests.reference import rows as reference
from tests.row_asserts import WORST_CASE, assert_gram, gaussian
from tests.strategies import LAYOUTS, lay_out, spread_out

pytest.importorskip("triton")

from mogeo.kernels import gram as kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# K and dtype on both sides of every choice that is made of them: rows or dot, a square of 16 or 32, full or not.
SHAPES = [
    *((k, FP32) for k in (1, 2, 10, 11)),
    *((k, BF16) for k in (1, 7, 8)),
    *((k, FP16) for k in (3, 9)),
    *slow_but([(16, FP32), (17, FP32), (32, FP32), (16, BF16), (31, BF16)]),
]
# Those that an interpreter is through with soon, of either kernel.
SMALL_SHAPES = [(2, FP32), (7, BF16), (3, FP16), (11, FP32), (8, BF16), (9, FP16)]
ROWS_AND_DOT = [(3, FP32), (3, BF16), (11, FP32), (9, BF16)]


# The kernels, for CPU tensors.
gram = elsewhere(kernels.gram, KERNEL_DEVICE)
gram_by_segment = elsewhere(kernels.gram_by_segment, KERNEL_DEVICE)


@pytest.fixture
def three_tiles(few_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three tiles, whatever the number of columns."""
    variant = kernels.variant
    monkeypatch.setattr(kernels, "variant", lambda count, dtype: variant(count, dtype)._replace(tiles=3))


@pytest.fixture
def few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as long as they get."""
    monkeypatch.setattr(kernels, "_FEWEST_CHUNKS", 1)


def tile(k: int, dtype: torch.dtype) -> int:
    """Columns of a tile."""
    return kernels.variant(k, dtype).block


# --------------------------------------------------------------------------------------------------------------------
# Cuts


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), st.integers(1, 4).map(lambda tiles: 128 * tiles))
def test_chunks_are_cut_at_their_length_and_at_boundaries(places: list[int], length: int) -> None:
    boundaries = (0, *sorted(places))
    cuts, ranges = kernels._cuts(boundaries, length, torch.device("cpu"))
    chunks = list(itertools.pairwise(cuts.tolist()))
    assert all(0 < end - start <= length for start, end in chunks)
    assert all(start % length == 0 or start in boundaries for start, _ in chunks)
    *segments, whole = ranges.tolist()
    assert whole == [0, len(chunks)]
    for (start, end), (first, last) in zip(itertools.pairwise(boundaries), segments, strict=True):
        assert sum(b - a for a, b in chunks[first:last]) == end - start
        assert all(start <= a and b <= end for a, b in chunks[first:last])


# --------------------------------------------------------------------------------------------------------------------
# Chunks of several tiles


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), SHAPES)
def test_chunks_of_several_tiles(three_tiles: None, k: int, dtype: torch.dtype) -> None:
    """Two full chunks, one of a tile and a part of one; and a part of a tile alone."""
    for columns in (7 * tile(k, dtype) + 17, tile(k, dtype) - 3):
        rows = gaussian(k, columns, dtype)
        assert_gram(rows, gram(rows))


@needs_kernels
@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "transposed"))
@pytest.mark.parametrize(("k", "dtype"), ROWS_AND_DOT)
def test_chunks_of_several_tiles_in_any_layout(three_tiles: None, k: int, dtype: torch.dtype, layout: str) -> None:
    rows = lay_out(gaussian(k, 4 * tile(k, dtype) + 5, dtype), layout)
    assert_gram(rows, gram(rows))


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), slow_but(SMALL_SHAPES, (2, FP32), (8, BF16)))
def test_segments_within_chunks_of_several_tiles(three_tiles: None, k: int, dtype: torch.dtype) -> None:
    """Chunks with a head, a tail, both, and both within one tile."""
    t = tile(k, dtype)
    rows = gaussian(k, 7 * t + 17, dtype)
    boundaries = [0, t + 3, t + 3, t + 9, 3 * t, 5 * t - 1, 7 * t + 17]
    *segments, total = gram_by_segment(rows, boundaries)
    assert_gram(rows, total)
    for (start, end), segment in zip(itertools.pairwise(boundaries), segments, strict=True):
        assert_gram(rows[:, start:end], segment)
    norms = total.diagonal().sqrt()
    assert bool(((sum(segments) - total).abs() <= 1e-13 * norms[:, None] * norms).all())  # both are sums of the chunks


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), [(2, FP32), (1, BF16), (11, FP32), (8, BF16)])
@pytest.mark.parametrize("first", [1.1, 2.0**13])
def test_the_longest_chunks_sum_accurately(few_chunks: None, k: int, dtype: torch.dtype, first: float) -> None:
    """Equal products, so that roundings of an fp32 sum have the same sign; and one entry that outweighs the rest.

    Then a rounding may lose half a unit of the largest sum per tile: in a thread's own sum, or in that of all columns.
    And a product of tiles may lose all others of the tile of that entry: it adds in an order of its own.
    """
    chosen = kernels.variant(k, dtype)
    rows = torch.full((k, 2 * chosen.tiles * chosen.block + 5), 1.1).to(dtype)
    rows[:, 0] = first
    lost = chosen.tiles * 2.0**-24 + chosen.block * (1.1 / first) ** 2 if chosen.kernel == "dot" and first > 2 else 0.0
    assert_gram(rows, gram(rows), max(WORST_CASE, lost))


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), slow_but(ROWS_AND_DOT, (3, FP32), (9, BF16)))
def test_cuts_do_not_matter_where_sums_are_exact(monkeypatch: pytest.MonkeyPatch, k: int, dtype: torch.dtype) -> None:
    rows = torch.randint(-8, 9, (k, 400), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference.gram(rows)
    variant = kernels.variant
    for tiles, fewest, block in ((1, 1024, 1024), (2, 1, 1), (100, 1, 2)):
        changed = variant(k, dtype)._replace(tiles=tiles)
        monkeypatch.setattr(kernels, "variant", lambda count, dtype, changed=changed: changed)
        monkeypatch.setattr(kernels, "_FEWEST_CHUNKS", fewest)
        monkeypatch.setattr(kernels, "_REDUCE_BLOCK", block)
        assert torch.equal(gram(rows), expected)
        assert torch.equal(gram_by_segment(rows, [0, 170, 400])[-1], expected)


@needs_kernels
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("k", slow_but([1, 2, 4, 8, 11], 4))
def test_candidates(few_chunks: None, k: int, dtype: torch.dtype) -> None:
    """All are right, over chunks of several tiles; the first is in use; their names tell them apart."""
    candidates = kernels.candidates(k, dtype)
    assert kernels.variant(k, dtype) == candidates[0]
    assert len({chosen.name for chosen in candidates}) == len(candidates)
    for chosen in candidates:
        rows = gaussian(k, 4 * chosen.block + 17, dtype)
        assert_gram(rows, gram(rows, chosen=chosen._replace(tiles=3)))
    assert torch.equal(gram(rows), gram(rows, chosen=candidates[0]))


# --------------------------------------------------------------------------------------------------------------------
# Chunks that are summed again in fp64


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), slow_but(ROWS_AND_DOT, (3, BF16), (11, FP32)))
@pytest.mark.parametrize(
    ("scale", "beside"), slow_but([(1e25, "normal"), (1e-25, "normal"), (1e-40, "zero")], (1e25, "normal"))
)
def test_some_chunks_leave_fp32(three_tiles: None, k: int, dtype: torch.dtype, scale: float, beside: str) -> None:
    """Rows 0 and 2 do, in the second chunk; right to the digits of what each segment holds."""
    t = tile(k, dtype)
    rows = gaussian(k, 6 * t + 5, torch.float64)
    if beside == "zero":
        rows.zero_()
    rows[::2, 3 * t : 6 * t] = gaussian(k, 3 * t, torch.float64, seed=1)[::2] * scale
    rows = rows.to(dtype)
    assert_gram(rows, gram(rows))
    boundaries = [0, 3 * t + 4, 6 * t - 3, 6 * t + 5]
    *segments, total = gram_by_segment(rows, boundaries)
    assert_gram(rows, total)
    for (start, end), segment in zip(itertools.pairwise(boundaries), segments, strict=True):
        assert_gram(rows[:, start:end], segment)


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), slow_but([*ROWS_AND_DOT, (3, FP16), (9, FP16)], (3, FP32), (9, BF16)))
@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_nonfinite_entry_beside_values_that_leave_fp32(
    three_tiles: None, k: int, dtype: torch.dtype, entry: float
) -> None:
    t = tile(k, dtype)
    rows = gaussian(k, 4 * t, torch.float64) * (1.0 if dtype == FP16 else 1e22)
    rows[1, t] = entry
    rows = rows.to(dtype)
    result = gram(rows)
    assert not bool(result[1, 1].isfinite())
    kept = torch.tensor([i for i in range(k) if i != 1])
    assert_gram(rows[kept], result[kept][:, kept])


# --------------------------------------------------------------------------------------------------------------------
# What else a launch decides


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), ROWS_AND_DOT)
def test_add_to(k: int, dtype: torch.dtype) -> None:
    rows = gaussian(k, 700, dtype)
    alone = gram(rows)
    total = torch.arange(k * k, dtype=torch.float64).view(k, k)
    total = total + total.T
    expected = total + alone
    result = gram(rows, add_to=total)
    assert result.data_ptr() == total.data_ptr()
    assert result.shape == total.shape
    assert torch.equal(total, expected)
    assert torch.equal(gram(rows[:, :0], add_to=total), expected)


@needs_kernels
@pytest.mark.parametrize(("k", "dtype"), [(3, BF16), (9, BF16)])
def test_rows_further_apart_than_32_bits_count(tmp_path: Path, k: int, dtype: torch.dtype) -> None:
    """Offsets in elements, beyond 2^31, into a sparse file of which a few pages are used."""
    if KERNEL_DEVICE != "cpu":
        pytest.skip("a GPU has no sparse memory")
    apart = (2**31 + 2**20) // (k - 1) // 16 * 16
    rows = spread_out(tmp_path, gaussian(k, 300, dtype), (apart, 1))
    assert (k - 1) * rows.stride(0) > 2**31
    assert_gram(rows, gram(rows))


@needs_kernels
@pytest.mark.parametrize("k", [1, 8])
def test_columns_further_apart_than_32_bits_count(tmp_path: Path, k: int) -> None:
    if KERNEL_DEVICE != "cpu":
        pytest.skip("a GPU has no sparse memory")
    rows = spread_out(tmp_path, gaussian(k, 5, BF16), (1, 2**29 + 9))
    assert 4 * rows.stride(1) > 2**31
    assert_gram(rows, gram(rows))


@needs_kernels
@pytest.mark.parametrize("columns", [2**31 - 1, 2**31 - 17, 2**31 + 5])
@pytest.mark.parametrize("k", [1, 9])
def test_the_last_chunk_of_as_many_columns_as_32_bits_count(tmp_path: Path, k: int, columns: int) -> None:
    """And none of what lies behind it: NaN. In a sparse file of which a few pages are used; all rows are the same."""
    if KERNEL_DEVICE != "cpu":
        pytest.skip("a GPU has no sparse memory")
    from tests.kernels.one_program import run_program

    chosen = kernels.variant(k, BF16)
    length = chosen.tiles * chosen.block
    n_chunks = -(-columns // length)
    start = (n_chunks - 1) * length
    row = torch.from_file(str(tmp_path / "sparse"), shared=True, size=columns + 2 * length, dtype=BF16)
    row[start:columns] = gaussian(1, columns - start, BF16)[0]
    row[columns:] = math.nan
    partials = torch.zeros(k * (k + 1) // 2, n_chunks, dtype=torch.float64)
    run_program(kernels.launch(row[:columns].expand(k, columns), None, length, partials, chosen), n_chunks - 1)
    expected = row[start:columns].double().square().sum().expand(len(partials))
    torch.testing.assert_close(partials[:, -1], expected, rtol=1e-6, atol=0)
    assert not partials[:, :-1].any()
