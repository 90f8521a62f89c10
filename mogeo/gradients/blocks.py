"""Blocks: the rows [K, n] of parameters of one kind, and their part of the direction, [n]. A class per way.

Knows flat memory and ranks; no parameters and no autograd. Of what several ranks hold, each counts its part by its
share, so that a sum over ranks counts every element once.

**Pieces.** K gradients of n elements that no engine has reduced need not be averaged in full on every rank. Each row is
reduced and scattered; the Gram matrix is summed from pieces; the pieces are combined where they lie; and one direction
is gathered. That moves (K + 1)·n elements where K all-reduces move 2K·n.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mogeo.geometry import ops
from mogeo.gradients.memory import Rows
from mogeo.gradients.ranks import Ranks

_STAGED = 1 << 24  # elements that move from the host at a time, where they are summed in another dtype than they have


class Kind(NamedTuple):
    """What parameters of one block have in common."""

    #: Of their gradients.
    dtype: torch.dtype
    device: torch.device
    #: With which this rank counts what it holds of them.
    share: float
    #: Whether they are DTensors.
    sharded: bool
    #: Dimensions of the mesh over which they are cut into parts, and the number of this rank's part.
    cut_over: tuple[int, ...] = ()
    part: int = 0


class Block:
    """Rows of gradients of one kind, row 0 being the direction as well: it takes no memory of its own.

    Args:
        kind: of the parameters.
        n_rows: K.
        columns: n, a multiple of the number of ranks.
        ranks: who has the other pieces, if there are several processes.

    Attributes:
        rows: [K, n].
        direction: [n].
    """

    #: Whether rows lie on another device than the gradients, and move there on a stream of their own.
    on_host = False
    #: Whether the row of an objective is scattered over ranks as soon as its backward is done.
    scattered = False
    #: Whether the direction lies over row 0.
    shares_row_0 = True

    def __init__(self, kind: Kind, n_rows: int, columns: int, ranks: Ranks | None) -> None:
        self.kind = kind
        self.n_rows = n_rows
        self.ranks = ranks
        self._pieces: Pieces | None = None
        self.rows, self.direction = self._allocated(columns)

    def _allocated(self, columns: int) -> tuple[Tensor, Tensor]:
        rows = torch.zeros(self.n_rows, columns, dtype=self.kind.dtype, device=self.kind.device)
        return rows, rows[0]

    def row(self, index: int) -> Tensor:
        """Where gradients of objective `index` are written, [n]."""
        return self.rows[index]

    @property
    def _active(self) -> Pieces | None:
        """This rank's pieces, if they, and not full rows, are what counts in this window."""
        return self._pieces if self._pieces is not None and self._pieces.active else None

    @property
    def share(self) -> float:
        """With which this rank counts what counts now."""
        return self.kind.share if self._active is None else 1.0

    @property
    def rows_now(self) -> Tensor:
        """The rows that count in this window: [K, n], or this rank's pieces of them."""
        return self.rows if self._active is None else self._active.rows

    @property
    def direction_now(self) -> Tensor:
        """Where the direction belongs in this window: [n], or this rank's piece of it."""
        return self.direction if self._active is None else self._active.direction

    def average(self, row: int | None, flat: Tensor) -> None:
        """Average a row [n], or (None) the direction, over ranks, and let pieces count from now on. A collective."""
        if self._pieces is None:
            self._pieces = self._new_pieces()
        self._pieces.put(row, flat)

    def _new_pieces(self) -> Pieces:
        assert self.ranks is not None
        return Pieces(self.n_rows, self.direction, self.ranks, self.rows.dtype, self.rows.device)

    def settle(self) -> None:
        """Zero the pieces of rows that this window did not fill."""
        if self._pieces is not None:
            self._pieces.settle()

    def combine(self, weights: Tensor) -> None:
        """Overwrite the direction with wᵀ rows, weights being fp64 [K]."""
        ops.combine(self.rows_now, weights, out=self.direction_now)

    def scale(self, factor: Tensor) -> None:
        """Multiply the direction by a factor, fp64 []; by 0 even where it is not finite."""
        ops.combine(self.direction_now[None], factor[None], out=self.direction_now)

    def gather(self) -> bool:
        """Make the direction whole again, if only pieces of it count; whether that was so. A collective."""
        if self._active is None:
            return False
        self._active.gather(self.direction)
        return True

    def forget_pieces(self) -> None:
        """Let the full direction count again."""
        if self._pieces is not None:
            self._pieces.active = False

    def drop(self) -> None:
        """Close the window."""
        if self._pieces is not None:
            self._pieces.drop()


class BlockApart(Block):
    """Rows in another dtype than the gradients; the direction has n elements of its own.

    Args:
        dtype: of the rows.
        device: of the rows.
    """

    shares_row_0 = False

    def __init__(
        self, kind: Kind, n_rows: int, columns: int, ranks: Ranks | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype, self._device = dtype, device
        super().__init__(kind, n_rows, columns, ranks)

    def _allocated(self, columns: int) -> tuple[Tensor, Tensor]:
        pinned = self._device.type == "cpu" and self.kind.device.type == "cuda"
        rows = torch.zeros(self.n_rows, columns, dtype=self._dtype, device=self._device, pin_memory=pinned)
        return rows, torch.zeros(columns, dtype=self.kind.dtype, device=self.kind.device)


class HostBlock(BlockApart):
    """Rows in the host's memory, of gradients that come from another device. The host multiplies and combines them."""

    on_host = True

    def combine(self, weights: Tensor) -> None:
        """Sum the rows on the host; only the sum moves to the device."""
        _combine_from_host(self.rows_now, weights, self.direction_now)


class ScatteredBlock(BlockApart):
    """One row in which every gradient lands, to be averaged and scattered once its backward is done.

    The direction lies over that row: n elements, and K·n / ranks in pieces.

    Attributes:
        rows: [1, n].
    """

    scattered = True

    def _allocated(self, columns: int) -> tuple[Tensor, Tensor]:
        landing = torch.zeros(1, columns, dtype=self.kind.dtype, device=self.kind.device)
        return landing, landing[0]

    def row(self, index: int) -> Tensor:
        """The row in which every gradient lands, [n]."""
        return self.rows[0]

    def _new_pieces(self) -> Pieces:
        assert self.ranks is not None
        return Pieces(self.n_rows, self.direction, self.ranks, self._dtype, self._device)

    def combine(self, weights: Tensor) -> None:
        """Overwrite this rank's piece of the direction; pieces of rows may lie on the host."""
        if self.rows_now.device == self.direction_now.device:
            super().combine(weights)
        else:
            _combine_from_host(self.rows_now, weights, self.direction_now)


class Pieces:
    """This rank's piece of K rows, and of the direction, of n elements, a multiple of the number of ranks.

    Args:
        n_rows: K.
        like: a full direction [n].
        ranks: who has the other pieces.
        dtype: of the rows.
        device: where the rows lie. Ranks meet on the device of the direction.

    Attributes:
        rows: [K, n / ranks].
        direction: [n / ranks], in the dtype and on the device of `like`: rows[0], if that has both.
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
        """Average a full row [n] over ranks, and add this rank's piece to row `index`, or (None) to the direction. A
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
        """The direction of all ranks into `out` [n]. A collective."""
        self._ranks.gather(out, self.direction)

    def drop(self) -> None:
        """Close the window."""
        self.active = False
        self._filled[:] = bytes(len(self._filled))


def place_of_rows(kind: Kind, memory: Rows) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the rows of gradients of a kind. Rows are never wider than the gradients."""
    dtype = kind.dtype
    if memory.dtype is not None and memory.dtype.itemsize < dtype.itemsize:
        dtype = memory.dtype
    return dtype, kind.device if memory.device is None else torch.device(memory.device)


def blocks_for(columns: Mapping[Kind, int], n_rows: int, ranks: Ranks | None, memory: Rows) -> list[Block]:
    """A block for each kind of parameters: the one place that chooses how rows are kept.

    Args:
        columns: n for each kind.
        n_rows: K; 1 where there is a direction alone.
        ranks: the processes that hold the parameters between them, if there are several.
        memory: what the user asked for.
    """
    places = {kind: place_of_rows(kind, memory) for kind in columns}
    # The direction lies over row 0 in all blocks or in none, so that one set of flags tells what it holds.
    apart = n_rows > 1 and any(place != (kind.dtype, kind.device) for kind, place in places.items())
    blocks: list[Block] = []
    for kind, n in columns.items():
        dtype, device = places[kind]
        if memory.scatter and ranks is not None and not kind.sharded:
            blocks.append(ScatteredBlock(kind, n_rows, n, ranks, dtype, device))
        elif not apart:
            blocks.append(Block(kind, n_rows, n, ranks))
        elif device.type != kind.device.type:
            blocks.append(HostBlock(kind, n_rows, n, ranks, dtype, device))
        else:
            blocks.append(BlockApart(kind, n_rows, n, ranks, dtype, device))
    return blocks


def _combine_from_host(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """wᵀ rows for rows on the host, in place where the dtype allows it; only the sum moves to the device."""
    weights = weights.cpu()
    if rows.dtype == out.dtype:
        out.copy_(ops.combine(rows, weights, out=rows[0]), non_blocking=True)
        return
    staging = torch.empty(min(_STAGED, len(out)), dtype=out.dtype, pin_memory=out.is_cuda)
    for start in range(0, len(out), _STAGED):
        part, target = rows[:, start : start + _STAGED], out[start : start + _STAGED]
        target.copy_(ops.combine(part, weights, out=staging[: len(target)]))
