"""`mogeo evaluate --judge reward`: the options that name reward models, and what they mean.

Must not import torch at the top: the options are declared before it is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mogeo.errors import InputError
from mogeo.judging.golden import Question
from mogeo.judging.judge import OVERALL
from mogeo.judging.judge_kinds import JudgeKind
from mogeo.judging.named_values import named_value

if TYPE_CHECKING:
    from mogeo.judging.reward_judge import RewardJudge, RewardSource


class RewardKind(JudgeKind):
    """Makes a `RewardJudge` of one or several reward models."""

    title = "judge: reward models, which are sequence classifiers of transformers"

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--reward-model", action="append", metavar="[NAME=]M",
            help="hub name or folder; NAME: the objective it rewards, or 'overall' (the default for one with a single "
            "logit); may be repeated",
        )  # fmt: skip
        group.add_argument(
            "--reward-label", action="append", metavar="NAME=LABEL",
            help="an objective, and the label (index or name) that is its reward, of a model with several; may be "
            "repeated",
        )  # fmt: skip
        group.add_argument(
            "--tie-margin", type=float, default=0.0, metavar="R",
            help="rewards that differ by at most this are a tie (default: %(default)g)",
        )  # fmt: skip

    def check(self, args: argparse.Namespace, objectives: Sequence[str], questions: Sequence[Question]) -> None:
        from mogeo.judging.reward_judge import check_classifier_source

        for source in self.make(args, objectives).sources.values():
            check_classifier_source(source.model)

    def make(self, args: argparse.Namespace, objectives: Sequence[str]) -> RewardJudge:
        import torch

        from mogeo.dpo.processes import resolve_device
        from mogeo.judging.reward_judge import RewardJudge

        return RewardJudge(
            reward_sources(args.reward_model or [], args.reward_label or []),
            margin=args.tie_margin,
            batch_size=args.batch_size,
            device=resolve_device(args.device),
            dtype=getattr(torch, args.dtype),
        )


def reward_sources(models: Sequence[str], labels: Sequence[str]) -> dict[str, RewardSource]:
    """Find out which logit of which model is the reward of which question.

    - One model without a name, and labels: each label is the reward of the objective that it is given for.
    - One model without a name, and no labels: its single logit is the reward of "overall".
    - Models with names: each is for the objective that it is named after. A label with the same name says which of the
      model's logits counts.

    Args:
        models: values of `--reward-model`, each "MODEL" or "NAME=MODEL".
        labels: values of `--reward-label`, each "NAME=LABEL".

    Returns:
        Question (an objective, or "overall") -> where its reward comes from.

    Raises:
        InputError: there is no model, or the names do not tell which model is for which objective.
    """
    from mogeo.judging.reward_judge import RewardSource

    if not models:
        raise InputError("--judge reward needs a reward model: --reward-model HUB/NAME")
    of_label = dict(named_value(text, "--reward-label") for text in labels)
    named: dict[str, str] = {}
    unnamed = []
    for text in models:
        name, mark, source = text.partition("=")
        if not mark or "/" in name or Path(text).exists():
            unnamed.append(text)
        elif name in named or not name or not source:
            raise InputError(f"--reward-model '{text}': each objective has one, as NAME=MODEL")
        else:
            named[name] = source
    if len(unnamed) > 1 or (unnamed and OVERALL in named):
        raise InputError(f"several reward models need names: --reward-model NAME={unnamed[-1]}")
    if not unnamed and (extra := set(of_label) - set(named)):
        raise InputError(f"--reward-label names {', '.join(sorted(extra))}, and no --reward-model does")
    found = {name: RewardSource(source, of_label.pop(name, None)) for name, source in named.items()}
    for source in unnamed:
        found.update({name: RewardSource(source, label) for name, label in of_label.items()})
        if not of_label:
            found[OVERALL] = RewardSource(source)
    return found
