"""Arrivals: takes gradients out of `p.grad` in batches while a backward goes on, so that few of them wait at a time.

Knows parameters and autograd's hooks. What becomes of gradients is up to the owner, who also takes what is left once
the backward is done.

A hook in Python costs some microseconds, as much as autograd spends on the gradient of a small parameter. So only
large parameters have one: small ones weigh little together, and wait in `p.grad` for the end of the backward. Hooks are
registered once. They do nothing outside `taking`, and they are removed when their owner is gone.

A hook never takes the gradient that it was called for: that one waits until more have come than may wait. So a hook of
the user's finds the gradient of its parameter in `p.grad`, whichever of the two was registered first.
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
    """Bytes of gradients, of `total`, that wait in `p.grad` at most, beside the one that came last.

    With several streams of a GPU, or several GPUs, half of that for each.
    """
    return min(max(total // _SHARE, _LEAST), _MOST)


class Arrivals:
    """Hooks on the large ones among some parameters: all but the smallest ones that together fill half of `may_wait`.

    Args:
        parameters: leaves.
        sizes: bytes of the gradient of each.
    """

    def __init__(self, parameters: Sequence[Tensor], sizes: Sequence[int]) -> None:
        # Half of what may wait is for small parameters, which have no hooks; half for a batch of large ones.
        half = may_wait(sum(sizes)) // 2
        self._waiting = _Waiting(half)
        handles: list[Any] = []
        # Before there are any: if an interrupt cuts this short, those registered by then are removed.
        weakref.finalize(self, _remove, handles).atexit = False
        #: Large ones that have no hook, since they were frozen.
        self.skipped: list[Tensor] = []
        together = 0
        for index in sorted(range(len(sizes)), key=sizes.__getitem__):
            together += sizes[index]
            if together <= half:
                continue
            if parameters[index].requires_grad:
                hook = partial(self._waiting.arrived, index, sizes[index])  # no reference to self, which must go
                handles.append(parameters[index].register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            else:
                self.skipped.append(parameters[index])

    @contextmanager
    def taking(self, take: Take) -> Iterator[None]:
        """Within this context, `take` is called with indices of parameters, ascending, whose gradients are to be taken.

        A gradient may be gone already. Call `forget` after each backward.
        """
        self._waiting.take = take
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Take no more, and let nothing wait."""
        self._waiting.take = None
        self.forget()

    def forget(self) -> None:
        """A backward is done, and its owner takes all that is left: nothing waits any more."""
        self._waiting.batches.clear()


class _Waiting:
    """Gradients that hooks have announced and nobody has taken yet.

    Batches are kept apart by stream: on a GPU, a gradient is there only for what follows on the stream it was made on.
    """

    def __init__(self, most: int) -> None:
        self.take: Take | None = None
        self.batches: dict[tuple[int, int], tuple[list[int], int]] = {}
        self._most = most

    def arrived(self, index: int, size: int, parameter: Tensor) -> None:
        """The hook: a gradient of `size` bytes lies in `parameter.grad`."""
        if self.take is None:
            return
        place = (-1, 0)  # not on a GPU
        if parameter.is_cuda:
            stream = torch.cuda.current_stream(parameter.device)
            place = (parameter.get_device(), stream.cuda_stream)
        indices, total = self.batches.get(place, ([], 0))
        if indices and total + size > self._most:
            self.batches[place] = ([index], size)
            # A second gradient of the same parameter (reentrant checkpoints) is added to one that waits: leave both.
            self.take(sorted({*indices} - {index}))
        else:
            self.batches[place] = ([*indices, index], total + size)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
