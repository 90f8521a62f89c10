"""Capture: catches the gradients that autograd accumulates, before they stay in `p.grad`.

Knows parameters and autograd. What becomes of a gradient, a subclass says: `mogeo.gradients.rows` keeps it whole,
`mogeo.gradients.sketches` a sketch of it.

A gradient is taken out of `p.grad` once autograd has finished it, in batches: large ones while the backward goes on
(`mogeo.gradients.arrivals`), the rest when it is done (`collect`). So few exist beside what is kept, and keeping one
costs a copy. Had autograd views of the row as `p.grad` beforehand, it would add to them, and the row would have to be
zeroed.

In a process group, be it of one process, an engine may read `p.grad` after autograd and write it again, so there all
gradients are taken once a backward is done. A rank keeps its own part of a sharded parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from mogeo.gradients.arrivals import Arrivals
from mogeo.gradients.ranks import Ranks, gradient_of, in_process_group, is_sharded, local_of

Layout = tuple[list[Any], ...]


class Capture:
    """Gradients of a fixed list of parameters, on their way to a row.

    Args:
        parameters: leaves in the order of the optimizer's groups, that require grad or did when a window began.
        n_rows: K.
        ranks: the processes that hold the parameters between them, if there are several.
    """

    device: torch.device

    def __init__(self, parameters: Sequence[Tensor], n_rows: int, ranks: Ranks | None = None) -> None:
        self.parameters = list(parameters)
        self.n_rows = n_rows
        self.ranks = ranks
        self._layout = layout_of(self.parameters)
        sizes = [local_of(p).numel() * grad_dtype(p).itemsize for p in self.parameters]
        self._arrivals = Arrivals(self.parameters, sizes) if ranks is None else None

    def suits(self, n_rows: int, layout: Layout) -> bool:
        """Whether this was made for so many rows, and for parameters of this layout."""
        return n_rows == self.n_rows and layout == self._layout

    def lacks_hooks(self) -> bool:
        """Whether a large parameter was frozen when this was made, and no longer is."""
        return self._arrivals is not None and any(parameter.requires_grad for parameter in self._arrivals.skipped)

    @property
    def sharded(self) -> bool:
        """Whether some parameters are held in shards by several ranks."""
        return any(map(is_sharded, self.parameters))

    @property
    def device_code(self) -> ModuleType | None:
        """`mogeo.geometry.triton_backend` where a whole step is decided on the device, else None: the host decides."""
        return None

    def select(self, row: int | None, weight: float = 1.0) -> None:
        """Send gradients to this row from now on."""
        raise NotImplementedError

    def store(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Take over gradients of the parameters at `indices`, in ascending order: this rank's parts, dense.

        Called without autograd, since gradients may have graphs of their own (create_graph=True).
        """
        raise NotImplementedError

    def average_replicas(self) -> None:
        """Average what stands for plain parameters over ranks, unless an engine did so already."""

    def gram(self) -> Tensor:
        """This rank's part of the Gram matrix, fp64 [K, K], on `device`."""
        raise NotImplementedError

    def touched(self) -> list[Tensor]:
        """Parameters that had a gradient in this window."""
        return [parameter for parameter, flag in zip(self.parameters, self.flags(), strict=True) if flag]

    def flags(self) -> bytes:
        """A byte per parameter: 1 where it had a gradient in this window."""
        raise NotImplementedError

    def drop(self) -> None:
        """Close the window."""
        raise NotImplementedError

    def withheld(self, grad: Tensor) -> Tensor:
        """What to put back as `p.grad` after capturing; a copy, if that memory is about to be overwritten."""
        return grad

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within this context, gradients that autograd accumulates are moved out of `p.grad`, and stored.

        Call `collect` after each backward. What `p.grad` held before comes back at the end.
        """
        held: dict[int, Tensor] = {}
        try:
            for i in self._with_gradient():
                held[i] = cast(Tensor, self.parameters[i].grad)
                held[i] = self.withheld(held[i])
                self.parameters[i].grad = None
            with nullcontext() if self._arrivals is None or in_process_group() else self._arrivals.taking(self._take):
                yield
        except BaseException:
            for i in self._with_gradient():
                self.parameters[i].grad = None
            raise
        finally:
            for i, grad in held.items():
                self.parameters[i].grad = grad

    def _with_gradient(self) -> list[int]:
        """Which parameters have a `p.grad`."""
        grads = list(map(_GRAD, self.parameters))
        if set(map(type, grads)) == {type(None)}:  # in bulk, as most often none has
            return []
        return [i for i, grad in enumerate(grads) if grad is not None]

    def collect(self) -> None:
        """A backward is done: store its gradients, as far as that has not been done."""
        if self._arrivals is not None:
            self._arrivals.forget()
        self._take(range(len(self.parameters)))

    @torch.no_grad()
    def _take(self, indices: Sequence[int]) -> None:
        """Store the gradients that some parameters have."""
        parameters = [self.parameters[i] for i in indices]
        grads = list(map(_GRAD, parameters))
        # In bulk, since most often all are there, and ordinary: asking each one costs as much as taking it.
        if set(map(type, grads)) != {Tensor} or set(map(_LAYOUT, grads)) != {torch.strided}:
            there = [at for at, grad in enumerate(grads) if grad is not None]
            indices, parameters = [indices[at] for at in there], [parameters[at] for at in there]
            grads = [_local_and_dense(p, grads[at]) for p, at in zip(parameters, there, strict=True)]
        for parameter in parameters:
            parameter.grad = None
        if grads:
            self.store(indices, grads)

    def ranks_hint(self) -> str:
        """What else may be why sharded parameters have no gradient."""
        if not self.sharded:
            return ""
        return (
            " Or was set_requires_gradient_sync(False) called? FSDP2 then keeps gradients to itself, and adds them to "
            "those of the next objective: leave it on, and call backward() several times before step() to accumulate"
        )


def _local_and_dense(parameter: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of a gradient, dense."""
    grad = gradient_of(parameter, grad)
    return grad if grad.layout == torch.strided else grad.to_dense()


_GRAD, _LAYOUT = attrgetter("grad"), attrgetter("layout")
# One list for each, not a tuple for each parameter: to make thousands of tuples costs more than to ask.
_FACTS = [attrgetter(name) for name in ("shape", "dtype", "device", "grad_dtype") if hasattr(Tensor, name)]


def layout_of(parameters: Sequence[Tensor]) -> Layout:
    """Identity, shape, strides, dtypes and device of parameters: what buffers for their gradients depend on.

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
