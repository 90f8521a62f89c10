"""Catcher: takes the gradients that autograd accumulates out of `p.grad`, and hands them to a store.

Knows parameters and autograd; what becomes of a gradient is the store's business.

A gradient is taken once autograd has finished it, in batches: large ones while the backward goes on
(`mogeo.gradients.arrivals`), the rest when it is done (`collect`). So few exist beside what is kept, and keeping one
costs a copy. The other way would be to let autograd accumulate in views of the store; but it adds to what it finds, so
that each row would have to be zeroed first.

In a process group, be it of one process, an engine may read `p.grad` after autograd and write it again, so there all
gradients are taken once a backward is done. A rank keeps its own part of a sharded parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Protocol, cast

import torch
from torch import Tensor

from mogeo.gradients.arrivals import Arrivals
from mogeo.gradients.flat import grad_dtype
from mogeo.gradients.ranks import gradient_of, in_process_group, local_of

_GRAD, _LAYOUT = attrgetter("grad"), attrgetter("layout")


class Receiver(Protocol):
    """What a catcher asks of a store."""

    @property
    def store(self) -> Callable[[Sequence[int], list[Tensor]], None]:
        """Takes over gradients of the parameters at these indices, in ascending order: this rank's parts, dense."""

    @property
    def withheld(self) -> Callable[[Tensor], Tensor]:
        """What to put back as `p.grad` afterwards; a copy, if that memory is about to be overwritten."""


class Catcher:
    """Catches the gradients of a fixed list of parameters.

    Args:
        parameters: leaves in the order of the optimizer's groups, that require grad or did when a window began.
        hooks: whether large parameters get hooks. Without, gradients are taken at the end of a backward only.
    """

    def __init__(self, parameters: Sequence[Tensor], *, hooks: bool) -> None:
        self._parameters = list(parameters)
        sizes = [local_of(p).numel() * grad_dtype(p).itemsize for p in self._parameters]
        self._arrivals = Arrivals(self._parameters, sizes) if hooks else None
        # What `p.grad` was before, by index; None while nothing is caught. One assignment opens and closes it.
        self._held: dict[int, Tensor] | None = None

    def lacks_hooks(self) -> bool:
        """Whether a large parameter was frozen when hooks were registered, and no longer is."""
        return self._arrivals is not None and any(parameter.requires_grad for parameter in self._arrivals.skipped)

    @contextmanager
    def catching(self, receiver: Receiver) -> Iterator[None]:
        """Within this context, gradients that autograd accumulates are moved out of `p.grad`, to the receiver.

        Call `collect` after each backward. What `p.grad` held before comes back at the end.
        """
        held = {i: receiver.withheld(cast(Tensor, self._parameters[i].grad)) for i in self._with_gradient()}
        self._held = held
        try:
            for i in held:
                self._parameters[i].grad = None
            take = partial(self._take, receiver)
            with nullcontext() if self._arrivals is None or in_process_group() else self._arrivals.taking(take):
                yield
        except BaseException:
            self.abort()
            raise
        self._give_back()

    def abort(self) -> None:
        """Let `p.grad` be what it was before `catching`, if that was cut short. Else nothing happens."""
        if self._held is None:
            return
        if self._arrivals is not None:
            self._arrivals.stop()
        for i in self._with_gradient():
            self._parameters[i].grad = None
        self._give_back()

    def _give_back(self) -> None:
        for i, grad in (self._held or {}).items():
            self._parameters[i].grad = grad
        self._held = None

    def _with_gradient(self) -> list[int]:
        """Which parameters have a `p.grad`."""
        grads = list(map(_GRAD, self._parameters))
        if set(map(type, grads)) == {type(None)}:  # in bulk, as most often none has
            return []
        return [i for i, grad in enumerate(grads) if grad is not None]

    def collect(self, receiver: Receiver) -> None:
        """A backward is done: hand over its gradients, as far as that has not been done."""
        if self._arrivals is not None:
            self._arrivals.forget()
        self._take(receiver, range(len(self._parameters)))

    @torch.no_grad()
    def _take(self, receiver: Receiver, indices: Sequence[int]) -> None:
        """Hand over the gradients that some parameters have. Without autograd, since create_graph=True gives them
        graphs.
        """
        parameters = [self._parameters[i] for i in indices]
        grads = list(map(_GRAD, parameters))
        # In bulk, since most often all are there, and ordinary: asking each one costs as much as taking it.
        if set(map(type, grads)) != {Tensor} or set(map(_LAYOUT, grads)) != {torch.strided}:
            there = [at for at, grad in enumerate(grads) if grad is not None]
            indices, parameters = [indices[at] for at in there], [parameters[at] for at in there]
            grads = [_local_and_dense(p, grads[at]) for p, at in zip(parameters, there, strict=True)]
        for parameter in parameters:
            parameter.grad = None
        if grads:
            receiver.store(indices, grads)


def _local_and_dense(parameter: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of a gradient, dense."""
    grad = gradient_of(parameter, grad)
    return grad if grad.layout == torch.strided else grad.to_dense()
