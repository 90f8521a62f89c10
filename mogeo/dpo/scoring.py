"""Score sequences with a model, and preferences with scores. Must not know about training, files or optimizers."""

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
    """How a policy orders preference pairs that it was not trained on; every dict is keyed by objective.

    With h the margin of a pair, (log π − log π_ref)(chosen) − (log π − log π_ref)(rejected), in nats:
    """

    accuracy: dict[str, float]
    """Share of pairs with h > 0; h = 0 counts one half, so that the reference itself has 0.5 by definition."""
    margin: dict[str, float]
    """Mean of β·h, the difference of the implicit rewards."""
    likelihood_accuracy: dict[str, float]
    """Share of pairs with log π(chosen) > log π(rejected), without a reference: it says something untrained too."""
    pairs: dict[str, int]
    """Number of pairs."""

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
    """Log-probability of every completion under the model in evaluation mode: fp32 [len(sequences)], on the CPU.

    The same sequences, batch size and weights give the same numbers, bit for bit, on one machine.

    Args:
        model: a causal language model; its training mode is restored.
        sequences: what to score.
        batch_size: sequences at once.
        pad: token id to pad with.
        precision: autocast context of the forward pass; entered once a batch, so it has to be reusable.
        on_batch: called with the number of sequences done, for a progress bar.
        log_probs: what to call with the tensors of a batch; by default `sequence_log_probs` of the model.
        ranks: processes that share the batches out, all of them in this call; each gets all scores.
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
                # Where none is left for this rank, it still takes part in the forward, and forgets the result.
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
    """Preference accuracy and reward margin of each objective, from the scores of `preferences.sequences`."""
    accuracy, margin, likelihood = {}, {}, {}
    for name, pairs in preferences.pairs.items():
        ratio = (policy - reference).double()
        h = ratio[pairs[:, 0]] - ratio[pairs[:, 1]]
        accuracy[name] = _share_positive(h)
        margin[name] = beta * h.mean().item()
        likelihood[name] = _share_positive(policy[pairs[:, 0]] - policy[pairs[:, 1]])
    return Evaluation(accuracy, margin, likelihood, {name: len(pairs) for name, pairs in preferences.pairs.items()})


def _share_positive(values: Tensor) -> float:
    """Share of values above zero, a value of exactly zero counting one half."""
    return float((0.5 * (values.sign() + 1)).double().mean())
