"""Which mode to take, of those that fit. Knows bytes and times; no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mogeo.plan.memory import EXACTNESS, Memory, Mode

SLACK = 0.1
"""How much longer than in the cheapest mode a step may take, as a share, if the weights are more exact. Weights that
are kept for ten steps are off by three quarters of what constant weights are off by (docs/benchmarks.md)."""


class Candidate(NamedTuple):
    """A mode, the memory that it takes, and how long its steps take compared with plain training."""

    mode: Mode
    memory: Memory
    ratio: float


def choose(candidates: Sequence[Candidate], limit: float) -> Candidate | None:
    """Choose a mode: the most exact one that fits and takes little longer than the cheapest that fits (`SLACK`).

    Of equally exact modes, the cheapest is chosen. Constant weights are never chosen, since they balance nothing.

    Args:
        candidates: the modes.
        limit: bytes that a rank may take.

    Returns:
        The mode, or None if none fits.
    """
    fitting = [c for c in candidates if c.mode.rows != "one" and c.memory.device <= limit]
    if not fitting:
        return None
    cheapest = min(c.ratio for c in fitting)
    near = [c for c in fitting if c.ratio <= cheapest * (1 + SLACK)]
    return min(near, key=lambda c: (EXACTNESS.index(c.mode.exactness), c.ratio))
