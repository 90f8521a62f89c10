"""What models answer to prompts: generated, or read from `responses.jsonl`. Knows nothing of judges.

Each line of the file holds a model's responses to one prompt:

    {"model": label, "prompt": "...", "responses": ["...", ...], "key": "..."}

`responses` is null if the prompt does not fit the model's context. `key` is a fingerprint of everything that the
responses depend on (see `Responder.key`): as long as it stays the same, they are read and not generated again.
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

ModelResponses = list[list[str] | None]
"""One model's responses: a list for each prompt, or None if the prompt does not fit the model's context."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Generation:
    """How responses are generated.

    Attributes:
        max_new_tokens: a response that has not ended after so many tokens is cut.
        temperature: 0 takes the likeliest token each time (greedy); above 0, tokens are sampled.
        samples_per_prompt: responses to each prompt.
        seed: of the sampling.
        batch_size: responses that are generated at once.
        dtype: of the model's weights, one of `DTYPES`.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    samples_per_prompt: int = 1
    seed: int = 0
    batch_size: int = 16
    dtype: str = "float32"

    def check(self) -> None:
        """Check the numbers.

        Raises:
            InputError: a number is out of its range; the message names the option.
        """
        for name in ("max_new_tokens", "samples_per_prompt", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} has to be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature has to be at least 0, got {self.temperature}")
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise InputError("several samples of a greedy response are one: set --temperature, or leave out "
                             "--samples-per-prompt")  # fmt: skip


@dataclass(frozen=True)
class Responder:
    """A model that is to respond.

    Attributes:
        label: its name in files and tables.
        source: hub name, folder or GGUF file.
        prompt_format: how prompts are shown to it, "chat" or "plain".
    """

    label: str
    source: str
    prompt_format: str

    def key(self, prompts: Sequence[str], how: Generation) -> str:
        """A fingerprint of what the responses depend on: model, prompts and settings.

        Weights are not hashed, since reading gigabytes would take as long as generating. A local model is known by the
        names, sizes and times of change of its files, one on the hub by its name.

        Args:
            prompts: what is responded to.
            how: settings of the generation.
        """
        path = Path(self.source)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        identity = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()] or self.source
        settings = asdict(how)
        if how.temperature == 0:  # greedy responses do not depend on these two, but for rounding
            del settings["seed"], settings["batch_size"]
        parts = json.dumps([identity, self.prompt_format, list(prompts), settings], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()


def respond(
    responder: Responder,
    prompts: Sequence[str],
    how: Generation,
    device: str,
    on_batch: Callable[[int], object] | None = None,
) -> ModelResponses:
    """Load a model and let it respond.

    Args:
        responder: the model.
        prompts: what to respond to.
        how: settings of the generation.
        device: of the model.
        on_batch: called with the number of responses of each batch, for a progress bar.

    Raises:
        InputError: the model cannot be loaded, or memory runs out.
    """
    import torch

    from mogeo.dpo.models import context_length, load_model, prompt_format_for
    from mogeo.dpo.tokens import encode_prompt
    from mogeo.judging.generate import generate

    assert responder.prompt_format in PROMPT_FORMATS
    model, tokenizer = load_model(responder.source, getattr(torch, how.dtype))
    form = prompt_format_for(tokenizer, responder.prompt_format)
    limit = context_length(model)
    lengths = [len(encode_prompt(tokenizer, prompt, form)) for prompt in prompts]
    fitting = [i for i, n in enumerate(lengths) if limit is None or n + how.max_new_tokens <= limit]
    # Longest first: batches of similar lengths waste little on padding, and if memory runs out, it does so at once.
    fitting.sort(key=lambda i: -lengths[i])
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
    said: ModelResponses = [None] * len(prompts)
    for place, i in enumerate(fitting):
        said[i] = texts[place * n : (place + 1) * n]
    return said


class ResponseFile:
    """The file `responses.jsonl`, which keeps responses from one run of the command to the next.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[dict[str, Any]] = read_rows(path) if path.is_file() and path.stat().st_size else []

    def get(self, key: str, prompts: Sequence[str]) -> ModelResponses | None:
        """The responses to these prompts that were written under a key, or None if some are missing."""
        found = {line["prompt"]: line["responses"] for line in self._lines if line.get("key") == key}
        return [found[prompt] for prompt in prompts] if all(prompt in found for prompt in prompts) else None

    def put(self, label: str, key: str, prompts: Sequence[str], said: ModelResponses) -> None:
        """Write a model's responses. Those that the file held under this key or label before are replaced."""
        kept = [line for line in self._lines if line.get("key") != key and line.get("model") != label]
        self._lines = kept + [
            {"model": label, "prompt": prompt, "responses": of_prompt, "key": key}
            for prompt, of_prompt in zip(prompts, said, strict=True)
        ]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self._lines), "utf-8")
        partial.replace(self.path)


def read_responses(path: Path, prompts: Sequence[str]) -> dict[str, ModelResponses]:
    """Read responses that this command or any other program has written, in the format described at the top.

    Args:
        path: a .jsonl, .json or .parquet file; the entry "key" is not needed.
        prompts: each model has to have responses to all of them.

    Returns:
        Label -> the model's responses.

    Raises:
        InputError: a line is not in the format, or a model has no responses to some prompt.
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
