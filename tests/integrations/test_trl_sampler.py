"""Every row comes once an epoch, each stretch holds its share of every kind, and epoch and seed decide the rest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogeo.integrations.trl_sampler import StratifiedSampler


def order(kinds: list[int], seed: int = 0, epoch: int = 0) -> list[int]:
    return list(StratifiedSampler(kinds, seed, lambda: epoch))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    width=st.integers(1, 30),
)
def test_each_stretch_holds_its_share(sizes: list[int], seed: int, width: int) -> None:
    kinds = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    rows = order(kinds, seed)
    assert sorted(rows) == list(range(len(kinds)))
    for start in range(0, len(rows) - width + 1, width):
        stretch = [kinds[row] for row in rows[start : start + width]]
        for kind, size in enumerate(sizes):
            # ±1 of its own, and as much for where the stretch begins and ends among the other kinds.
            assert abs(stretch.count(kind) - width * size / len(kinds)) <= 1 + len(sizes) * size / len(kinds)


def test_seed_and_epoch_decide() -> None:
    kinds = [0] * 20 + [1] * 10
    assert order(kinds, 1, 2) == order(kinds, 1, 2)
    assert len({tuple(order(kinds, seed, epoch)) for seed in (0, 10) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("position", [0, 15, 29])
def test_each_row_may_come_at_any_time(position: int) -> None:
    kinds = [0] * 20 + [1] * 10
    assert len({order(kinds, seed)[position] for seed in range(300)}) > 20
