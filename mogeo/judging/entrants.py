"""Who is judged, and on which prompts: runs of `mogeo align`, other models, and the questions that none was trained on.

Must not import torch: whatever is wrong here is found before a model is loaded.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mogeo.dpo.config import PROMPT_FORMATS
from mogeo.dpo.data import read_rows, split_rows
from mogeo.dpo.data_origin import DataOrigin
from mogeo.errors import InputError
from mogeo.judging.golden import Question, golden_questions
from mogeo.judging.responses import Speaker

logger = logging.getLogger("mogeo")


@dataclass(frozen=True)
class Entrant:
    """A model as it was named: one of the hub, a folder or a file, or that of a run of `mogeo align`."""

    label: str
    source: str
    origin: DataOrigin | None = None
    """Of a run."""
    prompt_format: str | None = None
    """Of a run: what it was trained with."""


def entrants(named: Sequence[str]) -> list[Entrant]:
    """The models behind `[LABEL=]SOURCE`; a source is a run's folder, or whatever `load_model` takes.

    Raises InputError for a run that is not finished, and for labels that are not distinct.
    """
    found = [_entrant(*_label_and_source(name)) for name in named]
    labels = [entrant.label for entrant in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"two models have the label {', '.join(twice)}; name them: --model LABEL=SOURCE")
    return found


def speakers(found: Sequence[Entrant], prompt_format: str | None) -> list[Speaker]:
    """The models with the format in which each is given prompts: as asked for, its run's, or else that of any run's."""
    of_runs = next((e.prompt_format for e in found if e.prompt_format), PROMPT_FORMATS[0])
    return [Speaker(e.label, e.source, prompt_format or e.prompt_format or of_runs) for e in found]


@dataclass(frozen=True)
class Prompts:
    """Which prompts to judge on; None: as the first run did."""

    data: str | None = None
    held_out: float | int | None = None
    seed: int | None = None
    objectives: tuple[str, ...] | None = None
    everything: bool = False
    """Do not split: the data is for judging only."""
    at_most: int | None = None


def questions(wanted: Prompts, found: Sequence[Entrant]) -> tuple[list[Question], tuple[str, ...]]:
    """The questions, and the objectives that their golden responses were chosen by (none, if the data says which).

    A prompt that one of the runs was trained on is never among them, whatever data and split were asked for.

    Raises:
        InputError: no data, data that cannot be used, or no prompt that is left.
    """
    origins = [e.origin for e in found if e.origin is not None]
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
    """At most so many, drawn at random, in their old order: the head of a file is often one source."""
    if at_most is None or at_most >= len(asked):
        return asked
    if at_most < 1:
        raise InputError(f"--prompts has to be at least 1, got {at_most}")
    return [asked[i] for i in sorted(random.Random("judged prompts").sample(range(len(asked)), at_most))]


def _label_and_source(named: str) -> tuple[str, str]:
    label, mark, source = named.partition("=")
    if not mark or "/" in label or Path(named).exists():
        return "", named
    if not label or not source:
        raise InputError(f"--model '{named}' has to be SOURCE or LABEL=SOURCE")
    return label, source


def _entrant(label: str, source: str) -> Entrant:
    path = Path(source)
    label = label or path.resolve().name if path.exists() else label or source.rstrip("/").rpartition("/")[2]
    if not (path / "run.json").is_file():
        return Entrant(label, source)
    if not (path / "model").is_dir():
        raise InputError(f"the run in '{path}' is not finished: go on with it first (mogeo align ... --resume)")
    try:
        prompt_format = json.loads((path / "run.json").read_text("utf-8"))["prompt_format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path / 'run.json'}' cannot be read ({error})") from None
    return Entrant(label, str(path / "model"), DataOrigin.read(path), prompt_format)
