"""Stop a long run between two steps instead of in the middle of one. Knows nothing of what the steps do."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("mogeo")


class Interrupted(Exception):
    """The run was stopped from outside (Ctrl-C, SIGTERM) after `step`; a checkpoint lies in `output`."""

    def __init__(self, step: int, output: Path) -> None:
        super().__init__(f"stopped after step {step}; checkpoint saved in '{output}'")
        self.step, self.output = step, output


@contextmanager
def stop_requests(deferred: bool) -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question that can be asked between steps; a second one stops at once."""
    # Signal handlers belong to the main thread; elsewhere (a notebook's worker) Ctrl-C keeps its usual meaning.
    if not deferred or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("stopping after this step, with a checkpoint (once more: stop at once, without)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
