"""Repeatable: a loss that can be evaluated again as it was the first time, and notices where it was not.

Knows random numbers, autocast and the buffers of modules; no gradients. Dropout draws the same masks, mixed precision
rounds the same way, a BatchNorm's statistics advance once, and whoever draws random numbers afterwards draws what they
would have drawn.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mogeo.losses.reachable import held_by

# How far apart two values of one loss may be, relative to it. Kernels that add in an order of their own, in half
# precision, are off by some 1e-4; another mini-batch by more than a percent.
_AGREEMENT = 2e-3


class _Autocast(NamedTuple):
    """As `torch.autocast` takes it."""

    device_type: str
    dtype: torch.dtype
    enabled: bool
    cache_enabled: bool


class Repeatable:
    """Wraps a callable loss; later calls see the random state, the autocast and the buffers of the first.

    Buffers are those of the modules that the callable holds (`mogeo.losses.reachable`), and, if none of these is
    compiled, of every other module that was called while it ran; with all modules within them. After a later call they
    hold again what they held before it.

    Args:
        name: of the objective, for the error.
        loss: returns a scalar tensor.
    """

    def __init__(self, name: str, loss: Callable[[], Tensor]) -> None:
        self._name = name
        self._loss = loss
        self._before: _Randomness | None = None
        self._autocasts: list[_Autocast] = []
        self._buffers: list[_Buffer] = []
        self._value = torch.empty(0)

    def __call__(self) -> Tensor:
        """The loss.

        Raises:
            RuntimeError: it is not what it was the first time.
        """
        if self._before is None:
            return self._first()
        with ExitStack() as stack:
            stack.enter_context(self._before.again())
            stack.enter_context(_restored(self._buffers))
            for autocast in self._autocasts:
                stack.enter_context(torch.autocast(**autocast._asdict()))
            loss = self._loss()
        self._compare(loss)
        return loss

    def _first(self) -> Tensor:
        self._before = _Randomness()
        self._autocasts = _autocasts(self._before.on_gpu)
        with _buffers_of_what_runs(self._loss) as self._buffers:
            loss = self._loss()
        if isinstance(loss, Tensor):
            self._value = loss.detach().clone()
        return loss

    def _compare(self, loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.numel() != 1:  # an error by itself, for whoever checks losses
            return
        before, now = float(self._value), float(loss.detach())
        if math.isclose(before, now, rel_tol=_AGREEMENT) or (math.isnan(before) and math.isnan(now)):
            return
        raise RuntimeError(
            f"the loss of objective {self._name!r} was {before:.6g}, and {now:.6g} when it was evaluated once more, as "
            "sketch= needs it: does its callable draw a batch, or random numbers from a generator of its own? Draw the "
            "batch before, and let the callable only compute; or hand over a loss tensor, or use memory=Rows()"
        )


class _Randomness:
    """The state of the generators that everybody shares: Python's, NumPy's, and torch's on the CPU and the GPU."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state() if self.on_gpu else None

    def _set(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within this context, random numbers are drawn as from here; afterwards as they would have been."""
        now = _Randomness()
        self._set()
        try:
            yield
        finally:
            now._set()


class _Buffer(NamedTuple):
    """A buffer of a module, and what it held. Nothing tells afterwards whether it was written to: BatchNorm's kernels
    leave the version counter of its statistics alone.
    """

    module: weakref.ref[nn.Module]
    name: str
    tensor: Tensor
    value: Tensor


@contextmanager
def _buffers_of_what_runs(function: Callable[[], Tensor]) -> Iterator[list[_Buffer]]:
    """Within this context, a list gathers the buffers of modules before they run.

    Those that the function holds are there from the beginning: a compiled one does not tell which modules it runs.
    A hook on all modules notices the others when they are called. There is none where the function holds a compiled
    module: under such a hook it would warn, and be compiled anew.
    """
    found: list[_Buffer] = []
    seen: set[nn.Module] = set()

    def before_forward(module: nn.Module, inputs: object) -> None:
        if torch.compiler.is_compiling() or module in seen:
            return
        gather(module)

    def gather(module: nn.Module) -> None:
        for inner in module.modules():
            if inner not in seen:
                seen.add(inner)
                reference = weakref.ref(inner)
                for name, tensor in inner._buffers.items():
                    if tensor is not None:
                        found.append(_Buffer(reference, name, tensor, tensor.detach().clone()))

    for held in held_by(function):
        if isinstance(held, nn.Module):
            gather(held)
    if any(hasattr(module, "_orig_mod") for module in seen):  # what `torch.compile` returns for a module
        yield found
        return
    # An interrupt may come before any line, that of a `finally` included. The hook is then removed with this object.
    watch = _Watch()
    unwatch = weakref.finalize(watch, register_module_forward_pre_hook(before_forward).remove)
    try:
        yield found
    finally:
        unwatch()


class _Watch:
    """Lives while modules are watched: `weakref.finalize` needs an object whose end it waits for."""


@contextmanager
def _restored(buffers: list[_Buffer]) -> Iterator[None]:
    """Within this context, modules have buffers of the values that they had; afterwards, the buffers they have now.

    Copies take their place, so that no buffer is written to which a graph has saved for its backward. Code that
    holds the buffers themselves, as compiled code does, still writes to them: their values are then put back, through
    `.data`, since autograd would otherwise refuse the backward of that graph.
    """
    originals = {id(buffer.tensor): buffer.tensor for buffer in buffers}
    values = {key: tensor.detach().clone() for key, tensor in originals.items()}
    copies = {id(buffer.tensor): buffer.value.clone() for buffer in buffers}  # one buffer may belong to two modules
    now: list[tuple[nn.Module, str, Tensor | None]] = []
    for buffer in buffers:
        module = buffer.module()
        if module is not None and buffer.name in module._buffers:
            now.append((module, buffer.name, module._buffers[buffer.name]))
            module._buffers[buffer.name] = copies[id(buffer.tensor)]
    try:
        yield
    finally:
        for module, name, tensor in now:
            module._buffers[name] = tensor
        for key, original in originals.items():
            if not torch.equal(original, values[key]):
                original.data.copy_(values[key])


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within this context nothing is computed in another precision than it asks for, whatever surrounds it."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _autocasts(on_gpu: bool) -> list[_Autocast]:
    return [
        _Autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()
        )
        for kind in (["cpu", "cuda"] if on_gpu else ["cpu"])
    ]
