"""Variants of MGDA-Decoupled, and a training loop for them: would any make adaptive weights pay?

The loop can do what `align` cannot: take the weights from other pairs than the step's, or from more; average them over
steps; and change labels half-way. Without any of that it gives what `align` gives, but for rounding, as a test checks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from alignment.explain import Measured
from mogeo import MultiObjectiveOptimizer
from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Preferences
from mogeo.dpo.log_probs import sequence_log_probs
from mogeo.dpo.losses import dpo_loss
from mogeo.dpo.scoring import score_sequences
from mogeo.dpo.tokens import ShuffledEpochs, collate, tokenize_preferences
from mogeo.weightings import MGDA, Weighting, WeightingLike, resolve


class Smoothed(Weighting):
    """Weights as an exponential average over steps: λ ← aλ + (1 − a)λ̂ (CR-MOGM, Zhou et al., NeurIPS 2022)."""

    def __init__(self, inner: WeightingLike, decay: float) -> None:
        self.inner, self.decay = resolve(inner), decay
        self.average: Tensor | None = None

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        new = self.inner(gram, losses)
        self.average = new if self.average is None else self.decay * self.average + (1 - self.decay) * new
        return self.average


class SmoothedGram(Weighting):
    """Weights from an exponential average of the Gram matrix and of the losses."""

    def __init__(self, inner: WeightingLike, decay: float) -> None:
        self.inner, self.decay = resolve(inner), decay
        self.average: tuple[Tensor, Tensor] | None = None

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        assert gram is not None
        if self.average is None:
            self.average = gram, losses
        else:
            a = self.decay
            self.average = a * self.average[0] + (1 - a) * gram, a * self.average[1] + (1 - a) * losses
        return self.inner(*self.average)


class Descent(Weighting):
    """The direction nearest to the inner one that hurts no objective: v = Gᵀ(w + μ), μ ≥ 0."""

    def __init__(self, inner: WeightingLike) -> None:
        self.inner = resolve(inner)

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        assert gram is not None
        weights = self.inner(gram, losses)
        # min ‖Gᵀ(w + μ)‖² over μ ≥ 0, with RᵀR = M.
        values, vectors = np.linalg.eigh(gram.numpy())
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        return weights + torch.from_numpy(nnls(root, -root @ weights.numpy())[0])


class Given(Weighting):
    """Weights that are set from outside before each step."""

    weights: Tensor

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        return self.weights


@dataclass(frozen=True)
class Variant:
    """How the weights of a step are found.

    Attributes:
        weighting: what finds them.
        gram_batches: number of batches that they are found on, the step's own included.
        apart: whether they are found on another batch than the step's own (MoDo's double sampling).
    """

    weighting: Any
    gram_batches: int = 1
    apart: bool = False


DECOUPLED = "mgda-decoupled"


def variant(name: str) -> Variant:
    """`smoothed(0.9)`, `smoothed gram(0.9)`, `gram of 4`, `apart`, `loss+`, `loss^2`, `descent`; or a weighting."""
    number = float(match[1]) if (match := re.search(r"([\d.]+)\)?$", name)) else 0.0
    if name.startswith("smoothed gram"):
        return Variant(SmoothedGram(DECOUPLED, number))
    if name.startswith("smoothed"):
        return Variant(Smoothed(DECOUPLED, number))
    if name.startswith("gram of"):
        return Variant(DECOUPLED, gram_batches=int(number))
    special = {
        "apart": Variant(DECOUPLED, apart=True),
        "loss+": Variant(MGDA("loss+")),
        "loss^2": Variant(MGDA("loss", power=2.0)),
        "descent": Variant(Descent(DECOUPLED)),
    }
    return special.get(name) or Variant(resolve(name))


def train(
    model: Any, tokenizer: Any, halves: Sequence[Preferences], config: AlignConfig, name: str
) -> list[dict[str, Any]]:
    """Align `model` in place; records as `align` writes them.

    Args:
        halves: the training pairs of the first and the second half of the steps: the same pairs, labels apart.
        config: `max_steps` is needed; loss, clipping, micro-batches and devices are not looked at.
        name: see `variant`.
    """
    chosen = variant(name)
    steps, per_step = config.steps(0), config.pairs_per_objective
    pad = tokenizer.pad_token_id
    phases = []
    for preferences in halves:
        tokens = tokenize_preferences(preferences, tokenizer, config.prompt_format, None)
        phases.append(
            (
                tokens,
                score_sequences(model, tokens.sequences, batch_size=2 * per_step, pad=pad, precision=nullcontext()),
            )
        )
    objectives = halves[0].objectives

    def losses(step: int, draws: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """The mean loss of each objective over the pairs of all draws."""
        tokens, reference = phases[int(step > steps // 2)]

        def of(objective: str) -> Tensor:
            flat = tokens.pairs[objective][torch.cat([draw[objective] for draw in draws])].T.flatten()
            batch = collate([tokens.sequences[i] for i in flat.tolist()], pad)
            chosen_scores, rejected = (sequence_log_probs(model, *batch) - reference[flat]).chunk(2)
            return dpo_loss(chosen_scores - rejected, config.beta).mean()

        return {objective: lambda objective=objective: of(objective) for objective in objectives}

    orders = {n: ShuffledEpochs(len(p), per_step, config.seed, n) for n, p in phases[0][0].pairs.items()}
    others = {n: ShuffledEpochs(len(p), per_step, config.seed, f"{n}, others") for n, p in phases[0][0].pairs.items()}
    parameters = list(model.parameters())
    given = Given() if chosen.apart or chosen.gram_batches > 1 else None
    adam = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    weighting = Measured(chosen.weighting if given is None else given)
    optimizer = MultiObjectiveOptimizer(adam, weighting, objectives=objectives)
    probe = MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.0), chosen.weighting, objectives=objectives)
    history = []
    model.train()
    torch.manual_seed(config.seed)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, steps)
        own = {n: order(step) for n, order in orders.items()}
        if given is not None:
            more = range((step - 1) * chosen.gram_batches + 1, step * chosen.gram_batches + (1 if chosen.apart else 0))
            extra = [{n: order(i) for n, order in others.items()} for i in more]
            probe.backward(losses(step, extra if chosen.apart else [own, *extra]))
            given.weights = probe.combine().weights
            probe.zero_grad()
        optimizer.zero_grad()
        optimizer.backward(losses(step, [own]))
        told = optimizer.combine().to_dict()
        optimizer.step()
        history.append(
            {
                "kind": "train",
                "step": step,
                "loss": told["losses"],
                "weight": told["weights"],
                "cosines": told["cosines"],
                "alignment": told["alignment"],
            }
        )
    model.eval()
    return history
