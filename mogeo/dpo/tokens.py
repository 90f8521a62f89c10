"""From preference pairs to token ids and batches. Must not know about models, losses or optimizers.

Completions are shared between objectives and between pairs, so each distinct (prompt, completion) is one sequence here,
tokenised and scored by the reference once; a pair is two indices into the sequences.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.dpo.data import Preferences
from mogeo.errors import InputError


class TokenSequence(NamedTuple):
    """Token ids of a prompt and, from `start` on, of its completion (an `array`: lists take nine times the memory)."""

    ids: Sequence[int]
    start: int


class Batch(NamedTuple):
    """Sequences padded on the right: int64 ids [B, T], bool attention mask [B, T], bool completion mask [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class TokenizedPreferences:
    """Preferences as tokens. `pairs[objective]` is int64 [n, 2]: indices of the chosen and the rejected sequence."""

    sequences: list[TokenSequence]
    pairs: dict[str, Tensor]
    too_long: dict[str, int]
    """Pairs of each objective that were left out, because one of the two is longer than allowed."""
    margins: dict[str, Tensor] = field(default_factory=dict)
    """`Pair.margin` of each pair, fp32 [n]."""


# ---- tokenising ------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any, prompt: str, prompt_format: str) -> list[int]:
    """Token ids of a prompt, up to where the completion starts: what a model is given to generate from."""
    if prompt_format == "chat":
        text = tokenizer.apply_chat_template(_turns(prompt), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    # Some tokenizers close every text; a prompt is not the end.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_completion(tokenizer: Any, prompt: str, response: str, prompt_format: str) -> list[int]:
    """Token ids of a completion, its end marker included: that a model ends its answer is part of the answer."""
    if prompt_format == "chat":
        before = tokenizer.apply_chat_template(_turns(prompt), tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(_turns(prompt, response), tokenize=False)
        if whole.startswith(before):
            # White space behind the end-of-turn marker is layout for a next turn that never comes.
            return list(tokenizer(whole[len(before) :].rstrip(), add_special_tokens=False)["input_ids"])
    # Prompt and completion are tokenised apart, so that no token lies across the border.
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def encode_sequence(tokenizer: Any, prompt: str, response: str, prompt_format: str) -> TokenSequence:
    """A prompt and its completion as one sequence."""
    head = encode_prompt(tokenizer, prompt, prompt_format)
    return TokenSequence((*head, *encode_completion(tokenizer, prompt, response, prompt_format)), len(head))


def _turns(prompt: str, response: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}]
    return turns if response is None else [*turns, {"role": "assistant", "content": response}]


def tokenize_preferences(
    preferences: Preferences, tokenizer: Any, prompt_format: str, max_length: int | None
) -> TokenizedPreferences:
    """Tokens of all pairs.

    A pair of which one sequence exceeds `max_length` tokens is left out and counted. It is not cut: a prompt without
    its beginning asks another question (and breaks a chat template), a completion without its end is another answer.

    Raises:
        InputError: an objective has no pair left.
    """
    encode = _Encoder(tokenizer, prompt_format)
    sequences: list[TokenSequence] = []
    indices: dict[tuple[str, str], int] = {}

    def index_of(prompt: str, response: str) -> int:
        if (prompt, response) not in indices:
            indices[prompt, response] = len(sequences)
            sequences.append(encode(prompt, response))
        return indices[prompt, response]

    pairs, too_long, margins = {}, {}, {}
    for name, listed in preferences.pairs.items():
        lengths = [max(len(encode(p.prompt, text).ids) for text in (p.chosen, p.rejected)) for p in listed]
        fitting = [p for p, n in zip(listed, lengths, strict=True) if max_length is None or n <= max_length]
        if not fitting:
            raise InputError(
                f"objective '{name}': all {len(listed)} pairs are longer than {max_length} tokens (the shortest needs "
                f"{min(lengths)}); raise max_length, or use a model with a longer context"
            )
        too_long[name] = len(listed) - len(fitting)
        pairs[name] = torch.tensor([[index_of(p.prompt, p.chosen), index_of(p.prompt, p.rejected)] for p in fitting])
        margins[name] = torch.tensor([p.margin for p in fitting], dtype=torch.float32)
    return TokenizedPreferences(sequences, pairs, too_long, margins)


class _Encoder:
    """Tokenises each distinct prompt and completion once."""

    def __init__(self, tokenizer: Any, prompt_format: str) -> None:
        self.tokenizer, self.prompt_format = tokenizer, prompt_format
        self._prompts: dict[str, list[int]] = {}
        self._sequences: dict[tuple[str, str], TokenSequence] = {}

    def __call__(self, prompt: str, response: str) -> TokenSequence:
        if prompt not in self._prompts:
            self._prompts[prompt] = encode_prompt(self.tokenizer, prompt, self.prompt_format)
        if (prompt, response) not in self._sequences:
            head = self._prompts[prompt]
            tail = encode_completion(self.tokenizer, prompt, response, self.prompt_format)
            self._sequences[prompt, response] = TokenSequence(array("i", [*head, *tail]), len(head))
        return self._sequences[prompt, response]


# ---- batching --------------------------------------------------------------------------------------------------------


def collate(sequences: Sequence[TokenSequence], pad: int) -> Batch:
    """Pad sequences on the right with token `pad` into one batch."""
    width = max(len(s.ids) for s in sequences)
    lengths = torch.tensor([len(s.ids) for s in sequences]).unsqueeze(1)
    starts = torch.tensor([s.start for s in sequences]).unsqueeze(1)
    position = torch.arange(width)
    ids = torch.tensor([[*s.ids, *[pad] * (width - len(s.ids))] for s in sequences])
    real = position < lengths
    return Batch(ids, real, real & (position >= starts))


def by_length(sequences: Sequence[TokenSequence], size: int) -> Iterator[list[int]]:
    """Indices of all sequences in groups of `size`, longest first: like lengths together, and no late surprise."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class ShuffledEpochs:
    """Which of `n` pairs come in which step: epoch after epoch, each in its own random order.

    A function of the step alone, so that a resumed run has nothing to restore.
    """

    def __init__(self, n: int, per_step: int, seed: int, name: str) -> None:
        self.n, self.per_step, self._label = n, per_step, f"{seed}/{name}"
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Tensor:
        """Indices of the pairs of step `step` (from 1), int64 [per_step]."""
        first = (step - 1) * self.per_step
        return torch.stack([self._at(*divmod(first + i, self.n)) for i in range(self.per_step)])

    def _at(self, epoch: int, place: int) -> Tensor:
        if epoch != self._epoch:
            digest = hashlib.sha256(f"{self._label}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order[place]
