"""The kernel for the nearest positive semi-definite matrix against PyTorch's operations, and what it refuses.

What holds on every backend is tested in tests/geometry/test_ops.py.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mogeo.geometry import torch_backend
from tests import strategies
from tests.backends import KERNEL_DEVICE, needs_kernels
from tests.profiles import examples, slow_but
from tests.strategies import SYMMETRIC

pytest.importorskip("triton")

from mogeo.kernels import psd as kernels

pytestmark = needs_kernels


def assert_as_on_the_cpu(matrix: Tensor) -> None:
    """To 1e-13 of the largest eigenvalue."""
    found = kernels.psd_part(matrix.to(KERNEL_DEVICE)).cpu()
    error = (found - torch_backend.psd_part(matrix)).abs().max()
    assert error <= 1e-13 * torch.linalg.matrix_norm(matrix, 2)


@examples(20)
@given(strategies.symmetric_matrices())
def test_small_matrices(matrix: Tensor) -> None:
    assert_as_on_the_cpu(matrix)


@pytest.mark.parametrize("family", ["coinciding eigenvalues", "Gram less noise"])
@pytest.mark.parametrize("k", slow_but([7, 8, 9, 16, 17, 32], 7))
def test_larger_matrices(k: int, family: str) -> None:
    """On either side of the sizes that a square of threads has."""
    assert_as_on_the_cpu(torch.from_numpy(SYMMETRIC[family](np.random.default_rng(k), k)))


@pytest.mark.parametrize(
    ("matrix", "told"),
    [
        (torch.zeros(2, 2), "of torch.float32"),
        (torch.zeros(2, 3, dtype=torch.float64), "(2, 3)"),
        (torch.zeros(0, 0, dtype=torch.float64), "(0, 0)"),
        (torch.zeros(33, 33, dtype=torch.float64), "K ≤ 32"),
        (torch.zeros(2, 4, dtype=torch.float64)[:, ::2], "matrix.contiguous()"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_told(matrix: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        kernels.psd_part(matrix)
