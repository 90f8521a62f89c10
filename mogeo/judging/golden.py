"""Golden responses, which a model's answers are compared with, from rows of data. Knows no models and no judges."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mogeo.dpo.data import Row, same_prompt
from mogeo.errors import InputError

logger = logging.getLogger("mogeo")


@dataclass(frozen=True)
class Question:
    """A prompt, and the golden response that a model's own response is compared with."""

    prompt: str
    golden: str


def golden_questions(rows: Iterable[Row], objectives: Sequence[str]) -> list[Question]:
    """A question for each distinct prompt.

    The golden response is the row's column `golden`, or else its best-rated completion (see `golden_response`). Prompts
    that differ in white space only are one question, since confidence intervals take questions to be independent. A
    prompt without a golden response is left out, and how many were is logged.

    Args:
        rows: with "instruction", and with "golden" or UltraFeedback's "completions".
        objectives: those over which ratings are summed.

    Raises:
        InputError: a row has neither "golden" nor "completions", or no prompt has a golden response.
    """
    found: dict[str, Question] = {}
    missing: set[str] = set()
    for number, row in enumerate(rows, start=1):
        prompt = row.get("instruction")
        if not isinstance(prompt, str):
            raise InputError(f"row {number}: column 'instruction' with a text is needed")
        key = same_prompt(prompt)
        if key in found:
            continue
        if isinstance(golden := row.get("golden"), str) and golden.strip():
            found[key] = Question(prompt, golden)
        elif isinstance(row.get("completions"), list) and objectives:
            try:
                found[key] = Question(prompt, golden_response(row, objectives))
            except InputError:
                missing.add(key)
        else:
            columns = ", ".join(map(str, row))
            raise InputError(f"row {number}: neither a golden response nor rated completions (columns: {columns})")
    if missing := missing - set(found):
        logger.warning("%d prompts left out: no completion is rated on all of %s", len(missing), ", ".join(objectives))
    if not found:
        raise InputError(f"no prompt has a golden response: none is rated on all of {', '.join(objectives)}")
    return list(found.values())


def golden_response(row: Row, objectives: Sequence[str]) -> str:
    """The completion with the largest sum of ratings over the objectives; the first, if several have that sum.

    Completions that are empty or lack one of the ratings are left out, since their sums are not comparable. Note that a
    sum favours what several objectives agree on.

    Args:
        row: in UltraFeedback's shape.
        objectives: those over which ratings are summed.

    Raises:
        InputError: no completion is rated on all objectives; the message quotes the prompt.
    """
    best: tuple[float, str] | None = None
    for completion in row["completions"]:
        if not (completion.get("response") or "").strip():  # null in a few rows of UltraFeedback
            continue
        total = sum(_rating(completion["annotations"].get(name)) for name in objectives)  # NaN if one is missing
        if not math.isnan(total) and (best is None or total > best[0]):
            best = total, completion["response"]
    if best is None:
        raise InputError(f"no completion is rated on all of {list(objectives)} for the prompt {row['instruction']!r}")
    return best[1]


def _rating(annotation: Mapping[str, Any] | None) -> float:
    """The rating as a number; NaN if there is none."""
    try:
        return float(annotation["Rating"]) if annotation else math.nan
    except (KeyError, TypeError, ValueError):
        return math.nan
