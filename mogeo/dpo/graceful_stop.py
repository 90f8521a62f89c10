"""Ctrl-C and SIGTERM stop a long run between two steps, and not in the middle of one. Knows nothing of the steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("mogeo")


class Interrupted(Exception):
    """A run was stopped by Ctrl-C or SIGTERM, and saved a checkpoint.

    Args:
        step: the last step that was taken.
        output: folder with the checkpoint.
    """

    def __init__(self, step: int, output: Path) -> None:
        super().__init__(f"stopped after step {step}; checkpoint saved in '{output}'")
        self.step, self.output = step, output


@contextmanager
def stop_requests(deferred: bool) -> Iterator[Callable[[], bool]]:
    """Within this context, Ctrl-C and SIGTERM are noted, and do not interrupt. A second one does interrupt.

    Args:
        deferred: False leaves both as they are.

    Yields:
        A function that tells whether a stop was requested.
    """
    # Python lets only the main thread handle signals. In another thread, Ctrl-C keeps its usual meaning.
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
