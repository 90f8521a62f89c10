"""Responses of models to the questions, generated or read back from `responses.jsonl`. Knows nothing of judges.

One line is a model's responses to a prompt: {"model": label, "prompt": ..., "responses": [...], "key": ...}; null in
place of the responses: the prompt does not fit the model's context. The key is a fingerprint of all that the
responses depend on; lines whose key still holds are not generated anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mogeo.dpo.config import PROMPT_FORMATS
from mogeo.dpo.data import read_rows
from mogeo.errors import InputError

Said = list[list[str] | None]
"""For each prompt, a model's responses to it, or None where the prompt does not fit."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Generation:
    """How responses are generated."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0: the likeliest token (greedy)."""
    samples_per_prompt: int = 1
    seed: int = 0
    batch_size: int = 16
    dtype: str = "float32"

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be."""
        for name in ("max_new_tokens", "samples_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} has to be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature has to be at least 0, got {self.temperature}")
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise InputError("several samples of a greedy response are one: set --temperature, or leave out "
                             "--samples-per-prompt")  # fmt: skip


@dataclass(frozen=True)
class Speaker:
    """A model that responds."""

    label: str
    source: str
    """Hub name, folder or GGUF file."""
    prompt_format: str

    def key(self, prompts: Sequence[str], how: Generation) -> str:
        """Fingerprint of what the responses depend on. Local files count by name, size and time of change, hub models
        by name: hashing gigabytes would take as long as what it spares.
        """
        path = Path(self.source)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        identity = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()] or self.source
        settings = asdict(how)
        if how.temperature == 0:  # then neither changes the text, but for rounding
            del settings["seed"], settings["batch_size"]
        parts = json.dumps([identity, self.prompt_format, list(prompts), settings], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()


def respond(
    speaker: Speaker,
    prompts: Sequence[str],
    how: Generation,
    device: str,
    on_batch: Callable[[int], object] | None = None,
) -> Said:
    """Load a model and let it respond. Raises InputError where it cannot be loaded, or memory runs out."""
    import torch

    from mogeo.dpo.models import context_length, load_model, prompt_format_for
    from mogeo.dpo.tokens import encode_prompt
    from mogeo.judging.generate import generate

    assert speaker.prompt_format in PROMPT_FORMATS
    model, tokenizer = load_model(speaker.source, getattr(torch, how.dtype))
    form = prompt_format_for(tokenizer, speaker.prompt_format)
    limit = context_length(model)
    lengths = [len(encode_prompt(tokenizer, prompt, form)) for prompt in prompts]
    fitting = [i for i, n in enumerate(lengths) if limit is None or n + how.max_new_tokens <= limit]
    fitting.sort(key=lambda i: -lengths[i])  # like lengths together, and no late surprise
    n = how.samples_per_prompt
    try:
        texts = generate(
            model.to(device),
            tokenizer,
            [prompts[i] for i in fitting for _ in range(n)],
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            seed=how.seed,
            batch_size=how.batch_size,
            prompt_format=form,
            on_batch=on_batch,
        )
    except torch.OutOfMemoryError as error:
        raise InputError(f"{device}: out of memory; try a smaller --batch-size, or --dtype bfloat16") from error
    said: Said = [None] * len(prompts)
    for place, i in enumerate(fitting):
        said[i] = texts[place * n : (place + 1) * n]
    return said


class ResponseFile:
    """`responses.jsonl` of an output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[dict[str, Any]] = read_rows(path) if path.is_file() and path.stat().st_size else []

    def get(self, key: str, prompts: Sequence[str]) -> Said | None:
        """The responses under a key, if all prompts have theirs."""
        found = {line["prompt"]: line["responses"] for line in self._lines if line.get("key") == key}
        return [found[prompt] for prompt in prompts] if all(prompt in found for prompt in prompts) else None

    def put(self, label: str, key: str, prompts: Sequence[str], said: Said) -> None:
        """Write responses, in place of what the file held under this key or label."""
        kept = [line for line in self._lines if line.get("key") != key and line.get("model") != label]
        self._lines = kept + [
            {"model": label, "prompt": prompt, "responses": of_prompt, "key": key}
            for prompt, of_prompt in zip(prompts, said, strict=True)
        ]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self._lines), "utf-8")
        partial.replace(self.path)


def read_responses(path: Path, prompts: Sequence[str]) -> dict[str, Said]:
    """Responses from a file in this format, of this command or of any other program, by label.

    Raises:
        InputError: a line lacks something, or a prompt has no responses of one of the models.
    """
    found: dict[str, dict[str, list[str] | None]] = {}
    for number, line in enumerate(read_rows(path), start=1):
        said = line.get("responses", "missing")
        texts = said is None or (isinstance(said, list) and said and all(isinstance(text, str) for text in said))
        if not texts or not isinstance(line.get("model"), str) or not isinstance(line.get("prompt"), str):
            raise InputError(
                f'{path}, line {number}: {{"model": "...", "prompt": "...", "responses": ["..."]}} is needed'
            )
        found.setdefault(line["model"], {})[line["prompt"]] = said
    for label, of_model in found.items():
        missing = [prompt for prompt in prompts if prompt not in of_model]
        if missing:
            raise InputError(
                f"{path}: '{label}' has no responses to {len(missing)} prompts, such as {missing[0]!r:.80}"
            )
    return {label: [of_model[prompt] for prompt in prompts] for label, of_model in found.items()}
