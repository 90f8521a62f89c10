"""What a judge is: it compares two texts for a prompt, by objective and on the whole. Knows no model and no network.

`RatingJudge` makes a judge out of any function that rates a text; `reward_judge` and `endpoint_judge` hold the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Ratings = Mapping[str, float]

OVERALL = "overall"  # the question that is about no objective
WORST = "worst"  # the lowest of the objectives' rates; like OVERALL, no name for an objective


@dataclass(frozen=True)
class Verdict:
    """Who won one comparison: +1 the candidate, -1 the reference, 0 neither, None not judged; by objective and overall.

    None is not a tie: the judge gave no answer that could be read, and the comparison is left out of the rate.
    """

    objectives: Mapping[str, int | None]
    overall: int | None
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the judge went by (rewards, both orders' answers), in plain values, for whoever looks into it."""

    def __getitem__(self, question: str) -> int | None:
        """The verdict on an objective, or on OVERALL."""
        return self.overall if question == OVERALL else self.objectives[question]


class Judge(Protocol):
    """Compares a candidate answer with a reference; a reward model or an API endpoint can stand behind it."""

    objectives: tuple[str, ...]

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        """One verdict a prompt, in order. The whole batch is handed over so that a judge may batch its own work."""
        ...


class RatingJudge:
    """Judges by ratings: an objective is won by the higher rating, the whole by the higher sum of ratings.

    Args:
        rate: (prompt, response) -> objective -> rating, for every one of `objectives`.
        objectives: the objectives to compare, in the order in which they are reported.
    """

    def __init__(self, rate: Callable[[str, str], Ratings], objectives: Sequence[str]) -> None:
        self.rate = rate
        self.objectives = tuple(objectives)

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        return [
            self._verdict(self.rate(p, c), self.rate(p, r))
            for p, c, r in zip(prompts, candidates, references, strict=True)
        ]

    def _verdict(self, candidate: Ratings, reference: Ratings) -> Verdict:
        differences = {name: candidate[name] - reference[name] for name in self.objectives}
        return Verdict({name: sign(d) for name, d in differences.items()}, sign(sum(differences.values())))


def sign(x: float) -> int:
    """+1, 0 or -1."""
    return (x > 0) - (x < 0)
