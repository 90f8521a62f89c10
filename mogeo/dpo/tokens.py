"""From preference pairs to token ids and batches. Knows no models, losses or optimizers.

Several objectives and several pairs may use the same completion. So each distinct (prompt, completion) is one sequence
here, which is tokenised once and scored by the reference model once, and a pair is two indices into the sequences.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.dpo.data import Preferences
from mogeo.errors import InputError


class TokenSequence(NamedTuple):
    """A prompt and its completion as token ids.

    Attributes:
        ids: token ids of both. `tokenize_preferences` makes arrays, since a list takes nine times the memory.
        start: where the completion begins.
    """

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
    """Preference pairs as tokens.

    Attributes:
        sequences: each distinct (prompt, completion) once.
        pairs: objective → int64 [n, 2], indices of the chosen and of the rejected sequence of each pair.
        kept: objective → int64 [n], the place of each of these pairs in `Preferences.pairs`.
        too_long: objective → how many of its pairs were left out because a sequence is longer than allowed.
    """

    sequences: list[TokenSequence]
    pairs: dict[str, Tensor]
    kept: dict[str, Tensor]
    too_long: dict[str, int]


# ---- tokenising ------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any, prompt: str, prompt_format: str) -> list[int]:
    """Token ids of a prompt, up to where a completion starts.

    Args:
        tokenizer: of transformers.
        prompt: the text.
        prompt_format: "chat" for the tokenizer's chat template, "plain" for the text as it is.
    """
    if prompt_format == "chat":
        text = tokenizer.apply_chat_template(_turns(prompt), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    # Some tokenizers put an end token after every text. A prompt goes on with its completion.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_completion(tokenizer: Any, prompt: str, response: str, prompt_format: str) -> list[int]:
    """Token ids of a completion, with the token that ends it: a model has to learn when to end, too.

    Args:
        tokenizer: of transformers.
        prompt: the text before it, which a chat template may need.
        response: the completion's text.
        prompt_format: as in `encode_prompt`.
    """
    if prompt_format == "chat":
        before = tokenizer.apply_chat_template(_turns(prompt), tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(_turns(prompt, response), tokenize=False)
        if whole.startswith(before):
            # Templates put white space behind the end of a turn, for the next turn. Here there is none.
            return list(tokenizer(whole[len(before) :].rstrip(), add_special_tokens=False)["input_ids"])
    # Prompt and completion are tokenised apart, so that no token lies across the border.
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def encode_sequence(tokenizer: Any, prompt: str, response: str, prompt_format: str) -> TokenSequence:
    """A prompt and its completion as one sequence; arguments as in `encode_completion`."""
    head = encode_prompt(tokenizer, prompt, prompt_format)
    return TokenSequence((*head, *encode_completion(tokenizer, prompt, response, prompt_format)), len(head))


def _turns(prompt: str, response: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}]
    return turns if response is None else [*turns, {"role": "assistant", "content": response}]


def tokenize_preferences(
    preferences: Preferences, tokenizer: Any, prompt_format: str, max_length: int | None
) -> TokenizedPreferences:
    """Tokenise all pairs.

    A pair is left out and counted if one of its sequences is too long. It is not cut: a prompt without its beginning
    asks another question and breaks the chat template, and a completion without its end is another answer.

    Args:
        preferences: the pairs.
        tokenizer: of transformers.
        prompt_format: as in `encode_prompt`.
        max_length: most tokens of prompt and completion together; None: any number.

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

    pairs, kept, too_long = {}, {}, {}
    for name, listed in preferences.pairs.items():
        lengths = [max(len(encode(p.prompt, text).ids) for text in (p.chosen, p.rejected)) for p in listed]
        fitting = [i for i, n in enumerate(lengths) if max_length is None or n <= max_length]
        if not fitting:
            raise InputError(
                f"objective '{name}': all {len(listed)} pairs are longer than {max_length} tokens (the shortest needs "
                f"{min(lengths)}); raise max_length, or use a model with a longer context"
            )
        too_long[name] = len(listed) - len(fitting)
        fit = [listed[i] for i in fitting]
        pairs[name] = torch.tensor([[index_of(p.prompt, p.chosen), index_of(p.prompt, p.rejected)] for p in fit])
        kept[name] = torch.tensor(fitting)
    return TokenizedPreferences(sequences, pairs, kept, too_long)


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
    """One batch of sequences, padded on the right.

    Args:
        sequences: B of them.
        pad: the token id to pad with.
    """
    width = max(len(s.ids) for s in sequences)
    lengths = torch.tensor([len(s.ids) for s in sequences]).unsqueeze(1)
    starts = torch.tensor([s.start for s in sequences]).unsqueeze(1)
    position = torch.arange(width)
    ids = torch.tensor([[*s.ids, *[pad] * (width - len(s.ids))] for s in sequences])
    real = position < lengths
    return Batch(ids, real, real & (position >= starts))


def by_length(sequences: Sequence[TokenSequence], size: int) -> Iterator[list[int]]:
    """Indices of the sequences in groups, the longest sequences first.

    Sequences of similar length are padded little; and if the longest do not fit into memory, that shows at once.

    Args:
        sequences: to be grouped.
        size: number of sequences in a group; the last group may have fewer.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class ShuffledEpochs:
    """The order in which pairs are used: epoch after epoch, each in a random order of its own.

    What comes at a step depends on nothing but the arguments and the step, so a checkpoint need not hold it.

    Args:
        n: number of pairs.
        per_step: pairs in a step.
        seed: decides the order.
        name: of the objective; each objective has an order of its own.
    """

    def __init__(self, n: int, per_step: int, seed: int, name: str) -> None:
        self.n, self.per_step, self._label = n, per_step, f"{seed}/{name}"
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Tensor:
        """Indices of the pairs of a step, int64 [per_step]; the first step is 1."""
        first = (step - 1) * self.per_step
        return torch.stack([self._at(*divmod(first + i, self.n)) for i in range(self.per_step)])

    def _at(self, epoch: int, place: int) -> Tensor:
        if epoch != self._epoch:
            digest = hashlib.sha256(f"{self._label}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order[place]
