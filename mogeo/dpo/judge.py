"""Generate answers and judge them against golden ones: batched generation, golden responses, net win rates.

A judge is anything that compares two texts for a prompt (`Judge`); `RatingJudge` makes one out of any function that
rates a text. This file knows nothing of training, of losses, or of where rows come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mogeo.dpo.batches import encode_prompt
from mogeo.dpo.data import Row
from mogeo.dpo.errors import InputError

Ratings = Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """Who won one comparison: +1 the candidate, -1 the reference, 0 neither; by objective and on the whole."""

    objectives: Mapping[str, int]
    overall: int


class Judge(Protocol):
    """Compares a candidate answer with a reference; a reward model or an API endpoint can stand behind it."""

    objectives: tuple[str, ...]

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        """One verdict a prompt, in order. The whole batch is handed over so that a judge may batch its own work."""
        ...


class RatingJudge:
    """Judges by ratings: an objective is won by the higher rating, the whole by the higher sum of ratings.

    Args:
        rate: (prompt, response) -> objective -> rating, for every one of `objectives`.
        objectives: the objectives to compare, in the order in which they are reported.
    """

    def __init__(self, rate: Callable[[str, str], Ratings], objectives: Sequence[str]) -> None:
        self.rate = rate
        self.objectives = tuple(objectives)

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        return [
            self._verdict(self.rate(p, c), self.rate(p, r))
            for p, c, r in zip(prompts, candidates, references, strict=True)
        ]

    def _verdict(self, candidate: Ratings, reference: Ratings) -> Verdict:
        differences = {name: candidate[name] - reference[name] for name in self.objectives}
        return Verdict({name: _sign(d) for name, d in differences.items()}, _sign(sum(differences.values())))


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


@dataclass(frozen=True)
class NetWinRates:
    """(wins - losses) / n against the references: -1 all lost, 0 as good as the references, 1 all won."""

    overall: float
    objectives: dict[str, float]

    @property
    def worst(self) -> float:
        """The lowest net win rate of any objective."""
        return min(self.objectives.values())

    @property
    def worst_objective(self) -> str:
        """The objective with the lowest net win rate; of several, the first."""
        return min(self.objectives, key=self.objectives.__getitem__)


def net_win_rates(
    judge: Judge, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]
) -> NetWinRates:
    """Judge one candidate a prompt against one reference a prompt. Raises ValueError where there is no prompt."""
    if not prompts:
        raise ValueError("nothing to judge: there are no prompts")
    verdicts = judge.compare(prompts, candidates, references)
    n = len(verdicts)
    by_objective = {name: sum(v.objectives[name] for v in verdicts) / n for name in judge.objectives}
    return NetWinRates(sum(v.overall for v in verdicts) / n, by_objective)


def golden_response(row: Row, objectives: Sequence[str]) -> str:
    """The completion with the largest sum of ratings over `objectives`; of several, the first.

    A completion that lacks one of the ratings (absent, "N/A") is passed over, as its sum would not compare. Raises
    InputError, which quotes the prompt, where none is left. Mind that a sum favours what several objectives agree on.
    """
    best: tuple[float, str] | None = None
    for completion in row["completions"]:
        total = sum(_rating(completion["annotations"].get(name)) for name in objectives)  # NaN if one is missing
        if not math.isnan(total) and (best is None or total > best[0]):
            best = total, completion["response"]
    if best is None:
        raise InputError(f"no completion is rated on all of {list(objectives)} for the prompt {row['instruction']!r}")
    return best[1]


def _rating(annotation: Mapping[str, Any] | None) -> float:
    try:
        return float(annotation["Rating"]) if annotation else math.nan
    except (KeyError, TypeError, ValueError):
        return math.nan


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    prompt_format: str = "chat",
) -> list[str]:
    """One response a prompt, without the prompt and without special tokens.

    Args:
        max_new_tokens: where a response that has not ended by itself is cut.
        temperature: 0 takes the likeliest token (greedy); above, tokens are sampled from softmax(logits / temperature),
            without top-k or top-p, so that the model's own distribution is what gets judged.
        seed: of the sampling. Its generator is its own; torch's global random state is neither read nor changed. The
            same seed, prompts and batch size give the same text.
        prompt_format: how the model was trained to see a prompt ("chat" or "plain", as in `AlignConfig`).
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    responses: list[str] = []
    try:
        for start in range(0, len(prompts), batch_size):
            encoded = [encode_prompt(tokenizer, p, prompt_format) for p in prompts[start : start + batch_size]]
            tokens = _continue(model, tokenizer, encoded, max_new_tokens, temperature, generator)
            responses += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    finally:
        model.train(was_training)
    return responses


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """New tokens [B, T], T <= max_new_tokens; what follows a response's end is padding.

    Our own loop, not `model.generate`: that samples from torch's global generator, and its defaults (top-k, penalties)
    come from whatever generation config a model ships.
    """
    stops = torch.tensor(_stop_ids(model, tokenizer), device=model.device)
    pad = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    width = max(map(len, encoded))
    # Padding goes to the left: all prompts end in the same column, and the next token of each comes from the last one.
    tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    done = torch.zeros(len(encoded), dtype=torch.bool, device=model.device)
    new: list[Tensor] = []
    cache = None
    for _ in range(max_new_tokens):
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # else the prompts' logits, [B, T, vocabulary], would be the peak of memory
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature > 0:
            choice = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        else:
            choice = logits.argmax(-1, keepdim=True)
        tokens = choice.masked_fill(done[:, None], pad)
        new.append(tokens)
        done |= torch.isin(tokens[:, 0], stops)
        if bool(done.all()):
            break
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(new, 1)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those the model declares besides (Gemma's end of turn is only declared there)."""
    declared: Any = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({int(i) for i in (tokenizer.eos_token_id, *declared) if i is not None})
