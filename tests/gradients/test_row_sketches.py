"""Sketches of rows: their inner products are those of the rows, whatever the rows are kept in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mogeo.gradients import row_sketches
from mogeo.gradients.memory import Rows
from mogeo.gradients.row_sketches import seed_of_part
from mogeo.gradients.rows import RowStore


def store_of(shapes: list[tuple[int, ...]], rows: Tensor, memory: Rows | None = None, dtype: Any = None) -> RowStore:
    """A store that holds these rows [K, N], for parameters of these shapes."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    store = RowStore(parameters, len(rows), None, memory)
    with store.capturing():
        for k, row in enumerate(rows):
            store.select(k)
            parts = torch.split(row, [p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)
            store.collect()
    store.complete()
    return store


def drawn(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_rows_of_no_more_than_d_columns_are_their_own_sketches() -> None:
    rows = drawn(3, 65)
    sketches = store_of([(7, 8), (9,)], rows).sketches()
    assert sketches.dimension is None
    torch.testing.assert_close(sketches.rows.double() @ sketches.rows.double().T, rows.double() @ rows.double().T)


@pytest.mark.parametrize("memory", [None, Rows(torch.bfloat16)])
def test_inner_products_are_estimated_within_what_is_promised(
    monkeypatch: pytest.MonkeyPatch, memory: Rows | None
) -> None:
    monkeypatch.setattr(row_sketches, "DIMENSION", 1024)
    rows = drawn(3, 40_000)
    rows[1] += 0.5 * rows[0]
    sketches = store_of([(200, 150), (10_000,)], rows, memory).sketches()
    assert sketches.dimension == 1024
    assert sketches.rows.shape == (3, 1024)
    assert sketches.rows.dtype == torch.float32
    truth = rows.double() @ rows.double().T
    lengths = truth.diagonal()
    error = ((torch.outer(lengths, lengths) + truth.square()) / 1024).sqrt()
    assert bool(((sketches.rows.double() @ sketches.rows.double().T - truth).abs() < 4 * error).all())


def test_sketches_are_linear_and_the_same_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sketches, "DIMENSION", 256)
    one, other = drawn(2, 5000, 1), drawn(2, 5000, 2)
    a, b, both = (store_of([(5000,)], rows).sketches().rows for rows in (one, other, one + other))
    torch.testing.assert_close(a + b, both, rtol=1e-4, atol=1e-3)


def test_parts_in_several_dtypes_lie_side_by_side() -> None:
    parameters = [nn.Parameter(torch.zeros(4, dtype=torch.float64)), nn.Parameter(torch.zeros(5))]
    store = RowStore(parameters, 2)
    with store.capturing():
        for k in range(2):
            store.select(k)
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, k + 1.0)
            store.collect()
    store.complete()
    sketches = store.sketches()
    assert sketches.rows.dtype == torch.float64
    assert (sketches.rows @ sketches.rows.T).tolist() == [[9.0, 18.0], [18.0, 36.0]]


def test_what_is_not_finite_shows() -> None:
    rows = drawn(2, 50)
    rows[1, 7] = torch.inf
    sketches = store_of([(50,)], rows).sketches()
    assert bool(sketches.rows[0].isfinite().all())
    assert not bool(sketches.rows[1].isfinite().all())


def test_parts_have_seeds_of_their_own() -> None:
    seeds = {seed_of_part(number, part) for number in range(50) for part in range(50)}
    assert len(seeds) == 2500
