"""Net win rates and their confidence intervals, from verdicts. Knows no models, no texts, and nothing of who judged.

The interval is the bootstrap's, over prompts: a prompt is drawn with all that belongs to it (its samples, its verdicts
on every objective and every model), so what hangs together stays together, and differences between models are paired.
BCa (bias-corrected and accelerated): Efron, "Better bootstrap confidence intervals", JASA 82 (1987), section 3; the
acceleration by the jackknife over prompts: Efron & Tibshirani, "An introduction to the bootstrap" (1993), eq. 14.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mogeo.judging.judge import Judge

Floats = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class NetWinRates:
    """(wins - losses) / n against the references: -1 all lost, 0 as good as the references, 1 all won."""

    overall: float
    objectives: dict[str, float]

    @property
    def worst(self) -> float:
        """The lowest net win rate of any objective."""
        return min(self.objectives.values())

    @property
    def worst_objective(self) -> str:
        """The objective with the lowest net win rate; of several, the first."""
        return min(self.objectives, key=self.objectives.__getitem__)


def net_win_rates(
    judge: Judge, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]
) -> NetWinRates:
    """Judge one candidate a prompt against one reference a prompt; what is not judged is left out of n.

    Raises ValueError where there is no prompt.
    """
    if not prompts:
        raise ValueError("nothing to judge: there are no prompts")
    verdicts = judge.compare(prompts, candidates, references)
    by_objective = {name: _net([v.objectives[name] for v in verdicts]) for name in judge.objectives}
    return NetWinRates(_net([v.overall for v in verdicts]), by_objective)


def _net(verdicts: Sequence[int | None]) -> float:
    judged = [v for v in verdicts if v is not None]
    return sum(judged) / len(judged) if judged else float("nan")


# ---- with intervals --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number between -1 and 1 (a difference: -2 and 2) and its confidence interval; NaN where nothing was judged."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimates:
    """What the verdicts of M models on Q questions come to."""

    rates: list[list[Estimate]]
    """[M][Q]: net win rates."""
    worst: list[Estimate]
    """[M]: the lowest net win rate of the questions that were named for it; empty where none was."""
    differences: list[list[Estimate]]
    """[M - 1][Q, and the worst]: each model minus the first, paired by prompt."""


def estimate(
    verdicts: Floats, worst_of: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Estimates:
    """Net win rates, the worst of them, and paired differences, each with its bootstrap interval.

    Args:
        verdicts: fp64 [M, P, S, Q] of +1, 0, -1, and NaN for what was not judged: models, prompts, samples, questions.
        worst_of: indices of the questions over whose rates the worst is taken.
        resamples: of the prompts; with 10,000, the error of an interval's end is under a hundredth of its width.
        seed: of the resampling.
        level: of the interval.
    """
    models, prompts, _, questions = verdicts.shape
    judged = ~np.isnan(verdicts)
    # [P, M * Q]: a resample is a count a prompt, and its sums are one matrix product.
    sums = np.where(judged, verdicts, 0.0).sum(2).transpose(1, 0, 2).reshape(prompts, -1)
    counts = judged.sum(2).transpose(1, 0, 2).reshape(prompts, -1).astype(np.float64)

    def statistics(total: Floats, n: Floats) -> Floats:
        """[B, M * Q] sums and numbers → [B, R]: rates, the worst, differences."""
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold nothing that was judged: NaN
            rates = (total / n).reshape(len(total), models, questions)
        if worst_of:
            rates = np.concatenate([rates, rates[:, :, list(worst_of)].min(2, keepdims=True)], 2)
        return np.concatenate([rates, rates[:, 1:] - rates[:, :1]], 1).reshape(len(total), -1)

    found = bca(sums, counts, statistics, resamples=resamples, seed=seed, level=level)
    columns = questions + bool(worst_of)
    table = [found[i : i + columns] for i in range(0, len(found), columns)]
    return Estimates(
        rates=[row[:questions] for row in table[:models]],
        worst=[row[questions] for row in table[:models]] if worst_of else [],
        differences=table[models:],
    )


def bca(
    sums: Floats,
    counts: Floats,
    statistics: Callable[[Floats, Floats], Floats],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Estimate]:
    """BCa intervals of statistics of sums over independent units.

    Args:
        sums: fp64 [P, C], what each unit contributes to C sums.
        counts: fp64 [P, C], what it contributes to their denominators.
        statistics: ([B, C] sums, [B, C] denominators) -> [B, R].

    Returns R estimates. A statistic that is the same in every resample has an interval without width: that says that
    there are too few units to see it vary, not that it is certain.
    """
    units = len(sums)
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // units)  # counts of at most 32 MB at a time, whatever the number of prompts
    drawn = []
    for start in range(0, resamples, chunk):
        weights = rng.multinomial(units, np.full(units, 1 / units), size=min(chunk, resamples - start)).astype(float)
        drawn.append(statistics(weights @ sums, weights @ counts))
    replicates = np.concatenate(drawn)  # [B, R]
    total, n = sums.sum(0, keepdims=True), counts.sum(0, keepdims=True)
    values = statistics(total, n)[0]
    leave_one_out = statistics(total - sums, n - counts)  # [P, R]
    columns = zip(values.tolist(), replicates.T, leave_one_out.T, strict=True)
    return [_interval(value, column, jackknife, level) for value, column, jackknife in columns]


def _interval(value: float, replicates: Floats, jackknife: Floats, level: float) -> Estimate:
    replicates, jackknife = replicates[~np.isnan(replicates)], jackknife[~np.isnan(jackknife)]
    if np.isnan(value) or not len(replicates):
        return Estimate(value, value, value)
    normal = NormalDist()
    # Rates are multiples of 1/n, so many replicates equal the estimate: half of them count as below it. Equal but for
    # the rounding of a sum, too.
    near = 1e-12
    below = ((replicates < value - near).sum() + 0.5 * (np.abs(replicates - value) <= near).sum()) / len(replicates)
    bias = normal.inv_cdf(float(np.clip(below, 0.5 / len(replicates), 1 - 0.5 / len(replicates))))
    spread = (jackknife.mean() if len(jackknife) else 0.0) - jackknife
    scale = 6 * float((spread**2).sum()) ** 1.5
    acceleration = float((spread**3).sum()) / scale if scale > near else 0.0
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(replicates, ends)
    return Estimate(value, float(low), float(high))
