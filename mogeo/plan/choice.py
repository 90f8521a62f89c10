"""Which mode to take, of those that fit. Knows bytes and ratios, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mogeo.plan.memory import EXACTNESS, Memory, Mode

SAME_COST = 0.02
"""Steps this much apart, of the cheapest, count as equal: less than one can tell from data sheets."""


class Candidate(NamedTuple):
    """A mode, what it holds, and its step over one of plain training."""

    mode: Mode
    memory: Memory
    ratio: float


def choose(candidates: Sequence[Candidate], limit: float) -> Candidate | None:
    """The cheapest mode that balances objectives and takes at most `limit` bytes; at equal cost the more exact one.

    Constant weights are no candidate: they balance nothing. None: nothing fits.
    """
    fitting = [c for c in candidates if c.mode.rows != "one" and c.memory.device <= limit]
    if not fitting:
        return None
    cheapest = min(c.ratio for c in fitting)
    equal = [c for c in fitting if c.ratio <= cheapest * (1 + SAME_COST)]
    return min(equal, key=lambda c: (EXACTNESS.index(c.mode.exactness), c.ratio))
