"""What benchmarks/timing.py does to torch's settings, it undoes: held without a GPU, by a stand-in for the settings."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import timing


class Debugging:
    """torch.cuda's sync debug mode: setting it warns, after the mode is set."""

    mode: str | int = 0

    def set(self, mode: str | int) -> None:
        self.mode = mode
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> Debugging:
    found = Debugging()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.set)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: found.mode)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return found


def test_the_mode_is_set_and_reset_though_warnings_are_errors(debugging: Debugging) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with timing.synchronisation("error"):
            assert debugging.mode == "error"
    assert debugging.mode == 0


def test_the_mode_is_reset_after_a_failure(debugging: Debugging) -> None:
    with pytest.raises(KeyError), timing.synchronisation("warn"):
        raise KeyError
    assert debugging.mode == 0


def test_what_waits_for_the_device_is_not_captured_and_leaves_no_mode_behind(debugging: Debugging) -> None:
    def call() -> None:
        if debugging.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")

    kept, reason = timing.captured(call, torch.device("cuda"))
    assert kept is call
    assert reason == "RuntimeError: called a synchronizing CUDA operation"
    assert debugging.mode == 0
