"""SharedDirection: N elements in which gradients are summed, or rows combined; they are handed out as `p.grad`.

Knows parameters and flat memory; no weighting and no optimizer. Where weights are known before the backward, gradients
are multiplied by them and summed here as they come, and no rows are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mogeo.geometry import ops
from mogeo.geometry.constants import constant_tensor
from mogeo.gradients.catching import Catcher
from mogeo.gradients.flat import FlatMemory
from mogeo.gradients.memory import Rows
from mogeo.gradients.ranks import Ranks, gradient_of, like_parameter, local_of
from mogeo.gradients.replicas import average_direction, gram_of
from mogeo.gradients.store import GradientStore
from mogeo.gradients.writing import FlatRow, write


class SharedDirection(GradientStore):
    """The direction, over the blocks of rows or alone.

    Args:
        parameters: as for `GradientStore`.
        ranks: as for `GradientStore`.
        catcher: as for `GradientStore`.
        memory: blocks that have a place for it; by default its own, without rows.

    Attributes:
        flat: the blocks.
        row: the direction as views, and what it holds.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        ranks: Ranks | None = None,
        catcher: Catcher | None = None,
        memory: FlatMemory | None = None,
    ) -> None:
        super().__init__(parameters, ranks, catcher)
        self.flat = FlatMemory(self.parameters, 1, ranks, Rows()) if memory is None else memory
        self.row = FlatRow(self.flat.layout.views([block.direction for block in self.flat.blocks]))
        self.device = self.flat.blocks[0].direction.device
        self._weight = 1.0
        self._padding = self.flat.layout.padding()
        #: p.grad of each parameter, over the direction: made once, for a DTensor takes a while to make.
        self._grads: list[Tensor | None] = [None] * len(self.parameters)
        self._code = ops.device_code(self._as_rows()) if ranks is None else None

    @property
    def device_code(self) -> ModuleType | None:
        """As in `GradientStore`."""
        return self._code

    @property
    def blocks(self) -> list[Tensor]:
        """What the direction lies in, one tensor [rows, n] per block."""
        return [block.rows for block in self.flat.blocks]

    def _as_rows(self) -> list[Tensor]:
        """The direction as blocks of one row."""
        return [block.direction[None] for block in self.flat.blocks]

    # gradients coming in

    def weigh(self, weight: float) -> None:
        """Multiply gradients by this weight from now on, and add them up. With weight 0 they are not read at all."""
        self._weight = weight

    def store(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Add weighted gradients to the direction."""
        if self._weight == 0:
            return
        row, scattered = self.row, self.flat.scattered
        if len(indices) == len(self.parameters) and not self.flat.scatters and row.fill(grads, self._weight):
            return
        for i in indices:
            row.dirty[i] = not scattered[i]
        for again in (False, True):
            # What is scattered shares its row with all objectives: nothing there belongs to this one yet.
            at = [position for position, i in enumerate(indices) if (row.written[i] and not scattered[i]) == again]
            if at:
                targets, sources = (
                    [row.views[indices[position]] for position in at],
                    [grads[position] for position in at],
                )
                write(targets, sources, self._weight, fresh=not again)
        for i in indices:
            row.written[i] = self.flat.landed[i] = 1

    def collect(self) -> None:
        """A backward is done: store what is left of its gradients. With scattered blocks, a collective."""
        with self.flat.scattering(None, self.row.views):
            super().collect()

    def withheld(self, grad: Tensor) -> Tensor:
        """A copy of the last direction, if the user has not zeroed it: it is about to be overwritten."""
        return grad.clone() if grad.layout == torch.strided and self._owns(grad) else grad

    def _owns(self, grad: Tensor) -> bool:
        storage = local_of(grad).untyped_storage().data_ptr()
        return any(storage == block.direction.untyped_storage().data_ptr() for block in self.flat.blocks)

    def flags(self) -> bytes:
        """As in `GradientStore`."""
        return bytes(self.row.written)

    def complete(self) -> None:
        """Zero what this window did not write, and average over ranks what no engine averaged. A collective."""
        self.row.zero_stale()
        if self.ranks is not None:
            average_direction(self.flat.blocks, self.ranks, self.row.written, self.device)

    def migrate(self, old: SharedDirection) -> None:
        """Take over the open window of `old`, for the parameters both have.

        Raises:
            RuntimeError: its gradients are scattered over ranks.
        """
        self.row.take_over(old.row, places_in(self.parameters, old))

    # the direction

    def squared_norm(self) -> Tensor:
        """‖direction‖² over all ranks, fp64 []."""
        if self._code is not None:
            squared_norm: Tensor = self._code.gram_of_blocks(self._as_rows()).squeeze()
            return squared_norm
        squared_norm = gram_of([(block.direction_now[None], block.share) for block in self.flat.blocks], self.device)
        squared_norm = squared_norm.squeeze()
        return squared_norm if self.ranks is None else self.ranks.sum_(squared_norm)

    def scale(self, factor: Tensor) -> None:
        """Multiply the direction by a factor, fp64 []; by 0 even where it is not finite."""
        for block in self.flat.blocks:
            block.scale(factor)

    def finish(self, squared_norm: Tensor, max_norm: float | None, *, discard: bool) -> Any:
        """Clip, or discard, what the direction holds, on the device; see `mogeo.kernels.combine`.

        Args:
            squared_norm: of the direction, fp64 [1].
            max_norm: to clip to, if at all.
            discard: whether a direction that is not finite becomes zero.

        Returns:
            Squared norm and clip factor.
        """
        assert self._code is not None
        one = constant_tensor((1.0,), torch.float64, self.device)
        directions = [block.direction for block in self.flat.blocks]
        return self._code.finish_(directions, squared_norm, one, None, max_norm, discard=discard)

    def written_anywhere(self) -> None:
        """The direction may hold anything now, everywhere but between the parameters."""
        self.row.dirty[:] = b"\1" * len(self.parameters)
        for block, padding in zip(self.flat.blocks, self._padding, strict=True):
            if padding.numel():  # a NaN there would outlast the step
                block.direction.index_fill_(0, padding, 0.0)

    def poison(self) -> None:
        """Fill the direction with NaN. Not by NaN weights: they would reach the padding, which nothing ever zeroes."""
        for block in self.flat.blocks:
            block.forget_pieces()
        for view in self.row.views:
            view.fill_(torch.nan)
        self.flat.landed[:] = self.row.dirty[:] = b"\1" * len(self.parameters)

    def overflowed(self) -> bool:
        """Whether finite fp16 rows were combined into something fp16 cannot hold, on any rank."""
        halves = [block.direction_now for block in self.flat.blocks if block.kind.dtype == torch.float16]
        if not halves:
            return False
        overflowed = any(not bool(direction.isfinite().all()) for direction in halves)
        if self.ranks is not None:
            overflowed = bool(self.ranks.sum_(torch.tensor([float(overflowed)], device=self.device)))
        return overflowed

    def publish(self, before: list[tuple[Tensor, Tensor | None]] | None = None) -> None:
        """Add the direction to `p.grad` of every parameter that something was written for, and close the window. A
        collective.

        `p.grad` then is a view of the direction: it lasts until the next window. Other parameters keep theirs.

        Args:
            before: takes each parameter with the `p.grad` that it had, just before that is replaced.
        """
        before = [] if before is None else before
        for block in self.flat.blocks:
            if block.gather():
                self.flat.landed[:] = self.row.dirty[:] = b"\1" * len(self.parameters)
        for i, (parameter, flag) in enumerate(zip(self.parameters, self.row.written, strict=True)):
            if not flag:
                continue
            grad = parameter.grad
            if grad is not None:
                self.row.views[i].add_(gradient_of(parameter, grad))
            if self._grads[i] is None:
                self._grads[i] = like_parameter(self.row.views[i], parameter)
            before.append((parameter, grad))
            parameter.grad = self._grads[i]
        self.drop()

    def drop(self) -> None:
        """As in `GradientStore`."""
        self.row.drop()
        for block in self.flat.blocks:
            block.drop()


def places_in(parameters: Sequence[Tensor], old: SharedDirection) -> list[tuple[int, int]]:
    """(Index in `parameters`, index in `old`) of the parameters that both have.

    Raises:
        RuntimeError: what `old` holds is scattered over ranks, and cannot move.
    """
    if old.flat.scatters:
        raise RuntimeError(
            "the parameters changed between backward() and step(), and with Rows(scatter=True) the gradients captured "
            "so far cannot move: change them after step() or zero_grad()"
        )
    places = {id(parameter): i for i, parameter in enumerate(parameters)}
    return [(places[id(parameter)], j) for j, parameter in enumerate(old.parameters) if id(parameter) in places]
