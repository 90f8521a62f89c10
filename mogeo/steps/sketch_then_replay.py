"""SketchThenReplay: a sketch of every gradient, weights from the sketches, and every loss once more, weighed.

No gradient of all elements is kept beside the direction. Where sketches hold the gradients themselves (d ≥ N), the
direction is read from them, and nothing is run twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mogeo.decide import on_host
from mogeo.decide.rules import Direction, Rules
from mogeo.gradients.sketches import SketchedRows
from mogeo.gradients.stores import Captures, Wanted
from mogeo.losses.named import Call
from mogeo.losses.repeatable import Repeatable, without_autocast
from mogeo.steps.step import Step
from mogeo.steps.sum_as_they_come import SumAsTheyCome


class SketchThenReplay(Step):
    """Two passes: sketches first, then `SumAsTheyCome` over every call again."""

    keep = "sketches"

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Call] = []
        self._wanted: Wanted | None = None

    def take(self, call: Call, captures: Captures, wanted: Wanted, rules: Rules, *, is_open: bool) -> None:
        """As in `Step`."""
        self._wanted = wanted
        super().take(call, captures, wanted, rules, is_open=is_open)

    def finish(self, captures: Captures, rules: Rules) -> Direction:
        """As in `Step`.

        Raises:
            RuntimeError: also where parameters were added, frozen or unfrozen since `take`, or where a callable does
                not return the same the second time.
        """
        sketches, direction = self._store(captures), captures.direction
        assert self._wanted is not None
        if self._calls and captures.changed(self._wanted.groups()):
            self.intact = False
            raise RuntimeError(
                "parameters were added, removed, frozen or unfrozen between backward() and step(), and the second "
                "backward that sketch= takes would miss them, or bring gradients that the first one did not have: "
                "change them after step() or zero_grad()"
            )
        sketches.complete()
        count = len(rules.objectives)
        absent = self.absent(count)
        decided = on_host.decide(sketches, self.losses(count, sketches.device), absent, rules)
        self.intact = False
        if decided.usable:
            # With nonfinite="propagate", all gradients are summed, so that what is not finite reaches the direction.
            weights = torch.ones_like(decided.weights) if decided.poisoned else decided.weights
            if sketches.exact:
                with direction.capturing():  # `p.grad` may be the last direction, which is overwritten now
                    sketches.combine_into(direction, weights)
            else:
                self._replay(captures, rules, weights, check=not decided.poisoned)
            direction.complete()
        if captures.plain is not None:
            captures.plain.complete()
        return on_host.summed(direction, decided, absent, rules, captures.plain)

    def _replay(self, captures: Captures, rules: Rules, weights: Tensor, *, check: bool) -> None:
        """Every call once more, its gradients weighed into the direction."""
        evaluated_again = any(isinstance(loss, Repeatable) for call in self._calls for _, _, loss in call.terms)
        again = _SecondPass(tuple(weights.tolist()))
        if captures.plain is not None:
            captures.plain.drop()
        with torch.enable_grad(), without_autocast():
            while self._calls:
                call = self._calls.pop(0)
                with captures.capturing(captures.direction, len(rules.objectives)):
                    again._run(call, captures, rules)
        if check and evaluated_again and self._store(captures).contradicts(captures.direction, weights):
            raise RuntimeError(
                f"the losses {', '.join(map(repr, rules.objectives))} were evaluated twice, as sketch= needs it, and "
                "their gradients were not the same the second time, although their values were: does a callable draw "
                "its batch, or random numbers from a generator of its own? Draw the batch before, and let the callable "
                "only compute; or hand over loss tensors, or use memory=Rows()"
            )

    def _store(self, captures: Captures) -> SketchedRows:
        assert captures.sketches is not None
        return captures.sketches

    def _run(self, call: Call, captures: Captures, rules: Rules) -> None:
        if self._store(captures).exact:
            self._each(call, captures, rules, keep_graphs=call.retain_graph)
            return
        terms = [t if isinstance(t.loss, Tensor) else t._replace(loss=Repeatable(t.name, t.loss)) for t in call.terms]
        call = call._replace(terms=terms)
        self._calls.append(call)
        self._each(call, captures, rules, keep_graphs=True)

    def _about_to_run(self, index: int, captures: Captures) -> None:
        self._store(captures).select(index)


class _SecondPass(SumAsTheyCome):
    """A weighted sum after which leaves outside the base optimizer hold what the first pass gave them."""

    def _may_sum(self, losses: list[Tensor], captures: Captures) -> bool:
        return True

    def _skips(self, index: int, loss: Tensor, value: Tensor, captures: Captures, rules: Rules) -> bool:
        if captures.plain is None and self._known[index] == 0:
            return True
        return super()._skips(index, loss, value, captures, rules)

    @contextmanager
    def _around(self, losses: list[Tensor], captures: Captures) -> Iterator[None]:
        outside = self._outside(losses, captures)
        before = [parameter.grad for parameter in outside]
        for parameter in outside:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, grad in zip(outside, before, strict=True):
                parameter.grad = grad
