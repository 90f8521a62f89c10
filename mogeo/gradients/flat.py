"""Flat memory: which parameter's gradient lies where in the rows. Knows shapes, strides and blocks; no autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mogeo.gradients.blocks import Kind, blocks_for
from mogeo.gradients.memory import Rows
from mogeo.gradients.ranks import Ranks, is_sharded, local_of, part_of

_ALIGNMENT = 16  # bytes at which parameters start, so that 128-bit loads hold
ROW_QUANTUM = 16  # elements that the length of a row is a multiple of: Triton loads vectors only from such rows

Facts = tuple[list[Any], ...]


class FlatLayout:
    """Places for the gradients of some parameters, one after another, in one flat vector for each kind of them.

    Args:
        parameters: leaves, in the order of the optimizer's groups.
        ranks: the processes that hold the parameters between them, if there are several.

    Attributes:
        kinds: of each parameter.
        columns: for each kind, the length of its vector.
    """

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks | None) -> None:
        self._parameters = list(parameters)
        self.kinds = [_kind_of(parameter, ranks) for parameter in parameters]
        ends: dict[Kind, int] = {}
        self._starts: list[int] = []
        for parameter, kind in zip(parameters, self.kinds, strict=True):
            self._starts.append(ends.setdefault(kind, 0))
            quantum = max(1, _ALIGNMENT // kind.dtype.itemsize)
            ends[kind] += -(-local_of(parameter).numel() // quantum) * quantum
        quantum = ROW_QUANTUM * (1 if ranks is None else ranks.size)  # so that pieces start aligned, too
        self.columns = {kind: -(-n // quantum) * quantum for kind, n in ends.items()}

    def views(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Views of flat vectors, one vector for each kind, in the order of `columns`.

        There is a view per parameter, with its shape and strides.

        Of a DTensor's gradient, the part that this rank holds.
        """
        by_kind = dict(zip(self.columns, vectors, strict=True))
        views = []
        for parameter, kind, start in zip(self._parameters, self.kinds, self._starts, strict=True):
            local = local_of(parameter)
            views.append(_strided_like(by_kind[kind][start : start + local.numel()], local))
        return views

    def boundaries(self, kind: Kind) -> tuple[list[int], list[int]]:
        """Indices of the parameters of a kind, P of them, and the columns b_0 = 0 ≤ … ≤ b_P = n where they lie.

        What lies between two parameters counts to the one before it.
        """
        indices = [i for i, each in enumerate(self.kinds) if each == kind]
        return indices, [*(self._starts[i] for i in indices), self.columns[kind]]

    def padding(self) -> list[Tensor]:
        """For each kind, indices of what lies between parameters and behind the last one, int64, on its device."""
        ends = dict.fromkeys(self.columns, 0)
        gaps: dict[Kind, list[Tensor]] = {kind: [] for kind in self.columns}
        for parameter, kind, start in zip(self._parameters, self.kinds, self._starts, strict=True):
            gaps[kind].append(torch.arange(ends[kind], start))
            ends[kind] = start + local_of(parameter).numel()
        for kind, n in self.columns.items():
            gaps[kind].append(torch.arange(ends[kind], n))
        return [torch.cat(indices).to(kind.device) for kind, indices in gaps.items()]


def _kind_of(parameter: Tensor, ranks: Ranks | None) -> Kind:
    if not parameter.is_floating_point():
        raise TypeError(
            f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}: gradients must be real floating "
            "point (view a complex parameter as real)"
        )
    share = 1.0 if ranks is None else ranks.share_of(parameter)
    return Kind(grad_dtype(parameter), parameter.device, share, is_sharded(parameter), *part_of(parameter))


def _strided_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """`flat` [n] as a view with the parameter's shape and, if those are dense, its strides.

    Fused optimizers walk parameter and gradient as flat memory and rely on equal strides (channels_last convolutions).
    """
    order = sorted(range(parameter.ndim), key=lambda dim: parameter.stride(dim), reverse=True)
    permuted = parameter.permute(order)
    if parameter.is_contiguous() or not permuted.is_contiguous():
        return flat.view(parameter.shape)
    return flat.view(permuted.shape).permute([order.index(dim) for dim in range(parameter.ndim)])


# One list for each, not a tuple for each parameter: to make thousands of tuples costs more than to ask.
_FACTS = [attrgetter(name) for name in ("shape", "dtype", "device", "grad_dtype") if hasattr(Tensor, name)]


def facts_of(parameters: Sequence[Tensor]) -> Facts:
    """Identity, shape, strides, dtypes and device of parameters: what memory for their gradients depends on.

    Compare it only while the parameters are alive: it holds their ids.
    """
    shards = [local_of(parameter) for parameter in parameters if is_sharded(parameter)]
    return (
        list(map(id, parameters)),
        list(map(Tensor.stride, parameters)),
        [(shard.shape, shard.stride()) for shard in shards],
        *(list(map(fact, parameters)) for fact in _FACTS),
    )


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that autograd gives this parameter's gradient: from torch 2.10 on it may be chosen."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


class FlatMemory:
    """Blocks for the gradients of some parameters.

    Args:
        parameters: leaves, in the order of the optimizer's groups.
        n_rows: K; 1 for a direction alone.
        ranks: the processes that hold the parameters between them, if there are several.
        memory: how rows are kept.

    Attributes:
        layout: which parameter's gradient lies where.
        blocks: one for each kind of parameters.
        scattered: a byte per parameter: 1 where each objective's gradient is scattered over ranks at once.
        on_host: a byte per parameter: 1 where its rows lie on the host, and its gradients do not.
        landed: a byte per parameter: 1 where the row that all objectives share holds a gradient, or the direction.
        scatters: whether any block is scattered.
    """

    def __init__(self, parameters: Sequence[Tensor], n_rows: int, ranks: Ranks | None, memory: Rows) -> None:
        self.layout = FlatLayout(parameters, ranks)
        self.blocks = blocks_for(self.layout.columns, n_rows, ranks, memory)
        of_kind = dict(zip(self.layout.columns, self.blocks, strict=True))
        self.scattered = bytes(of_kind[kind].scattered for kind in self.layout.kinds)
        self.on_host = bytes(of_kind[kind].on_host for kind in self.layout.kinds)
        self.landed = bytearray(len(self.layout.kinds))
        self.scatters = any(self.scattered)
        #: Whether the direction lies over row 0. Scattered blocks have a way of their own.
        self.shares_row_0 = all(block.shares_row_0 or block.scattered for block in self.blocks)

    @contextmanager
    def scattering(self, row: int | None, views: Sequence[Tensor]) -> Iterator[None]:
        """Store the gradients of one objective's backward within this context.

        At its end, those in scattered blocks are averaged over ranks, and each rank keeps a piece: a collective.
        Without such blocks nothing happens.

        Args:
            row: of the objective; None for the direction.
            views: of the row that all objectives share, one per parameter.
        """
        if not self.scatters:
            yield
            return
        before = bytes(self.landed)
        self.landed[:] = bytes(len(before))
        yield
        for i, stale in enumerate(before):
            if stale and not self.landed[i] and self.scattered[i]:
                views[i].zero_()  # left there by the objective before, or by the last direction
        for block in self.blocks:
            if block.scattered:
                block.average(row, block.direction)
