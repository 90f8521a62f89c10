"""The models to be judged: what `mogeo evaluate --model` names.

Must not import torch: whatever is wrong here is found before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mogeo.dpo.config import PROMPT_FORMATS
from mogeo.dpo.data_origin import DataOrigin
from mogeo.errors import InputError
from mogeo.judging.responses import Responder


@dataclass(frozen=True)
class CandidateModel:
    """A model to be judged: that of a run of `mogeo align`, or any other.

    Attributes:
        label: its name in tables.
        source: hub name, folder or GGUF file.
        origin: the data of its run; None for a model that comes from no run.
        prompt_format: how its run showed prompts to it; None for a model that comes from no run.
    """

    label: str
    source: str
    origin: DataOrigin | None = None
    prompt_format: str | None = None


def find_candidates(named: Sequence[str]) -> list[CandidateModel]:
    """Find out which models were named.

    Args:
        named: values of `--model`, each "SOURCE" or "LABEL=SOURCE"; a source is the folder of a run of `mogeo align`,
            or what `mogeo.dpo.models.load_model` takes.

    Raises:
        InputError: a run is not finished or lacks its `data.json`, or two models have the same label.
    """
    found = [_candidate(*_label_and_source(name)) for name in named]
    labels = [candidate.label for candidate in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"two models have the label {', '.join(twice)}; name them: --model LABEL=SOURCE")
    return found


def responders(candidates: Sequence[CandidateModel], prompt_format: str | None) -> list[Responder]:
    """The models, each with the format in which it is given prompts.

    Args:
        candidates: the models.
        prompt_format: the format for all of them. None: each model's run decides; a model without a run gets the format
            of the first run among the others, or "chat" if there is none.
    """
    of_runs = next((c.prompt_format for c in candidates if c.prompt_format), PROMPT_FORMATS[0])
    return [Responder(c.label, c.source, prompt_format or c.prompt_format or of_runs) for c in candidates]


def _label_and_source(named: str) -> tuple[str, str]:
    """Split "LABEL=SOURCE"; the label is "" where there is none. Paths may hold equals signs, too."""
    label, mark, source = named.partition("=")
    if not mark or "/" in label or Path(named).exists():
        return "", named
    if not label or not source:
        raise InputError(f"--model '{named}' has to be SOURCE or LABEL=SOURCE")
    return label, source


def _candidate(label: str, source: str) -> CandidateModel:
    """The model at a source; without a label, it is called after its folder, its file or its name on the hub."""
    path = Path(source)
    label = label or (path.resolve().name if path.exists() else source.rstrip("/").rpartition("/")[2])
    if not (path / "run.json").is_file():
        return CandidateModel(label, source)
    if not (path / "model").is_dir():
        raise InputError(f"the run in '{path}' is not finished: go on with it first (mogeo align ... --resume)")
    try:
        prompt_format = json.loads((path / "run.json").read_text("utf-8"))["prompt_format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path / 'run.json'}' cannot be read ({error})") from None
    return CandidateModel(label, str(path / "model"), DataOrigin.read(path), prompt_format)
