"""What a run on a GPU leaves behind: a line of JSON for every case, written and flushed at once. Knows no torch.

A line has a `stage`, and most have a `case` and `ok`; what failed has an `error`, what was not tried a `left_out`. The
lines of a run that was killed are those of all cases that had ended.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

#: Exit code of a stage whose GPU context an error has spoilt: a fresh process can go on with the next case.
SPOILT = 3
# What CUDA says then, in errors of torch and Triton. (An error of a launch alone, such as too little shared memory, or
# memory that has run out, spoils nothing.)
_SPOILERS = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure",
             "illegal instruction", "hardware stack error")  # fmt: skip


class Records:
    """The file of one run, as one stage writes it."""

    def __init__(self, path: Path, stage: str, budget: float = math.inf) -> None:
        """Append to `path`; no case of this stage starts later than `budget` seconds from now."""
        self.path, self.stage = path, stage
        self.end = time.monotonic() + budget
        self.failed = 0
        self._done = {record.get("case") for record in read(path) if record["stage"] == stage}

    def note(self, **figures: Any) -> None:
        """Write a line."""
        line = {"stage": self.stage, "at": round(time.time(), 2), **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(line), ensure_ascii=False) + "\n")

    def case(self, name: str, function: Callable[[], Figures | None]) -> Figures | None:
        """Run a case and write its figures, or its error; skipped if an earlier process of this stage has done it.

        Figures may say `wrong`, a list of what does not hold: then the case is not ok.

        Raises:
            SystemExit: the error has spoilt the GPU's context, so that no later case of this process can work.
        """
        if name in self._done:
            return None
        if time.monotonic() > self.end:
            self.note(case=name, left_out="no time left")
            return None
        self._done.add(name)
        start = time.monotonic()
        try:
            figures = function() or {}
        except Exception as error:  # whatever it is: on to the next case
            self.failed += 1
            text = f"{type(error).__name__}: {error}"
            where = traceback.format_exc()[-1500:]
            self.note(case=name, ok=False, seconds=_since(start), error=text[:600], where=where)
            print(f"failed: {self.stage}: {name}: {text[:200]}", flush=True)
            if any(sign in text.lower() for sign in _SPOILERS):
                raise SystemExit(SPOILT) from error
            return None
        wrong = figures.get("wrong")
        self.failed += bool(wrong)
        told = {"error": "; ".join(wrong)} if wrong else {}
        self.note(case=name, ok=not wrong, seconds=_since(start), **told, **figures)
        print(f"{self.stage}: {name}: {'wrong: ' + told['error'] if wrong else 'ok'}", flush=True)
        return figures

    def leave_out(self, name: str, why: str) -> None:
        """A case that is not tried."""
        if name not in self._done:
            self._done.add(name)
            self.note(case=name, left_out=why)


def read(path: Path) -> list[Figures]:
    """All whole lines of a file; none if there is no file. A run that was killed may leave half a line at the end."""
    records = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "stage" in record]


def _since(start: float) -> float:
    return round(time.monotonic() - start, 3)


def _plain(value: Any) -> Any:
    """The value as JSON has it: NaN and infinities are words."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
