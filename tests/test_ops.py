"""`gram` and `combine` against three-line fp64 references, for every dtype, length, layout and magnitude."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import mogeo
from tests import strategies
from tests.reference import rows as reference
from tests.strategies import DTYPES, LAYOUTS, REPRODUCIBLE, lay_out

# Error of a Gram entry, relative to ‖g_i‖·‖g_j‖. Products of half-precision numbers are exact in fp32.
GRAM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# The same where every rounding of an fp32 sum has the same sign: equal magnitudes, or one entry that outweighs a block.
WORST_CASE = 4e-6
# Error of an entry of the combination, relative to Σ|w_k||g_k|: K roundings of the accumulator, one to the rows' dtype.
COMBINE_TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Rows whose squares overflow fp32, vanish, or sink into its subnormals, alone and beside others.
SCALES_BEYOND_FP32 = ((1e25, 1e25), (1e-25, 1e-25), (1e25, 1e-25), (1e25, 1.0, 1e-25), (1e19, 1e-19), (1.0, 1e-20))

SOME = settings(REPRODUCIBLE, max_examples=150)


def gaussian(k: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian rows [k, n]."""
    return torch.randn(k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_gram(rows: Tensor, gram: Tensor, tolerance: float | None = None) -> None:
    """Right to the tolerance (that of the rows' dtype) in units of ‖g_i‖·‖g_j‖, fp64, symmetric to the bit."""
    tolerance = GRAM_TOLERANCE[rows.dtype] if tolerance is None else tolerance
    expected = reference.gram(rows)
    assert gram.dtype == torch.float64
    assert gram.shape == (len(rows), len(rows))
    assert torch.equal(gram, gram.T)
    norms = expected.diagonal().sqrt()
    assert bool(((gram - expected).abs() <= tolerance * norms[:, None] * norms).all())


def assert_combined(rows: Tensor, weights: Tensor, combined: Tensor) -> None:
    """Right to the tolerance of its dtype, in units of Σ|w_k||g_k|."""
    assert combined.dtype == rows.dtype
    assert combined.shape == rows.shape[1:]
    error = (combined.to(torch.float64) - reference.combine(rows, weights)).abs()
    tiny = torch.finfo(rows.dtype).smallest_normal
    bound = COMBINE_TOLERANCE[rows.dtype] * reference.combine(rows.abs(), weights.abs()) + tiny
    assert bool((error <= bound).all())


# --------------------------------------------------------------------------------------------------------------------
# gram


@SOME
@given(strategies.rows())
def test_gram_matches_the_reference(rows: Tensor) -> None:
    before = rows.clone()
    assert_gram(rows, mogeo.gram(rows))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 32])
def test_gram_of_many_rows(k: int, dtype: torch.dtype) -> None:
    rows = gaussian(k, 20_011, dtype)
    assert_gram(rows, mogeo.gram(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    for k in (1, 4, 7):
        for seed in range(4):
            rows = lay_out(gaussian(k, 4103, dtype, seed), layout)
            assert_gram(rows, mogeo.gram(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gram_sums_in_blocks(k: int, dtype: torch.dtype) -> None:
    """Equal products, so that every rounding of a running fp32 sum has the same sign: it is far off here."""
    rows = torch.full((k, 3_000_001), 1.1).to(dtype) * torch.arange(1, k + 1)[:, None].to(dtype)
    one = rows[0].float().numpy()
    running = float(np.cumsum(one * one, dtype=np.float32)[-1])
    exact = float(reference.gram(rows[:1]))
    assert abs(running / exact - 1) > 20 * WORST_CASE  # else this input would tell nothing
    assert_gram(rows, mogeo.gram(rows), WORST_CASE)


def test_gram_of_a_long_row_keeps_small_contributions() -> None:
    """One huge entry, then 2^22 ones: each one alone is below half a unit in the last place of an fp32 sum."""
    rows = torch.ones(2, 1 << 22)
    rows[:, 0] = 2.0**13
    assert_gram(rows, mogeo.gram(rows), WORST_CASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 5, 4096, 9001])
@pytest.mark.parametrize("scales", SCALES_BEYOND_FP32)
def test_gram_of_entries_whose_squares_leave_fp32(scales: tuple[float, ...], n: int, dtype: torch.dtype) -> None:
    rows = (gaussian(len(scales), n, torch.float64) * torch.tensor(scales, dtype=torch.float64)[:, None]).to(dtype)
    gram = mogeo.gram(rows)
    assert bool((gram.diagonal() > 0).all())
    assert_gram(rows, gram)


@pytest.mark.parametrize("tiny", [1e-18, 1e-22, 1e-30, 1e-39])
@pytest.mark.parametrize("n", [10, 5000])
def test_gram_of_a_sparse_row_of_small_entries(n: int, tiny: float) -> None:
    """One entry carries the whole norm, or a block of them beside a row of ones: nothing is lost to subnormals."""
    rows = torch.zeros(3, n)
    rows[0, n // 2] = tiny
    rows[1, ::3] = tiny
    rows[2] = 1.0
    assert_gram(rows, mogeo.gram(rows))


def test_gram_of_a_row_that_mixes_huge_and_tiny() -> None:
    rows = gaussian(2, 9000, torch.float64)
    rows[0, :4096] *= 1e25
    rows[1, 4096:] *= 1e-25
    rows = rows.float()
    assert_gram(rows, mogeo.gram(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [3, 4096, 10_001])
def test_a_nonfinite_row_spoils_its_own_row_and_column_only(n: int, entry: float, dtype: torch.dtype) -> None:
    rows = gaussian(4, n, dtype)
    rows[2, n // 2] = entry
    kept = [0, 1, 3]
    gram = mogeo.gram(rows)
    assert not gram[2, 2].isfinite()
    assert_gram(rows[kept], gram[kept][:, kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_nothing_is_zero(dtype: torch.dtype) -> None:
    assert torch.equal(mogeo.gram(torch.zeros(3, 0, dtype=dtype)), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(mogeo.gram(torch.zeros(2, 5000, dtype=dtype)), torch.zeros(2, 2, dtype=torch.float64))


def test_gram_is_deterministic_and_outside_autograd() -> None:
    rows = gaussian(4, 100_003).requires_grad_()
    first = mogeo.gram(rows)
    assert torch.equal(first, mogeo.gram(rows))
    assert not first.requires_grad


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3), ()])
def test_gram_names_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"rows.*" + str(shape).replace("(", r"\(").replace(")", r"\)") + r".*\[K, N\]"
    ):
        mogeo.gram(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_gram_names_a_wrong_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"rows.*{dtype}.*fp32"):
        mogeo.gram(torch.zeros(2, 3, dtype=dtype))


# --------------------------------------------------------------------------------------------------------------------
# combine


@SOME
@given(strategies.rows(), st.integers(0, 2**20), st.booleans())
def test_combine_matches_the_reference(rows: Tensor, seed: int, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(rows), dtype=torch.float64, generator=generator)
    if sparse:
        weights *= torch.rand(len(rows), generator=generator) < 0.5
    before = rows.clone()
    assert_combined(rows, weights, mogeo.combine(rows, weights))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "weights", [(0.3, 0.2, 0.5), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_combine_in_place(weights: tuple[float, ...], layout: str, dtype: torch.dtype) -> None:
    """out=rows[0]: the direction replaces the first gradient, whatever weight that one has; the others stay."""
    rows = lay_out(gaussian(3, 9001, dtype), layout)
    before, w = rows.clone(), torch.tensor(weights, dtype=torch.float64)
    result = mogeo.combine(rows, w, out=rows[0])
    assert result.data_ptr() == rows.data_ptr()
    assert_combined(before, w, rows[0])
    assert torch.equal(rows[1:], before[1:])
    assert torch.equal(rows[0], mogeo.combine(before, w))


def test_combine_in_place_beyond_one_chunk() -> None:
    rows = gaussian(3, 1_000_003, torch.bfloat16)
    before, weights = rows.clone(), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert_combined(before, weights, mogeo.combine(rows, weights, out=rows[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_row_of_weight_zero_is_not_read(entry: float, dtype: torch.dtype) -> None:
    rows = gaussian(4, 5001, dtype)
    rows[0], rows[2] = entry, entry
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75])
    clean = rows[[1, 3]].clone()
    assert_combined(clean, weights[[1, 3]], mogeo.combine(rows, weights))
    assert_combined(clean, weights[[1, 3]], mogeo.combine(rows, weights, out=rows[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_weights_zero_gives_zero_even_over_nan(dtype: torch.dtype) -> None:
    rows = torch.full((2, 100), math.nan, dtype=dtype)
    assert torch.equal(mogeo.combine(rows, torch.zeros(2)), torch.zeros(100, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_accumulated_in_fp32(dtype: torch.dtype) -> None:
    """32 rows of ones, weights summing to 1 + 31/256: rounding each partial sum to bf16 would stay at 1."""
    rows = torch.ones(32, 1000, dtype=dtype)
    weights = torch.full((32,), torch.finfo(dtype).eps / 2, dtype=torch.float64)
    weights[0] = 1.0
    expected = torch.tensor(weights.sum().item(), dtype=dtype)
    assert expected > 1
    assert torch.equal(mogeo.combine(rows, weights), expected.expand(1000))


def test_combine_with_large_weights_on_small_rows() -> None:
    """mgda-normalized divides by ‖g‖: gradients of 1e-30 meet weights of 1e30."""
    rows = (gaussian(2, 1000, torch.float64) * 1e-30).float()
    weights = torch.tensor([1e30, 5e29], dtype=torch.float64)
    assert_combined(rows, weights, mogeo.combine(rows, weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_combine_takes_weights_of_any_real_dtype(dtype: torch.dtype) -> None:
    rows, weights = gaussian(3, 100), torch.tensor([1, 0, 2])
    assert torch.equal(mogeo.combine(rows, weights.to(dtype)), rows[0] + 2 * rows[2])


def test_combine_writes_into_out_of_any_stride() -> None:
    rows, weights = gaussian(2, 77), torch.tensor([0.5, 0.25])
    wide = torch.full((77, 2), 7.0)
    assert_combined(rows, weights, mogeo.combine(rows, weights, out=wide[:, 1]))
    assert bool((wide[:, 0] == 7).all())
    assert_combined(rows, weights, wide[:, 1])


def test_combine_is_outside_autograd() -> None:
    rows = gaussian(2, 10).requires_grad_()
    assert not mogeo.combine(rows, torch.tensor([0.5, 0.5], requires_grad=True)).requires_grad


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()])
def test_combine_names_a_wrong_number_of_weights(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights.*2 rows"):
        mogeo.combine(gaussian(2, 10), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_combine_names_an_out_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"out.*{dtype}.*float32"):
        mogeo.combine(gaussian(2, 10), torch.ones(2), out=torch.empty(10, dtype=dtype))


@pytest.mark.parametrize("shape", [(9,), (11,), (1, 10), (10, 1)])
def test_combine_names_an_out_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"out.*10 columns"):
        mogeo.combine(gaussian(2, 10), torch.ones(2), out=torch.empty(shape))


def test_combine_refuses_to_overwrite_a_row_it_still_reads() -> None:
    rows = gaussian(3, 10)
    before = rows.clone()
    for out in (rows[1], rows[2], rows.flatten()[5:15]):
        with pytest.raises(ValueError, match=r"out overlaps.*rows\[0\]"):
            mogeo.combine(rows, torch.ones(3), out=out)
    assert torch.equal(rows, before)
