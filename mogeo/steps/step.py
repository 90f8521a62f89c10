"""Step: what all ways to make a step have in common. Knows losses, gradient stores and rules; no optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mogeo.decide.rules import Direction, Rules
from mogeo.geometry.constants import constant_tensor
from mogeo.gradients.ranks import value_of
from mogeo.gradients.store import GradientStore
from mogeo.gradients.stores import Captures, Keep, Wanted
from mogeo.losses.named import Call, evaluate, run_backward
from mogeo.losses.shared_graphs import shared_with_later


class Step(ABC):
    """Takes what `backward` brings, call by call, and makes one direction of it.

    Attributes:
        keep: what is kept of gradients until the direction is known.
        weights: K of them, if they are known beforehand; else None.
        held: whether an earlier step found these weights.
        intact: whether the step can be finished again after `finish` raised: nothing it needs has been overwritten.
    """

    keep: Keep
    weights: tuple[float, ...] | None = None
    held = False

    def __init__(self) -> None:
        self.intact = True
        self._losses: dict[int, Tensor] = {}

    # what optimizers ask

    def take(self, call: Call, captures: Captures, wanted: Wanted, rules: Rules, *, is_open: bool) -> None:
        """Forward and backward of every loss of a call.

        Args:
            call: what `backward` got.
            captures: where gradients are caught.
            wanted: parameters, objectives, and how to keep gradients.
            rules: of the optimizer.
            is_open: whether this step has taken calls before.

        Raises:
            ValueError: no loss depends on a parameter that the base optimizer has.
        """
        captures.fit(wanted, self.keep, is_open)
        store = self._store(captures)
        with captures.capturing(store, len(wanted.names)):
            self._run(call, captures, rules)
        if call.terms and not self._all_of_weight_zero() and not captures.touched(store):
            raise ValueError(
                "no loss reached a parameter of the base optimizer: was the model copied, or its parameters "
                "replaced, after the optimizer was made?" + store.ranks_hint()
            )

    @abstractmethod
    def finish(self, captures: Captures, rules: Rules) -> Direction:
        """Weights, as far as they are not known, and the direction, in `captures.direction`. A collective.

        Raises:
            NonFiniteError: something is not finite, and the rules say raise.
            ValueError: a loss ≤ 0 under a weighting that divides by it.
            RuntimeError: the weighting did not return one finite weight per objective.
        """

    def losses(self, count: int, device: torch.device) -> Tensor:
        """Sums of losses, fp64 [K], NaN where absent."""
        nan = constant_tensor((torch.nan,), torch.float64, device)[0]
        return torch.stack([self._losses.get(k, nan).to(device, non_blocking=True) for k in range(count)])

    def absent(self, count: int) -> tuple[bool, ...]:
        """Which objectives no call brought."""
        return tuple(k not in self._losses for k in range(count))

    # what subclasses say

    @abstractmethod
    def _store(self, captures: Captures) -> GradientStore:
        """What gradients go to."""

    @abstractmethod
    def _run(self, call: Call, captures: Captures, rules: Rules) -> None:
        """Forward and backward of every loss of a call, while gradients are caught."""

    @abstractmethod
    def _about_to_run(self, index: int, captures: Captures) -> None:
        """The backward of objective `index` comes next."""

    def _skips(self, index: int, loss: Tensor, value: Tensor, captures: Captures, rules: Rules) -> bool:
        """Whether no backward is needed of a loss, `value` being its number, fp64 [].

        By default gradients are kept apart by objective, and only those of groups with multi_objective=False summed:
        a loss that is not finite must not reach that sum.
        """
        return captures.plain is not None and spoils_a_sum(value, captures, rules)

    def _all_of_weight_zero(self) -> bool:
        """Whether no gradient is expected, since every loss so far has weight 0."""
        return False

    @contextmanager
    def _around(self, losses: list[Tensor], captures: Captures) -> Iterator[None]:
        """Surrounds the backward of these losses."""
        yield

    # what they have in common

    def _each(self, call: Call, captures: Captures, rules: Rules, *, keep_graphs: bool) -> None:
        """One backward per objective; graphs of tensors are kept for a later loss that shares them, or all of them."""
        store = self._store(captures)
        tensors = [loss for _, _, loss in call.terms if isinstance(loss, Tensor)]
        shared = iter([True] * len(tensors) if keep_graphs else shared_with_later(tensors))
        for index, name, term in call.terms:
            needed_later = isinstance(term, Tensor) and next(shared)
            self._about_to_run(index, captures)
            loss = evaluate(name, term)
            value = self._add_loss(index, loss)
            # FSDP gathers parameters for a forward, and frees them in its backward: that must run in any case.
            if store.sharded or not self._skips(index, loss, value, captures, rules):
                with self._around([loss], captures):
                    run_backward(name, loss, call.backward, call.retain_graph or needed_later)
            captures.collect(store)
            del loss  # or the next callable runs while this graph is still alive

    def _add_loss(self, index: int, loss: Tensor) -> Tensor:
        """Add to the sum of an objective's losses; returns the value added, fp64 []."""
        value = value_of(loss.detach()).to(torch.float64, copy=True).reshape(())
        self._losses[index] = self._losses[index] + value if index in self._losses else value
        return value


def spoils_a_sum(value: Tensor, captures: Captures, rules: Rules) -> bool:
    """Whether a loss is not finite, so that its gradient must not be added to others.

    Where the host would have to wait for a device to know, or other ranks for this one's backward, it is not asked, and
    what was summed counts for all or nothing.
    """
    store = captures.direction
    asks = rules.nonfinite != "propagate" and not (store.ranks or store.sharded)
    return asks and not decided_on_device(store, captures, rules) and not bool(value.isfinite())


def decided_on_device(store: GradientStore, captures: Captures, rules: Rules) -> bool:
    """Whether the device decides this step, and the host hears of it later."""
    return store.device_code is not None and rules.nonfinite != "raise" and captures.plain is None
