"""What a run's records say about why its method did what it did: conflicts, weights, and steps that hurt somebody."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from mogeo.weightings import Weighting, WeightingLike, resolve


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
    - hurt: share of steps whose direction has a negative cosine with some objective's gradient;
    - alignment: mean over steps of the smallest cosine between the direction and a gradient;
    - weight, weight_sd: mean and standard deviation over steps of w / Σw, by objective;
    - memory: correlation of w / Σw with itself a step later, mean over objectives (null where it does not vary);
    - weights: w / Σw of every step, [steps][K].
    """
    steps = [record for record in history if record["kind"] == "train"]
    n = len(objectives)
    cosines = [r["cosines"][i][j] for r in steps for i, j in combinations(range(n), 2)]
    lowest = [min(v for v in r["alignment"].values() if not math.isnan(v)) for r in steps if r["alignment"]]
    weights = [[r["weight"][name] / sum(r["weight"].values()) for name in objectives] for r in steps]
    by_objective = list(zip(*weights, strict=True))
    return {
        "steps": len(steps),
        "conflict": fmean(c < 0 for c in cosines) if cosines else None,
        "hurt": fmean(a < 0 for a in lowest),
        "alignment": fmean(lowest),
        "weight": dict(zip(objectives, map(fmean, by_objective), strict=True)),
        "weight_sd": dict(zip(objectives, map(pstdev, by_objective), strict=True)),
        "memory": _memory(by_objective),
        "weights": [[round(w, 4) for w in step] for step in weights],
    }


def _memory(by_objective: Sequence[Sequence[float]]) -> float | None:
    correlations = []
    for series in by_objective:
        mean = fmean(series)
        spread = sum((w - mean) ** 2 for w in series)
        if spread > 1e-12:
            correlations.append(sum((a - mean) * (b - mean) for a, b in pairwise(series)) / spread)
    return fmean(correlations) if correlations else None
