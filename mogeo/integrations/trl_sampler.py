"""An order of rows of several kinds in which every part of an epoch has its share of each kind.

In `trl`, the kind of a row is which objectives it has labels for. Knows indices and kinds; nothing of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """Each epoch has every row once. The rows of a kind are shuffled, and spread evenly over the epoch.

    The j-th of the n rows of a kind is placed at (j + u) / n of the epoch, where u ~ U(0, 1) is drawn once for each
    kind and epoch. So any B consecutive rows of N contain B·n/N rows of each kind, up to about 1. After a plain
    shuffle, that number would vary by √(B·n/N).

    Args:
        kinds: the kind of each row.
        seed: decides the order, together with the epoch. So no random state has to be saved, or sent to other ranks.
        epoch: returns the number of the epoch that begins.
    """

    def __init__(self, kinds: Sequence[Hashable], seed: int, epoch: Callable[[], int]) -> None:
        self.rows: dict[Hashable, list[int]] = {}
        for row, kind in enumerate(kinds):
            self.rows.setdefault(kind, []).append(row)
        self.length = len(kinds)
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        placed: list[tuple[float, int]] = []
        for rows in self.rows.values():
            shift = torch.rand((), generator=generator, dtype=torch.float64).item()
            order = torch.randperm(len(rows), generator=generator).tolist()
            placed += [((j + shift) / len(rows), rows[at]) for j, at in enumerate(order)]
        return iter([row for _, row in sorted(placed)])
