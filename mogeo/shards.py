"""Rows of replicated parameters, shared out over ranks: each owns one piece of every row.

Knows rows and ranks; no parameters. K gradients of N elements that no engine has reduced need not be averaged in full
on every rank. Each row is reduced and scattered; the Gram matrix is summed from pieces; the pieces are combined where
they lie; and one direction is gathered. That moves (K + 1)·N elements where K all-reduces move 2K·N.
"""

from __future__ import annotations

from torch import Tensor

from mogeo.distributed import Ranks


class Shards:
    """This rank's piece of K rows of `columns` elements, a multiple of the number of ranks.

    Attributes:
        rows: [K, columns / n].
        active: whether they, and not full rows, are what counts in this window.
    """

    def __init__(self, n_rows: int, columns: int, like: Tensor, ranks: Ranks) -> None:
        self.rows = like.new_zeros(n_rows, columns // ranks.size)
        self.active = False
        self._ranks = ranks
        self._filled = bytearray(n_rows)

    def put(self, index: int, row: Tensor) -> None:
        """Average a full row [columns] over ranks, and add this rank's piece to row `index`. A collective."""
        self.active = True
        piece = self._ranks.scattered_mean(row)
        if self._filled[index]:
            self.rows[index].add_(piece)
        else:
            self.rows[index].copy_(piece)
            self._filled[index] = 1

    def settle(self) -> None:
        """Zero the rows that this window did not fill."""
        for index, filled in enumerate(self._filled):
            if not filled:
                self.rows[index].zero_()

    def gather(self, out: Tensor) -> None:
        """Row 0 of all ranks into `out` [columns]. A collective."""
        self._ranks.gather(out, self.rows[0])

    def drop(self) -> None:
        """Close the window."""
        self.active = False
        self._filled[:] = bytes(len(self._filled))
