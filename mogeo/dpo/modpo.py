"""MODPO: DPO on each objective's pairs, with a margin for what the other objectives' rewards say about the pair.

The rewards are given, or are those that are implied by one DPO model per objective, trained first. Source: Zhou et al.
2024, *Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization* (arXiv 2310.03708).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mogeo.dpo.losses import BeforeTraining, PreferenceLoss
from mogeo.dpo.models import context_length, pad_token, prompt_format_for
from mogeo.dpo.processes import resolve_device
from mogeo.dpo.scoring import score_sequences
from mogeo.dpo.tokens import encode_sequence
from mogeo.errors import InputError

Rewards = Callable[[str, str], Mapping[str, float]]
"""(prompt, response) -> objective -> reward, in the unit of βh."""


class MODPO(PreferenceLoss):
    """The loss of MODPO, for any number of objectives.

    Without rewards, each run first trains one DPO model per objective, with the run's own settings and on that
    objective's pairs alone. MODPO as published takes the mean of the objectives' losses: use weighting "uniform".

    Args:
        weights: w by objective, or in the order of the objectives: positive numbers, of which only the ratios count.
            None: equal ones.
        rewards: (prompt, response) -> objective -> reward, in the unit of βh. None: the implicit rewards of DPO models.
    """

    def __init__(
        self, weights: Mapping[str, float] | Sequence[float] | None = None, rewards: Rewards | None = None
    ) -> None:
        self.weights, self.rewards = weights, rewards
        self.one_process = rewards is None  # training in `prepare` is not shared out over processes

    @classmethod
    def named(cls, name: str, numbers: Sequence[float]) -> MODPO:
        return cls(list(numbers) or None)

    def for_objectives(self, objectives: Sequence[str]) -> MODPO:
        return MODPO(normalized_weights(self.weights, objectives), self.rewards)

    def prepare(self, before: BeforeTraining) -> Mapping[str, Tensor]:
        """m of each pair, see `modpo_loss`. Trains the models whose rewards are needed, unless rewards are given."""
        weights = normalized_weights(self.weights, before.train.objectives)
        rewards = implicit_rewards(before) if self.rewards is None else self.rewards

        def margin(own: str, prompt: str, chosen: str, rejected: str) -> float:
            above, below = rewards(prompt, chosen), rewards(prompt, rejected)
            return sum(w * (above[name] - below[name]) for name, w in weights.items() if name != own)

        return {
            name: torch.tensor([margin(name, p.prompt, p.chosen, p.rejected) for p in pairs])
            for name, pairs in before.train.pairs.items()
        }

    def __call__(self, objective: str, margins: Tensor, beta: float, prepared: Tensor | None) -> Tensor:
        assert isinstance(self.weights, Mapping)
        assert prepared is not None
        return modpo_loss(margins, prepared, beta, self.weights[objective])

    def __repr__(self) -> str:
        weights = self.weights.values() if isinstance(self.weights, Mapping) else self.weights or ()
        return f"modpo({', '.join(f'{w:g}' for w in weights)})"


def normalized_weights(
    weights: Mapping[str, float] | Sequence[float] | None, objectives: Sequence[str]
) -> dict[str, float]:
    """Weights by objective, in the order of the objectives and with a sum of 1.

    Args:
        weights: by objective, or in the order of the objectives; None: equal ones.
        objectives: names.

    Raises:
        InputError: an objective has no weight, or one that is not positive.
    """
    if weights is None:
        return dict.fromkeys(objectives, 1 / len(objectives))
    named = dict(weights) if isinstance(weights, Mapping) else dict(zip(objectives, weights, strict=False))
    if len(weights) != len(objectives) or set(named) != set(objectives) or not all(w > 0 for w in named.values()):
        given = dict(weights) if isinstance(weights, Mapping) else list(weights)
        raise InputError(f"MODPO's weights {given}: give one positive number for each of {', '.join(objectives)}")
    return {name: named[name] / sum(named.values()) for name in objectives}


def implicit_rewards(before: BeforeTraining) -> Rewards:
    """The rewards r_i = β (log π_i − log π_ref) of the completions in the training pairs.

    Each π_i is trained here, by DPO on objective i alone. The model itself is left as it is, on its device.

    Returns:
        A look-up that knows the completions of the training pairs, and no others.
    """
    config, tokenizer, train = before.config, before.tokenizer, before.train
    used = prompt_format_for(tokenizer, config.prompt_format)
    limit = min((n for n in (config.max_length, context_length(before.model)) if n is not None), default=math.inf)
    completions = dict.fromkeys(
        (p.prompt, r) for listed in train.pairs.values() for p in listed for r in (p.chosen, p.rejected)
    )
    tokens = {key: encode_sequence(tokenizer, *key, used) for key in completions}
    # Pairs with a longer completion are left out of training, so their rewards, 0 here, are never used.
    fitting = {key: sequence for key, sequence in tokens.items() if len(sequence.ids) <= limit}
    device = torch.device(resolve_device(config.device))
    before.model.to(device)

    def scores(model: torch.nn.Module) -> Tensor:
        return score_sequences(
            model,
            list(fitting.values()),
            batch_size=2 * (config.micro_batch or config.pairs_per_objective),
            pad=pad_token(tokenizer),
            precision=torch.autocast(device.type, torch.bfloat16, enabled=config.autocast == "bf16"),
        )

    reference = scores(before.model)
    found: dict[tuple[str, str], dict[str, float]] = {key: dict.fromkeys(train.objectives, 0.0) for key in tokens}
    for name in train.objectives:
        alone, measured = (
            dataclasses.replace(preferences, pairs={name: preferences.pairs[name]})
            for preferences in (train, before.held_out)
        )
        policy = copy.deepcopy(before.model)
        settings = dataclasses.replace(config.of_one_objective(), eval_every=0)
        before.align(policy, tokenizer, alone, measured, settings, progress=False)
        implied = config.beta * (scores(policy) - reference)
        for key, reward in zip(fitting, implied.tolist(), strict=True):
            found[key][name] = reward
        del policy  # one at a time in memory

    def look_up(prompt: str, response: str) -> Mapping[str, float]:
        return found[prompt, response]

    return look_up


def modpo_loss(margins: Tensor, reward_margins: Tensor, beta: float, weight: float) -> Tensor:
    """MODPO's loss of each pair of objective k: −log σ((βh − m) / w_k).

    m = Σ_{i≠k} w_i (r_i(chosen) − r_i(rejected)) is what the rewards of the other objectives say about the pair. Where
    they prefer the chosen completion, a smaller margin h is enough; where they prefer the rejected one, h has to be
    larger. With m = 0 and w_k = 1 this is DPO.

    Args:
        margins: h, as in `dpo_loss`, of any shape.
        reward_margins: m, of the same shape, in the unit of the rewards; that of βh for the implicit rewards of DPO
            models, r_i = β (log π_i − log π_ref).
        beta: > 0.
        weight: w_k in (0, 1], the objective's share of the weights, which sum to 1.

    Returns:
        Loss of each pair, the shape and dtype of `margins`.

    Raises:
        ValueError: an argument outside the ranges above.

    Source: Zhou et al. 2024, *Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization*
    (arXiv 2310.03708).
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 < weight <= 1:
        raise ValueError(f"weight must be in (0, 1], got {weight}: the weights of all objectives sum to 1")
    return -F.logsigmoid((beta * margins - reward_margins) / weight)
