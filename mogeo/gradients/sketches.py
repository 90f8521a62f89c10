"""SketchedRows: per objective a sketch of its gradient instead of the gradient, [K, d] for d ≪ N.

Knows parameters and sketches; no weighting and no optimizer. Enough to estimate the Gram matrix, fed while autograd
goes on, so that no gradient of all N elements is needed. Sketches are linear, so micro-batches add up in them, and
replicas need to average d numbers per objective instead of N.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mogeo.geometry import ops
from mogeo.geometry.projection import SignedSketch
from mogeo.geometry.tracking import Sketches
from mogeo.gradients.arrivals import may_wait
from mogeo.gradients.blocks import Kind
from mogeo.gradients.catching import Catcher
from mogeo.gradients.direction import SharedDirection
from mogeo.gradients.flat import grad_dtype
from mogeo.gradients.ranks import Ranks, is_sharded, local_of, part_of
from mogeo.gradients.row_sketches import seed_of_part
from mogeo.gradients.store import ComparableStore

# Share of Σ |w_k| ‖g_k‖ by which the sketch of a direction may differ from the sum of sketches: a direction in bf16 is
# rounded by up to 0.4 % at each addition, and another mini-batch's gradients are off by their own length.
_AGREEMENT = 0.05


class SketchedRows(ComparableStore):
    """Sketches of flattened gradients for a fixed list of parameters.

    Args:
        parameters: as for `GradientStore`.
        n_rows: K.
        ranks: as for `GradientStore`.
        dimension: d, numbers kept per objective and kind (dtype, device, share) of parameters.
        catcher: as for `GradientStore`.
        places: as for `ComparableStore`.

    Attributes:
        exact: whether gradients themselves are kept, since no kind of parameters has more than d elements.

    The host decides on the weights, since it has to know them for the backward that follows.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        n_rows: int,
        ranks: Ranks | None = None,
        *,
        dimension: int,
        catcher: Catcher | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__(parameters, n_rows, ranks, catcher, places)
        self.dimension = dimension
        self.device = self.parameters[0].device
        self._index = 0
        self._touched = bytearray(len(self.parameters))
        self._sketches = self._planned()
        self._rows = [sketch.rows for sketch in self._sketches]
        self.exact = all(isinstance(sketch, _Whole) for sketch in self._sketches)

    def _planned(self) -> list[_Sketched]:
        members: dict[Kind, list[int]] = {}
        for i, parameter in enumerate(self.parameters):
            dtype = torch.promote_types(grad_dtype(parameter), torch.float32)
            share = 1.0 if self.ranks is None else self.ranks.share_of(parameter)
            kind = Kind(dtype, parameter.device, share, is_sharded(parameter), *part_of(parameter))
            members.setdefault(kind, []).append(i)
        self._of_parameter = [0] * len(self.parameters)  # which sketch
        sketches: list[_Sketched] = []
        for number, (kind, indices) in enumerate(members.items()):
            shapes = {i: local_of(self.parameters[i]).shape for i in indices}
            fits = _holds(self.dimension, sum(shape.numel() for shape in shapes.values()))
            seed = seed_of_part(number, kind.part)
            sketches.append((_Whole if fits else _Projected)(kind, shapes, self.n_rows, self.dimension, seed))
            for i in indices:
                self._of_parameter[i] = number
        return sketches

    def select(self, row: int) -> None:
        """Send gradients to the row of objective `row` from now on."""
        self._index = row

    def store(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Add sketches of gradients to the selected row; those of small parameters once the backward is done."""
        for i in indices:
            self._touched[i] = 1
        for number, sketch in enumerate(self._sketches):
            at = [position for position, i in enumerate(indices) if self._of_parameter[i] == number]
            if at:
                sketch.add(self._index, [indices[p] for p in at], [grads[p] for p in at])

    def collect(self) -> None:
        """A backward is done: store what is left of its gradients, and the sketch of what was gathered in packs."""
        super().collect()
        for sketch in self._sketches:
            sketch.finish(self._index)

    def complete(self) -> None:
        """Average sketches of plain parameters over ranks. Where an engine averaged gradients already, they stay."""
        if self.ranks is None:
            return
        for sketch in self._sketches:
            if not sketch.kind.sharded:
                self.ranks.mean_(sketch.rows)
        touched = torch.tensor(list(self._touched), dtype=torch.uint8, device=self.device)
        self._touched[:] = bytes(self.ranks.max_(touched).tolist())

    def gram(self) -> Tensor:
        """This rank's part of an unbiased estimate of G Gᵀ, fp64 [K, K], on `device`; of G Gᵀ itself, if `exact`."""
        parts = [
            ops.gram(sketch.rows[:, : sketch.used]).to(self.device) * sketch.kind.share for sketch in self._sketches
        ]
        return torch.stack(parts).sum(0)

    def _local_sketches(self) -> Sketches:
        """Parts that lie on several ranks are sketched with signs of their own, and added."""
        parts, layout = [], []
        for sketch in self._sketches:
            rows = sketch.rows[:, : sketch.used]
            if sketch.kind.sharded and self.ranks is not None:
                rows = self.ranks.sum_(sketch.projected() * sketch.kind.share)
            parts.append(rows.to(self.device))
            layout.append((rows.shape[1], sketch.sizes))
        dimension = None if self.exact and not self.sharded else self.dimension
        return Sketches(torch.cat(parts, dim=1), dimension, tuple(layout))

    def combine_into(self, direction: SharedDirection, weights: Tensor) -> None:
        """Add the direction wᵀG to a store of the same parameters, if sketches are `exact`."""
        assert self.exact
        grads: dict[int, Tensor] = {}
        for sketch in self._sketches:
            assert isinstance(sketch, _Whole)
            rows = sketch.rows[:, : sketch.used]
            grads |= sketch.parts(ops.combine(rows, weights.to(rows.device)))
        indices = [i for i, flag in enumerate(self._touched) if flag]
        direction.weigh(1.0)
        direction.store(indices, [grads[i] for i in indices])

    def contradicts(self, direction: SharedDirection, weights: Tensor) -> bool:
        """Whether a direction is not the weighted sum of the gradients whose sketches these are.

        Sketches are linear, so that of the direction must be the weighted sum of these, up to the rounding of a
        direction in half precision. A collective with several ranks.

        Args:
            direction: gradients summed in a second pass, not averaged over ranks yet.
            weights: that they were summed with, fp64 [K].
        """
        indices = [i for i, flag in enumerate(direction.flags()) if flag]
        off = reach = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, sketch in enumerate(self._sketches):
            if not isinstance(sketch, _Projected):
                continue
            row = torch.zeros_like(sketch.rows[0])
            mine = [i for i in indices if self._of_parameter[i] == number]
            sketch.sketch_into(row, mine, [direction.row.views[i] for i in mine])
            sketch.empty_pack_into(row)
            if self.ranks is not None and not sketch.kind.sharded:
                self.ranks.mean_(row)
            used = weights.to(row.device)
            off = off + (row - ops.combine(sketch.rows, used)).double().square().sum().to(self.device)
            # Rounding follows the sums on the way, which may be longer than what they end in.
            reach = reach + (sketch.reach.double()[used != 0] @ used[used != 0].abs()).square().to(self.device)
        wrong = (off > _AGREEMENT**2 * reach).to(torch.float64)
        return bool(wrong if self.ranks is None else self.ranks.max_(wrong))

    def flags(self) -> bytes:
        """As in `GradientStore`."""
        return bytes(self._touched)

    def drop(self) -> None:
        """As in `GradientStore`."""
        for sketch in self._sketches:
            sketch.drop()
        self._touched[:] = bytes(len(self._touched))


class _Sketched(ABC):
    """Sketches [K, d] of the parameters of one kind.

    Args:
        kind: dtype of the sketches, and device, share and sort of the parameters.
        shapes: of the parts that this rank holds, by index of the parameter.
        n_rows: K.
        dimension: d.
        seed: of what is random.
    """

    def __init__(self, kind: Kind, shapes: Mapping[int, torch.Size], n_rows: int, dimension: int, seed: int) -> None:
        self.kind = kind
        self.seed = seed
        self.sizes = tuple(shape.numel() for shape in shapes.values())
        self.rows = torch.zeros(n_rows, dimension, dtype=kind.dtype, device=kind.device)
        self.used = dimension
        #: The longest that each row has been in this window, after any backward, [K].
        self.reach = torch.zeros(n_rows, dtype=kind.dtype, device=kind.device)

    @abstractmethod
    def projected(self) -> Tensor:
        """Random projections of the gradients, [K, d], with signs that no other part of them has."""

    @abstractmethod
    def add(self, index: int, indices: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Add sketches of gradients to row `index`, now or when the backward is done."""

    def finish(self, index: int) -> None:
        """A backward is done: add what `add` has not added."""
        row = self.rows[index, : self.used]
        self.reach[index] = torch.maximum(self.reach[index], row.norm())

    def drop(self) -> None:
        """Close the window, and forget what `add` has not added."""
        self.rows[:, : self.used].zero_()
        self.reach.zero_()


class _Whole(_Sketched):
    """No more than d elements: the d numbers hold the gradient itself, parameter after parameter."""

    def __init__(self, kind: Kind, shapes: Mapping[int, torch.Size], n_rows: int, dimension: int, seed: int) -> None:
        super().__init__(kind, shapes, n_rows, dimension, seed)
        self._shapes = dict(shapes)
        self.used = sum(shape.numel() for shape in shapes.values())
        self._parts = [self.parts(row) for row in self.rows]  # made once: a view costs as much as adding to it

    def parts(self, row: Tensor) -> dict[int, Tensor]:
        """Views of a row [d], by index of the parameter."""
        parts = torch.split(row[: self.used], [shape.numel() for shape in self._shapes.values()])
        return {i: part.view(shape) for (i, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def projected(self) -> Tensor:
        """As in `_Sketched`."""
        rows = torch.zeros_like(self.rows)
        self._sketch.add_rows_(rows, 0, self.rows[:, : self.used])
        return rows

    @cached_property
    def _sketch(self) -> SignedSketch:
        return SignedSketch([self.used], self.rows.shape[1], seed=self.seed, device=self.kind.device)

    def add(self, index: int, indices: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Add gradients."""
        parts = self._parts[index]
        if indices:
            torch._foreach_add_([parts[i] for i in indices], list(grads))


class _Projected(_Sketched):
    """Random projections. Small parameters share a pack: their gradients are gathered in one tensor [n], which is
    sketched when a backward is done.
    """

    def __init__(self, kind: Kind, shapes: Mapping[int, torch.Size], n_rows: int, dimension: int, seed: int) -> None:
        super().__init__(kind, shapes, n_rows, dimension, seed)
        sizes = {i: shape.numel() for i, shape in shapes.items()}
        small = _small(sizes)
        self._pack = torch.zeros(sum(sizes[i] for i in small), dtype=kind.dtype, device=kind.device)
        parts = torch.split(self._pack, [sizes[i] for i in small])
        self._slots = {i: part.view(shapes[i]) for i, part in zip(small, parts, strict=True)}
        self._packed = False  # whether the pack holds anything
        # The pack comes first; what is in it has no place of its own.
        own = [0 if i in self._slots else size for i, size in sizes.items()]
        self._sketch = SignedSketch([len(self._pack), *own], dimension, seed=seed, device=kind.device)
        self._places = {i: place for place, i in enumerate(sizes, start=1)}

    def projected(self) -> Tensor:
        """As in `_Sketched`."""
        return self.rows

    def add(self, index: int, indices: Sequence[int], grads: Sequence[Tensor]) -> None:
        """Add sketches of large gradients, and gather small ones."""
        self.sketch_into(self.rows[index], indices, grads)

    def sketch_into(self, row: Tensor, indices: Sequence[int], grads: Sequence[Tensor]) -> None:
        """`add`, into any row [d]."""
        slots, parts = [], []
        for i, grad in zip(indices, grads, strict=True):
            slot = self._slots.get(i)
            if slot is None:
                self._sketch.add_(row, self._places[i], grad)
            else:
                slots.append(slot)
                parts.append(grad)
        if slots:
            self._packed = True  # said before, lest an interrupt leave gradients in the pack for the next window
            torch._foreach_add_(slots, parts)

    def finish(self, index: int) -> None:
        """A backward is done: add the sketch of the pack."""
        self.empty_pack_into(self.rows[index])
        super().finish(index)

    def empty_pack_into(self, row: Tensor | None) -> None:
        """Add the sketch of the pack to a row [d], or (None) to nothing; the pack is empty then."""
        if self._packed:
            if row is not None:
                self._sketch.add_(row, 0, self._pack)
            self._pack.zero_()
            self._packed = False

    def drop(self) -> None:
        """Close the window, and empty the pack."""
        self.empty_pack_into(None)
        super().drop()


def _holds(dimension: int, elements: int) -> bool:
    """Whether so many numbers hold a gradient of so many elements."""
    return elements <= dimension


def _small(sizes: Mapping[int, int]) -> list[int]:
    """Which tensors share a pack: the smallest, up to a 64th of all elements, but at least 131,072 and at most 2²².

    By their sizes alone, so that all ranks that hold the same parameters pack the same.
    """
    left = may_wait(4 * sum(sizes.values())) // 8  # half as much memory as waiting gradients may take, in elements
    small = []
    for i in sorted(sizes, key=sizes.__getitem__):
        left -= sizes[i]
        if left < 0:
            break
        small.append(i)
    return sorted(small)
