"""What a judge is: it compares two responses to a prompt, by objective and overall. Knows no model and no network.

`RatingJudge` makes a judge of any function that rates a text. Other judges are in `reward_judge` and `endpoint_judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Ratings = Mapping[str, float]

OVERALL = "overall"
"""The question which response is better all in all. No objective may have this name."""

WORST = "worst"
"""The row of tables with the lowest of the objectives' rates. No objective may have this name."""


@dataclass(frozen=True)
class Verdict:
    """Who won one comparison, by objective and overall.

    +1 stands for the candidate, -1 for the reference, 0 for a tie, and None for a comparison that was not judged,
    because the judge gave no answer that could be read. It is left out of the rate, and does not count as a tie.

    Attributes:
        objectives: the winner by objective.
        overall: the winner all in all.
        details: what the verdict is based on, such as rewards or answers, as plain values for JSON.
    """

    objectives: Mapping[str, int | None]
    overall: int | None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, question: str) -> int | None:
        """The winner under a question: an objective, or "overall"."""
        return self.overall if question == OVERALL else self.objectives[question]


class Judge(Protocol):
    """Anything that compares responses with references: a reward model, a model behind an endpoint, a function.

    Attributes:
        objectives: names of what it judges by, besides "overall".
    """

    objectives: tuple[str, ...]

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        """Compare candidates with references.

        Args:
            prompts: [N].
            candidates: [N], a response to each prompt.
            references: [N], another response to each prompt.

        Returns:
            [N] verdicts, in order.
        """
        ...


class RatingJudge:
    """Judges by ratings: the higher rating wins an objective, and the higher sum of ratings wins overall.

    Args:
        rate: (prompt, response) -> objective -> rating, at least for the objectives below.
        objectives: names, in the order of the tables.
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
