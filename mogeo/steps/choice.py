"""The one place that chooses how a step is made. A new way is a file beside this one, and a line here."""

from __future__ import annotations

from mogeo.decide.refresh import HeldWeights
from mogeo.decide.rules import Rules
from mogeo.gradients.memory import Memory, Rows, Sketch
from mogeo.steps.keep_and_combine import KeepAndCombine
from mogeo.steps.sketch_then_replay import SketchThenReplay
from mogeo.steps.step import Step
from mogeo.steps.sum_as_they_come import SumAsTheyCome

_TO_SOLVE: dict[type[Memory], type[Step]] = {Rows: KeepAndCombine, Sketch: SketchThenReplay}


def opened_step(rules: Rules, held: HeldWeights, memory: Memory) -> Step:
    """A step without gradients so far: a weighted sum where weights are known, else what `memory` asks for."""
    constant = rules.constant()
    if constant is not None:
        return SumAsTheyCome(constant)
    known = held.known()
    if known is not None:
        # Constant weights are solved for only where gradients are tracked; an objective that was absent from the solve
        # keeps its own.
        return SumAsTheyCome(rules.weighting.constant(len(rules.objectives)) or known, held=True)
    return _TO_SOLVE[type(memory)]()
