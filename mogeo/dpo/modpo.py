"""MODPO: DPO on each objective's pairs, with a margin for what the other objectives' rewards say about the pair.

Rewards are given, or are those implied by one DPO model per objective, trained first. A user of `align`; the loss is
`mogeo.dpo.losses.modpo_loss`. Source: Zhou et al. 2024 (arXiv 2310.03708).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Preferences
from mogeo.dpo.models import context_length, pad_token, prompt_format_for
from mogeo.dpo.processes import current_processes
from mogeo.dpo.scoring import score_sequences
from mogeo.dpo.tokens import encode_sequence
from mogeo.dpo.train import AlignResult, align, resolve_device
from mogeo.errors import InputError

Rewards = Callable[[str, str], Mapping[str, float]]
"""(prompt, response) → objective → reward."""


def align_modpo(
    model: Any,
    tokenizer: Any,
    train: Preferences,
    held_out: Preferences,
    config: AlignConfig,
    *,
    weights: Mapping[str, float] | None = None,
    rewards: Rewards | None = None,
    **options: Any,
) -> AlignResult:
    """Fine-tune `model` in place with MODPO, on one process.

    Any number of objectives. The losses of all of them are balanced by `config.weighting`, as in `align`; MODPO proper
    is `"uniform"`, or the preferences of one objective only. Without `rewards`, costs one DPO run per objective more,
    each with the settings of `config` and on that objective's pairs alone.

    Args:
        model: as it comes in, the reference of every stage.
        tokenizer: its tokenizer.
        train: preferences to learn from.
        held_out: preferences to measure on.
        config: `modpo_weights` is set from `weights`.
        weights: w by objective, positive; only their proportions matter. None: equal ones.
        rewards: (prompt, response) → objective → reward, in the unit of βh; None: those of per-objective DPO models.
        options: what else `align` takes, for the last stage.

    Raises:
        InputError: settings or data cannot be used, or there are several ranks.
    """
    if current_processes().size > 1:
        raise InputError("MODPO runs on one process: its margin models are not shared out over ranks")
    shares = normalized_weights(weights, train.objectives)
    config = replace(config, modpo_weights=tuple(shares.values()))
    config.check()
    if rewards is None:
        rewards = implicit_rewards(model, tokenizer, train, held_out, replace(config, modpo_weights=None))
    return align(model, tokenizer, with_margins(train, rewards, shares), held_out, config, **options)


def normalized_weights(weights: Mapping[str, float] | None, objectives: Sequence[str]) -> dict[str, float]:
    """w / Σw in the order of the objectives; equal ones for None.

    Raises:
        InputError: an objective has no weight, or none that is positive.
    """
    if weights is None:
        return dict.fromkeys(objectives, 1 / len(objectives))
    if set(weights) != set(objectives) or not all(w > 0 for w in weights.values()):
        raise InputError(f"weights {dict(weights)}: give one positive number for each of {', '.join(objectives)}")
    return {name: weights[name] / sum(weights.values()) for name in objectives}


def with_margins(train: Preferences, rewards: Rewards, weights: Mapping[str, float]) -> Preferences:
    """The same pairs, each with its margin Σ w_i (r_i(chosen) − r_i(rejected)) over the other objectives i."""

    def margin(own: str, prompt: str, chosen: str, rejected: str) -> float:
        above, below = rewards(prompt, chosen), rewards(prompt, rejected)
        return sum(w * (above[name] - below[name]) for name, w in weights.items() if name != own)

    pairs = {
        name: [replace(p, margin=margin(name, p.prompt, p.chosen, p.rejected)) for p in listed]
        for name, listed in train.pairs.items()
    }
    return replace(train, pairs=pairs)


def implicit_rewards(
    model: Any, tokenizer: Any, train: Preferences, held_out: Preferences, config: AlignConfig
) -> Rewards:
    """r_i = β (log π_i − log π_ref) of every completion in `train`, π_i being trained by DPO on objective i alone.

    Returns a look-up: it knows the completions of `train` and no others. `model` is left as it is, on its device.
    """
    used = prompt_format_for(tokenizer, config.prompt_format)
    limit = min((n for n in (config.max_length, context_length(model)) if n is not None), default=math.inf)
    completions = dict.fromkeys(
        (p.prompt, r) for listed in train.pairs.values() for p in listed for r in (p.chosen, p.rejected)
    )
    tokens = {key: encode_sequence(tokenizer, *key, used) for key in completions}
    # `align` leaves out pairs with a longer completion, so nobody asks for their rewards' worth.
    fitting = {key: sequence for key, sequence in tokens.items() if len(sequence.ids) <= limit}
    device = torch.device(resolve_device(config.device))
    model.to(device)

    def scores(scored: Any) -> Tensor:
        return score_sequences(
            scored,
            list(fitting.values()),
            batch_size=2 * (config.micro_batch or config.pairs_per_objective),
            pad=pad_token(tokenizer),
            precision=torch.autocast(device.type, torch.bfloat16, enabled=config.autocast == "bf16"),
        )

    reference = scores(model)
    found: dict[tuple[str, str], dict[str, float]] = {key: dict.fromkeys(train.objectives, 0.0) for key in tokens}
    for name in train.objectives:
        alone = replace(train, pairs={name: train.pairs[name]})
        measured = replace(held_out, pairs={name: held_out.pairs[name]})
        policy = copy.deepcopy(model)
        # One objective: nothing to balance. What is measured on the way is nobody's result.
        align(policy, tokenizer, alone, measured, replace(config.of_one_objective(), eval_every=0), progress=False)
        implied = config.beta * (scores(policy) - reference)
        for key, reward in zip(fitting, implied.tolist(), strict=True):
            found[key][name] = reward
        del policy

    def look_up(prompt: str, response: str) -> Mapping[str, float]:
        return found[prompt, response]

    return look_up
