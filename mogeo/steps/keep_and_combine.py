"""KeepAndCombine: every gradient into a row of its own; Gram matrix, weights, and the rows combined."""

from __future__ import annotations

from torch import Tensor

from mogeo.decide.rules import Direction, Rules
from mogeo.gradients.rows import RowStore
from mogeo.gradients.stores import Captures
from mogeo.losses.named import Call
from mogeo.steps.decider import decider_for
from mogeo.steps.step import Step


class KeepAndCombine(Step):
    """The exact way, for weights that depend on this step's gradients or losses."""

    keep = "rows"

    def finish(self, captures: Captures, rules: Rules) -> Direction:
        """As in `Step`."""
        rows = self._store(captures)
        rows.complete()
        if captures.plain is not None:
            captures.plain.complete()
        count = len(rules.objectives)
        losses, absent = self.losses(count, rows.device), self.absent(count)
        decider = decider_for(rows, captures, rules, absent)
        decided = decider.decide(rows, losses, absent, rules)
        by_parameter = _gram_by_parameter(rows) if rules.gram_by_parameter else None
        self.intact = False
        found: Direction = decider.combined(rows, decided, absent, rules, captures.plain)
        return found._replace(gram_by_parameter=by_parameter)

    def _store(self, captures: Captures) -> RowStore:
        assert captures.rows is not None
        return captures.rows

    def _run(self, call: Call, captures: Captures, rules: Rules) -> None:
        self._each(call, captures, rules, keep_graphs=call.retain_graph)

    def _about_to_run(self, index: int, captures: Captures) -> None:
        self._store(captures).select(index)


def _gram_by_parameter(rows: RowStore) -> Tensor:
    """Over all ranks, fp64 [P, K, K]. A collective."""
    grams = rows.gram_by_parameter()
    return grams if rows.ranks is None else rows.ranks.sum_(grams)
