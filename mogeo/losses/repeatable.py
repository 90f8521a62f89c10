"""Repeatable: a loss that can be evaluated again as it was the first time.

Knows random numbers and autocast; no gradients. Dropout draws the same masks, mixed precision rounds the same way, and
whoever draws random numbers afterwards draws what they would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class _Autocast(NamedTuple):
    """As `torch.autocast` takes it."""

    device_type: str
    dtype: torch.dtype
    enabled: bool
    cache_enabled: bool


class Repeatable:
    """Wraps a callable loss; the second call and later ones see the random state and autocast of the first."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self._loss = loss
        self._seen: tuple[Tensor, Tensor | None, list[_Autocast]] | None = None

    def __call__(self) -> Tensor:
        """The loss."""
        if self._seen is None:
            on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            self._seen = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None, _autocasts(on_gpu)
            return self._loss()
        with self._as_before():
            return self._loss()

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        assert self._seen is not None
        of_cpu, of_gpu, autocasts = self._seen
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([] if of_gpu is None else [torch.cuda.current_device()]))
            torch.set_rng_state(of_cpu)
            if of_gpu is not None:
                torch.cuda.set_rng_state(of_gpu)
            for autocast in autocasts:
                stack.enter_context(torch.autocast(**autocast._asdict()))
            yield


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
