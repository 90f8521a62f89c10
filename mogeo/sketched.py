"""SketchedRows: per objective a sketch of its gradient instead of the gradient, [K, d] for d ≪ N.

Knows parameters and sketches; no weighting and no optimizer. Enough to estimate the Gram matrix, fed gradient by
gradient while autograd goes on, so that no full gradient exists beside the model's own. Sketches are linear, so
micro-batches add up in them, and replicas need to average d numbers per objective instead of N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo import ops
from mogeo.capture import Capture, grad_dtype, signature
from mogeo.distributed import Ranks, is_sharded, local_of
from mogeo.sketch import SignedSketch

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
        super().__init__(parameters, ranks)
        self.device = self.parameters[0].device
        self.signature = signature(parameters, n_rows)
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
        self._places = [(0, 0)] * len(self.parameters)  # of each parameter: block, index in its sketch
        for b, (kind, indices) in enumerate(members.items()):
            sizes = [local_of(self.parameters[i]).numel() for i in indices]
            self._sketches.append(SignedSketch(sizes, dimension, device=kind[1]))
            for place, i in enumerate(indices):
                self._places[i] = b, place

    def select(self, row: int | None, weight: float = 1.0) -> None:
        """Send gradients to this row from now on."""
        assert row is not None
        assert weight == 1.0
        self._row = row

    def store(self, index: int, grad: Tensor) -> None:
        """Add the sketch of a gradient to the selected row."""
        block, place = self._places[index]
        self._sketches[block].add_(self._rows[block][self._row], place, grad)
        self._touched[index] = 1

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

    def touched(self) -> set[Tensor]:
        """Parameters that had a gradient in this window."""
        return {parameter for parameter, flag in zip(self.parameters, self._touched, strict=True) if flag}

    def drop(self) -> None:
        """Close the window."""
        for rows in self._rows:
            rows.zero_()
        self._touched[:] = bytes(len(self._touched))
