"""GradientBuffers: one flat row per objective, [K, N] per (dtype, device), filled by autograd, and the direction, which
is handed out as `p.grad`.

Knows parameters and autograd; no weighting and no optimizer. A window is what lies between two directions: `capturing`
and `select` fill rows (again and again under gradient accumulation), `settle` makes rows readable, `combine` sums them
up in the direction, `publish` hands that out. Where weights are known beforehand, `select(None, weight)` sums
gradients in the direction as they come, and the rows stay as they are.

The direction lies over row 0, and so takes no memory, unless rows have another dtype or lie on another device than the
gradients. Of what several ranks hold, each counts its part by its share.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.geometry import ops
from mogeo.geometry.constants import constant_tensor
from mogeo.gradients.ranks import Ranks, gradient_of, is_sharded, like_parameter, local_of
from mogeo.gradients.row_pieces import Shards
from mogeo.gradients.store import Capture, grad_dtype

_ALIGNMENT = 16  # bytes at which parameters start, so that 128-bit loads hold
_STAGED = 1 << 24  # elements that move from the host at a time, where they are summed in another dtype than they have
_WIDE, _DTYPE = {torch.float32, torch.float64}, attrgetter("dtype")
_SMALL = 1 << 14  # elements of a tensor up to which what an operator costs is mostly its call
_ROW_QUANTUM = 16  # elements that the length of a row is a multiple of: Triton loads vectors only from such rows


class _Kind(NamedTuple):
    """What parameters of one block have in common."""

    dtype: torch.dtype  # of their gradients
    device: torch.device
    share: float  # with which this rank counts what it holds of them
    sharded: bool  # DTensors


class GradientBuffers(Capture):
    """Rows of flattened gradients for a fixed list of parameters.

    Args:
        parameters: leaves that require grad, in the order of the optimizer's groups.
        n_rows: K.
        ranks: the processes that hold the parameters between them, if there are several.
        shard_rows: reduce every gradient of plain parameters as soon as it is complete, and keep a piece of it per
            rank: N + K·N/ranks elements instead of K·N, beside the N that autograd makes.
        row_dtype: of the rows of wider gradients; None: that of the gradients.
        host_rows: keep rows in the host's memory: pinned, and filled while autograd goes on.

    Attributes:
        blocks: one tensor [K, N_b] per (dtype, device, share) among the parameters.
        summed: whether this window's gradients are summed in the direction, and the rows do not count.
        device: where the Gram and everything that follows from it lives: that of the first parameter.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        n_rows: int,
        ranks: Ranks | None = None,
        *,
        shard_rows: bool = False,
        row_dtype: torch.dtype | None = None,
        host_rows: bool = False,
    ) -> None:
        super().__init__(parameters, n_rows, ranks)
        self.shard_rows = shard_rows and ranks is not None
        self.blocks: list[Tensor] = []
        self._row_dtype, self._host_rows = row_dtype, host_rows
        self._allocate()
        self.device = self._directions[0].device
        # The rows that count in a window, row 0 and the direction being one where they share memory.
        self._rows = range(n_rows)
        self._direction = n_rows if self._apart else 0
        # p.grad of each parameter, over the direction: built once, for a DTensor takes a while to make
        self._grads: list[Tensor | None] = [None] * len(self.parameters)
        # Per row (and direction) and parameter: written in this window; holding anything but zeros.
        self._written = [bytearray(len(self.parameters)) for _ in self._views]
        self._dirty = [bytearray(len(self.parameters)) for _ in self._views]
        self._captured = bytearray(len(self.parameters))  # with shard_rows: what the row of all objectives holds
        self._row, self._weight, self.summed = 0, 1.0, False
        alone = ranks is None
        self._codes = [ops.device_code(blocks) if alone else None for blocks in (self.blocks, self._as_rows())]
        # Whose gradients are scattered over ranks, and whose move to the host, on a stream of their own.
        self._scattered = bytes(self._scatters(kind) for kind in self._kind_of_parameter)
        self._sent = bytes(view.device != p.device for p, view in zip(self.parameters, self._views[0], strict=True))
        # Neither: then gradients that come together are written together.
        self._moves_plainly = not (any(self._scattered) or any(self._sent))
        self._stream = torch.cuda.Stream(self.device) if any(self._sent) else None  # type: ignore[no-untyped-call]

    @property
    def device_code(self) -> ModuleType | None:
        """`mogeo.geometry.triton_backend` where a whole step is decided on the device, else None: the host decides."""
        return self._codes[self.summed]

    def _as_rows(self) -> list[Tensor]:
        """The direction as blocks of one row."""
        return [direction[None] for direction in self._directions]

    def _allocate(self) -> None:
        offsets: dict[_Kind, int] = {}
        places: list[int] = []
        kinds = [self._kind_of(parameter) for parameter in self.parameters]
        for parameter, kind in zip(self.parameters, kinds, strict=True):
            places.append(offsets.setdefault(kind, 0))
            quantum = max(1, _ALIGNMENT // kind.dtype.itemsize)
            offsets[kind] += -(-local_of(parameter).numel() // quantum) * quantum
        quantum = _ROW_QUANTUM * (1 if self.ranks is None else self.ranks.size)  # pieces start aligned, too
        columns = {kind: -(-n // quantum) * quantum for kind, n in offsets.items()}
        self._kinds, self._kind_of_parameter = list(columns), kinds
        # All or none, so that one set of flags tells what row 0 and the direction hold.
        self._apart = self.n_rows > 1 and any(self._place_of_rows(kind) != kind[:2] for kind in columns)
        blocks = {kind: self._rows_for(kind, n) for kind, n in columns.items()}
        self.blocks = list(blocks.values())
        directions = {
            kind: torch.zeros(n, dtype=kind.dtype, device=kind.device)
            if self._apart and not self._scatters(kind)
            else blocks[kind][0]
            for kind, n in columns.items()
        }
        self._directions = list(directions.values())
        self._shards: list[Shards | None] = [None] * len(self.blocks)
        for b, kind in enumerate(self._kinds):
            if self._scatters(kind):
                self._shards[b] = self._shards_for(b)
        ends = dict.fromkeys(columns, 0)  # of the parameters placed so far
        gaps: dict[_Kind, list[Tensor]] = {kind: [] for kind in columns}
        # views[k][i]: row k of parameter i, with the parameter's shape and strides; the direction last, if apart
        self._views: list[list[Tensor]] = [[] for _ in range(self.n_rows + self._apart)]
        for parameter, kind, start in zip(self.parameters, kinds, places, strict=True):
            local = local_of(parameter)
            gaps[kind].append(torch.arange(ends[kind], start))
            ends[kind] = start + local.numel()
            rows = [blocks[kind][min(k, len(blocks[kind]) - 1)] for k in range(self.n_rows)]
            for views, row in zip(self._views, [*rows, directions[kind]], strict=False):
                views.append(_strided_like(row[start : start + local.numel()], local))
        for kind, n in columns.items():
            gaps[kind].append(torch.arange(ends[kind], n))
        self._padding = [torch.cat(places).to(kind.device) for kind, places in gaps.items()]

    def _place_of_rows(self, kind: _Kind) -> tuple[torch.dtype, torch.device]:
        narrower = self._row_dtype is not None and self._row_dtype.itemsize < kind.dtype.itemsize
        dtype = self._row_dtype if narrower and self._row_dtype else kind.dtype
        return dtype, torch.device("cpu") if self._host_rows else kind.device

    def _scatters(self, kind: _Kind) -> bool:
        """Whether each gradient is scattered over the ranks as soon as it is complete."""
        return self.shard_rows and not kind.sharded

    def _rows_for(self, kind: _Kind, columns: int) -> Tensor:
        if not self._apart or self._scatters(kind):
            count = 1 if self._scatters(kind) else self.n_rows
            return torch.zeros(count, columns, dtype=kind.dtype, device=kind.device)
        dtype, device = self._place_of_rows(kind)
        pinned = device.type == "cpu" and kind.device.type == "cuda"
        return torch.zeros(self.n_rows, columns, dtype=dtype, device=device, pin_memory=pinned)

    def _shards_for(self, block: int) -> Shards:
        assert self.ranks is not None
        dtype, device = self._place_of_rows(self._kinds[block])
        return Shards(self.n_rows, self._directions[block], self.ranks, dtype, device)

    def _kind_of(self, parameter: Tensor) -> _Kind:
        if not parameter.is_floating_point():
            raise TypeError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}: gradients must be real floating "
                "point (view a complex parameter as real)"
            )
        share = 1.0 if self.ranks is None else self.ranks.share_of(parameter)
        return _Kind(grad_dtype(parameter), parameter.device, share, is_sharded(parameter))

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
        old.wait()
        self.summed = old.summed
        places = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        rows = [(old._direction, self._direction)] if old.summed else [(k, k) for k in self._rows]
        for source, target in rows:
            for j, parameter in enumerate(old.parameters):
                i = places.get(id(parameter))
                if i is not None and old._written[source][j] and old._views[source][j].shape == parameter.shape:
                    self._views[target][i].copy_(old._views[source][j])
                    self._written[target][i] = self._dirty[target][i] = 1

    def select(self, row: int | None, weight: float = 1.0) -> None:
        """Send gradients to this row from now on, multiplied by `weight`; None: to the direction, to be summed there.

        A window is of one sort or the other.
        """
        self.summed = row is None
        self._row, self._weight = self._direction if row is None else row, weight

    def collect(self) -> None:
        """A backward is done: move what is left of its gradients to the selected row.

        With `shard_rows` that row is the one that all objectives share, and is scattered at once: a collective.
        """
        before, self._captured = self._captured, bytearray(len(self.parameters))
        super().collect()
        if not self.shard_rows:
            return
        for i, stale in enumerate(before):
            if stale and not self._captured[i] and self._scattered[i]:
                self._views[0][i].zero_()  # left there by the objective before, or by the last direction
        for kind, direction, shards in zip(self._kinds, self._directions, self._shards, strict=True):
            if shards is not None and self._scatters(kind):
                shards.put(None if self.summed else self._row, direction)

    def withheld(self, grad: Tensor) -> Tensor:
        """A copy of the last direction, if the user has not zeroed it: it is about to be overwritten."""
        return grad.clone() if grad.layout == torch.strided and self._owns(grad) else grad

    def _owns(self, grad: Tensor) -> bool:
        storage = local_of(grad).untyped_storage().data_ptr()
        return any(storage == block.untyped_storage().data_ptr() for block in self._directions)

    def store(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Move gradients to the selected row; of weight 0 nowhere, so that they may hold NaN."""
        if self._weight == 0:
            return
        views, written, dirty = self._views[self._row], self._written[self._row], self._dirty[self._row]
        if self._moves_plainly and len(indices) == len(views) and (not any(written) or all(written)):  # as most often
            _write(views, grads, self._weight, fresh=not any(written))
            for flags in (written, dirty, self._captured):
                flags[:] = b"\1" * len(flags)
            return
        goes_to_host = self._sent if self._row != self._direction else bytes(len(self._sent))
        # By whether the row lies on the host, and whether it holds a gradient of this window already. What is scattered
        # over ranks shares its row with all objectives, and never does.
        batches: dict[tuple[int, int], list[int]] = {}
        for position, i in enumerate(indices):
            batches.setdefault((goes_to_host[i], written[i] and not self._scattered[i]), []).append(position)
        for (sent, again), positions in batches.items():
            targets = [views[indices[at]] for at in positions]
            sources = [grads[at] for at in positions]
            if sent:
                self._send(targets, sources, not again)
            else:
                _write(targets, sources, self._weight, not again)
        for i in indices:
            written[i] = self._captured[i] = 1
            dirty[i] = not self._scattered[i]

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

    def wait(self) -> None:
        """Wait for the rows that are on their way to the host."""
        if self._stream is not None:
            self._stream.synchronize()

    def settle(self) -> None:
        """Zero what this window did not write: what counts is then the gradients of this window, complete."""
        self.wait()
        for k in [self._direction] if self.summed else self._rows:
            views, written, dirty = self._views[k], self._written[k], self._dirty[k]
            if written == dirty:
                continue
            for i, stale in enumerate(dirty):
                if stale and not written[i]:
                    views[i].zero_()
                    dirty[i] = 0

    def gram(self) -> Tensor:
        """This rank's part of G Gᵀ of the rows, fp64 [K, K], on `device`.

        With one process that is G Gᵀ; else the sum over ranks is.
        """
        if self.device_code is not None:
            gram: Tensor = self.device_code.gram_of_blocks(self.blocks)
            return gram
        return self._sum_of_grams([(self._rows_of(b), self._share_of(b)) for b in range(len(self.blocks))])

    def squared_norm(self) -> Tensor:
        """‖direction‖² over all ranks, fp64 []."""
        if self.device_code is not None:
            squared_norm: Tensor = self.device_code.gram_of_blocks(self._as_rows()).squeeze()
            return squared_norm
        parts = [(self._direction_of(b)[None], self._share_of(b)) for b in range(len(self.blocks))]
        squared_norm = self._sum_of_grams(parts).squeeze()
        return squared_norm if self.ranks is None else self.ranks.sum_(squared_norm)

    def _sum_of_grams(self, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
        if len(parts) == 1 and parts[0][1] == 1.0:
            return ops.gram(parts[0][0]).to(self.device)
        return torch.stack([ops.gram(rows).to(self.device) * share for rows, share in parts]).sum(0)

    def average_replicas(self) -> None:
        """Average rows of plain parameters over ranks, unless they are the same on all: an engine did so already.

        An average that is averaged again stays, so it does not matter which of the backwards an engine reduced, or
        which micro-batches: none (`no_sync`), the first of several, or the last.
        """
        plain = [b for b, kind in enumerate(self._kinds) if not kind.sharded]
        if self.ranks is None or not plain:
            return
        if not self.shard_rows:
            counting = [self._directions[b][None] if self.summed else self.blocks[b] for b in plain]
            if not self.ranks.differ(torch.cat([_fingerprint(rows).to(self.device) for rows in counting])):
                return
            for b, rows in zip(plain, counting, strict=True):
                self._shards[b] = shards = self._shards[b] or self._shards_for(b)
                for k, row in enumerate(rows):
                    shards.put(None if self.summed else k, row)
        for shard in self._shards:
            if shard is not None and not self.summed:
                shard.settle()
        # A parameter that this rank did not touch, but another did, has a gradient now.
        written = torch.tensor([list(flags) for flags in self._written], dtype=torch.uint8, device=self.device)
        for flags, union in zip(self._written, self.ranks.max_(written).tolist(), strict=True):
            flags[:] = bytes(union)

    def _active(self, block: int) -> Shards | None:
        shards = self._shards[block]
        return shards if shards is not None and shards.active else None

    def _rows_of(self, block: int) -> Tensor:
        """The rows that count now, [K, n]."""
        shards = self._active(block)
        return self.blocks[block] if shards is None else shards.rows

    def _direction_of(self, block: int) -> Tensor:
        """Where the direction belongs now, [n]."""
        shards = self._active(block)
        return self._directions[block] if shards is None else shards.direction

    def _share_of(self, block: int) -> float:
        return self._kinds[block].share if self._active(block) is None else 1.0

    def combine(self, weights: Tensor) -> None:
        """Overwrite the direction with wᵀ rows."""
        for b in range(len(self.blocks)):
            rows, direction = self._rows_of(b), self._direction_of(b)
            if rows.device == direction.device:
                ops.combine(rows, weights, out=direction)
            else:
                _combine_from_host(rows, weights, direction)
        self._mark_combined()

    def scale(self, factor: Tensor) -> None:
        """Multiply the direction by a factor, fp64 []; by 0 even where it is not finite."""
        for b in range(len(self.blocks)):
            direction = self._direction_of(b)
            ops.combine(direction[None], factor[None], out=direction)

    def direct(self, weights: Tensor, gram: Tensor | None, max_norm: float | None, *, discard: bool) -> Any:
        """`combine`, clipped and measured on the device; see `mogeo.kernels.combine`.

        Returns:
            Its `Direction`: squared norm and clip factor.
        """
        assert self.device_code is not None
        direction = self.device_code.direction_(
            self.blocks, weights, self._directions, gram=gram, max_norm=max_norm, discard=discard
        )
        self._mark_combined()
        if not discard:  # then weights may be NaN, and NaN · 0 stands where no gradient ever was
            self._dirty[self._direction][:] = b"\1" * len(self.parameters)
            self._clean_padding()
        return direction

    def finish(self, squared_norm: Tensor, max_norm: float | None, *, discard: bool) -> Any:
        """Clip, or discard, what the direction holds already, as `direct` does, from its squared norm, fp64 [1]."""
        assert self.device_code is not None
        one = constant_tensor((1.0,), torch.float64, self.device)
        return self.device_code.finish_(self._directions, squared_norm, one, None, max_norm, discard=discard)

    def _mark_combined(self) -> None:
        self._dirty[self._direction][:] = _union([self._dirty[k] for k in self._rows])

    def _clean_padding(self) -> None:
        """Zero what lies between the parameters in the direction: a NaN there would outlast the step."""
        for direction, padding in zip(self._directions, self._padding, strict=True):
            if padding.numel():
                direction.index_fill_(0, padding, 0.0)

    def poison(self) -> None:
        """Fill the direction with NaN. Not by NaN weights: they would reach the padding, which nothing ever zeroes."""
        for shards in self._shards:
            if shards is not None:
                shards.active = False
        for view in self._views[self._direction]:
            view.fill_(torch.nan)
        self._captured[:] = b"\1" * len(self.parameters)
        self._dirty[self._direction][:] = b"\1" * len(self.parameters)

    def direction_overflowed(self) -> bool:
        """Whether finite fp16 rows were combined into something fp16 cannot hold, on any rank."""
        halves = [self._direction_of(b) for b, kind in enumerate(self._kinds) if kind.dtype == torch.float16]
        if not halves:
            return False
        overflowed = any(not bool(direction.isfinite().all()) for direction in halves)
        if self.ranks is not None:
            overflowed = bool(self.ranks.sum_(torch.tensor([float(overflowed)], device=self.device)))
        return overflowed

    def flags(self) -> bytes:
        """A byte per parameter: 1 where some row was written for it in this window."""
        return _union(self._written)

    def publish(self) -> None:
        """Add the direction to `p.grad` of every parameter that something was written for, and close the window. A
        collective.

        `p.grad` then is a view of the direction: it lasts until the next window. Other parameters keep theirs.
        """
        for direction, shards in zip(self._directions, self._shards, strict=True):
            if shards is not None and shards.active:
                shards.gather(direction)
                self._captured[:] = b"\1" * len(self.parameters)
                self._dirty[self._direction][:] = b"\1" * len(self.parameters)
        views, grads = self._views[self._direction], self._grads
        for i, (parameter, flag) in enumerate(zip(self.parameters, self.flags(), strict=True)):
            if not flag:
                continue
            if parameter.grad is not None:
                views[i].add_(gradient_of(parameter, parameter.grad))
            if grads[i] is None:
                grads[i] = like_parameter(views[i], parameter)
            parameter.grad = grads[i]
        self.drop()

    def without_rows(self) -> GradientBuffers:
        """Buffers that hold the published direction, and `p.grad` with it, but no other row. Drop these then."""
        lean = GradientBuffers(self.parameters, 1, self.ranks, shard_rows=self.shard_rows)
        for mine, its in zip(self._directions, lean._directions, strict=True):
            its.copy_(mine)
        lean._dirty[0][:] = self._dirty[self._direction]
        lean._captured[:] = self._captured
        for i, (parameter, view, grad) in enumerate(zip(self.parameters, lean._views[0], self._grads, strict=True)):
            if grad is not None and parameter.grad is grad:
                parameter.grad = lean._grads[i] = like_parameter(view, parameter)
        return lean

    def drop(self) -> None:
        """Close the window without handing anything out."""
        for written in self._written:
            written[:] = bytes(len(written))
        for shards in self._shards:
            if shards is not None:
                shards.drop()
        self.summed = False


def _union(flags: Sequence[bytearray]) -> bytes:
    """1 where any of the flags is."""
    total = functools.reduce(operator.or_, (int.from_bytes(each, "little") for each in flags))
    return total.to_bytes(len(flags[0]), "little")


def _write(targets: list[Tensor], grads: list[Tensor], weight: float, fresh: bool) -> None:
    """Write weighted gradients, or add them to what is there. Weights keep all their digits, whatever the dtype."""
    if weight == 1.0:
        (torch._foreach_copy_ if fresh else torch._foreach_add_)(targets, grads)
        return
    # A GPU adds a multiple in fp32. A CPU rounds the factor first where the dtype is half precision: 0.2 % off.
    exact = not targets[0].is_cpu or _WIDE.issuperset(map(_DTYPE, targets))
    if fresh:
        small = []
        for at, target in enumerate(targets):
            if exact and target.numel() <= _SMALL:
                small.append(at)
            else:
                torch.mul(grads[at], weight, out=target)
        if small:  # for these, two calls in all cost less than one call each
            targets, grads = [targets[at] for at in small], [grads[at] for at in small]
            torch._foreach_zero_(targets)
            torch._foreach_add_(targets, grads, alpha=weight)
    elif exact:
        torch._foreach_add_(targets, grads, alpha=weight)
    else:
        for target, grad in zip(targets, grads, strict=True):
            wide = torch.promote_types(target.dtype, torch.float32)
            target.copy_(target.to(wide, copy=True).add_(grad, alpha=weight))


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


def _fingerprint(block: Tensor) -> Tensor:
    """Sums over up to 256 parts of each row [K, N], fp64: replicas that differ have others. (Norms would not do: a pair
    of answers that two ranks see in opposite order gives g and −g.)
    """
    count, columns = block.shape
    if not columns:
        return torch.zeros(0, dtype=torch.float64, device=block.device)
    stretches = math.gcd(columns // _ROW_QUANTUM, 16)
    parts = block.view(count, stretches, -1, _ROW_QUANTUM)
    # Row by row: on a CPU, torch copies what it sums to the dtype of the sum.
    return torch.stack([row.sum(1, dtype=torch.float64) for row in parts]).flatten()


def _strided_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` [n] as a view with the parameter's shape and, if those are dense, its strides.

    Fused optimizers walk parameter and gradient as flat memory and rely on equal strides (channels_last convolutions).
    """
    order = sorted(range(parameter.ndim), key=lambda dim: parameter.stride(dim), reverse=True)
    permuted = parameter.permute(order)
    if parameter.is_contiguous() or not permuted.is_contiguous():
        return flat.view(parameter.shape)
    return flat.view(permuted.shape).permute([order.index(dim) for dim in range(parameter.ndim)])
