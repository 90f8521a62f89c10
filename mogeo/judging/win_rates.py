"""Net win rates and their confidence intervals, from verdicts. Knows no models and no texts.

Intervals come from a bootstrap over prompts. A prompt is drawn with all its verdicts: on every sample, every objective
and every model. So verdicts that depend on each other are not taken for independent ones, and differences between
models are paired by prompt. BCa (bias-corrected and accelerated): Efron, "Better bootstrap confidence intervals", JASA
82 (1987), section 3; the acceleration by the jackknife over prompts: Efron & Tibshirani, "An introduction to the
bootstrap" (1993), eq. 14.15.
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
    """Net win rates (wins - losses) / n: -1 if all was lost, 0 if the candidates are as good as the references, 1 if
    all was won.

    Attributes:
        overall: all in all.
        objectives: by objective.
    """

    overall: float
    objectives: dict[str, float]

    @property
    def worst(self) -> float:
        """The lowest net win rate of any objective."""
        return min(self.objectives.values())

    @property
    def worst_objective(self) -> str:
        """The objective with the lowest net win rate; the first, if several have it."""
        return min(self.objectives, key=self.objectives.__getitem__)


def net_win_rates(
    judge: Judge, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]
) -> NetWinRates:
    """Judge one candidate per prompt against one reference per prompt. What is not judged is left out of n.

    Args:
        judge: compares them.
        prompts: [N].
        candidates: [N].
        references: [N].

    Raises:
        ValueError: there are no prompts.
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
    """A net win rate, or a difference of two, and its confidence interval. All NaN if nothing was judged.

    Attributes:
        value: between -1 and 1; a difference is between -2 and 2.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimates:
    """The estimates for M models and Q questions.

    Attributes:
        rates: [M][Q], net win rates.
        worst: [M], the lowest net win rate of some questions; empty if none were named for it.
        differences: [M - 1][Q, and 1 for the worst if there is one], each model minus the first, paired by prompt.
    """

    rates: list[list[Estimate]]
    worst: list[Estimate]
    differences: list[list[Estimate]]


def estimate(
    verdicts: Floats, worst_of: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Estimates:
    """Net win rates, the worst of them, and differences between models, each with its interval.

    Args:
        verdicts: fp64 [models, prompts, samples, questions]: +1, 0, -1, or NaN for what was not judged.
        worst_of: indices of the questions of whose rates the worst is taken.
        resamples: how often prompts are drawn. With 10,000, an end of an interval is off by less than a hundredth of
            the interval's width.
        seed: of the drawing.
        level: probability that an interval holds the true value.
    """
    models, prompts, _, questions = verdicts.shape
    judged = ~np.isnan(verdicts)
    # [P, M * Q]. A resample says how often each prompt was drawn, so that its sums are a matrix product with these.
    sums = np.where(judged, verdicts, 0.0).sum(2).transpose(1, 0, 2).reshape(prompts, -1)
    counts = judged.sum(2).transpose(1, 0, 2).reshape(prompts, -1).astype(np.float64)

    def statistics(total: Floats, n: Floats) -> Floats:
        """From sums and counts, each [B, M * Q], to rates, the worst and differences, [B, R]."""
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN where a resample holds nothing that was judged
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
    """BCa bootstrap intervals of statistics that are computed from sums over independent units.

    Args:
        sums: fp64 [P, C], what each of P units adds to C sums.
        counts: fp64 [P, C], what it adds to their denominators.
        statistics: (sums [B, C], denominators [B, C]) -> [B, R].
        resamples: as in `estimate`.
        seed: as in `estimate`.
        level: as in `estimate`.

    Returns:
        [R] estimates. If a statistic is the same in every resample, its interval has no width. That does not mean that
        it is certain, but that there are too few units to see it vary.
    """
    units = len(sums)
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // units)  # resamples at once: their weights, fp64 [chunk, P], take at most 32 MB
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
    # Rates are multiples of 1/n, so many replicates equal the estimate, but for rounding. Half of these count as below.
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
