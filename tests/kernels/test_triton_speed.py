"""Reductions under the interpreter as `tests.triton_speed` makes them: by any function, along any axis, of tuples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.backends import INTERPRETED

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter, which does not run here")


@triton.jit
def _first(a, a_index, b, b_index):
    """Keeps the operand on the left: no exchange of two goes unnoticed."""
    return a, a_index


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _reduce(x, largest, firsts, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr):
    row, column = tl.arange(0, M), tl.arange(0, N)
    values = tl.load(x + row[:, None] * N + column[None, :])
    total = tl.reduce(values, AXIS, _larger, keep_dims=KEEP)
    _, first = tl.reduce((values, values), AXIS, _first, keep_dims=KEEP)
    at = column if AXIS == 0 else row
    if KEEP:
        at = tl.expand_dims(at, AXIS)
    tl.store(largest + at, total)
    tl.store(firsts + at, first)


@triton.jit
def _reduce_all(x, largest, N: tl.constexpr):
    tl.store(largest, tl.reduce(tl.load(x + tl.arange(0, N)), 0, _larger))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (4, 16)])
def test_each_column_or_row_is_reduced_in_order(shape: tuple[int, int], axis: int, keep: bool) -> None:
    x: Tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    largest, firsts = torch.empty(shape[1 - axis]).double(), torch.empty(shape[1 - axis]).double()
    _reduce[(1,)](x, largest, firsts, *shape, AXIS=axis, KEEP=keep)
    assert torch.equal(largest, x.max(dim=axis).values)
    assert torch.equal(firsts, x.select(axis, 0))


def test_a_vector_is_reduced_to_a_number() -> None:
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    largest = torch.empty(1)
    _reduce_all[(1,)](x, largest, N=32)
    assert largest.item() == x.max().item()
