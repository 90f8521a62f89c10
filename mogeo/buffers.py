"""GradientBuffers: one flat row per objective, [K, N] per (dtype, device), filled by autograd and handed out as
`p.grad`.

Knows parameters and autograd; no weighting and no optimizer. A window is what lies between two directions: `capturing`
and `select` fill rows (again and again under gradient accumulation), `settle` makes rows readable, `publish` hands row
0 out.

Capture by post-accumulate hooks: autograd finishes the gradient of one parameter, the hook moves it into its row and
drops it. So beside the rows never more than one parameter's gradient exists, and a row costs one copy of a gradient
still in cache; views preset as `p.grad` would cost a zeroed row and a read-modify-write of it instead.

With several ranks an engine reads `p.grad` after autograd and writes it again, so gradients are moved once a backward
is done (`collect`). A rank keeps its own part of a sharded parameter, and counts what others hold too by its share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo import ops
from mogeo.constants import constant_tensor
from mogeo.distributed import Ranks, gradient_of, is_sharded, like_parameter, local_of
from mogeo.shards import Shards

_ALIGNMENT = 16  # bytes at which parameters start, so that 128-bit loads hold
_ROW_QUANTUM = 16  # elements that the length of a row is a multiple of: Triton loads vectors only from such rows


class _Kind(NamedTuple):
    """What parameters of one block have in common."""

    dtype: torch.dtype  # of their gradients
    device: torch.device
    share: float  # with which this rank counts what it holds of them
    sharded: bool  # DTensors


class GradientBuffers:
    """Rows of flattened gradients for a fixed list of parameters.

    Args:
        parameters: leaves that require grad, in the order of the optimizer's groups.
        n_rows: K.
        ranks: the processes that hold the parameters between them, if there are several.
        shard_rows: reduce every gradient of plain parameters as soon as it is complete, and keep a piece of it per
            rank: N + K·N/ranks elements instead of K·N, beside the N that autograd makes.

    Attributes:
        blocks: one tensor [K, N_b] per (dtype, device, share) among the parameters.
        device: where the Gram and everything that follows from it lives: that of the first block.
        device_code: `mogeo.cuda` where a whole step is decided on the device, else None: the host decides.
    """

    def __init__(
        self, parameters: Sequence[Tensor], n_rows: int, ranks: Ranks | None = None, *, shard_rows: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self.n_rows = n_rows
        self.ranks = ranks
        self.shard_rows = shard_rows and ranks is not None
        self.signature = signature(parameters, n_rows)
        self.blocks: list[Tensor] = []
        # views[k][i]: row k of parameter i, with the parameter's shape and strides
        self._views: list[list[Tensor]] = [[torch.empty(0)] * len(self.parameters) for _ in range(n_rows)]
        self._allocate()
        self.device = self.blocks[0].device
        self.device_code = ops.device_code(self.blocks) if ranks is None else None
        # p.grad of each parameter, over row 0: built once, for a DTensor takes a while to make
        self._grads: list[Tensor | None] = [None] * len(self.parameters)
        # Per row and parameter: written in this window; holding anything but zeros.
        self._written = [bytearray(len(self.parameters)) for _ in range(n_rows)]
        self._dirty = [bytearray(len(self.parameters)) for _ in range(n_rows)]
        self._captured = bytearray(len(self.parameters))  # with shard_rows: what the row of all objectives holds
        self._row, self._weight = 0, 1.0

    def _allocate(self) -> None:
        offsets: dict[_Kind, int] = {}
        places: list[int] = []
        kinds = [self._kind_of(parameter) for parameter in self.parameters]
        for parameter, kind in zip(self.parameters, kinds, strict=True):
            places.append(offsets.setdefault(kind, 0))
            quantum = max(1, _ALIGNMENT // kind.dtype.itemsize)
            offsets[kind] += -(-local_of(parameter).numel() // quantum) * quantum
        quantum = _ROW_QUANTUM * (1 if self.ranks is None else self.ranks.size)  # pieces start aligned, too
        blocks = {
            kind: torch.zeros(
                1 if self.shard_rows and not kind.sharded else self.n_rows,
                -(-columns // quantum) * quantum,
                dtype=kind.dtype,
                device=kind.device,
            )
            for kind, columns in offsets.items()
        }
        self.blocks = list(blocks.values())
        self._kinds = list(blocks)
        self._shards: list[Shards | None] = [None] * len(self.blocks)
        if self.shard_rows and self.ranks is not None:
            for b, (block, kind) in enumerate(zip(self.blocks, self._kinds, strict=True)):
                if not kind.sharded:
                    self._shards[b] = Shards(self.n_rows, block.shape[1], block, self.ranks)
        ends = dict.fromkeys(blocks, 0)  # of the parameters placed so far
        gaps: dict[_Kind, list[Tensor]] = {kind: [] for kind in blocks}
        for i, (parameter, kind, start) in enumerate(zip(self.parameters, kinds, places, strict=True)):
            local = local_of(parameter)
            gaps[kind].append(torch.arange(ends[kind], start))
            ends[kind] = start + local.numel()
            for k in range(self.n_rows):
                row = blocks[kind][min(k, len(blocks[kind]) - 1)]
                self._views[k][i] = _strided_like(row[start : start + local.numel()], local)
        for kind, block in blocks.items():
            gaps[kind].append(torch.arange(ends[kind], block.shape[1]))
        self._padding = [torch.cat(places).to(kind.device) for kind, places in gaps.items()]

    def _kind_of(self, parameter: Tensor) -> _Kind:
        if not parameter.is_floating_point():
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}: gradients must be real floating "
                "point (view a complex parameter as real)"
            )
        share = 1.0 if self.ranks is None else self.ranks.share_of(parameter)
        return _Kind(_grad_dtype(parameter), parameter.device, share, is_sharded(parameter))

    def migrate(self, old: GradientBuffers) -> None:
        """Take over the open window of `old`, for the parameters both have.

        Raises:
            RuntimeError: its rows are shared out over ranks.
        """
        if old.shard_rows:
            raise RuntimeError(
                "the parameters changed between backward() and step(), and with shard_rows=True the gradients captured "
                "so far cannot move: change them after step() or zero_grad()"
            )
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
        held: list[tuple[Tensor, Tensor | None]] = []
        handles = []
        try:
            for parameter in self.parameters:
                held.append((parameter, parameter.grad))
                held[-1] = (parameter, self._withhold(parameter))
            for i, parameter in enumerate(self.parameters):
                if parameter.requires_grad and self.ranks is None:
                    hook = partial(self._take, i)
                    handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, grad in held:
                parameter.grad = grad

    def select(self, row: int, weight: float = 1.0) -> None:
        """Send gradients to this row from now on, multiplied by `weight`."""
        self._row, self._weight = row, weight

    def collect(self) -> None:
        """A backward is done: move its gradients to the selected row, where no hooks have done so.

        With `shard_rows` that row is the one that all objectives share, and is scattered at once: a collective.
        """
        if self.ranks is None:
            return
        captured = bytearray(len(self.parameters))
        for i, parameter in enumerate(self.parameters):
            captured[i] = self._collect(i, parameter)
        if self.shard_rows:
            for i, stale in enumerate(self._captured):
                if stale and not captured[i] and not is_sharded(self.parameters[i]):
                    self._views[0][i].zero_()  # left there by the objective before, or by the last direction
            self._captured = captured
            for block, shards in zip(self.blocks, self._shards, strict=True):
                if shards is not None:
                    shards.put(self._row, block[0])

    def _take(self, index: int, parameter: Tensor) -> None:
        self._collect(index, parameter)

    def _withhold(self, parameter: Tensor) -> Tensor | None:
        grad = parameter.grad
        parameter.grad = None
        if grad is not None and grad.layout == torch.strided and self._owns(grad):
            return grad.clone()  # the last direction, not zeroed by the user: row 0 is about to be overwritten
        return grad

    def _owns(self, grad: Tensor) -> bool:
        storage = local_of(grad).untyped_storage().data_ptr()
        return any(storage == block.untyped_storage().data_ptr() for block in self.blocks)

    def _collect(self, index: int, parameter: Tensor) -> bool:
        """Move a gradient to the selected row; returns whether there was one."""
        grad = parameter.grad
        if grad is None:
            return False
        parameter.grad = None
        if grad.requires_grad:  # under create_graph=True: its graph stays out of the row
            grad = grad.detach()
        grad = gradient_of(parameter, grad)
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        view = self._views[self._row][index]
        shared = self.shard_rows and not is_sharded(parameter)  # with all objectives, and scattered after each
        if self._written[self._row][index] and not shared:
            view.add_(grad, alpha=self._weight)
        else:
            view.copy_(grad) if self._weight == 1.0 else torch.mul(grad, self._weight, out=view)
            self._written[self._row][index] = 1
            self._dirty[self._row][index] = not shared
        return True

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
        """This rank's part of G Gᵀ of the first `n_rows` rows (by default all), fp64 [n_rows, n_rows], on `device`.

        With one process that is G Gᵀ; else the sum over ranks is.
        """
        if self.device_code is not None:
            gram: Tensor = self.device_code.gram_of_blocks([block[:n_rows] for block in self.blocks])
            return gram
        parts = [self._rows_of(b) for b in range(len(self.blocks))]
        return torch.stack([ops.gram(rows[:n_rows]).to(self.device) * share for rows, share in parts]).sum(0)

    def squared_norm(self) -> Tensor:
        """‖row 0‖² over all ranks, fp64 []."""
        squared_norm = self.gram(1).squeeze()
        return squared_norm if self.ranks is None else self.ranks.sum_(squared_norm)

    def average_replicas(self) -> None:
        """Average rows of plain parameters over ranks, unless they are the same on all: an engine did so already.

        An average that is averaged again stays, so it does not matter which of the backwards an engine reduced, or
        which micro-batches: none (`no_sync`), the first of several, or the last.
        """
        plain = [b for b, kind in enumerate(self._kinds) if not kind.sharded]
        if self.ranks is None or not plain:
            return
        if not self.shard_rows:
            if not self.ranks.differ(torch.cat([_fingerprint(self.blocks[b]).to(self.device) for b in plain])):
                return
            for b in plain:
                block = self.blocks[b]
                self._shards[b] = shards = self._shards[b] or Shards(len(block), block.shape[1], block, self.ranks)
                for k, row in enumerate(block):
                    shards.put(k, row)
        for shard in self._shards:
            if shard is not None:
                shard.settle()
        # A parameter that this rank did not touch, but another did, has a gradient now.
        written = torch.tensor([list(flags) for flags in self._written], dtype=torch.uint8, device=self.device)
        for flags, union in zip(self._written, self.ranks.max_(written).tolist(), strict=True):
            flags[:] = bytes(union)

    def _rows_of(self, block: int) -> tuple[Tensor, float]:
        """The rows that count now, [K, n], and with which share."""
        shards = self._shards[block]
        if shards is not None and shards.active:
            return shards.rows, 1.0
        return self.blocks[block], self._kinds[block].share

    def combine(self, weights: Tensor) -> None:
        """Overwrite row 0 with wᵀ rows, for weights of the first rows."""
        for b in range(len(self.blocks)):
            rows, _ = self._rows_of(b)
            ops.combine(rows[: len(weights)], weights, out=rows[0])
        self._mark_combined()

    def direct(self, weights: Tensor, gram: Tensor | None, max_norm: float | None, *, discard: bool) -> Any:
        """`combine`, clipped and measured on the device, for weights of all rows; see `mogeo.kernels.combine`.

        Returns:
            Its `Direction`: squared norm and clip factor.
        """
        assert self.device_code is not None
        direction = self.device_code.direction_(self.blocks, weights, gram=gram, max_norm=max_norm, discard=discard)
        self._mark_combined()
        if not discard:  # then weights may be NaN, and NaN · 0 stands where no gradient ever was
            self._dirty[0][:] = b"\1" * len(self.parameters)
            self._clean_padding()
        return direction

    def finish(self, squared_norm: Tensor, max_norm: float | None, *, discard: bool) -> Any:
        """Clip, or discard, what row 0 holds already, as `direct` does, from its squared norm, fp64 [1]."""
        assert self.device_code is not None
        parts = [block[0] for block in self.blocks]
        one = constant_tensor((1.0,), torch.float64, self.device)
        return self.device_code.finish_(parts, squared_norm, one, None, max_norm, discard=discard)

    def _mark_combined(self) -> None:
        self._dirty[0][:] = bytes(any(flags) for flags in zip(*self._dirty, strict=True))

    def _clean_padding(self) -> None:
        """Zero what lies between the parameters in row 0: a NaN there would outlast the step."""
        for block, padding in zip(self.blocks, self._padding, strict=True):
            if padding.numel():
                block[0].index_fill_(0, padding, 0.0)

    def poison(self) -> None:
        """Overwrite row 0 with NaN. Not by NaN weights: they would reach the padding, which nothing ever zeroes."""
        for shards in self._shards:
            if shards is not None:
                shards.active = False
        for view in self._views[0]:
            view.fill_(torch.nan)
        self._captured[:] = b"\1" * len(self.parameters)
        self._dirty[0][:] = b"\1" * len(self.parameters)

    def direction_overflowed(self) -> bool:
        """Whether finite fp16 rows were combined into something fp16 cannot hold, on any rank."""
        firsts = [self._rows_of(b)[0][0] for b, kind in enumerate(self._kinds) if kind.dtype == torch.float16]
        if not firsts:
            return False
        overflowed = any(not bool(row.isfinite().all()) for row in firsts)
        if self.ranks is not None:
            overflowed = bool(self.ranks.sum_(torch.tensor([float(overflowed)], device=self.device)))
        return overflowed

    def touched(self) -> set[Tensor]:
        """Parameters that some row was written for in this window."""
        return {p for p, *written in zip(self.parameters, *self._written, strict=True) if any(written)}

    def ranks_hint(self) -> str:
        """What else may be why sharded parameters have no gradient."""
        if not any(kind.sharded for kind in self._kinds):
            return ""
        return (
            " Or was set_requires_gradient_sync(False) called? FSDP2 then keeps gradients to itself, and adds them to "
            "those of the next objective: leave it on, and call backward() several times before step() to accumulate"
        )

    def publish(self) -> None:
        """Add row 0 to `p.grad` of every parameter that some row was written for, and close the window. A collective.

        `p.grad` then is a view of row 0: it lasts until the next window is filled. Other parameters keep theirs.
        """
        for block, shards in zip(self.blocks, self._shards, strict=True):
            if shards is not None and shards.active:
                shards.gather(block[0])
                self._captured[:] = b"\1" * len(self.parameters)
                self._dirty[0][:] = b"\1" * len(self.parameters)
        for i, (parameter, view, *written) in enumerate(
            zip(self.parameters, self._views[0], *self._written, strict=True)
        ):
            if not any(written):
                continue
            if parameter.grad is not None:
                view.add_(gradient_of(parameter, parameter.grad))
            if self._grads[i] is None:
                self._grads[i] = like_parameter(view, parameter)
            parameter.grad = self._grads[i]
        self.drop()

    def drop(self) -> None:
        """Close the window without handing anything out."""
        for written in self._written:
            written[:] = bytes(len(written))
        for shards in self._shards:
            if shards is not None:
                shards.drop()


def _fingerprint(block: Tensor) -> Tensor:
    """Sums over up to 256 parts of each row [K, N], fp64: replicas that differ have others. (Norms would not do: a pair
    of answers that two ranks see in opposite order gives g and −g.)
    """
    count, columns = block.shape
    if not columns:
        return torch.zeros(0, dtype=torch.float64, device=block.device)
    stretches = math.gcd(columns // _ROW_QUANTUM, 16)
    parts = block.view(count, stretches, -1, _ROW_QUANTUM)
    return parts.sum(2, dtype=torch.float64).flatten()


def signature(parameters: Sequence[Tensor], n_rows: int) -> tuple[object, ...]:
    """What a layout depends on. Compare it only while the parameters are alive: it holds their ids."""
    return (n_rows, *((id(p), local_of(p).shape, local_of(p).stride(), _grad_dtype(p), p.device) for p in parameters))


def _grad_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that autograd gives this parameter's gradient: from torch 2.10 on it may be chosen."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _strided_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` [n] as a view with the parameter's shape and, if those are dense, its strides.

    Fused optimizers walk parameter and gradient as flat memory and rely on equal strides (channels_last convolutions).
    """
    order = sorted(range(parameter.ndim), key=lambda dim: parameter.stride(dim), reverse=True)
    permuted = parameter.permute(order)
    if parameter.is_contiguous() or not permuted.is_contiguous():
        return flat.view(parameter.shape)
    return flat.view(permuted.shape).permute([order.index(dim) for dim in range(parameter.ndim)])
