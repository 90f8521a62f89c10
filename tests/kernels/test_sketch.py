"""The sketch kernel: the map it computes is that of its definition, over any cuts, and the same bits on every run."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mogeo.geometry.projection import SignedSketch
from tests.backends import KERNEL_DEVICE, elsewhere, needs_kernels
from tests.profiles import examples, slow_but
from tests.reference import sketch as reference
from tests.row_asserts import assert_sketched
from tests.strategies import DTYPES, Sketched, sketched

pytest.importorskip("triton")

from mogeo.kernels import sketch as kernels

pytestmark = needs_kernels

CPU = torch.device("cpu")
FP64, FP32, BF16, FP16 = DTYPES

sketch_ = elsewhere(kernels.sketch_, KERNEL_DEVICE)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What is random about the sketch of one tensor, for the kernel, for the CPU, and as a matrix."""

    sketch: SignedSketch
    index: int

    @property
    def chunks(self) -> Tensor:
        return tables(self.sketch)[1][self.index]

    @property
    def signs(self) -> Tensor:
        return tables(self.sketch)[0]

    @property
    def matrix(self) -> Tensor:
        chunks = [tuple(chunk) for chunk in self.sketch.chunks[self.index].tolist()]
        size = self.sketch.sizes[self.index]
        return reference.matrix(size, self.sketch.dimension, chunks, self.sketch.signs.tolist())


def tables(sketch: SignedSketch) -> tuple[Tensor, list[Tensor]]:
    """What the kernel reads, of a sketch for the CPU."""
    return kernels.tables(sketch.signs.to(torch.int8), sketch.chunks, CPU)


def drawn(sizes: list[int], dimension: int, seed: int = 0, index: int = 0) -> Drawn:
    return Drawn(SignedSketch(sizes, dimension, seed=seed, device=CPU), index)


def sketch_and_judge(row: Tensor, gradient: Tensor, case: Drawn) -> None:
    """A few roundings of the row's dtype per chunk."""
    before = row.clone()
    sketch_(row, gradient, case.chunks, case.signs)
    assert_sketched(gradient, case.matrix, before, row, roundings=len(case.chunks) + 2)


# --------------------------------------------------------------------------------------------------------------------
# The map


@examples(12)
@given(sketched())
def test_it_is_the_matrix_of_its_definition(example: Sketched) -> None:
    case = drawn(example.sizes, example.dimension, example.seed, example.index)
    sketch_and_judge(example.row, example.gradient, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimension", slow_but([1023, 1024, 2048, 2500], 1023))
def test_tiles_that_are_whole_cut_or_wrapped_around(dimension: int, dtype: torch.dtype) -> None:
    """Of 1,024 buckets each; the last chunk is short."""
    size = 9 * dimension + 700
    case = drawn([size], dimension, seed=dimension)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=FP64).to(dtype)
    sketch_and_judge(torch.ones(dimension, dtype=FP64 if dtype == FP64 else FP32), gradient, case)


@examples(6)
@given(sketched(max_size=1500, dimensions=(7, 64, 1000)), st.integers(1, 3), st.integers(1, 9))
def test_chunks_dealt_to_several_programs(example: Sketched, fewest: int, enough: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_FEWEST_CHUNKS", fewest)
        patch.setattr(kernels, "variant", lambda dtype: kernels.candidates(dtype)[0]._replace(programs=enough))
        test_it_is_the_matrix_of_its_definition.hypothesis.inner_test(example)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("n_chunks", "dimension", "parts"),
    [(0, 64, 1), (1, 64, 1), (63, 64, 1), (64, 64, 2), (10**6, 1024, 2048), (10**6, 1 << 18, 8), (10**4, 1 << 22, 1)],
)
def test_how_chunks_are_dealt(n_chunks: int, dimension: int, parts: int) -> None:
    assert kernels.parts(n_chunks, dimension, kernels.variant(FP32)._replace(programs=2048)) == parts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """All are right, whatever is left of a group of chunks; the first is in use; their names tell them apart."""
    monkeypatch.setattr(kernels, "_FEWEST_CHUNKS", 4)
    candidates = kernels.candidates(dtype)
    assert kernels.variant(dtype) == candidates[0]
    assert len({chosen.name for chosen in candidates}) == len(candidates)
    for n_chunks in (1, 2, 3, 7, 11):
        case = drawn([1024 * n_chunks - 5], 1024, seed=n_chunks)
        gradient = torch.randn(1024 * n_chunks - 5, generator=torch.Generator().manual_seed(1), dtype=FP64).to(dtype)
        for chosen in candidates:
            row = torch.ones(1024, dtype=FP64 if dtype == FP64 else FP32)
            before = row.clone()
            sketch_(row, gradient, case.chunks, case.signs, chosen=chosen)
            assert_sketched(gradient, case.matrix, before, row, roundings=n_chunks + 2)


def test_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts, in fp64: the same up to a few roundings."""
    monkeypatch.setattr(kernels, "_FEWEST_CHUNKS", 4)
    case = drawn([20_000], 1500)
    gradient = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=FP64)
    mine, theirs = torch.zeros(2, 1500, dtype=FP64)
    sketch_(mine, gradient, case.chunks, case.signs)
    case.sketch.add_(theirs, 0, gradient)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_half_precision_is_accumulated_in_fp32() -> None:
    """300 chunks of ones with one sign sum to 300; bf16 would stop counting at 256."""
    case = drawn([300 * 4], 4)
    row = torch.zeros(4)
    sketch_(row, torch.ones(300 * 4, dtype=BF16), case.chunks & ~1, torch.zeros_like(case.signs))
    assert row.tolist() == [300.0] * 4


def test_what_is_not_finite_spoils_its_bucket() -> None:
    case = drawn([3000], 1024)
    gradient = torch.ones(3000)
    gradient[1500] = torch.nan
    row = torch.zeros(1024)
    sketch_(row, gradient, case.chunks, case.signs)
    (bucket,) = case.matrix[:, 1500].nonzero()
    assert row.isnan().nonzero().tolist() == [bucket.tolist()]


def test_nothing_to_sketch() -> None:
    case = drawn([0, 5], 8)
    row = torch.ones(8)
    sketch_(row, torch.empty(0), case.chunks, case.signs)
    assert row.tolist() == [1.0] * 8


def test_more_chunks_than_32_bits_count_are_refused() -> None:
    chunks = torch.zeros(1, 2, dtype=torch.int32).expand(2**31, 2)
    with pytest.raises(ValueError, match="use more buckets"):
        kernels.sketch_(torch.zeros(1), torch.zeros(1).expand(2**31), chunks, torch.zeros(1, dtype=torch.uint8))


def test_the_same_bits_on_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FEWEST_CHUNKS", 10)
    case = drawn([30_000], 1024)
    gradient = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    rows = torch.zeros(2, 1024)
    for row in rows:
        sketch_(row, gradient, case.chunks, case.signs)
    assert torch.equal(*rows)


# --------------------------------------------------------------------------------------------------------------------
# The tables


def test_signs_are_packed_column_by_column() -> None:
    sketch = SignedSketch([70_000], 700, device=CPU)
    signs, (packed, _) = sketch.signs, tables(sketch)
    for place in (0, 1, 130, 799):
        for s in range(8):
            entry = place + 128 * s
            if entry < len(signs):
                assert (int(packed[place]) >> s) & 1 == (signs[entry] < 0)


def test_chunks_stay_apart_by_tensor() -> None:
    sketch = SignedSketch([0, 100, 64, 65], 64, device=CPU)
    _, chunks = tables(sketch)
    assert [len(of_tensor) for of_tensor in chunks] == [0, 2, 1, 2]
    for mine, theirs in zip(chunks, sketch.chunks, strict=True):
        rotations, windows, flips = theirs.T
        assert torch.equal(mine[:, 0] >> 1, rotations)
        assert torch.equal(mine[:, 0] & 1, (flips < 0).int())
        assert torch.equal(mine[:, 1], windows)
