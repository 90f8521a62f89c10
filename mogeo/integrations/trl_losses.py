"""TRL's DPO loss of several objectives from one forward. Only this file knows how TRL computes its loss.

TRL has no function from log-probabilities to the loss of a pair: forward passes, formulas and metrics are all in the
method `DPOTrainer._compute_loss(model, inputs, return_outputs)`. We call that method instead of copying its formulas.
The first call gets the real model, whose output is kept. Then there is one call per objective, with a stand-in that
returns the kept output: without the pairs that have no label, and with the two answers swapped where the label is −1.
So every loss type that TRL has, or will have, works as in TRL.

This takes the following for granted; tests/integrations/test_trl_privates.py tells what a new version of TRL changes:

- `_compute_loss` calls its argument `model` once, and takes log-probabilities from its output only. Of `inputs` it
reads
  `input_ids`, `attention_mask` and `completion_mask`, in which chosen answers come first and rejected ones after them.
- With `self.precompute_ref_logps` it takes the reference's log-probabilities from `inputs`, after it has called
`model`.
  They are what `compute_ref_log_probs(model, inputs)` returns.
- Metrics are added to `self._metrics[mode][name]` and to `self._total_train_tokens`. Those about pairs go through
  `self.accelerator.gather`, those about tokens through `gather_for_metrics`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# Fields of a model's output: those that the loss is computed from, and those that are only logged.
_FOR_THE_LOSS = ("log_probs", "log_sum_sq_probs")
_ONLY_LOGGED = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class LabelledLoss:
    """The loss of an objective over the pairs that have a label for it, and metrics. All are scalars on the device.

    Attributes:
        loss: mean over those pairs, differentiable.
        accuracy: share of pairs in which the preferred answer has the higher reward.
        margin: mean of the preferred answer's reward minus the other's.
    """

    loss: Tensor
    accuracy: Tensor
    margin: Tensor


class ScoredPairs:
    """A batch of B pairs, whose forward is run when this is made.

    Args:
        trainer: a DPOTrainer.
        compute_loss: its method `_compute_loss`.
        model: called once, with gradients if they are enabled.
        inputs: what TRL's collator made of the pairs.
        return_outputs: whether to have TRL compute `outputs`, too, which is deprecated and takes another forward.

    Attributes:
        outputs: these outputs, or None.
    """

    def __init__(
        self,
        trainer: Any,
        compute_loss: Callable[..., Any],
        model: Callable[..., Any],
        inputs: dict[str, Any],
        return_outputs: bool = False,
    ) -> None:
        self._trainer, self._compute_loss = trainer, compute_loss
        self._inputs = dict(inputs)
        self._scored: Any = None
        reference_is_due = not trainer.precompute_ref_logps

        def scored_once(**options: Any) -> Any:
            outputs = model(**options)
            if self._scored is None:
                self._scored = outputs
                if reference_is_due:
                    # After the model, as in TRL, so that dropout draws the same random numbers.
                    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
                    self._inputs.update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
            return outputs

        with _replaced(trainer, precompute_ref_logps=True):
            result = compute_loss(scored_once, self._inputs, return_outputs)
        self.outputs = result[1] if return_outputs else None

    def under(self, labels: Sequence[int]) -> LabelledLoss:
        """The loss of one objective.

        Args:
            labels: the objective's label of each pair, +1, 0 or −1; not all 0.
        """
        count = len(labels)
        chosen = [pair if label > 0 else pair + count for pair, label in enumerate(labels) if label]
        rejected = [pair + count if label > 0 else pair for pair, label in enumerate(labels) if label]
        rows = chosen + rejected

        def pick(values: Tensor) -> Tensor:
            if rows == list(range(2 * count)):
                return values
            return values.index_select(0, torch.tensor(rows).to(values.device, non_blocking=True))

        inputs = {name: pick(self._inputs[name]) for name in ("input_ids", "attention_mask", "completion_mask")}
        reference = torch.cat([self._inputs["ref_chosen_logps"], self._inputs["ref_rejected_logps"]])
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = pick(reference).chunk(2)
        outputs = {name: getattr(self._scored, name, None) for name in _FOR_THE_LOSS}
        replay = SimpleNamespace(
            **{name: None if values is None else pick(values) for name, values in outputs.items()},
            **dict.fromkeys(_ONLY_LOGGED, _Unlogged()),
            aux_loss=getattr(self._scored, "aux_loss", None),
        )
        metrics: dict[str, dict[str, list[Any]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        with _replaced(
            self._trainer,
            precompute_ref_logps=True,
            accelerator=_Unasked(self._trainer.accelerator.device),
            _metrics=metrics,
            _total_train_tokens=0,
        ):
            loss = self._compute_loss(lambda **_: replay, inputs, False)
        (logged,) = [of_mode for of_mode in metrics.values() if of_mode]
        return LabelledLoss(loss, logged["rewards/accuracies"][0], logged["rewards/margins"][0])

    def nothing(self) -> Tensor:
        """A loss of 0 whose backward reaches all parameters, for a rank without labels that others wait for."""
        loss: Tensor = (self._scored.log_probs * 0.0).sum()
        return loss


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within this context, attributes of an object have other values."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


class _Unasked:
    """Takes the place of the accelerator when a loss is computed from the kept output.

    The real one would gather metrics over ranks each time. This one leaves them where they are, so that no rank waits
    for another, and the host does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gather(self, values: Tensor) -> _Unread:
        return _Unread(values)

    def gather_for_metrics(self, values: Any) -> Tensor:
        return torch.zeros(())  # about tokens; the call with the real model has logged it


class _Unread:
    """A metric whose `item()` returns it as a tensor: reading its value would wait for the device."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def mean(self) -> _Unread:
        return _Unread(self.values.mean())

    def item(self) -> Tensor:
        return self.values


class _Unlogged:
    """Takes the place of values per token that are only logged: selecting them by a mask would wait for the device."""

    def itself(self, *_: Any, **__: Any) -> _Unlogged:
        return self

    __getitem__ = __mul__ = __and__ = detach = sum = itself

    def chunk(self, *_: Any, **__: Any) -> tuple[_Unlogged, _Unlogged]:
        return self, self
