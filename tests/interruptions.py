"""Something that happens in the middle of a run of `mogeo align`, such as Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest


def ctrl_c() -> None:
    """What the terminal sends."""
    signal.raise_signal(signal.SIGINT)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], object] = ctrl_c) -> None:
    """Let `how` happen once, at the end of step `step`."""
    from mogeo.dpo.train import _Run

    original = _Run._step

    def patched(self, number):  # type: ignore[no-untyped-def]
        record = original(self, number)
        if number == step:
            monkeypatch.setattr(_Run, "_step", original)
            how()
        return record

    monkeypatch.setattr(_Run, "_step", patched)
