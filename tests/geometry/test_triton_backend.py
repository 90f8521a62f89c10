"""`mogeo.geometry.triton_backend`: what it does beside the kernels, which have tests of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.backends import KERNEL_DEVICE, needs_kernels
from tests.min_norm_asserts import assert_kkt, judge
from tests.reference import rows as reference
from tests.row_asserts import assert_combined, assert_gram, gaussian
from tests.strategies import DTYPES, symmetric

pytest.importorskip("triton")

from mogeo import Status
from mogeo.geometry import torch_backend, triton_backend

pytestmark = needs_kernels


def there(value: Tensor) -> Tensor:
    return value.to(KERNEL_DEVICE)


@pytest.mark.parametrize("first", range(4))
def test_gram_of_blocks_of_several_dtypes(first: int) -> None:
    """Whichever block comes first, and one of no columns among them."""
    blocks = [gaussian(3, 700, dtype, seed) for seed, dtype in enumerate(DTYPES)]
    blocks = [*blocks[first:], torch.zeros(3, 0), *blocks[:first]]
    before = [block.clone() for block in blocks]
    together = triton_backend.gram_of_blocks([there(block) for block in blocks]).cpu()
    assert_gram(torch.cat([block.double() for block in blocks], dim=1), together, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(blocks, before, strict=True))


def test_gram_of_one_block_is_its_gram() -> None:
    rows = there(gaussian(4, 900, torch.bfloat16))
    assert torch.equal(triton_backend.gram_of_blocks([rows]), triton_backend.gram(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_the_kernels_take(dtype: torch.dtype) -> None:
    k = triton_backend.MOST_ROWS + 1
    rows, weights = gaussian(k, 200, dtype), torch.linspace(-1, 1, k, dtype=torch.float64)
    assert_gram(rows, triton_backend.gram(there(rows)).cpu())
    assert_gram(torch.cat([rows, rows], dim=1), triton_backend.gram_of_blocks([there(rows), there(rows)]).cpu())
    *_, second, total = triton_backend.gram_by_segment(there(rows), [0, 50, 200]).cpu()
    assert_gram(rows[:, 50:], second)
    assert_gram(rows, total)
    assert_combined(
        rows, weights, triton_backend.combine(there(rows), there(weights), there(torch.empty(200, dtype=dtype))).cpu()
    )


def test_more_objectives_than_the_kernel_takes() -> None:
    gram = reference.gram(gaussian(triton_backend.MOST_ROWS + 1, 500, torch.float64))
    weights, _, status = triton_backend.min_norm(there(gram), None, "none", 1.0, "raw")
    assert int(status) == Status.OPTIMAL
    assert_kkt(judge(gram, weights.cpu()))


def test_a_larger_psd_part_than_the_kernel_takes() -> None:
    k = triton_backend.MOST_ROWS + 1
    matrix = torch.from_numpy(symmetric(np.random.default_rng(0), k))
    found, expected = triton_backend.psd_part(there(matrix)).cpu(), torch_backend.psd_part(matrix)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * k)


def test_arguments_of_any_stride_and_precision() -> None:
    """Kernels want contiguous fp64; users need not know."""
    rows, weights = gaussian(3, 100), torch.tensor([0.5, 9, -1, 9, 2, 9], dtype=torch.float64)[::2]
    combined = triton_backend.combine(there(rows), there(weights), there(torch.empty(100)))
    assert_combined(rows, weights, combined.cpu())
    gram, losses = reference.gram(rows), torch.tensor([1.0, 9, 2, 9, 4, 9])[::2]
    strided = torch.full((3, 6), 9.0, dtype=torch.float64)
    strided[:, ::2] = gram
    plain = triton_backend.min_norm(there(gram), there(losses.double().contiguous()), "loss", 1.0, "raw")
    given = triton_backend.min_norm(there(strided)[:, ::2], there(losses), "loss", 1.0, "raw")
    assert all(torch.equal(a, b) for a, b in zip(plain, given, strict=True))
