"""Which mode to take, of those that fit. Knows bytes and ratios, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mogeo.plan.memory import EXACTNESS, Memory, Mode

SLACK = 0.1
"""How much longer a step may take than the cheapest for the sake of exact weights: those held over ten steps are off by
three quarters of what constant ones are (docs/benchmarks.md)."""


class Candidate(NamedTuple):
    """A mode, what it holds, and its step over one of plain training."""

    mode: Mode
    memory: Memory
    ratio: float


def choose(candidates: Sequence[Candidate], limit: float) -> Candidate | None:
    """The most exact mode that balances objectives, takes at most `limit` bytes, and little longer than the cheapest
    (`SLACK`); of equally exact ones the cheapest.

    Constant weights are no candidate: they balance nothing. None: nothing fits.
    """
    fitting = [c for c in candidates if c.mode.rows != "one" and c.memory.device <= limit]
    if not fitting:
        return None
    cheapest = min(c.ratio for c in fitting)
    near = [c for c in fitting if c.ratio <= cheapest * (1 + SLACK)]
    return min(near, key=lambda c: (EXACTNESS.index(c.mode.exactness), c.ratio))
