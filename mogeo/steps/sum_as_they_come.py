"""SumAsTheyCome: weights known before the backward. Gradients are weighed as autograd brings them, into one sum."""

from __future__ import annotations

import torch
from torch import Tensor

from mogeo.decide.rules import Direction, Rules
from mogeo.gradients.direction import SharedDirection
from mogeo.gradients.stores import Captures
from mogeo.losses.named import Call, Loss, evaluate, run_backward
from mogeo.losses.shared_graphs import leaves_reached
from mogeo.steps.decider import decider_for
from mogeo.steps.step import Step, spoils_a_sum


class SumAsTheyCome(Step):
    """One backward of the weighted sum where losses are tensors, as in plain training; else one per objective.

    Parameters outside the base optimizer get the plain sum of all gradients, as autograd gives it. Where a loss reaches
    such parameters, it therefore has a backward of its own, and only what is caught is weighed.

    Args:
        weights: K of them.
        held: whether an earlier step found them. Rows that it filled then keep their memory.
    """

    def __init__(self, weights: tuple[float, ...], *, held: bool = False) -> None:
        super().__init__()
        self.weights = self._known = weights
        self.held = held
        self.keep = "rows" if held else "direction"
        #: Objectives whose gradients are in the sum.
        self._contributed: set[int] = set()

    def finish(self, captures: Captures, rules: Rules) -> Direction:
        """As in `Step`."""
        direction = captures.direction
        direction.complete()
        if captures.plain is not None:
            captures.plain.complete()
        self.intact = False
        count = len(rules.objectives)
        losses, absent = self.losses(count, direction.device), self.absent(count)
        decider = decider_for(direction, captures, rules, absent)
        found: Direction = decider.weighed_sum(
            direction, self._known, losses, absent, rules, self._contributed, captures.plain
        )
        return found

    def _store(self, captures: Captures) -> SharedDirection:
        return captures.direction

    def _run(self, call: Call, captures: Captures, rules: Rules) -> None:
        if captures.plain is None and all(_adds_exactly(loss) for _, _, loss in call.terms):
            losses = [loss for _, _, loss in call.terms if isinstance(loss, Tensor)]
            if self._may_sum(losses, captures):
                self._sum(call, captures, rules)
                return
        self._each(call, captures, rules, keep_graphs=call.retain_graph)

    def _may_sum(self, losses: list[Tensor], captures: Captures) -> bool:
        """Whether losses may be summed, weighed, before their backward: not if they reach parameters outside the base
        optimizer, which get the plain sum of all gradients.

        Leaves that are no parameters do not count: every forward makes them anew, as `enable_input_require_grads` does.
        """
        return not any(isinstance(leaf, torch.nn.Parameter) for leaf in self._outside(losses, captures))

    def _outside(self, losses: list[Tensor], captures: Captures) -> list[Tensor]:
        """Leaves outside the base optimizer that these losses reach.

        Graphs of FSDP2 end in parameters that it gathered, which cannot be told from others: there, none are seen.
        """
        return [] if captures.direction.sharded else leaves_reached(losses, captures.belongs)

    def _about_to_run(self, index: int, captures: Captures) -> None:
        captures.direction.weigh(self._known[index])

    def _skips(self, index: int, loss: Tensor, value: Tensor, captures: Captures, rules: Rules) -> bool:
        if spoils_a_sum(value, captures, rules):
            return True
        if self._known[index] != 0:
            self._contributed.add(index)
            return False
        return captures.plain is None and self._may_sum([loss], captures)

    def _all_of_weight_zero(self) -> bool:
        return not self._contributed

    def _sum(self, call: Call, captures: Captures, rules: Rules) -> None:
        """One backward of the weighted sum of loss tensors."""
        direction = captures.direction
        direction.weigh(1.0)  # the weights are in the sum
        losses: dict[str, Tensor] = {}
        summands: dict[str, Tensor] = {}
        with torch.enable_grad():
            for index, name, term in call.terms:
                loss = losses[name] = evaluate(name, term).reshape(())
                if not self._skips(index, loss, self._add_loss(index, loss), captures, rules):
                    summands[name] = loss * self._known[index]
            if not summands and direction.sharded:  # as in `Step._each`
                direction.weigh(0.0)
                summands = losses
            if summands:
                total = torch.stack([summand.double() for summand in summands.values()]).sum()
        if summands:
            with self._around(list(losses.values()), captures):
                run_backward(" + ".join(summands), total, call.backward, call.retain_graph)
        captures.collect(direction)


def _adds_exactly(loss: Loss) -> bool:
    """Whether a weighted sum of such losses has exact enough gradients: a weight in bf16 is off by 0.2 %."""
    return isinstance(loss, Tensor) and loss.dtype in (torch.float32, torch.float64)
