"""Net win rates are counts, and intervals hold what they promise: against definitions, scipy, and known truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mogeo.judging.judge import RatingJudge, Verdict
from mogeo.judging.win_rates import Estimate, bca, estimate, net_win_rates
from tests.profiles import slow_but

OBJECTIVES = ("wit", "tact")

# ---- net win rates ---------------------------------------------------------------------------------------------------


def judge(ratings: dict[str, tuple[float, float]]) -> RatingJudge:
    return RatingJudge(lambda _, response: dict(zip(OBJECTIVES, ratings[response], strict=True)), OBJECTIVES)


def test_net_win_rates_are_wins_minus_losses_over_all() -> None:
    rater = judge({"a": (5, 1), "b": (3, 2), "c": (3, 3.5), "d": (3, 2)})
    #                        wit: win  loss  tie   tie;   tact: loss  win   win   tie;   sum: a 6 > b 5, 5 < 6, 6.5 > 5
    candidates, references = ["a", "b", "c", "d"], ["b", "a", "d", "b"]
    rates = net_win_rates(rater, ["?"] * 4, candidates, references)
    assert rates.objectives == {"wit": 0.0, "tact": 0.25}
    assert rates.overall == 0.25
    assert (rates.worst, rates.worst_objective) == (0.0, "wit")


RATED = st.tuples(st.integers(2, 10), st.integers(2, 10)).map(lambda pair: (pair[0] / 2, pair[1] / 2))


@given(st.lists(st.tuples(RATED, RATED), min_size=1, max_size=30))
def test_exchanging_candidate_and_reference_changes_the_sign(pairs: list[tuple[tuple[float, float], ...]]) -> None:
    rater = judge({f"{i}{side}": pair[side] for i, pair in enumerate(pairs) for side in (0, 1)})
    prompts, left, right = ["?"] * len(pairs), *([f"{i}{side}" for i in range(len(pairs))] for side in (0, 1))
    there, back = net_win_rates(rater, prompts, left, right), net_win_rates(rater, prompts, right, left)
    assert there.overall == -back.overall
    assert there.objectives == {name: -rate for name, rate in back.objectives.items()}
    assert -1 <= there.worst <= min(1, *there.objectives.values())
    assert net_win_rates(rater, prompts, left, left).overall == 0


def test_nothing_to_judge_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        net_win_rates(judge({}), [], [], [])


def test_texts_that_do_not_pair_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        net_win_rates(judge({"a": (1, 1)}), ["?", "?"], ["a", "a"], ["a"])


class Undecided:
    """Judges one text in three."""

    objectives = ("wit",)

    def compare(self, prompts, candidates, references):
        return [Verdict({"wit": None if i % 3 else 1}, None) for i in range(len(prompts))]


def test_what_is_not_judged_is_not_a_tie() -> None:
    rates = net_win_rates(Undecided(), ["?"] * 6, ["a"] * 6, ["b"] * 6)
    assert rates.objectives == {"wit": 1.0}
    assert math.isnan(rates.overall)


# ---- intervals -------------------------------------------------------------------------------------------------------


def one(values: list[float] | NDArray[np.float64], **options: int) -> Estimate:
    """The estimate of one model on one question, one sample a prompt."""
    return estimate(np.asarray(values, dtype=float).reshape(1, -1, 1, 1), [], **options).rates[0][0]


VERDICTS = st.lists(st.sampled_from([-1.0, 0.0, 1.0, math.nan]), min_size=1, max_size=12)


@given(VERDICTS, st.integers(0, 5))
def test_an_interval_lies_within_the_possible_and_mirrors_when_sides_are_exchanged(values, seed) -> None:
    there, back = one(values, seed=seed, resamples=200), one([-v for v in values], seed=seed, resamples=200)
    if all(map(math.isnan, values)):
        assert math.isnan(there.value)
        return
    assert there.value == pytest.approx(np.nanmean(values))
    assert -1 <= there.low <= there.high <= 1
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low), abs=1e-9)
    assert one(values, seed=seed, resamples=200) == there


def test_the_interval_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    values = rng.choice([-1.0, 0.0, 1.0], size=60, p=[0.15, 0.2, 0.65])
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=rng).confidence_interval
    ours = one(values, resamples=20_000)
    # Values are multiples of 1/60: the two may differ by one of them, and by the noise of resampling.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.025)


@pytest.mark.parametrize(
    ("p_win", "p_loss", "n"), slow_but([(0.5, 0.5, 40), (0.6, 0.2, 60), (0.75, 0.25, 80)], (0.6, 0.2, 60))
)
def test_the_interval_covers_the_truth_as_often_as_it_says(p_win: float, p_loss: float, n: int) -> None:
    rng = np.random.default_rng(1)
    repeats, hits = 400, 0
    for seed in range(repeats):
        found = one(
            rng.choice([1.0, -1.0, 0.0], size=n, p=[p_win, p_loss, 1 - p_win - p_loss]), seed=seed, resamples=600
        )
        hits += found.low <= p_win - p_loss <= found.high
    # Standard error of a share of 0.95 in 400: 0.011. Known to be a little low for few units.
    assert 0.91 <= hits / repeats <= 0.985


def test_samples_of_a_prompt_are_no_independent_observations() -> None:
    rng = np.random.default_rng(2)
    values = rng.choice([1.0, -1.0], size=50)
    repeated = np.repeat(values.reshape(1, -1, 1, 1), 8, axis=2)
    single, clustered = one(values), estimate(repeated, []).rates[0][0]
    assert (clustered.value, clustered.low, clustered.high) == pytest.approx((single.value, single.low, single.high))


def test_differences_are_paired_by_prompt() -> None:
    rng = np.random.default_rng(3)
    first = rng.choice([1.0, -1.0], size=(1, 200, 1, 1))
    second = first.copy()
    second[0, :20] = 1.0  # the same but for a few prompts: far closer together than two independent models
    found = estimate(np.concatenate([first, second]), [])
    difference = found.differences[0][0]
    assert difference.value == pytest.approx(found.rates[1][0].value - found.rates[0][0].value)
    assert difference.low > 0
    assert difference.high - difference.low < 0.5 * (found.rates[0][0].high - found.rates[0][0].low)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_rates_and_worst_are_their_definitions(
    models: int, prompts: int, samples: int, questions: int, seed: int
) -> None:
    values = np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], size=(models, prompts, samples, questions))
    found = estimate(values, range(1, questions), resamples=20)
    means = values.mean((1, 2))
    assert np.allclose([[e.value for e in row] for row in found.rates], means)
    assert [e.value for e in found.worst] == pytest.approx(means[:, 1:].min(1).tolist() if questions > 1 else [])
    expected = [row[0] - means[0, 0] for row in means[1:]]
    assert [row[0].value for row in found.differences] == pytest.approx(expected)
    assert {len(row) for row in found.differences} <= {questions + (questions > 1)}


def test_a_statistic_that_never_varies_has_no_width() -> None:
    assert one([1.0] * 9) == Estimate(1.0, 1.0, 1.0)


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(0).choice([-1.0, 1.0], size=(3000, 1))
    seen = []

    def statistics(total, n):
        seen.append(len(total))
        return total / n

    bca(sums, np.ones_like(sums), statistics, resamples=3000)
    assert max(seen[:-2]) <= 4_000_000 // 3000  # the last two are the estimate and the jackknife
    assert sum(seen[:-2]) == 3000
