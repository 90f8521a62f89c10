"""RowSketches: rows of gradients as K·d numbers, for averages over steps. Knows blocks and ranks; no parameters.

One pass over the rows, in place of that for their Gram matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo.geometry.projection import SignedSketch
from mogeo.geometry.tracking import Sketches
from mogeo.gradients.blocks import Block
from mogeo.gradients.ranks import Ranks

DIMENSION = 1 << 14
"""d: inner products of averages are off by some 0.8 % of the product of their lengths."""


class RowSketches:
    """Sketches of the rows in some blocks, side by side. A block of no more than d columns is taken as it is.

    Args:
        blocks: all of them.
        ranks: who holds the others, if there are several processes.
        device: where sketches go.
    """

    def __init__(self, blocks: Sequence[Block], ranks: Ranks | None, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._of_blocks = [_BlockSketch(block, ranks, number) for number, block in enumerate(blocks)]
        exact = all(each.exact for each in self._of_blocks)
        self._dimension = None if exact else DIMENSION
        self._layout = tuple(each.layout for each in self._of_blocks)

    def __call__(self) -> Sketches:
        """Of what the rows hold now. A collective, where parts of them lie on several ranks."""
        parts = [each().to(self._device) for each in self._of_blocks]
        return Sketches(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), self._dimension, self._layout)


class _BlockSketch:
    """Sketches [K, d] of the rows [K, n] of one block.

    Replicas are cut into as many pieces as there are ranks, each with signs of its own, so that the sketch is the same
    whether a rank holds all of them, or one.
    """

    def __init__(self, block: Block, ranks: Ranks | None, number: int) -> None:
        self._block, self._ranks = block, ranks
        columns = block.direction.numel()
        self._pieces = 1 if ranks is None or block.kind.sharded else ranks.size
        self.exact = columns <= DIMENSION and not (block.kind.sharded and ranks is not None)
        self.layout = (columns, self._pieces, None if ranks is None else ranks.size, self.exact)
        self._columns = columns
        self._sketch: SignedSketch | None = None
        if not self.exact:
            sizes = [columns // self._pieces] * self._pieces
            seed = seed_of_part(number, block.kind.part)
            self._sketch = SignedSketch(sizes, DIMENSION, seed=seed, device=block.rows.device)

    def __call__(self) -> Tensor:
        block, rows = self._block, self._block.rows_now
        dtype = torch.promote_types(rows.dtype, torch.float32)
        in_pieces = rows is not block.rows
        width = self._columns if self._sketch is None else DIMENSION
        if self._sketch is None and not in_pieces:
            return rows.to(dtype)
        result = torch.zeros(block.n_rows, width, dtype=dtype, device=rows.device)
        first = self._ranks.rank if in_pieces and self._ranks is not None else 0
        size = self._columns // self._pieces
        for index, piece in enumerate(torch.split(rows, size, dim=1), start=first):
            if self._sketch is None:
                result[:, index * size : (index + 1) * size] = piece
            else:
                self._sketch.add_rows_(result, index, piece)
        if self._ranks is not None and (in_pieces or block.kind.sharded):
            device = block.direction.device  # where ranks meet
            result = self._ranks.sum_(result.to(device) * block.share)
        return result


def seed_of_part(number: int, part: int) -> int:
    """A seed for each part of a gradient that is sketched apart: by its place on a rank, and its number over ranks."""
    return (part << 16) + number
