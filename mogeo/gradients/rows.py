"""RowStore: one flat row per objective, filled by autograd, and the direction that they are combined into.

Knows parameters, autograd and flat memory; no weighting and no optimizer. `capturing` and `select` fill rows, again and
again under gradient accumulation; `complete` makes them readable; `combine` sums them up in the direction. How rows are
kept (under the direction, in another dtype, on the host, in pieces on several ranks) is the business of
`mogeo.gradients.blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mogeo.geometry import ops
from mogeo.geometry.tracking import Sketches
from mogeo.gradients.catching import Catcher
from mogeo.gradients.direction import SharedDirection, places_in
from mogeo.gradients.flat import FlatMemory
from mogeo.gradients.memory import Rows
from mogeo.gradients.ranks import Ranks
from mogeo.gradients.replicas import average_rows, gram_of
from mogeo.gradients.row_sketches import RowSketches
from mogeo.gradients.store import ComparableStore
from mogeo.gradients.writing import FlatRow, union, write


class RowStore(ComparableStore):
    """Rows of flattened gradients for a fixed list of parameters.

    Args:
        parameters: as for `GradientStore`.
        n_rows: K.
        ranks: as for `GradientStore`.
        memory: how rows are kept.
        catcher: as for `GradientStore`.
        places: as for `ComparableStore`.

    Attributes:
        flat: the blocks, one for each (dtype, device, share) among the parameters.
        direction: what `combine` writes, and `direction.publish` hands out.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        n_rows: int,
        ranks: Ranks | None = None,
        memory: Rows | None = None,
        catcher: Catcher | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__(parameters, n_rows, ranks, catcher, places)
        self.memory = Rows() if memory is None else memory
        self.flat = FlatMemory(self.parameters, n_rows, ranks, self.memory)
        self.direction = SharedDirection(self.parameters, ranks, self.catcher, self.flat)
        self.device = self.direction.device
        views = [self.flat.layout.views([block.row(k) for block in self.flat.blocks]) for k in range(n_rows)]
        # Row 0 and the direction share memory, or none: then one set of flags tells what both hold.
        shared = self.direction.row.dirty if self.flat.shares_row_0 else None
        self.rows = [FlatRow(each, shared if k == 0 else None) for k, each in enumerate(views)]
        self._index = 0
        self._sketches: RowSketches | None = None  # made when they are asked for
        self._code = ops.device_code(self.blocks) if ranks is None else None
        # Gradients that come together are written together, unless some of them go another way.
        self._moves_plainly = not (self.flat.scatters or any(self.flat.on_host))
        self._stream = torch.cuda.Stream(self.device) if any(self.flat.on_host) else None  # type: ignore[no-untyped-call]

    @property
    def blocks(self) -> list[Tensor]:
        """The rows, one tensor [K, n] per block; [1, n] where they are scattered over ranks."""
        return [block.rows for block in self.flat.blocks]

    @property
    def device_code(self) -> ModuleType | None:
        """As in `GradientStore`."""
        return self._code

    # gradients coming in

    def select(self, row: int) -> None:
        """Send gradients to the row of objective `row` from now on."""
        self._index = row

    def store(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Move gradients to the selected row, or add them to what this window wrote there."""
        row, scattered = self.rows[self._index], self.flat.scattered
        if self._moves_plainly and len(indices) == len(self.parameters) and row.fill(grads, 1.0):
            return
        for i in indices:
            row.dirty[i] = not scattered[i]
        # By whether the row lies on the host, and whether it holds a gradient of this window already. What is scattered
        # over ranks shares its row with all objectives, and never does.
        batches: dict[tuple[int, int], list[int]] = {}
        for position, i in enumerate(indices):
            batches.setdefault((self.flat.on_host[i], row.written[i] and not scattered[i]), []).append(position)
        for (on_host, again), positions in batches.items():
            targets = [row.views[indices[at]] for at in positions]
            sources = [grads[at] for at in positions]
            if on_host:
                self._send(targets, sources, not again)
            else:
                write(targets, sources, 1.0, not again)
        for i in indices:
            row.written[i] = self.flat.landed[i] = 1

    def _send(self, targets: Sequence[Tensor], grads: Sequence[Tensor], fresh: bool) -> None:
        """Write gradients to a row on the host, beside what autograd goes on to do."""
        assert self._stream is not None
        for device in {grad.device for grad in grads}:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for target, grad in zip(targets, grads, strict=True):
                total = grad
                if not fresh:  # added up on the device: the host would have to wait to do it
                    total = target.to(grad.device, non_blocking=True).to(grad.dtype) + grad
                narrow = total.to(target.dtype)
                target.copy_(narrow, non_blocking=True)
                for tensor in (grad, total, narrow):
                    tensor.record_stream(self._stream)

    def collect(self) -> None:
        """A backward is done: store what is left of its gradients. With scattered blocks, a collective."""
        with self.flat.scattering(self._index, self.rows[0].views):
            super().collect()

    def withheld(self, grad: Tensor) -> Tensor:
        """As in `SharedDirection`."""
        return self.direction.withheld(grad)

    def flags(self) -> bytes:
        """As in `GradientStore`."""
        return union([row.written for row in self.rows])

    def wait(self) -> None:
        """Wait for the gradients that are on their way to the host."""
        if self._stream is not None:
            self._stream.synchronize()

    def complete(self) -> None:
        """Zero what this window did not write, and average over ranks what no engine averaged. A collective."""
        self.wait()
        for row in self.rows:
            row.zero_stale()
        if self.ranks is not None:
            average_rows(self.flat.blocks, self.ranks, [row.written for row in self.rows], self.device)

    def migrate(self, old: RowStore) -> None:
        """Take over the open window of `old`, for the parameters both have.

        Raises:
            RuntimeError: its rows are scattered over ranks.
        """
        places = places_in(self.parameters, old.direction)
        old.wait()
        for mine, its in zip(self.rows, old.rows, strict=True):
            mine.take_over(its, places)

    # what becomes of them

    def gram(self) -> Tensor:
        """As in `ComparableStore`."""
        if self._code is not None:
            gram: Tensor = self._code.gram_of_blocks(self.blocks)
            return gram
        return gram_of([(block.rows_now, block.share) for block in self.flat.blocks], self.device)

    def _local_sketches(self) -> Sketches:
        if self._sketches is None:
            self._sketches = RowSketches(self.flat.blocks, self.ranks, self.device)
        return self._sketches()

    def gram_by_parameter(self) -> Tensor:
        """This rank's part of the Gram matrix of each parameter's gradients, fp64 [P, K, K], on `device`.

        They sum to `gram`. One more pass over the rows.

        Raises:
            RuntimeError: rows are scattered over ranks in this window, so that pieces cut across parameters.
        """
        result = torch.zeros(len(self.parameters), self.n_rows, self.n_rows, dtype=torch.float64, device=self.device)
        for kind, block in zip(self.flat.layout.columns, self.flat.blocks, strict=True):
            if block.rows_now is not block.rows:
                raise RuntimeError(
                    "gram_by_parameter needs whole rows, and these are scattered over ranks: leave out "
                    "Rows(scatter=True), and let DDP reduce gradients instead of calling backward in no_sync()"
                )
            indices, boundaries = self.flat.layout.boundaries(kind)
            grams = torch.ops.mogeo.gram_by_segment(block.rows, boundaries)[:-1]
            result[torch.tensor(indices, device=self.device)] = grams.to(self.device) * block.share
        return result

    def combine(self, weights: Tensor) -> None:
        """Overwrite the direction with wᵀ rows, weights being fp64 [K]."""
        self._hand_on()
        for block in self.flat.blocks:
            block.combine(weights)

    def direct(self, weights: Tensor, gram: Tensor | None, max_norm: float | None, *, discard: bool) -> Any:
        """`combine`, clipped and measured on the device; see `mogeo.kernels.combine`.

        Args:
            weights: fp64 [K].
            gram: of the rows, fp64 [K, K], if there is one.
            max_norm: to clip to, if at all.
            discard: whether a direction that is not finite becomes zero.

        Returns:
            Squared norm, fp64 [], and clip factor, fp64 [].
        """
        assert self._code is not None
        self._hand_on()
        directions = [block.direction for block in self.flat.blocks]
        direction = self._code.direction_(
            self.blocks, weights, directions, gram=gram, max_norm=max_norm, discard=discard
        )
        if not discard:  # then weights may be NaN, and NaN · 0 stands where no gradient ever was
            self.direction.written_anywhere()
        return direction

    def poison(self) -> None:
        """Fill the direction with NaN, of all parameters that this window wrote to."""
        self.direction.poison()
        self.direction.row.written[:] = self.flags()

    def _hand_on(self) -> None:
        """The direction will hold what the rows hold: said before, lest an interrupt leave it unsaid."""
        self.direction.row.written[:] = self.flags()
        self.direction.row.dirty[:] = union([row.dirty for row in self.rows])

    def drop(self) -> None:
        """As in `GradientStore`."""
        for row in self.rows:
            row.drop()
        self.direction.drop()
