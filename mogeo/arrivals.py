"""Arrivals: takes gradients out of `p.grad` in batches while a backward goes on, so that few of them wait at a time.

Knows parameters and autograd's hooks. What becomes of gradients is up to the owner, who also takes what is left once
the backward is done.

A hook in Python costs some microseconds, as much as autograd spends on the gradient of a small parameter. So only
large parameters have one: small ones weigh little together, and wait in `p.grad` for the end of the backward. Hooks are
registered once. They do nothing outside `taking`, and they are removed when their owner is gone.

A hook leaves the gradient it was called for in `p.grad`, and takes earlier ones. So hooks that a user registers on a
parameter, before ours or after them, find its gradient there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Bytes of gradients that may wait: a share of all, so that they stay small beside them, within bounds.
_SHARE = 32
_LEAST, _MOST = 1 << 20, 1 << 25

Take = Callable[[Sequence[int]], None]


def may_wait(total: int) -> int:
    """Bytes of gradients, of `total`, that wait in `p.grad` at most, beside the one that comes last."""
    return min(max(total // _SHARE, _LEAST), _MOST)


class Arrivals:
    """Hooks on the large ones among some parameters.

    Args:
        parameters: leaves.
        sizes: bytes of the gradient of each.
    """

    def __init__(self, parameters: Sequence[Tensor], sizes: Sequence[int]) -> None:
        # One half for small parameters, which have no hooks; the other for large ones between two batches.
        half = may_wait(sum(sizes)) // 2
        self._waiting = _Waiting(half)
        handles: list[Any] = []
        weakref.finalize(self, _remove, handles).atexit = False  # also where registering them is cut short
        together = 0
        for index in sorted(range(len(sizes)), key=sizes.__getitem__):
            together += sizes[index]
            if together > half and parameters[index].requires_grad:
                hook = partial(self._waiting.arrived, index, sizes[index])  # no reference to self, which must go
                handles.append(parameters[index].register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    @contextmanager
    def taking(self, take: Take) -> Iterator[None]:
        """Within this context, `take` is called with indices of parameters, ascending, whose gradients are to be taken.

        A gradient may be gone already. Call `done` after each backward.
        """
        self._waiting.take = take
        try:
            yield
        finally:
            self._waiting.take = None
            self.done()

    def done(self) -> set[int]:
        """A backward is done: the parameters for which `take` was called, and no other gradient announced since.

        Drop whatever `p.grad` they have by now: an engine wrote it. DDP on one process writes what it reduced.
        """
        taken, self._waiting.taken = self._waiting.taken, set()
        self._waiting.batches.clear()
        return taken


class _Waiting:
    """Gradients that hooks have announced and nobody has taken yet.

    Batches are kept apart by stream: on a GPU, a gradient is there only for what follows on the stream it was made on.
    """

    def __init__(self, most: int) -> None:
        self.take: Take | None = None
        self.batches: dict[tuple[int, int], tuple[list[int], int]] = {}
        self.taken: set[int] = set()
        self._most = most

    def arrived(self, index: int, size: int, parameter: Tensor) -> None:
        """The hook: a gradient of `size` bytes lies in `parameter.grad`."""
        if self.take is None:
            return
        self.taken.discard(index)
        place = (-1, 0)
        if parameter.is_cuda:
            stream = torch.cuda.current_stream(parameter.device)
            place = (parameter.get_device(), stream.cuda_stream)
        indices, total = self.batches.get(place, ([], 0))
        if indices and total + size > self._most:
            self.batches[place] = ([index], size)
            # A second gradient of the same parameter (reentrant checkpoints) is added to one that waits: leave both.
            others = sorted({*indices} - {index})
            self.take(others)
            self.taken.update(others)
        else:
            self.batches[place] = ([*indices, index], total + size)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
