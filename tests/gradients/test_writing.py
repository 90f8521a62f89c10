"""Weights of any size on gradients of any dtype: fp16 holds no number above 65504, but a product may fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mogeo import MultiObjectiveOptimizer
from mogeo.gradients.writing import write
from tests.deciders import WAYS, let_decide

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("weight", [1e6, -3e5, 65505.0, 7e4])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_that_fits_is_written(dtype: torch.dtype, fresh: bool, weight: float) -> None:
    grads = [torch.full((size,), 1e-3, dtype=dtype) for size in (3, 20_000)]
    targets = [torch.full_like(grad, 2.0) for grad in grads]
    write(targets, grads, weight, fresh)
    for target, grad in zip(targets, grads, strict=True):
        expected = (grad.double() * weight + (0.0 if fresh else 2.0)).to(dtype)
        torch.testing.assert_close(target, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("dtype", "row_dtype"), [(torch.float16, None), (torch.float32, torch.float16)])
def test_large_weights_on_small_rows_in_fp16(
    dtype: torch.dtype, row_dtype: torch.dtype | None, every: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way in ("sketched", "replayed") and row_dtype is not None:
        pytest.skip("a sketch has no rows")
    let_decide(way, monkeypatch)
    parameter = nn.Parameter(torch.zeros(4, dtype=dtype))
    scale = torch.tensor([1e-4, 2e-4, 3e-4, 0.0], dtype=dtype)
    optimizer = MultiObjectiveOptimizer(
        torch.optim.SGD([parameter], lr=0.1), lambda gram, losses: [1e6, -2e5], refresh_every=every, row_dtype=row_dtype
    )
    for _ in range(2):
        parameter.grad = None
        optimizer.backward({"a": (parameter * scale).sum() + 1, "b": (parameter * scale.flip(0)).sum() + 1})
        report = optimizer.combine()
        assert report.skipped == ()
        expected = 1e6 * scale.to(row_dtype or dtype).double() - 2e5 * scale.flip(0).to(row_dtype or dtype).double()
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=2e-3, atol=1e-2)
