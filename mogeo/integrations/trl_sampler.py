"""The order of rows that do not all have the same objectives: every stretch of it holds its share of each kind.

Knows indices and kinds; nothing of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class StratifiedSampler(Sampler[int]):
    """Every row once an epoch, shuffled within its kind, kinds interleaved in proportion to their sizes.

    The j-th of the n rows of a kind lies at (j + u) / n of the epoch, with one u ~ U(0, 1) for each kind and epoch. So
    any stretch of B of the N rows holds B·n/N of each kind, give or take 1 of that kind and the rounding of the
    stretch, where a plain shuffle gives or takes √(B·n/N).

    Args:
        kinds: of each row.
        seed: with the epoch, decides the order: no random state needs to be saved, or agreed on between ranks.
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
