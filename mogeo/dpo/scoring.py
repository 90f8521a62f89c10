"""Score sequences with a model, and measure preference accuracy from the scores. Knows no training and no files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mogeo.dpo.log_probs import sequence_log_probs
from mogeo.dpo.processes import Processes
from mogeo.dpo.tokens import TokenizedPreferences, TokenSequence, by_length, collate


@dataclass(frozen=True)
class Evaluation:
    """How well a policy orders preference pairs that it was not trained on, by objective.

    h is the margin of a pair, see `mogeo.dpo.losses`.

    Attributes:
        accuracy: share of pairs with h > 0. A pair with h = 0 counts one half, so the reference model has 0.5.
        margin: mean of β·h, the difference between the implicit rewards of the two completions.
        likelihood_accuracy: share of pairs with log π(chosen) > log π(rejected). The reference is not used, so this
            differs from 0.5 before training, too.
        pairs: number of pairs.
    """

    accuracy: dict[str, float]
    margin: dict[str, float]
    likelihood_accuracy: dict[str, float]
    pairs: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dict(vars(self))


def score_sequences(
    model: torch.nn.Module,
    sequences: list[TokenSequence],
    *,
    batch_size: int,
    pad: int,
    precision: AbstractContextManager[Any],
    on_batch: Callable[[int], object] | None = None,
    log_probs: Callable[..., Tensor] | None = None,
    ranks: Processes | None = None,
) -> Tensor:
    """The log-probability of every completion, under the model in evaluation mode.

    On one machine, the same sequences, batch size and weights give the same bits.

    Args:
        model: a causal language model. It is in training mode afterwards if it was before.
        sequences: what to score.
        batch_size: sequences that go through the model at once.
        pad: token id to pad with.
        precision: autocast context for the forward pass. It is entered once per batch.
        on_batch: called with the number of sequences of each batch, for a progress bar.
        log_probs: called with the tensors of a batch; None: `sequence_log_probs` of the model.
        ranks: processes that share the batches out. All of them have to call this, and each gets all scores.

    Returns:
        fp32 [len(sequences)], in nats, on the CPU.
    """
    log_probs, ranks = log_probs or partial(sequence_log_probs, model), ranks or Processes()
    device = next(model.parameters()).device
    scores = torch.zeros(len(sequences), dtype=torch.float32)
    batches = list(by_length(sequences, batch_size))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(batches), ranks.size):
                together = batches[start : start + ranks.size]
                # If there is no batch left for this rank, it runs another rank's batch, since with FSDP2 all ranks have
                # to take part in a forward, and its result is not used.
                indices = together[min(ranks.rank, len(together) - 1)]
                batch = collate([sequences[i] for i in indices], pad).to(device)
                with precision:
                    result = log_probs(*batch).cpu()
                if ranks.rank < len(together):
                    scores[indices] = result
                if on_batch is not None:
                    on_batch(sum(map(len, together)))
    finally:
        model.train(training)
    return ranks.sum_(scores)


def evaluate_preferences(
    policy: Tensor, reference: Tensor, preferences: TokenizedPreferences, beta: float
) -> Evaluation:
    """Preference accuracy and reward margin of each objective.

    Args:
        policy: log-probability of each of `preferences.sequences` under the policy, fp32 [n].
        reference: the same under the reference model.
        preferences: the pairs.
        beta: strength of the pull towards the reference.
    """
    accuracy, margin, likelihood = {}, {}, {}
    for name, pairs in preferences.pairs.items():
        ratio = (policy - reference).double()
        h = ratio[pairs[:, 0]] - ratio[pairs[:, 1]]
        accuracy[name] = _share_positive(h)
        margin[name] = beta * h.mean().item()
        likelihood[name] = _share_positive(policy[pairs[:, 0]] - policy[pairs[:, 1]])
    return Evaluation(accuracy, margin, likelihood, {name: len(pairs) for name, pairs in preferences.pairs.items()})


def _share_positive(values: Tensor) -> float:
    """Share of values above zero, where a value of exactly zero counts one half."""
    return float((0.5 * (values.sign() + 1)).double().mean())
