"""What a run's records say about why its method did what it did: conflicts, weights, and steps that hurt somebody."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean, median, pstdev
from typing import Any

from torch import Tensor

from mogeo.figures.records import ROUNDING
from mogeo.weightings import Weighting, WeightingLike, resolve

HURT = -ROUNDING
"""A cosine below it counts as hurting, as in `mogeo.StepReport.hurt`: above, rounding can make it negative."""


class Measured(Weighting):
    """A weighting for which the Gram matrix is always computed, so that conflicts can be counted.

    Without this, the optimizer only sums gradients where weights are constant, and has no Gram matrix. The weights are
    those of the inner weighting, so the run is the same but for rounding.
    """

    def __init__(self, inner: WeightingLike) -> None:
        self.inner: Any = resolve(inner)
        self.needs_positive_losses = getattr(self.inner, "needs_positive_losses", False)

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        weights: Tensor = self.inner(gram, losses)
        return weights

    def __repr__(self) -> str:
        return repr(self.inner)


def explain(history: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> dict[str, Any]:
    """Over the training steps of a run's records:

    - conflict: share of (step, pair of objectives) whose gradients have a negative cosine;
    - hurt: share of steps whose direction has a negative cosine with some objective's gradient, as the run's reports
      have it: with the mean gradient, where gradients are tracked, and with that of the mini-batch otherwise. Of those
      steps in which some cosine is known (null: in none);
    - alignment: mean over steps of the smallest cosine between the direction and a gradient, where one is known;
    - hurt_by_objective: the share of the steps that hurt each, of those in which that is known (null: in none);
    - evidence, noise_scale: by objective, mean and median over the steps (null without tracking, and where unknown);
    - weight, weight_sd: mean and standard deviation over steps of w / Σw, by objective;
    - memory: correlation of w / Σw with itself a step later, mean over objectives (null where it does not vary);
    - weights: w / Σw of every step, [steps][K].
    """
    steps = [record for record in history if record["kind"] == "train"]
    n = len(objectives)
    cosines = [r["cosines"][i][j] for r in steps for i, j in combinations(range(n), 2)]
    known = [_known(r["alignment"]) for r in steps if r["alignment"]]
    lowest = [min(each.values()) for each in known if each]
    weights = [[r["weight"][name] / sum(r["weight"].values()) for name in objectives] for r in steps]
    by_objective = list(zip(*weights, strict=True))
    return {
        "steps": len(steps),
        "conflict": fmean(c < 0 for c in cosines) if cosines else None,
        "hurt": fmean(a < HURT for a in lowest) if lowest else None,
        "alignment": fmean(lowest) if lowest else None,
        "hurt_by_objective": {name: _mean([float(e[name] < HURT) for e in known if name in e]) for name in objectives},
        "evidence": _by_objective(steps, "evidence", objectives, fmean),
        "noise_scale": _by_objective(steps, "noise_scale", objectives, median),
        "weight": dict(zip(objectives, map(fmean, by_objective), strict=True)),
        "weight_sd": dict(zip(objectives, map(pstdev, by_objective), strict=True)),
        "memory": _memory(by_objective),
        "weights": [[round(w, 4) for w in step] for step in weights],
    }


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    """Without the objectives of which a report cannot tell."""
    return {name: value for name, value in values.items() if value is not None and not math.isnan(value)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _by_objective(
    steps: Sequence[Mapping[str, Any]], key: str, objectives: Sequence[str], of: Callable[[list[float]], float]
) -> dict[str, float | None] | None:
    """A statistic over the steps of a number that records have by objective, where it is known."""
    told = [_known(record[key]) for record in steps if record.get(key) is not None]
    if not told:
        return None
    values = {name: [each[name] for each in told if name in each] for name in objectives}
    return {name: of(known) if known else None for name, known in values.items()}


def _memory(by_objective: Sequence[Sequence[float]]) -> float | None:
    correlations = []
    for series in by_objective:
        mean = fmean(series)
        spread = sum((w - mean) ** 2 for w in series)
        if spread > 1e-12:
            correlations.append(sum((a - mean) * (b - mean) for a, b in pairwise(series)) / spread)
    return fmean(correlations) if correlations else None
