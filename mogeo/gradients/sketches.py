"""SketchedRows: per objective a sketch of its gradient instead of the gradient, [K, d] for d ≪ N.

Knows parameters and sketches; no weighting and no optimizer. Enough to estimate the Gram matrix, fed while autograd
goes on, so that no gradient of all N elements is needed. Sketches are linear, so micro-batches add up in them, and
replicas need to average d numbers per objective instead of N.

Small parameters share a pack: their gradients are gathered in one tensor, which is sketched when a backward is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo.geometry import ops
from mogeo.geometry.projection import SignedSketch
from mogeo.gradients.arrivals import may_wait
from mogeo.gradients.ranks import Ranks, is_sharded, local_of
from mogeo.gradients.store import Capture, grad_dtype

# What rows of one block have in common: dtype, device, share of this rank, whether it holds shards.
_Kind = tuple[torch.dtype, torch.device, float, bool]


class SketchedRows(Capture):
    """Sketches of flattened gradients for a fixed list of parameters.

    Args:
        parameters: leaves that require grad, in the order of the optimizer's groups.
        n_rows: K.
        ranks: the processes that hold the parameters between them, if there are several.
        dimension: d, numbers kept per objective and (dtype, device, share) among the parameters.

    Attributes:
        device: where the Gram and everything that follows from it lives: that of the first parameter. The host decides
            on the weights, since it has to know them for the backward that follows.
    """

    def __init__(
        self, parameters: Sequence[Tensor], n_rows: int, ranks: Ranks | None = None, *, dimension: int
    ) -> None:
        super().__init__(parameters, n_rows, ranks)
        self.device = self.parameters[0].device
        self._row = 0
        self._touched = bytearray(len(self.parameters))
        members: dict[_Kind, list[int]] = {}
        for i, parameter in enumerate(self.parameters):
            dtype = torch.promote_types(grad_dtype(parameter), torch.float32)
            share = 1.0 if ranks is None else ranks.share_of(parameter)
            members.setdefault((dtype, parameter.device, share, is_sharded(parameter)), []).append(i)
        self._kinds = list(members)
        self._rows = [torch.zeros(n_rows, dimension, dtype=kind[0], device=kind[1]) for kind in self._kinds]
        self._sketches: list[SignedSketch] = []
        self._packs: list[Tensor] = []
        self._packed = bytearray(len(self._kinds))  # whether a pack holds anything
        self._places = [(0, 0)] * len(self.parameters)  # of each parameter: block, index in its sketch
        self._slots: list[Tensor | None] = [None] * len(self.parameters)  # where in a pack, if there
        for b, (kind, indices) in enumerate(members.items()):
            sizes = [local_of(self.parameters[i]).numel() for i in indices]
            small = _small(sizes)
            pack = torch.zeros(sum(sizes[place] for place in small), dtype=kind[0], device=kind[1])
            for place, slot in zip(small, torch.split(pack, [sizes[place] for place in small]), strict=True):
                shape = local_of(self.parameters[indices[place]]).shape
                self._slots[indices[place]] = slot.view(shape)
            self._packs.append(pack)
            # The pack comes first; those in it have no place of their own.
            own = list(sizes)
            for place in small:
                own[place] = 0
            self._sketches.append(SignedSketch([len(pack), *own], dimension, device=kind[1]))
            for place, i in enumerate(indices):
                self._places[i] = b, 1 + place

    def select(self, row: int | None, weight: float = 1.0) -> None:
        """Send gradients to this row from now on."""
        assert row is not None
        assert weight == 1.0
        self._row = row

    def store(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Add sketches of gradients to the selected row; those of small parameters once the backward is done."""
        slots, parts = [], []
        for i, grad in zip(indices, grads, strict=True):
            self._touched[i] = 1
            block, place = self._places[i]
            slot = self._slots[i]
            if slot is None:
                self._sketches[block].add_(self._rows[block][self._row], place, grad)
            else:
                slots.append(slot)
                parts.append(grad)
                self._packed[block] = 1
        if slots:
            torch._foreach_add_(slots, parts)

    def collect(self) -> None:
        """A backward is done: store what is left of its gradients, and the sketch of what was gathered in packs."""
        super().collect()
        for block, (pack, sketch) in enumerate(zip(self._packs, self._sketches, strict=True)):
            if self._packed[block]:
                sketch.add_(self._rows[block][self._row], 0, pack)
        self._empty_packs()

    def _empty_packs(self) -> None:
        for block, pack in enumerate(self._packs):
            if self._packed[block]:
                pack.zero_()
                self._packed[block] = 0

    def average_replicas(self) -> None:
        """Average sketches of plain parameters over ranks. Where an engine averaged gradients already, they stay."""
        if self.ranks is not None:
            for rows, (*_, sharded) in zip(self._rows, self._kinds, strict=True):
                if not sharded:
                    self.ranks.mean_(rows)

    def gram(self) -> Tensor:
        """This rank's part of an unbiased estimate of G Gᵀ, fp64 [K, K], on `device`."""
        parts = [
            ops.gram(rows).to(self.device) * share
            for rows, (_, _, share, _) in zip(self._rows, self._kinds, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def flags(self) -> bytes:
        """A byte per parameter: 1 where it had a gradient in this window."""
        return bytes(self._touched)

    def drop(self) -> None:
        """Close the window."""
        self._empty_packs()
        for rows in self._rows:
            rows.zero_()
        self._touched[:] = bytes(len(self._touched))


def _small(sizes: Sequence[int]) -> list[int]:
    """Which tensors share a pack: the smallest, up to a 64th of all elements, but at least 131,072 and at most 2²².

    By their sizes alone, so that all ranks that hold the same parameters pack the same.
    """
    left = may_wait(4 * sum(sizes)) // 8  # half as much memory as gradients may take that wait, four bytes an element
    small = []
    for place in sorted(range(len(sizes)), key=sizes.__getitem__):
        left -= sizes[place]
        if left < 0:
            break
        small.append(place)
    return sorted(small)
