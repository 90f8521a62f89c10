"""`gram`, `gram_by_segment`, `combine` and `psd_part` against short references of their own, on every backend.

For every dtype, length, layout and magnitude.
"""

from __future__ import annotations

import itertools
import math
import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

import mogeo
from mogeo.geometry import ops
from tests import strategies
from tests.backends import FAST_BACKENDS, Backend, everywhere
from tests.profiles import slow_but
from tests.reference import nearest_psd
from tests.reference import rows as reference
from tests.row_asserts import WORST_CASE, assert_combined, assert_gram, gaussian
from tests.strategies import DTYPES, LAYOUTS, lay_out

# Rows whose squares overflow fp32, vanish, or sink into its subnormals, alone and beside others.
SCALES_BEYOND_FP32 = ((1e25, 1e25), (1e-25, 1e-25), (1e25, 1e-25), (1e25, 1.0, 1e-25), (1e19, 1e-19), (1.0, 1e-20))


# --------------------------------------------------------------------------------------------------------------------
# gram


@everywhere
def test_gram_matches_the_reference(backend: Backend) -> None:
    @backend.check(150, strategies.rows(backend.max_k))
    def holds(rows: Tensor) -> None:
        before = rows.clone()
        assert_gram(rows, backend.gram(rows))
        assert torch.equal(rows, before)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", slow_but([1, 2, 3, 5, 8, 32], 1, 2, 3, 5, 8))
def test_gram_of_many_rows(backend: Backend, k: int, dtype: torch.dtype) -> None:
    rows = gaussian(k, 9_011, dtype)
    assert_gram(rows, backend.gram(rows))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_of_any_layout(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    for k in (1, 4, 7):
        for seed in range(backend.some(4)):
            rows = lay_out(gaussian(k, 4103, dtype, seed), layout)
            assert_gram(rows, backend.gram(rows))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gram_sums_in_blocks(backend: Backend, k: int, dtype: torch.dtype) -> None:
    """Equal products, so that every rounding of a running fp32 sum has the same sign: it is far off here."""
    rows = torch.full((k, 3_000_001), 1.1).to(dtype) * torch.arange(1, k + 1)[:, None].to(dtype)
    one = rows[0].float().numpy()
    running = float(np.cumsum(one * one, dtype=np.float32)[-1])
    exact = float(reference.gram(rows[:1]))
    assert abs(running / exact - 1) > 20 * WORST_CASE  # else this input would tell nothing
    assert_gram(rows, backend.gram(rows), WORST_CASE)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gram_of_a_long_row_keeps_small_contributions(backend: Backend) -> None:
    """One huge entry, then 2^22 ones: each one alone is below half a unit in the last place of an fp32 sum."""
    rows = torch.ones(2, 1 << 22)
    rows[:, 0] = 2.0**13
    assert_gram(rows, backend.gram(rows), WORST_CASE)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", slow_but([1, 5, 4096, 9001], 1, 9001))
@pytest.mark.parametrize("scales", SCALES_BEYOND_FP32)
def test_gram_of_entries_whose_squares_leave_fp32(
    backend: Backend, scales: tuple[float, ...], n: int, dtype: torch.dtype
) -> None:
    rows = (gaussian(len(scales), n, torch.float64) * torch.tensor(scales, dtype=torch.float64)[:, None]).to(dtype)
    gram = backend.gram(rows)
    assert bool((gram.diagonal() > 0).all())
    assert_gram(rows, gram)


@everywhere
@pytest.mark.parametrize("tiny", [1e-18, 1e-22, 1e-30, 1e-39])
@pytest.mark.parametrize("n", [10, 5000])
def test_gram_of_a_sparse_row_of_small_entries(backend: Backend, n: int, tiny: float) -> None:
    """One entry carries the whole norm, or a block of them beside a row of ones: nothing is lost to subnormals."""
    rows = torch.zeros(3, n)
    rows[0, n // 2] = tiny
    rows[1, ::3] = tiny
    rows[2] = 1.0
    assert_gram(rows, backend.gram(rows))


@everywhere
def test_gram_of_a_row_that_mixes_huge_and_tiny(backend: Backend) -> None:
    rows = gaussian(2, 9000, torch.float64)
    rows[0, :4096] *= 1e25
    rows[1, 4096:] *= 1e-25
    rows = rows.float()
    assert_gram(rows, backend.gram(rows))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", slow_but([3, 4096, 10_001], 10_001))
def test_a_nonfinite_row_spoils_its_own_row_and_column_only(
    backend: Backend, n: int, entry: float, dtype: torch.dtype
) -> None:
    rows = gaussian(4, n, dtype)
    rows[2, n // 2] = entry
    kept = [0, 1, 3]
    gram = backend.gram(rows)
    assert not gram[2, 2].isfinite()
    assert_gram(rows[kept], gram[kept][:, kept])


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_nothing_is_zero(backend: Backend, dtype: torch.dtype) -> None:
    assert torch.equal(backend.gram(torch.zeros(3, 0, dtype=dtype)), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(backend.gram(torch.zeros(2, 5000, dtype=dtype)), torch.zeros(2, 2, dtype=torch.float64))


@everywhere
def test_gram_is_deterministic_and_outside_autograd(backend: Backend) -> None:
    rows = gaussian(4, 20_003).requires_grad_()
    first = backend.gram(rows)
    assert torch.equal(first, backend.gram(rows))
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
# gram_by_segment


def assert_segments(rows: Tensor, boundaries: list[int], total: Tensor, segments: Tensor) -> None:
    """The Gram of all columns, and that of each segment, which sum to it."""
    assert segments.shape == (len(boundaries) - 1, len(rows), len(rows))
    assert_gram(rows, total)
    for (start, end), segment in zip(itertools.pairwise(boundaries), segments, strict=True):
        assert_gram(rows[:, start:end], segment)
    assert_gram(rows, sum(segments[1:], start=segments[0]))


@everywhere
def test_segments_match_the_reference(backend: Backend) -> None:
    @backend.check(100, strategies.segmented_rows(backend.max_k))
    def holds(segmented: tuple[Tensor, list[int]]) -> None:
        rows, boundaries = segmented
        before = rows.clone()
        assert_segments(rows, boundaries, *backend.gram_by_segment(rows, boundaries))
        assert torch.equal(rows, before)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", slow_but([1, 4, 9], 4))
def test_segments_that_cut_blocks(backend: Backend, k: int, dtype: torch.dtype) -> None:
    """Of one column, of less than a block within one, across one edge and several, on an edge, and of none."""
    rows = gaussian(k, 4500, dtype)
    boundaries = [0, 0, 1, 31, 100, 512, 1024, 1024, 1500, 4095, 4500, 4500]
    assert_segments(rows, boundaries, *backend.gram_by_segment(rows, boundaries))


@everywhere
def test_one_segment_is_all_columns(backend: Backend) -> None:
    rows = gaussian(3, 3000)
    total, (segment,) = backend.gram_by_segment(rows, [0, 3000])
    assert torch.equal(total, segment)
    assert torch.equal(total, backend.gram(rows))


@everywhere
def test_segments_of_no_columns_are_zero(backend: Backend) -> None:
    total, segments = backend.gram_by_segment(torch.zeros(2, 0), [0, 0, 0])
    assert torch.equal(total, torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(segments, torch.zeros(2, 2, 2, dtype=torch.float64))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", slow_but([3, 11], 3))
def test_segments_of_magnitudes_whose_squares_leave_fp32(backend: Backend, k: int, dtype: torch.dtype) -> None:
    """Each segment is as right as if it stood alone."""
    rows, boundaries = gaussian(k, 810, torch.float64), [0, 270, 540, 810]
    rows[:, :270] *= 1e25
    rows[:, 540:] *= 1e-25
    rows = rows.to(dtype)
    assert_segments(rows, boundaries, *backend.gram_by_segment(rows, boundaries))


@everywhere
@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_nonfinite_entry_spoils_its_own_segment_only(backend: Backend, entry: float) -> None:
    rows = gaussian(3, 900)
    rows[1, 450] = entry
    total, segments = backend.gram_by_segment(rows, [0, 450, 451, 900])
    assert_gram(rows[:, :450], segments[0])
    assert_gram(rows[:, 451:], segments[2])
    assert not segments[1, 1, 1].isfinite()
    assert not total[1, 1].isfinite()
    kept = torch.tensor([0, 2])
    assert_gram(rows[kept], total[kept][:, kept])


@everywhere
def test_segments_are_outside_autograd(backend: Backend) -> None:
    total, segments = backend.gram_by_segment(gaussian(2, 10).requires_grad_(), [0, 4, 10])
    assert not total.requires_grad
    assert not segments.requires_grad


@pytest.mark.parametrize(
    "boundaries", [[], [0], [10], [0, 9], [1, 10], [0, 11], [0, 7, 3, 10], [0, -1, 10], [0, 12, 10]], ids=str
)
def test_segments_name_wrong_boundaries(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"boundaries {boundaries} do not cut 10 columns")):
        mogeo.gram_by_segment(gaussian(2, 10), boundaries)


def test_segments_name_wrong_rows() -> None:
    with pytest.raises(ValueError, match=r"rows.*\(5,\).*\[K, N\]"):
        mogeo.gram_by_segment(torch.zeros(5), [0, 5])
    with pytest.raises(TypeError, match=r"rows.*int64.*fp32"):
        mogeo.gram_by_segment(torch.zeros(2, 5, dtype=torch.int64), [0, 5])


# --------------------------------------------------------------------------------------------------------------------
# combine


@everywhere
def test_combine_matches_the_reference(backend: Backend) -> None:
    @backend.check(150, strategies.rows(backend.max_k), st.integers(0, 2**20), st.booleans())
    def holds(rows: Tensor, seed: int, sparse: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(len(rows), dtype=torch.float64, generator=generator)
        if sparse:
            weights *= torch.rand(len(rows), generator=generator) < 0.5
        before = rows.clone()
        assert_combined(rows, weights, backend.combine(rows, weights))
        assert torch.equal(rows, before)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "contiguous", "transposed"))
@pytest.mark.parametrize(
    "weights", [(0.3, 0.2, 0.5), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_combine_in_place(backend: Backend, weights: tuple[float, ...], layout: str, dtype: torch.dtype) -> None:
    """out=rows[0]: the direction replaces the first gradient, whatever weight that one has; the others stay."""
    rows = lay_out(gaussian(3, 2501, dtype), layout)
    before, w = rows.clone(), torch.tensor(weights, dtype=torch.float64)
    result = backend.combine(rows, w, out=rows[0])
    assert result.data_ptr() == rows.data_ptr()
    assert_combined(before, w, rows[0])
    assert torch.equal(rows[1:], before[1:])
    assert torch.equal(rows[0], backend.combine(before, w))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_combine_in_place_beyond_one_chunk(backend: Backend) -> None:
    rows = gaussian(3, 1_000_003, torch.bfloat16)
    before, weights = rows.clone(), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert_combined(before, weights, backend.combine(rows, weights, out=rows[0]))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_a_row_of_weight_zero_is_not_read(backend: Backend, entry: float, dtype: torch.dtype) -> None:
    rows = gaussian(4, 5001, dtype)
    rows[0], rows[2] = entry, entry
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75])
    clean = rows[[1, 3]].clone()
    assert_combined(clean, weights[[1, 3]], backend.combine(rows, weights))
    assert_combined(clean, weights[[1, 3]], backend.combine(rows, weights, out=rows[0]))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_weights_zero_gives_zero_even_over_nan(backend: Backend, dtype: torch.dtype) -> None:
    rows = torch.full((2, 100), math.nan, dtype=dtype)
    assert torch.equal(backend.combine(rows, torch.zeros(2)), torch.zeros(100, dtype=dtype))


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_accumulated_in_fp32(backend: Backend, dtype: torch.dtype) -> None:
    """32 rows of ones, weights summing to 1 + 31/256: rounding each partial sum to bf16 would stay at 1."""
    rows = torch.ones(32, 1000, dtype=dtype)
    weights = torch.full((32,), torch.finfo(dtype).eps / 2, dtype=torch.float64)
    weights[0] = 1.0
    expected = torch.tensor(weights.sum().item(), dtype=dtype)
    assert expected > 1
    assert torch.equal(backend.combine(rows, weights), expected.expand(1000))


@everywhere
def test_combine_with_large_weights_on_small_rows(backend: Backend) -> None:
    """mgda-normalized divides by ‖g‖: gradients of 1e-30 meet weights of 1e30."""
    rows = (gaussian(2, 1000, torch.float64) * 1e-30).float()
    weights = torch.tensor([1e30, 5e29], dtype=torch.float64)
    assert_combined(rows, weights, backend.combine(rows, weights))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_combine_takes_weights_of_any_real_dtype(backend: Backend, dtype: torch.dtype) -> None:
    rows, weights = gaussian(3, 100), torch.tensor([1, 0, 2])
    assert torch.equal(backend.combine(rows, weights.to(dtype)), rows[0] + 2 * rows[2])


@everywhere
def test_combine_writes_into_out_of_any_stride(backend: Backend) -> None:
    rows, weights = gaussian(2, 77), torch.tensor([0.5, 0.25])
    wide = torch.full((77, 2), 7.0)
    assert_combined(rows, weights, backend.combine(rows, weights, out=wide[:, 1]))
    assert bool((wide[:, 0] == 7).all())
    assert_combined(rows, weights, wide[:, 1])


@everywhere
def test_combine_is_outside_autograd(backend: Backend) -> None:
    rows = gaussian(2, 10).requires_grad_()
    assert not backend.combine(rows, torch.tensor([0.5, 0.5], requires_grad=True)).requires_grad


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), ()])
def test_combine_names_a_wrong_number_of_weights(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights.*2 rows"):
        mogeo.combine(gaussian(2, 10), torch.zeros(shape))


def test_combine_names_an_out_that_is_not_floating_point() -> None:
    with pytest.raises(TypeError, match=r"out is torch.int32: pass fp64, fp32, bf16 or fp16"):
        mogeo.combine(gaussian(2, 10), torch.ones(2), out=torch.empty(10, dtype=torch.int32))


@everywhere
@pytest.mark.parametrize("of_out", DTYPES)
@pytest.mark.parametrize("of_rows", DTYPES)
def test_combine_rounds_once_to_the_dtype_of_out(of_rows: torch.dtype, of_out: torch.dtype, backend: Backend) -> None:
    """Half-precision rows under an fp32 direction keep every digit that their sum has."""
    rows, weights = gaussian(3, 300).to(of_rows), torch.tensor([0.5, -1.25, 3.0])
    out = torch.full((300,), torch.nan, dtype=of_out)
    backend.combine(rows, weights, out=out)
    exact = weights.double() @ rows.double()
    reach = weights.abs().double() @ rows.double().abs()
    rounding = torch.finfo(of_out).eps + 4 * torch.finfo(torch.promote_types(of_rows, torch.float32)).eps
    assert ((out.double() - exact).abs() <= rounding * reach + 1e-7).all()


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


# --------------------------------------------------------------------------------------------------------------------
# psd_part


def assert_psd_part(matrix: Tensor, result: Tensor) -> None:
    """The nearest to 1e-13 of the largest eigenvalue, symmetric to the bit, diagonal ≥ 0, and zero rows stay zero."""
    symmetric = matrix / 2 + matrix.mT / 2
    assert result.dtype == torch.float64
    assert torch.equal(result, result.mT)
    assert bool((result.diagonal() >= 0).all())
    assert not result[(symmetric == 0).all(dim=1)].any()
    error = (result - nearest_psd.psd_part(symmetric)).abs().max()
    assert error <= 1e-13 * torch.linalg.matrix_norm(symmetric, 2)


@everywhere
def test_psd_part_matches_the_reference(backend: Backend) -> None:
    """And is its own PSD part, to the last bit."""

    @backend.check(100, strategies.symmetric_matrices())
    def holds(matrix: Tensor) -> None:
        before = matrix.clone()
        result = backend.psd_part(matrix)
        assert torch.equal(matrix, before)
        assert_psd_part(matrix, result)
        assert torch.equal(backend.psd_part(result), result)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("family", strategies.SYMMETRIC)
@pytest.mark.parametrize("k", slow_but([8, 16], 8))
def test_psd_part_of_larger_matrices(backend: Backend, k: int, family: str) -> None:
    matrix = torch.from_numpy(strategies.SYMMETRIC[family](np.random.default_rng(k), k))
    assert_psd_part(matrix, backend.psd_part(matrix))


@everywhere
def test_no_psd_matrix_is_nearer_than_the_psd_part(backend: Backend) -> None:
    """By the Frobenius norm; neither any, nor one beside it."""

    @backend.check(50, strategies.symmetric_matrices(), st.integers(0, 2**20), st.floats(1e-3, 1))
    def holds(matrix: Tensor, seed: int, share: float) -> None:
        result = backend.psd_part(matrix)
        distance, size = torch.linalg.matrix_norm(matrix - result), torch.linalg.matrix_norm(matrix)
        factors = size.sqrt() * gaussian(20 * len(matrix), len(matrix), torch.float64, seed).view(20, len(matrix), -1)
        for rival in factors @ factors.mT:
            for other in (share * rival, (1 - share) * result + share * rival):
                assert torch.linalg.matrix_norm(matrix - other) >= distance - 1e-13 * size


@everywhere
def test_a_matrix_without_negative_eigenvalues_is_its_own_psd_part_to_the_last_bit(backend: Backend) -> None:
    """Up to the rounding of its entries, that is: of most families here, some eigenvalue should be zero."""

    @backend.check(100, st.one_of(strategies.integer_grams(), strategies.grams(strategies.SEMI_DEFINITE)))
    def holds(gram: Tensor) -> None:
        assert torch.equal(backend.psd_part(gram), gram)


@everywhere
@pytest.mark.parametrize("exponent", [-960, -100, 100, 1022])
def test_psd_part_scales_as_its_matrix_does(backend: Backend, exponent: int) -> None:
    """To the last bit, for powers of two, up to the largest number."""
    matrix = torch.tensor([[0.75, -1.5, 0.3], [-1.5, 0.1, 1.0], [0.3, 1.0, -1.2]], dtype=torch.float64)
    scale = 2.0**exponent
    assert torch.equal(backend.psd_part(matrix * scale), backend.psd_part(matrix) * scale)


@everywhere
def test_psd_part_is_that_of_the_symmetric_part(backend: Backend) -> None:
    matrix = gaussian(3, 3, torch.float64)
    assert not torch.equal(matrix, matrix.T)
    expected = backend.psd_part((matrix + matrix.T) / 2)
    assert torch.equal(backend.psd_part(matrix), expected)
    assert torch.equal(backend.psd_part(lay_out(matrix, "every second")), expected)


@everywhere
def test_psd_parts_of_a_batch_are_those_of_its_matrices(backend: Backend) -> None:
    """NaN for those that are not finite, be it in one entry, and nothing else is."""
    matrices = torch.stack([torch.from_numpy(strategies.symmetric(np.random.default_rng(i), 3)) for i in range(6)])
    matrices[1] = torch.eye(3)
    spoilt = {2: math.nan, 4: math.inf, 5: -math.inf}
    for i, entry in spoilt.items():
        matrices[i, 0, 2] = entry
    together = backend.psd_part(matrices.view(2, 3, 3, 3))
    assert together.shape == (2, 3, 3, 3)
    for i, result in enumerate(together.flatten(0, 1)):
        if i in spoilt:
            assert bool(result.isnan().all())
        else:
            assert_psd_part(matrices[i], result)
            assert torch.equal(result, backend.psd_part(matrices[i]))


@everywhere
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_psd_parts_of_an_empty_batch(backend: Backend, batch: tuple[int, ...]) -> None:
    assert backend.psd_part(torch.zeros(*batch, 3, 3)).shape == (*batch, 3, 3)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_psd_part_takes_any_float_and_is_outside_autograd(backend: Backend, dtype: torch.dtype) -> None:
    matrix = gaussian(3, 3, dtype).requires_grad_()
    result = backend.psd_part(matrix)
    assert not result.requires_grad
    assert_psd_part(matrix.detach().double(), result)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 3, 2), ()])
def test_psd_part_names_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"matrix has shape {shape}: pass a square matrix")):
        ops.psd_part(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_psd_part_names_a_wrong_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"matrix is {dtype}.*floating-point"):
        ops.psd_part(torch.zeros(2, 2, dtype=dtype))


# --------------------------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize(("version", "told"), [("3.2.0", "3.2.0 is too old"), ("3.3.1", None), ("3.10.0+git1", None)])
def test_a_triton_that_cannot_compile_the_kernels_is_named(
    version: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    lack = ops._lack_of_triton()
    assert lack is None if told is None else told in str(lack)
