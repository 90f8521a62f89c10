"""The data of CDPO (controllable preference optimisation), from rated rows. Knows no models and no training.

In CDPO a prompt asks for ratings. A model first learns from completions whose prompts ask for the ratings that they
have (supervised training, CPSFT), and then from pairs that are ranked by how well they meet the ratings asked for
(DPO). So CDPO is a recipe for two data sets, which any trainer can use: `python benchmarks/alignment cdpo` writes them,
and docs/reproduce.md trains on them. Source: Guo et al. 2024, *Controllable Preference Optimization: Toward
Controllable Multi-Objective Alignment* (arXiv 2402.19085).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mogeo.dpo.config import share_or_number
from mogeo.dpo.data import Preferences, Row, build_preferences, rating_of, read_rows, split_rows
from mogeo.errors import InputError

CONTROLLED = "controlled"
"""The one objective of controlled preferences."""


def controlled_prompt(prompt: str, targets: Mapping[str, float]) -> str:
    """A prompt that asks for ratings: `<helpfulness:5> <honesty:3>` before it, one control a target.

    Ratings are rounded to whole numbers, halves up, so that there are few controls to learn.
    """
    return " ".join([*(control(name, target) for name, target in targets.items()), prompt])


def control(objective: str, target: float) -> str:
    """The text that asks for one rating of one objective. It can be added to a tokenizer as a token."""
    return f"<{objective}:{int(target + 0.5)}>"


def controlled_completions(rows: Iterable[Row], objectives: Sequence[str]) -> list[Row]:
    """Rows for supervised training (CPSFT): one per fully rated completion, whose prompt asks for its own ratings.

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
    """Rows for DPO (CDPO) with the single objective `CONTROLLED`: completions rated by how well they obey their prompt.

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
    """The same pairs under prompts that ask for the targets: what a model with controls is measured on."""
    pairs = {
        name: [replace(pair, prompt=controlled_prompt(pair.prompt, targets)) for pair in listed]
        for name, listed in preferences.pairs.items()
    }
    return replace(preferences, pairs=pairs)


def _rated(row: Row, objectives: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """(completion, its ratings) for each completion of a row that is rated on all objectives."""
    found = []
    for completion in row["completions"]:
        ratings = {name: rating_of(completion["annotations"].get(name), f"objective '{name}'") for name in objectives}
        if None not in ratings.values() and completion["response"]:
            found.append((completion, {name: float(value) for name, value in ratings.items() if value is not None}))
    return found


# ---- as a command ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python benchmarks/alignment cdpo`."""
    parser.add_argument("--data", required=True, metavar="D", help="hub name, or .jsonl, .json, .parquet file")
    parser.add_argument("--objectives", required=True, metavar="A,B", help="names, comma-separated")
    parser.add_argument("--held-out", type=share_or_number, default=0.1, metavar="H", help="as in mogeo align")
    parser.add_argument("--seed", type=int, default=0, help="as in mogeo align (default: 0)")
    parser.add_argument("--best", type=float, default=5, metavar="R", help="the best rating there is (default: 5)")
    parser.add_argument("--into", type=Path, default=Path("cdpo"), metavar="F", help="folder (default: cdpo)")


def run(options: argparse.Namespace) -> None:
    """Write supervised.jsonl for TRL's SFTTrainer, preferences.jsonl for `mogeo align`, and prompts.jsonl.

    The last holds the held-out prompts as they are ("prompt"), and as a model with controls is given them ("asked").
    """
    objectives = [name.strip() for name in options.objectives.split(",")]
    rows, held_out = split_rows(read_rows(options.data), options.held_out, options.seed)
    best = dict.fromkeys(objectives, options.best)
    files: dict[str, list[dict[str, Any]]] = {
        "supervised": [
            {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["completions"][0]["response"]}],
            }
            for row in controlled_completions(rows, objectives)
        ],
        "preferences": controlled_rows(rows, objectives, seed=options.seed),
        "prompts": [
            {"prompt": row["instruction"], "asked": controlled_prompt(row["instruction"], best)} for row in held_out
        ],
    }
    options.into.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (options.into / f"{name}.jsonl").write_text(text, "utf-8")
        print(f"{options.into / name}.jsonl: {len(lines):,} lines")
