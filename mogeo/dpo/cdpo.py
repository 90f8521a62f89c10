"""Controllable preference optimisation: the ratings that are wanted stand in the prompt, and pairs obey them.

A recipe for data: what comes out is rows and preferences as any, for supervised training and for `align`. Knows nothing
of models. Source: Guo et al. 2024, *Controllable Preference Optimization: Toward Controllable Multi-Objective
Alignment* (arXiv 2402.19085): supervised training on completions under their own ratings (CPSFT), then DPO on pairs
ranked by how well they meet ratings asked for (CDPO).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mogeo.dpo.data import Preferences, Row, build_preferences, rating_of
from mogeo.errors import InputError

CONTROLLED = "controlled"
"""The one objective of controlled preferences."""


def controlled_prompt(prompt: str, targets: Mapping[str, float]) -> str:
    """A prompt that asks for ratings: `<helpfulness:5> <honesty:3>` before it, one control a target.

    Ratings are rounded to whole numbers, halves up, so that there are few controls to learn.
    """
    return " ".join([*(control(name, target) for name, target in targets.items()), prompt])


def control(objective: str, target: float) -> str:
    """The text that asks for one rating of one objective. A tokenizer without words for it wants it as a token."""
    return f"<{objective}:{int(target + 0.5)}>"


def controlled_completions(rows: Iterable[Row], objectives: Sequence[str]) -> list[Row]:
    """Rows for supervised training (CPSFT): every fully rated completion alone, under a prompt with its own ratings.

    Raises:
        InputError: no completion is rated on all objectives.
    """
    alone = [
        {**row, "instruction": controlled_prompt(row["instruction"], ratings), "completions": [completion]}
        for row in rows
        for completion, ratings in _rated(row, objectives)
    ]
    if not alone:
        raise InputError(f"no completion is rated on all of {', '.join(objectives)}")
    return alone


def controlled_rows(
    rows: Sequence[Row],
    objectives: Sequence[str],
    *,
    weights: Mapping[str, float] | None = None,
    strength: float = 1.0,
    controlled: float = 1.0,
    seed: int = 0,
) -> list[Row]:
    """Rows for DPO (CDPO), of the one objective `CONTROLLED`: completions rated by how well they obey their prompt.

    Each row's prompt gets the ratings of one of its completions as targets c, drawn at random, each objective with
    probability `controlled`. A completion with ratings P is then worth R = Σ ω_i g_i, with g_i = −λ |P_i − c_i| for an
    objective that is controlled, and P_i for one that is not.

    Args:
        rows: in UltraFeedback's shape.
        objectives: names, in the order of their controls.
        weights: ω by objective; None: 1 for each.
        strength: λ.
        controlled: probability in [0, 1].
        seed: for the draws. They depend on the seed and the prompt, not on the other rows.

    Raises:
        InputError: no completion is rated on all objectives.
    """
    omega = dict.fromkeys(objectives, 1.0) if weights is None else dict(weights)
    ranked = []
    for row in rows:
        rated = _rated(row, objectives)
        if not rated:
            continue
        draw = random.Random(f"controls/{seed}/{row['instruction']}")
        wanted = rated[draw.randrange(len(rated))][1]
        targets = {name: float(int(wanted[name] + 0.5)) for name in objectives if draw.random() < controlled}
        completions = []
        for completion, ratings in rated:
            worth = {n: -strength * abs(p - targets[n]) if n in targets else p for n, p in ratings.items()}
            total = sum(omega[n] * value for n, value in worth.items())
            completions.append({**completion, "annotations": {CONTROLLED: {"Rating": repr(total)}}})
        ranked.append({"instruction": controlled_prompt(row["instruction"], targets), "completions": completions})
    if not ranked:
        raise InputError(f"no completion is rated on all of {', '.join(objectives)}")
    return ranked


def controlled_preferences(
    rows: Sequence[Row], objectives: Sequence[str], *, pairing: str = "all", seed: int = 0, **options: Any
) -> Preferences:
    """Preferences of `controlled_rows`; `pairing` as in `build_preferences`, `options` as there.

    Raises:
        InputError: no completion is rated on all objectives, or no two of a prompt differ in what they are worth.
    """
    return build_preferences(controlled_rows(rows, objectives, seed=seed, **options), [CONTROLLED], pairing, seed)


def with_controls(preferences: Preferences, targets: Mapping[str, float]) -> Preferences:
    """The same pairs of every objective, under prompts that ask for `targets`: to measure a controlled model on."""
    pairs = {
        name: [replace(pair, prompt=controlled_prompt(pair.prompt, targets)) for pair in listed]
        for name, listed in preferences.pairs.items()
    }
    return replace(preferences, pairs=pairs)


def _rated(row: Row, objectives: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """(completion, its ratings) of a row, where all objectives are rated."""
    found = []
    for completion in row["completions"]:
        ratings = {name: rating_of(completion["annotations"].get(name), f"objective '{name}'") for name in objectives}
        if None not in ratings.values() and completion["response"]:
            found.append((completion, {name: float(value) for name, value in ratings.items() if value is not None}))
    return found
