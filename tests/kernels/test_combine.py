"""The combination kernels where tests/geometry/test_ops.py does not reach: clipping, measuring and discarding.

Expected is what follows from the rows in fp64: d = wᵀG, its norm, and min(1, max_norm / ‖d‖).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.backends import KERNEL_DEVICE, elsewhere, needs_kernels
from tests.profiles import examples, slow_but
from tests.reference import rows as reference
from tests.row_asserts import assert_combined, gaussian
from tests.strategies import DTYPES, LAYOUTS, lay_out, spread_out

pytest.importorskip("triton")

from mogeo.kernels import combine as kernels

pytestmark = needs_kernels

FP64, FP32, BF16, FP16 = DTYPES
WEIGHTS = torch.tensor([0.5, -0.3, 0.8], dtype=FP64)
# Right to this much, relatively, whatever is measured of a direction in fp32 or more.
MEASURED = 1e-6


# The kernels, for CPU tensors.
combine_ = elsewhere(kernels.combine_, KERNEL_DEVICE)
_direction_ = elsewhere(kernels.direction_, KERNEL_DEVICE)
_finish_ = elsewhere(kernels.finish_, KERNEL_DEVICE)


def direction_(blocks: list[Tensor], weights: Tensor, **options: Any) -> tuple[float, float]:
    """Squared norm and clip factor, as numbers."""
    result = _direction_(blocks, weights, **options)
    assert result.squared_norm.dtype == result.clip_factor.dtype == FP64
    return result.squared_norm.item(), result.clip_factor.item()


def gram_of(blocks: Sequence[Tensor]) -> Tensor:
    """The Gram of all blocks, in fp64."""
    return sum((reference.gram(block) for block in blocks[1:]), start=reference.gram(blocks[0]))


def norm_of(blocks: Sequence[Tensor], weights: Tensor) -> float:
    """‖wᵀG‖ of all blocks, in fp64."""
    return torch.cat([reference.combine(block, weights) for block in blocks]).norm().item()


def mixed_blocks(k: int = 3, columns: tuple[int, ...] = (300, 1100, 2100, 37)) -> list[Tensor]:
    """A block of each dtype, of several tiles, of one and of less."""
    return [gaussian(k, n, dtype, seed) for seed, (n, dtype) in enumerate(zip(columns, DTYPES, strict=True))]


# --------------------------------------------------------------------------------------------------------------------
# combine_: clipping in the pass that combines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_0_becomes_the_clipped_direction(layout: str, dtype: torch.dtype) -> None:
    rows = lay_out(gaussian(3, 2100, dtype), layout)
    before = rows.clone()
    norm = norm_of([rows], WEIGHTS)
    result = combine_(rows, WEIGHTS, gram=reference.gram(rows), max_norm=norm / 3)
    assert result.data_ptr() == rows.data_ptr()
    assert_combined(before, WEIGHTS / 3, rows[0])
    assert torch.equal(rows[1:], before[1:])


def test_the_clip_factor_is_exact() -> None:
    rows = gaussian(4, 3000, FP64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=FP64)
    combine_(rows, weights, gram=reference.gram(rows), max_norm=0.25)
    assert rows[0].norm().item() == pytest.approx(0.25, rel=1e-13)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_short_direction_is_not_clipped(dtype: torch.dtype) -> None:
    rows = gaussian(3, 1500, dtype)
    gram, norm = reference.gram(rows), norm_of([rows], WEIGHTS)
    plain = rows.clone()
    combine_(plain, WEIGHTS)
    for max_norm in (1.001 * norm, math.inf):
        clipped = rows.clone()
        combine_(clipped, WEIGHTS, gram=gram, max_norm=max_norm)
        assert torch.equal(clipped, plain)


def test_rows_of_weight_zero_do_not_spoil_the_clipping() -> None:
    """They hold NaN, and so do their row and column of the Gram matrix."""
    rows = gaussian(3, 700)
    rows[1] = math.nan
    weights = torch.tensor([0.5, 0.0, 0.5], dtype=FP64)
    kept = rows[[0, 2]].clone()
    combine_(rows, weights, gram=reference.gram(rows), max_norm=norm_of([kept], weights[[0, 2]]) / 2)
    assert_combined(kept, weights[[0, 2]] / 2, rows[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", slow_but([1, 2, 4, 8, 9], 4))
def test_candidates_write_the_same_bits(monkeypatch: pytest.MonkeyPatch, k: int, dtype: torch.dtype) -> None:
    """Over several tiles a program; the first is in use; their names tell them apart. A row of weight zero is NaN."""
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", 2)
    candidates = kernels.candidates(k, dtype)
    assert kernels.variant(k, dtype) == candidates[0]
    assert len({chosen.name for chosen in candidates}) == len(candidates)
    rows, weights = gaussian(k, 5300, dtype), torch.linspace(0, 2, k + 1, dtype=FP64)[1:]
    if k > 2:
        weights[1], rows[1] = 0.0, math.nan
    combined = []
    for chosen in candidates:
        copy = rows.clone()
        combined.append(combine_(copy, weights, chosen=chosen).clone())
    used = weights != 0
    assert_combined(rows[used], weights[used], combined[0])
    assert all(torch.equal(other, combined[0]) for other in combined)


@pytest.mark.parametrize("k", [1, 2, 5, 32])
def test_any_number_of_rows(k: int) -> None:
    rows = gaussian(k, 600)
    before, weights = rows.clone(), torch.linspace(-1, 2, k, dtype=FP64)
    combine_(rows, weights, gram=reference.gram(rows), max_norm=norm_of([rows], weights) / 4)
    assert_combined(before, weights / 4, rows[0])


def test_what_has_cancelled_is_left_to_be_measured() -> None:
    """Here wᵀMw says nothing: nothing is clipped."""
    rows = gaussian(2, 500)
    rows[1] = -rows[0] * (1 - 2.0**-8)
    before, weights = rows.clone(), torch.tensor([0.5, 0.5], dtype=FP64)
    combine_(rows, weights, gram=reference.gram(rows), max_norm=1e-5)
    assert_combined(before, weights, rows[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_weights_zero(dtype: torch.dtype) -> None:
    rows = gaussian(3, 700, dtype)
    combine_(rows, torch.zeros(3, dtype=FP64), gram=reference.gram(rows), max_norm=1.0)
    assert torch.equal(rows[0], torch.zeros(700, dtype=dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("weight", "scale", "max_norm"),
    [(1e42, 1e-30, None), (1e-42, 1e36, None), (2.0**-140, 2.0**100, None), (1e60, 1e-30, 1.0), (1.0, 1e30, 1e-12)],
)
def test_weights_outside_fp32(weight: float, scale: float, max_norm: float | None, dtype: torch.dtype) -> None:
    """The products fit, though the weights do not; once clipped, or before."""
    rows = (gaussian(3, 900, FP64) * scale).to(dtype)
    before, weights = rows.clone(), torch.tensor([weight, 0.0, -weight / 2], dtype=FP64)
    norm = norm_of([rows], weights)
    combine_(rows, weights, gram=reference.gram(rows), max_norm=max_norm)
    assert_combined(before, weights * (max_norm or norm) / norm, rows[0])
    assert bool((rows[0] != 0).any())


@pytest.mark.parametrize("programs", [1, 3])
def test_the_number_of_programs_changes_no_bit(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """As many as there are tiles, or fewer that go round and round."""
    blocks, limited = mixed_blocks(columns=(2100, 4100, 8200, 8300)), mixed_blocks(columns=(2100, 4100, 8200, 8300))
    gram = gram_of(blocks)
    expected = direction_(blocks, WEIGHTS, gram=gram, max_norm=1.0)
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", programs)
    assert direction_(limited, WEIGHTS, gram=gram, max_norm=1.0) == expected
    assert all(torch.equal(a, b) for a, b in zip(blocks, limited, strict=True))
    measured = direction_(mixed_blocks(columns=(2100, 4100, 8200, 8300)), WEIGHTS, max_norm=1.0)
    assert measured == pytest.approx(expected, rel=1e-3)  # of the direction as rounded to each dtype


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_further_apart_than_32_bits_count(tmp_path: Path, dtype: torch.dtype) -> None:
    """Offsets in elements, beyond 2^31, into a sparse file of which a few pages are used."""
    if KERNEL_DEVICE != "cpu":
        pytest.skip("a GPU has no sparse memory")
    rows = spread_out(tmp_path, gaussian(3, 1100, dtype), (2**30 + 16, 1))
    before = rows.clone()
    combine_(rows, WEIGHTS)
    assert_combined(before, WEIGHTS, rows[0])


def test_columns_further_apart_than_32_bits_count(tmp_path: Path) -> None:
    if KERNEL_DEVICE != "cpu":
        pytest.skip("a GPU has no sparse memory")
    rows = spread_out(tmp_path, gaussian(3, 5, BF16), (1, 2**29 + 9))
    before = rows.clone()
    norm = norm_of([rows], WEIGHTS)
    squared_norm, factor = direction_([rows], WEIGHTS, max_norm=norm / 2)
    assert (squared_norm, factor) == pytest.approx((norm**2, 0.5), rel=1e-2)
    assert_combined(before, WEIGHTS * factor, rows[0], roundings=2)


@pytest.mark.parametrize("columns", [2**31 - 1, 2**31 - 17])
def test_the_last_tile_of_as_many_columns_as_32_bits_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """It is combined and scaled; what lies behind it stays. In a sparse file of which a few pages are used."""
    if KERNEL_DEVICE != "cpu":
        pytest.skip("a GPU has no sparse memory")
    from tests.kernels.one_program import run_program

    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", 1 << 21)  # so that the program of the last tile has few others
    chosen = kernels.variant(2, BF16)
    tile = chosen.threads * 8
    start = columns // tile * tile
    row = torch.from_file(str(tmp_path / "sparse"), shared=True, size=columns + 2 * tile, dtype=BF16)
    row[start:] = gaussian(1, len(row) - start, BF16)[0]
    before, behind = row[start:columns].clone(), row[columns:].clone()
    weights, squares = torch.tensor([0.5, -2.0], dtype=FP64), torch.zeros(kernels._MOST_PROGRAMS, dtype=FP64)
    rows = row[:columns].expand(2, columns)  # twice the same: row 0 is written where both have been read
    launch = kernels.launch(rows, weights, row[:columns], None, None, squares, chosen)
    program = columns // tile % launch.grid[0]
    run_program(launch, program)
    assert torch.equal(row[start:columns], -1.5 * before)
    # Zeros, but for the last tile, are all that this program has combined.
    written = row[start:columns].double()
    assert squares[program].item() == pytest.approx(written.square().sum().item(), rel=1e-12)
    scale = kernels.launch_scale(row[:columns], torch.tensor([1.0, 1.0, 0.5], dtype=FP64))
    run_program(scale, columns // tile % scale.grid[0])
    assert torch.equal(row[start:columns], -0.75 * before)
    assert torch.equal(row[columns:], behind)


# --------------------------------------------------------------------------------------------------------------------
# direction_: several blocks, one norm


@pytest.mark.parametrize("share", [0.3, 2.0, None])
@pytest.mark.parametrize("with_gram", [True, False])
def test_blocks_of_several_dtypes_are_one_direction(with_gram: bool, share: float | None) -> None:
    """Clipped to a share of their norm, or not: by the Gram matrix, or by what was measured."""
    blocks = mixed_blocks()
    before, norm = [block.clone() for block in blocks], norm_of(blocks, WEIGHTS)
    gram = gram_of(blocks) if with_gram else None
    squared_norm, factor = direction_(blocks, WEIGHTS, gram=gram, max_norm=None if share is None else share * norm)
    # Half precision rounds each entry of what is measured; two factors in place of one round it twice.
    assert squared_norm == pytest.approx(norm**2, rel=1e-12 if with_gram else 1e-3)
    assert factor == pytest.approx(min(1.0, share or 1.0), rel=1e-12 if with_gram else 1e-3)
    for block, original in zip(blocks, before, strict=True):
        assert_combined(original, WEIGHTS * factor, block[0], roundings=1 if with_gram else 2)
        assert torch.equal(block[1:], original[1:])


def test_without_clipping_the_gram_gives_the_norm() -> None:
    blocks = mixed_blocks()
    norm = norm_of(blocks, WEIGHTS)
    squared_norm, factor = direction_(blocks, WEIGHTS, gram=gram_of(blocks))
    assert (squared_norm, factor) == (pytest.approx(norm**2, rel=1e-12), 1.0)


@pytest.mark.parametrize("dtype", [FP64, FP32])
@pytest.mark.parametrize("left", [2.0**-8, 2.0**-12])
def test_where_gradients_cancel_the_measured_norm_counts(left: float, dtype: torch.dtype) -> None:
    """wᵀMw is what rounding left of it; made worse here, to be sure that nobody looks at it."""
    rows = gaussian(2, 1300, dtype)
    rows[1] = -rows[0] * (1 - left)
    before, weights = rows.clone(), torch.tensor([0.5, 0.5], dtype=FP64)
    norm = norm_of([rows], weights)
    gram = reference.gram(rows)
    gram[0, 0] += 10 * norm**2
    squared_norm, factor = direction_([rows], weights, gram=gram, max_norm=norm / 10)
    assert squared_norm == pytest.approx(norm**2, rel=MEASURED)
    assert factor == pytest.approx(0.1, rel=MEASURED)
    assert rows[0].double().norm().item() == pytest.approx(norm / 10, rel=MEASURED)
    assert_combined(before, weights * factor, rows[0], roundings=2)


def test_a_gram_that_has_not_cancelled_counts() -> None:
    """What is measured in half precision is less exact than the Gram matrix that was summed in fp32."""
    rows = gaussian(3, 1300, BF16)
    gram = reference.gram(rows) * 1.0001
    squared_norm, _ = direction_([rows], WEIGHTS, gram=gram, max_norm=1.0)
    assert squared_norm == pytest.approx((WEIGHTS @ gram @ WEIGHTS).item(), rel=1e-12)


@examples(15)
@given(st.integers(1, 6), st.integers(0, 2**20), st.sampled_from([0.0, 0.9, 1.0 - 1e-3]), st.booleans())
def test_the_direction_has_the_length_it_was_clipped_to(k: int, seed: int, common: float, with_gram: bool) -> None:
    """Whatever cancels: to 1e-6, in fp32."""
    rows = gaussian(k, 600, FP32, seed)
    rows -= common * rows.mean(0) if k > 1 else 0.0
    weights = torch.rand(k, dtype=FP64, generator=torch.Generator().manual_seed(seed)) + 0.5
    if common:
        weights.fill_(1 / k)
    norm = norm_of([rows], weights)
    direction_([rows], weights, gram=reference.gram(rows) if with_gram else None, max_norm=norm / 7)
    assert rows[0].double().norm().item() == pytest.approx(norm / 7, rel=MEASURED)


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_row_of_weight_zero_is_not_read(entry: float) -> None:
    blocks = mixed_blocks()
    weights = torch.tensor([0.0, 0.25, 0.75], dtype=FP64)
    kept = [block[1:].clone() for block in blocks]
    for block in blocks:
        block[0] = entry
    norm = norm_of(kept, weights[1:])
    squared_norm, factor = direction_(blocks, weights, gram=gram_of(blocks), max_norm=norm / 2)
    assert (squared_norm, factor) == pytest.approx((norm**2, 0.5), rel=1e-12)
    for block, original in zip(blocks, kept, strict=True):
        assert_combined(original, weights[1:] * factor, block[0])


def test_blocks_without_columns() -> None:
    blocks = [torch.zeros(3, 0), gaussian(3, 50), torch.zeros(3, 0, dtype=FP16)]
    before, norm = blocks[1].clone(), norm_of(blocks, WEIGHTS)
    squared_norm, factor = direction_(blocks, WEIGHTS, max_norm=norm / 2)
    assert (squared_norm, factor) == pytest.approx((norm**2, 0.5), rel=MEASURED)
    assert_combined(before, WEIGHTS * factor, blocks[1][0], roundings=2)
    assert direction_(blocks[::2], WEIGHTS, max_norm=1.0) == (0.0, 1.0)
    combine_(blocks[0], WEIGHTS, gram=torch.zeros(3, 3, dtype=FP64), max_norm=1.0)


# --------------------------------------------------------------------------------------------------------------------
# direction_: what is not finite


@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("max_norm", [None, 1e9])
def test_an_overflow_in_one_block_discards_all(max_norm: float | None, with_gram: bool) -> None:
    blocks = mixed_blocks()
    blocks[3][:, 5] = 6e4
    before, weights = [block.clone() for block in blocks], torch.tensor([0.5, 0.5, 0.5], dtype=FP64)
    gram = gram_of(blocks) if with_gram else None
    squared_norm, factor = direction_(blocks, weights, gram=gram, max_norm=max_norm)
    assert factor == 0.0
    assert math.isinf(squared_norm) != with_gram
    for block, original in zip(blocks, before, strict=True):
        assert torch.equal(block[0], torch.zeros_like(block[0]))
        assert torch.equal(block[1:], original[1:])


def test_clipping_comes_before_an_overflow() -> None:
    """A Gram matrix clips as it combines, so that a direction which would not fit into fp16 does."""
    rows = torch.full((2, 10), 6e4, dtype=FP16)
    before, weights = rows.clone(), torch.tensor([1.0, 1.0], dtype=FP64)
    norm = norm_of([rows], weights)
    squared_norm, factor = direction_([rows], weights, gram=reference.gram(rows), max_norm=1.0)
    assert (squared_norm, factor) == (pytest.approx(norm**2), pytest.approx(1 / norm))
    assert_combined(before, weights * factor, rows[0])


def test_an_overflow_is_kept_on_demand() -> None:
    rows = gaussian(2, 1200, FP16)
    rows[:, 7] = 6e4
    before, weights = rows.clone(), torch.tensor([1.0, 1.0], dtype=FP64)
    squared_norm, factor = direction_([rows], weights, discard=False)
    assert (squared_norm, factor) == (math.inf, 1.0)
    assert_combined(before[:, :7], weights, rows[0, :7])
    assert rows[0, 7] == math.inf


@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_weights_that_are_not_finite(max_norm: float | None, with_gram: bool) -> None:
    weights = torch.tensor([0.5, math.nan, 0.5], dtype=FP64)
    for discard in (True, False):
        blocks = mixed_blocks()
        gram = gram_of(blocks) if with_gram else None
        squared_norm, factor = direction_(blocks, weights, gram=gram, max_norm=max_norm, discard=discard)
        assert math.isnan(squared_norm)
        assert factor == (0.0 if discard else 1.0)
        for block in blocks:
            assert bool((block[0] == 0).all() if discard else block[0].isnan().all())


@pytest.mark.parametrize("discard", [True, False])
def test_a_row_that_is_not_finite(discard: bool) -> None:
    rows = gaussian(2, 1200)
    rows[1, 1100] = math.nan
    squared_norm, factor = direction_([rows], torch.tensor([0.5, 0.5], dtype=FP64), max_norm=1.0, discard=discard)
    assert math.isnan(squared_norm)
    assert factor == (0.0 if discard else 1.0)
    assert int(rows[0].isnan().sum()) == (0 if discard else 1)
    assert bool((rows[0] == 0).all()) == discard


# --------------------------------------------------------------------------------------------------------------------
# finish_: a direction that lies there already


@pytest.mark.parametrize("n", [0, 1, 1024, 2500])
def test_finish_adds_up_and_clips(n: int) -> None:
    squares = torch.arange(n, dtype=FP64)
    wide, narrow = gaussian(1, 900)[0], gaussian(1, 40, FP16)[0]
    parts = [wide.repeat_interleave(2)[::2], narrow.clone()]
    result = _finish_(parts, squares, torch.ones(1, dtype=FP64), None, 10.0, discard=True)
    total = n * (n - 1) / 2
    factor = 10.0 / math.sqrt(total) if total > 100 else 1.0
    assert result.squared_norm.item() == total
    assert result.clip_factor.item() == pytest.approx(factor, rel=1e-15)
    for part, original in zip(parts, (wide, narrow), strict=True):
        assert torch.equal(part, (original.double() * factor).to(original.dtype))
