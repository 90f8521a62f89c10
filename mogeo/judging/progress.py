"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, total: int, unit: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for as long as this context lasts.

    Args:
        label: shown before the bar.
        total: how many units there are to do.
        unit: what they are.
        quiet: show nothing.

    Yields:
        A function to call with the number of units done since the last call.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, disable=quiet) as bar:

        def done(count: int) -> None:
            bar.update(count)

        yield done
