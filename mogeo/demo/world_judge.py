"""`mogeo evaluate --judge world`: the raters of the demo's world, who know the truth about it.

Must not import torch at the top: the options are declared before it is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mogeo.errors import InputError
from mogeo.judging.golden import Question
from mogeo.judging.judge import Judge, RatingJudge
from mogeo.judging.judge_kinds import JudgeKind


class WorldKind(JudgeKind):
    """Rates answers to prompts of `mogeo.demo.world.World`, and of nothing else."""

    title = "judge: the raters of the demo's world"

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--world-seed", type=int, default=0, metavar="N", help="seed of the world (default: %(default)s)"
        )

    def check(self, args: argparse.Namespace, objectives: Sequence[str], questions: Sequence[Question]) -> None:
        from mogeo.demo.world import OBJECTIVES, TownQuestion

        if unknown := set(objectives) - set(OBJECTIVES):
            raise InputError(
                f"the world's raters know no {', '.join(sorted(unknown))}; they rate {', '.join(OBJECTIVES)}"
            )
        try:
            for question in questions:
                TownQuestion.parse(question.prompt)
        except ValueError as error:
            raise InputError(f"--judge world: {error}") from None

    def make(self, args: argparse.Namespace, objectives: Sequence[str]) -> Judge:
        from mogeo.demo.world import OBJECTIVES, World

        return RatingJudge(World(args.world_seed).rate, objectives or OBJECTIVES)
