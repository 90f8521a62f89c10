"""Rows of replicated parameters, shared out over ranks: each owns one piece of every row.

Knows rows and ranks; no parameters. K gradients of N elements that no engine has reduced need not be averaged in full
on every rank. Each row is reduced and scattered; the Gram matrix is summed from pieces; the pieces are combined where
they lie; and one direction is gathered. That moves (K + 1)·N elements where K all-reduces move 2K·N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mogeo.gradients.ranks import Ranks


class Shards:
    """This rank's piece of K rows, and of the direction, of N elements, a multiple of the number of ranks.

    Args:
        n_rows: K.
        like: a full direction [N].
        ranks: who has the other pieces.
        dtype: of the rows.
        device: where the rows lie. Ranks meet on the device of the direction.

    Attributes:
        rows: [K, N / n].
        direction: [N / n], in the dtype and on the device of `like`: rows[0], if that has both.
        active: whether they, and not full rows, are what counts in this window.
    """

    def __init__(self, n_rows: int, like: Tensor, ranks: Ranks, dtype: torch.dtype, device: torch.device) -> None:
        size = len(like) // ranks.size
        self.rows = torch.zeros(n_rows, size, dtype=dtype, device=device)
        shared = (dtype, device) == (like.dtype, like.device)
        self.direction = self.rows[0] if shared else like.new_zeros(size)
        self.active = False
        self._ranks = ranks
        self._direction = 0 if shared else n_rows
        self._filled = bytearray(n_rows + 1)

    def put(self, index: int | None, row: Tensor) -> None:
        """Average a full row [N] over ranks, and add this rank's piece to row `index`, or (None) to the direction. A
        collective.
        """
        self.active = True
        piece = self._ranks.scattered_mean(row.to(self.direction.device))
        target = self.direction if index is None else self.rows[index]
        place = self._direction if index is None else index
        if self._filled[place]:
            target.add_(piece)
        else:
            target.copy_(piece)
            self._filled[place] = 1

    def settle(self) -> None:
        """Zero the rows that this window did not fill."""
        for index, row in enumerate(self.rows):
            if not self._filled[index]:
                row.zero_()

    def gather(self, out: Tensor) -> None:
        """The direction of all ranks into `out` [N]. A collective."""
        self._ranks.gather(out, self.direction)

    def drop(self) -> None:
        """Close the window."""
        self.active = False
        self._filled[:] = bytes(len(self._filled))
