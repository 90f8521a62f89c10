"""What the host is told of a step that the device decided: read once it has arrived, never waited for.

Knows tensors and events only. A copy to pinned memory is asynchronous; the event behind it tells whether it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Letter(NamedTuple):
    """Numbers on their way, and whatever the receiver needs beside them."""

    host: list[Tensor]
    event: torch.cuda.Event | None
    enclosed: Any


class Mailbox:
    """Letters from a device to the host, in the order they were sent."""

    def __init__(self) -> None:
        self._letters: deque[Letter] = deque()

    def post(self, tensors: list[Tensor], enclosed: Any = None) -> None:
        """Send small tensors. Not while a CUDA graph is captured: its replays have no host to read them."""
        event = None
        if tensors[0].is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for target, source in zip(host, tensors, strict=True):
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(tensors[0].device))
        else:
            host = [t.clone() for t in tensors]
        self._letters.append(Letter(host, event, enclosed))

    def arrived(self) -> Iterator[tuple[list[list[Any]], Any]]:
        """Take out the letters that are here: their numbers as lists, and what was enclosed."""
        while self._letters:
            event = self._letters[0].event
            if event is not None and (
                torch.cuda.is_current_stream_capturing() or not event.query()  # type: ignore[no-untyped-call]
            ):
                return
            letter = self._letters.popleft()
            yield [host.numpy().tolist() for host in letter.host], letter.enclosed
