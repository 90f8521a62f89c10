"""GradientBuffers: one flat row per objective, [K, N] per (dtype, device), filled by autograd and handed out as
`p.grad`.

Knows parameters and autograd; no weighting and no optimizer. A window is what lies between two directions: `capturing`
and `select` fill rows (again and again under gradient accumulation), `settle` makes rows readable, `publish` hands row
0 out.

Capture by post-accumulate hooks: autograd finishes the gradient of one parameter, the hook moves it into its row and
drops it. So beside the rows never more than one parameter's gradient exists, and a row costs one copy of a gradient
still in cache; views preset as `p.grad` would cost a zeroed row and a read-modify-write of it instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mogeo import ops

_ALIGNMENT = 16  # bytes at which rows and parameters start, so that 128-bit loads hold


class GradientBuffers:
    """Rows of flattened gradients for a fixed list of parameters.

    Args:
        parameters: leaves that require grad, in the order of the optimizer's groups.
        n_rows: K.

    Attributes:
        blocks: one tensor [K, N_b] per (dtype, device) among the parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], n_rows: int) -> None:
        self.parameters = list(parameters)
        self.n_rows = n_rows
        self.signature = signature(parameters)
        self.blocks: list[Tensor] = []
        # views[k][i]: row k of parameter i, with the parameter's shape and strides
        self._views: list[list[Tensor]] = [[torch.empty(0)] * len(self.parameters) for _ in range(n_rows)]
        self._allocate()
        # Per row and parameter: written in this window; holding anything but zeros.
        self._written = [bytearray(len(self.parameters)) for _ in range(n_rows)]
        self._dirty = [bytearray(len(self.parameters)) for _ in range(n_rows)]
        self._row = 0

    def _allocate(self) -> None:
        offsets: dict[tuple[torch.dtype, torch.device], int] = {}
        places: list[int] = []
        for parameter in self.parameters:
            key = (parameter.dtype, parameter.device)
            places.append(offsets.setdefault(key, 0))
            quantum = max(1, _ALIGNMENT // parameter.element_size())
            offsets[key] += -(-parameter.numel() // quantum) * quantum
        blocks = {
            (dtype, device): torch.zeros(self.n_rows, columns, dtype=dtype, device=device)
            for (dtype, device), columns in offsets.items()
        }
        self.blocks = list(blocks.values())
        for i, (parameter, start) in enumerate(zip(self.parameters, places, strict=True)):
            block = blocks[parameter.dtype, parameter.device]
            for k in range(self.n_rows):
                self._views[k][i] = _strided_like(block[k, start : start + parameter.numel()], parameter)

    def migrate(self, old: GradientBuffers) -> None:
        """Take over the open window of `old`, for the parameters both have."""
        places = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        for k in range(self.n_rows):
            for j, parameter in enumerate(old.parameters):
                i = places.get(id(parameter))
                if i is not None and old._written[k][j] and old._views[k][j].shape == parameter.shape:
                    self._views[k][i].copy_(old._views[k][j])
                    self._written[k][i] = self._dirty[k][i] = 1

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within this context, gradients that autograd accumulates go to the selected row instead of `p.grad`.

        What `p.grad` held before comes back at the end.
        """
        held = [self._withhold(parameter) for parameter in self.parameters]
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._collect, i))  # type: ignore[no-untyped-call]
            for i, parameter in enumerate(self.parameters)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, grad in zip(self.parameters, held, strict=True):
                parameter.grad = grad

    def select(self, row: int) -> None:
        """Send gradients to this row from now on."""
        self._row = row

    def _withhold(self, parameter: Tensor) -> Tensor | None:
        grad = parameter.grad
        parameter.grad = None
        if grad is not None and grad.layout == torch.strided and self._owns(grad):
            return grad.clone()  # the last direction, not zeroed by the user: row 0 is about to be overwritten
        return grad

    def _owns(self, grad: Tensor) -> bool:
        storage = grad.untyped_storage().data_ptr()
        return any(storage == block.untyped_storage().data_ptr() for block in self.blocks)

    def _collect(self, index: int, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        parameter.grad = None
        grad = grad.detach()  # under create_graph=True it would drag its graph into the row
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        view = self._views[self._row][index]
        if self._written[self._row][index]:
            view.add_(grad)
        else:
            view.copy_(grad)
            self._written[self._row][index] = self._dirty[self._row][index] = 1

    def settle(self) -> None:
        """Zero what this window did not write: rows are then the gradients of this window, complete."""
        for views, written, dirty in zip(self._views, self._written, self._dirty, strict=True):
            if written == dirty:
                continue
            for i, stale in enumerate(dirty):
                if stale and not written[i]:
                    views[i].zero_()
                    dirty[i] = 0

    def gram(self, n_rows: int | None = None) -> Tensor:
        """G Gᵀ of the first `n_rows` rows (by default all), fp64 [n_rows, n_rows], on the first block's device."""
        device = self.blocks[0].device
        return torch.stack([ops.gram(block[:n_rows]).to(device) for block in self.blocks]).sum(0)

    def combine(self, weights: Tensor) -> None:
        """Overwrite row 0 with wᵀ rows, for weights of the first rows."""
        for block in self.blocks:
            ops.combine(block[: len(weights)], weights, out=block[0])
        for i in range(len(self.parameters)):
            self._dirty[0][i] = any(dirty[i] for dirty in self._dirty)

    def poison(self) -> None:
        """Overwrite row 0 with NaN. Not by NaN weights: they would reach the padding, which nothing ever zeroes."""
        for view in self._views[0]:
            view.fill_(torch.nan)
        self._dirty[0][:] = b"\1" * len(self.parameters)

    def publish(self) -> None:
        """Add row 0 to `p.grad` of every parameter that some row was written for, and close the window.

        `p.grad` then is a view of row 0: it lasts until the next window is filled. Other parameters keep theirs.
        """
        for i, parameter in enumerate(self.parameters):
            if not any(written[i] for written in self._written):
                continue
            view = self._views[0][i]
            if parameter.grad is not None:
                view.add_(parameter.grad)
            parameter.grad = view
        self.drop()

    def drop(self) -> None:
        """Close the window without handing anything out."""
        for written in self._written:
            written[:] = bytes(len(written))


def signature(parameters: Sequence[Tensor]) -> tuple[object, ...]:
    """What a layout depends on. Compare it only while the parameters are alive: it holds their ids."""
    return tuple((id(p), p.shape, p.stride(), p.dtype, p.device) for p in parameters)


def _strided_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` [n] as a view with the parameter's shape and, if those are dense, its strides.

    Fused optimizers walk parameter and gradient as flat memory and rely on equal strides (channels_last convolutions).
    """
    order = sorted(range(parameter.ndim), key=lambda dim: parameter.stride(dim), reverse=True)
    permuted = parameter.permute(order)
    if parameter.is_contiguous() or not permuted.is_contiguous():
        return flat.view(parameter.shape)
    return flat.view(permuted.shape).permute([order.index(dim) for dim in range(parameter.ndim)])
