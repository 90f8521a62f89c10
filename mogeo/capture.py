"""Capture: catches the gradients that autograd accumulates, before they stay in `p.grad`.

Knows parameters and autograd. What becomes of a gradient, a subclass says: `mogeo.buffers` keeps it whole,
`mogeo.sketched` a sketch of it.

Capture by post-accumulate hooks: autograd finishes the gradient of one parameter, the hook hands it on and drops it. So
never more than one parameter's gradient exists beside what is kept, and keeping a row costs one copy of a gradient
still in cache; views preset as `p.grad` would cost a zeroed row and a read-modify-write of it instead.

With several ranks an engine reads `p.grad` after autograd and writes it again, so gradients are taken once a backward
is done (`collect`). A rank keeps its own part of a sharded parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from mogeo.distributed import Ranks, gradient_of, is_sharded, local_of


class Capture:
    """Gradients of a fixed list of parameters, on their way to a row.

    Args:
        parameters: leaves that require grad, in the order of the optimizer's groups.
        ranks: the processes that hold the parameters between them, if there are several.
    """

    device: torch.device
    #: What the layout depends on: see `signature`.
    signature: tuple[object, ...]

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks | None = None) -> None:
        self.parameters = list(parameters)
        self.ranks = ranks

    @property
    def sharded(self) -> bool:
        """Whether some parameters are held in shards by several ranks."""
        return any(map(is_sharded, self.parameters))

    @property
    def device_code(self) -> ModuleType | None:
        """`mogeo.cuda` where a whole step is decided on the device, else None: the host decides."""
        return None

    def select(self, row: int | None, weight: float = 1.0) -> None:
        """Send gradients to this row from now on."""
        raise NotImplementedError

    def store(self, index: int, grad: Tensor) -> None:
        """Take over the gradient of parameter `index`: this rank's part, dense, without a graph."""
        raise NotImplementedError

    def average_replicas(self) -> None:
        """Average what stands for plain parameters over ranks, unless an engine did so already."""

    def gram(self) -> Tensor:
        """This rank's part of the Gram matrix, fp64 [K, K], on `device`."""
        raise NotImplementedError

    def touched(self) -> set[Tensor]:
        """Parameters that had a gradient in this window."""
        raise NotImplementedError

    def drop(self) -> None:
        """Close the window."""
        raise NotImplementedError

    def withheld(self, grad: Tensor) -> Tensor:
        """What to put back as `p.grad` after capturing; a copy, if that memory is about to be overwritten."""
        return grad

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within this context, gradients that autograd accumulates are stored instead of left in `p.grad`.

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

    def _withhold(self, parameter: Tensor) -> Tensor | None:
        grad = parameter.grad
        parameter.grad = None
        return grad if grad is None else self.withheld(grad)

    def collect(self) -> None:
        """A backward is done: store its gradients, where no hooks have done so."""
        if self.ranks is not None:
            for i, parameter in enumerate(self.parameters):
                self._take(i, parameter)

    def _take(self, index: int, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        parameter.grad = None
        if grad.requires_grad:  # under create_graph=True: its graph stays out of the row
            grad = grad.detach()
        grad = gradient_of(parameter, grad)
        self.store(index, grad if grad.layout == torch.strided else grad.to_dense())

    def ranks_hint(self) -> str:
        """What else may be why sharded parameters have no gradient."""
        if not self.sharded:
            return ""
        return (
            " Or was set_requires_gradient_sync(False) called? FSDP2 then keeps gradients to itself, and adds them to "
            "those of the next objective: leave it on, and call backward() several times before step() to accumulate"
        )


def signature(parameters: Sequence[Tensor], n_rows: int) -> tuple[object, ...]:
    """What a layout depends on. Compare it only while the parameters are alive: it holds their ids."""
    return (n_rows, *((id(p), local_of(p).shape, local_of(p).stride(), grad_dtype(p), p.device) for p in parameters))


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that autograd gives this parameter's gradient: from torch 2.10 on it may be chosen."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
