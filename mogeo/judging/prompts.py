"""The prompts to judge on: held-out ones of the data, and none that a model was trained on. Must not import torch."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from mogeo.dpo.data import read_rows, split_rows
from mogeo.errors import InputError
from mogeo.judging.candidates import CandidateModel
from mogeo.judging.golden import Question, golden_questions

logger = logging.getLogger("mogeo")


@dataclass(frozen=True)
class PromptChoice:
    """Which prompts are asked for. What is None is taken from the first run among the models.

    Attributes:
        data: hub name, or file.
        held_out: the share or number of prompts that are held out of the data.
        seed: of that split.
        objectives: names to judge by, in order.
        everything: whether to take all rows, without a split: the data is for judging only.
        at_most: how many prompts to take; None: all that are left.
    """

    data: str | None = None
    held_out: float | int | None = None
    seed: int | None = None
    objectives: tuple[str, ...] | None = None
    everything: bool = False
    at_most: int | None = None


def choose_questions(
    wanted: PromptChoice, candidates: Sequence[CandidateModel]
) -> tuple[list[Question], tuple[str, ...]]:
    """Read the data, and choose prompts with golden responses from it.

    A prompt that one of the runs was trained on is left out, whatever data and split are asked for.

    Args:
        wanted: what is asked for.
        candidates: the models to be judged; the first run among them decides what is not asked for.

    Returns:
        The prompts with their golden responses; and the objectives to judge by, which are empty if neither the user,
        nor a run, nor the data names any.

    Raises:
        InputError: there is no data, it cannot be used, or no prompt is left.
    """
    origins = [c.origin for c in candidates if c.origin is not None]
    first = origins[0] if origins else None
    data = wanted.data or (first.data if first else None)
    if data is None:
        raise InputError("no prompts: none of the models is a run of `mogeo align`, so name the rows with --data")
    rows = read_rows(data)
    if not wanted.everything:
        share = wanted.held_out if wanted.held_out is not None else first.held_out if first else 0.1
        seed = wanted.seed if wanted.seed is not None else first.seed if first else 0
        rows = split_rows(rows, share, seed)[1]
    rated = dict.fromkeys(
        name
        for row in rows
        for completion in row.get("completions") or []
        if isinstance(completion, dict)
        for name in completion.get("annotations") or {}
    )
    objectives = wanted.objectives or (first.objectives if first else None) or tuple(rated)
    asked = golden_questions(rows, [name for name in objectives if name in rated] or tuple(rated))
    fresh = [q for q in asked if not any(origin.trained_on(q.prompt) for origin in origins)]
    if len(fresh) < len(asked):
        logger.warning("%d of %d prompts left out: a run was trained on them", len(asked) - len(fresh), len(asked))
    if not fresh:
        raise InputError(f"all {len(asked)} prompts of '{data}' were trained on; judge on others (--data)")
    return _some(fresh, wanted.at_most), objectives


def _some(asked: list[Question], at_most: int | None) -> list[Question]:
    """At most so many questions, in their old order.

    They are drawn at random, and not taken from the beginning, since the first rows of a file often come from a single
    source.
    """
    if at_most is None or at_most >= len(asked):
        return asked
    if at_most < 1:
        raise InputError(f"--prompts has to be at least 1, got {at_most}")
    return [asked[i] for i in sorted(random.Random("judged prompts").sample(range(len(asked)), at_most))]
