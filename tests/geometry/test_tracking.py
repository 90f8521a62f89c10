"""Mean gradients from averages over steps, against sums over all pairs of steps, and against the truth."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mogeo.geometry.tracking import (
    CERTAIN,
    DOUBTFUL,
    LONGEST,
    SHORTEST,
    SPIKE,
    Estimate,
    MeanGradients,
    Sketches,
    nearest_gram,
    noise_scale,
    noise_scale_interval,
)
from tests.profiles import examples
from tests.reference.mean_gradients import over_pairs, without_spikes

ALL = torch.tensor([True, True, True])


def of(rows: Tensor) -> Sketches:
    """Gradients as their own sketches."""
    return Sketches(rows, None, "whole")


def tracked(tracker: MeanGradients, steps: list[Tensor], present: list[list[bool]] | None = None) -> Estimate:
    """What is known after some steps, each with losses of its number."""
    for t, rows in enumerate(steps):
        flags = torch.tensor(present[t]) if present else torch.ones(len(rows), dtype=torch.bool)
        estimate = tracker.look(of(rows), torch.full((len(rows),), float(t), dtype=torch.float64), flags)
        tracker.take_over()
    return estimate


def noisy(means: Tensor, noise: float, steps: int, seed: int, *, shared: float = 0.0) -> list[Tensor]:
    """Gradients of some steps: means [K, N], and noise of this standard deviation, a share of it the same for all."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(count, means.shape[1], dtype=torch.float64, generator=generator)

    own, common = (1 - shared) ** 0.5, shared**0.5
    return [means + noise * (own * draw(len(means)) + common * draw(1)) for _ in range(steps)]


def conflicting() -> Tensor:
    """Means [3, 400] of lengths 1, 0.8 and 1.5; the first has a cosine of −0.5 with the second, 0 with the third."""
    basis = torch.linalg.qr(torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0].T
    return torch.stack([basis[0], 0.8 * (-0.5 * basis[0] + 0.75**0.5 * basis[1]), 1.5 * basis[2]])


# --------------------------------------------------------------------------------------------------------------------
# What is estimated


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 4),
    decay=st.floats(0.1, 0.99),
    present=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=9),
    sizes=st.lists(st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e-6, 30.0, 1e3]), min_size=9, max_size=9),
)
@examples(60)
def test_is_the_weighted_sum_over_pairs_of_different_steps(
    seed: int, count: int, decay: float, present: list[list[bool]], sizes: list[float]
) -> None:
    """Also where the first objective has gradients of all sizes, of which spikes are cut."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(count, 5, dtype=torch.float64, generator=generator) for _ in present]
    for rows, size in zip(drawn, sizes, strict=False):
        rows[0] *= size
    flags = [each[:count] for each in present]
    estimate = tracked(MeanGradients(decay), drawn, flags)
    steps = without_spikes(drawn, flags, decay, SPIKE)
    torch.testing.assert_close(estimate.gram, over_pairs(steps, flags, decay), rtol=1e-6, atol=1e-9, equal_nan=True)
    for k in range(count):
        seen = [t for t, each in enumerate(flags) if each[k]]
        weights = torch.tensor([decay ** (len(seen) - 1 - n) for n in range(len(seen))], dtype=torch.float64)
        if seen:
            lengths = torch.stack([steps[t][k].square().sum() for t in seen])
            torch.testing.assert_close(estimate.mean_square[k], weights @ lengths / weights.sum())
            counted = [t * float(steps[t][k].norm() / drawn[t][k].norm()) if drawn[t][k].any() else t for t in seen]
            losses = torch.tensor(counted, dtype=torch.float64)  # those of spikes are cut by the same factor
            torch.testing.assert_close(estimate.losses[k], weights @ losses / weights.sum())


@pytest.mark.parametrize("size", [10.0, 1e3, 1e100])
def test_a_spike_takes_no_evidence(size: float) -> None:
    """Nor does it take errors further than a gradient at the limit does, whatever its size."""
    means = conflicting()
    steps = noisy(means, (9 / 400) ** 0.5, 60, 0)
    steps[40] = steps[40] * torch.tensor([[size], [1.0], [1.0]], dtype=torch.float64)
    plain, tracker = MeanGradients(0.95), MeanGradients(0.95)
    for t, rows in enumerate(steps):
        estimate = tracked(tracker, [rows])
        tracked(plain, [rows / torch.tensor([[size if t == 40 else 1.0], [1.0], [1.0]], dtype=torch.float64)])
        if t >= 40:
            assert estimate.evidence.tolist() == [1.0] * 3
            assert bool(((estimate.gram - means @ means.T).abs() < 4 * estimate.error).all())
    assert plain.estimate is not None
    assert bool((estimate.error < SPIKE * plain.estimate.error).all())


def test_a_gradient_after_zeros_counts_as_it_is() -> None:
    """Nothing is known of how long gradients are: a first one that is not zero is no spike."""
    rows = conflicting()
    estimate = tracked(MeanGradients(0.9), [torch.zeros_like(rows), rows, rows])
    torch.testing.assert_close(estimate.mean_square, rows.square().sum(1) * (1 + 0.9) / (1 + 0.9 + 0.81))


@pytest.mark.parametrize("before", [1.0, 1e-9, 0.0])
def test_lengths_that_have_grown_for_good_are_followed(before: float) -> None:
    """From the second gradient on: what came once is a spike, what comes twice is not."""
    tracker, rows = MeanGradients(0.9), conflicting()
    tracked(tracker, [before * rows] * 60)
    estimate = tracked(tracker, [1e3 * rows] * 30)
    assert bool((estimate.mean_square > 0.9 * 1e6 * rows.square().sum(1)).all())


def test_gradients_that_come_rarely_do_not_vanish() -> None:
    """Zero in all but one of 60 steps: cut, and each time by the same factor."""
    tracker, rows, found = MeanGradients(0.95), conflicting(), []
    for t in range(1, 601):
        estimate = tracked(tracker, [rows if t % 60 == 0 else torch.zeros_like(rows)])
        if t % 60 == 0:
            found.append(estimate.mean_square / rows.square().sum(1))
    torch.testing.assert_close(found[-1], found[4], rtol=1e-3, atol=0.0)
    assert bool((found[-1] > 1e-3).all())


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_how_long_a_gradient_is_beside_the_others_makes_no_difference(scale: float) -> None:
    """In directions so few that products scatter, and the estimate is far from positive semi-definite."""
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randn(4, 3, dtype=torch.float64, generator=generator) + 0.6 for _ in range(12)]
    scales = torch.tensor([scale, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    plain = tracked(MeanGradients(0.9), steps)
    scaled = tracked(MeanGradients(0.9), [rows * scales for rows in steps])
    assert torch.linalg.eigvalsh(plain.gram).min() < -0.01
    torch.testing.assert_close(scaled.seen, plain.seen * scales * scales.T, rtol=1e-9, atol=0.0)


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_the_nearest_gram_is_the_nearest_by_cosines(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(count, count, dtype=torch.float64, generator=generator)
    matrix = (root + root.T).fill_diagonal_(0.0) + torch.diag(10.0 ** torch.arange(count, dtype=torch.float64))
    scales = torch.outer(*[matrix.diagonal().sqrt()] * 2)
    values, vectors = torch.linalg.eigh(matrix / scales)
    expected = (vectors * values.clamp(min=0)) @ vectors.T * scales
    torch.testing.assert_close(nearest_gram(matrix) / scales, expected / scales, rtol=0.0, atol=1e-12)
    psd = (root @ root.T + (root @ root.T).T) / 2
    assert torch.equal(nearest_gram(psd), psd)
    matrix[0, 0] = -1.0
    assert not nearest_gram(matrix)[0].any()


def test_the_first_step_tells_nothing_and_an_error_takes_six() -> None:
    tracker, steps = MeanGradients(0.9), noisy(conflicting(), 0.01, 8, 0)
    for t in range(8):
        estimate = tracked(tracker, steps[t : t + 1])
        assert bool(estimate.gram.isnan().all()) == (t == 0)
        assert bool(estimate.error.isinf().all()) == (t < 5)
        assert estimate.evidence.tolist() == ([0.0] * 3 if t < 5 else [1.0] * 3)
        assert bool((estimate.seen.diagonal() > 0).all())  # never taken for solved


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_is_unbiased_also_where_objectives_share_noise(shared: float) -> None:
    """Noise 19 times the signal, and of the size of its own mean in the products of one step, if it is shared."""
    means = conflicting()
    truth = means @ means.T
    found = torch.stack(
        [tracked(MeanGradients(0.9), noisy(means, (19 / 400) ** 0.5, 16, s, shared=shared)).gram for s in range(30)]
    )
    spread = found.std(0) / 30**0.5
    assert bool(((found.mean(0) - truth).abs() < 4.5 * spread).all())
    one_step = noisy(means, (19 / 400) ** 0.5, 1, 0, shared=shared)[0]
    assert (one_step @ one_step.T).diagonal().min() > 10 * truth.diagonal().min()


def test_is_unbiased_where_noise_changes_from_step_to_step() -> None:
    means = conflicting()
    found = []
    for seed in range(30):
        steps = noisy(means, 1.0, 16, seed)
        steps = [means + (rows - means) * (0.02 + 0.3 * (t % 5 == 0)) for t, rows in enumerate(steps)]
        found.append(tracked(MeanGradients(0.8), steps).gram)
    stacked = torch.stack(found)
    off = (stacked.mean(0) - means @ means.T).abs()
    assert bool((off < 4.5 * stacked.std(0) / 30**0.5).all())


@pytest.mark.parametrize("steps", [12, 40])
def test_errors_are_those_that_are_made(steps: int) -> None:
    """In units of the standard error, what is found lies about the truth as widely as it says, or less."""
    means = conflicting()
    scores = []
    for seed in range(24):
        estimate = tracked(MeanGradients(0.95), noisy(means, (9 / 400) ** 0.5, steps, seed))
        scores.append((estimate.gram - means @ means.T) / estimate.error)
    spread = torch.stack(scores).std(0)
    assert bool(((spread > 0.35) & (spread < 1.6)).all()), spread


def test_a_sketch_adds_its_own_error() -> None:
    rows = noisy(conflicting(), 0.01, 10, 0)
    exact, sketched = MeanGradients(0.9), MeanGradients(0.9)
    for step in rows:
        one = exact.look(of(step), torch.ones(3, dtype=torch.float64), ALL)
        other = sketched.look(Sketches(step, 100, "sketched"), torch.ones(3, dtype=torch.float64), ALL)
        exact.take_over()
        sketched.take_over()
    lengths = torch.outer(one.gram.diagonal(), one.gram.diagonal())
    extra = (lengths + one.gram.square()) / 100
    torch.testing.assert_close(other.error.square() - one.error.square(), extra, rtol=1e-2, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# How far it is trusted


def test_noise_alone_is_no_evidence() -> None:
    """Where there is no signal, nothing, or next to nothing, is believed."""
    evidence, negative = [], 0.0
    for seed in range(20):
        estimate = tracked(MeanGradients(0.95), noisy(torch.zeros(3, 400, dtype=torch.float64), 0.1, 30, seed))
        evidence.append(estimate.evidence)
        negative += float((estimate.seen.fill_diagonal_(0.0)).abs().max() > 0)
        assert bool(noise_scale(estimate)[estimate.evidence == 0].isnan().all())
    assert torch.stack(evidence).mean() < 0.05
    assert negative <= 2


@given(seed=st.integers(0, 10_000), noise=st.floats(0.0, 1.0), steps=st.integers(1, 30), decay=st.floats(0.5, 0.99))
@examples(60)
def test_what_weightings_see_is_a_gram_matrix_without_solved_objectives(
    seed: int, noise: float, steps: int, decay: float
) -> None:
    estimate = tracked(MeanGradients(decay), noisy(conflicting(), noise, steps, seed))
    seen = estimate.seen
    assert torch.equal(seen, seen.T)
    assert torch.linalg.eigvalsh(seen)[0] >= -1e-12 * seen.diagonal().max()
    assert bool((seen.diagonal() > 0).all())
    assert bool(((estimate.evidence >= 0) & (estimate.evidence <= 1)).all())
    certain = estimate.evidence == 1
    both = certain[:, None] & certain[None, :]
    if bool(both.all()) and torch.linalg.eigvalsh(estimate.gram)[0] >= 0:
        torch.testing.assert_close(seen, estimate.gram)


def test_evidence_rises_between_two_and_three_standard_errors() -> None:
    estimate = tracked(MeanGradients(0.95), noisy(conflicting(), (300 / 400) ** 0.5, 30, 3))
    ratio = estimate.gram.diagonal() / estimate.error.diagonal()
    expected = ((ratio - DOUBTFUL) / (CERTAIN - DOUBTFUL)).clamp(0, 1)
    torch.testing.assert_close(estimate.evidence, expected)


def test_a_gradient_that_is_zero_stays_one() -> None:
    means = conflicting()
    means[1] = 0
    steps = [rows.index_fill(0, torch.tensor([1]), 0.0) for rows in noisy(means, 0.05, 12, 0)]
    estimate = tracked(MeanGradients(0.9), steps)
    assert not estimate.seen[1].any()
    assert not estimate.seen[:, 1].any()
    assert estimate.evidence[1] == 1


def test_noise_scale_lies_in_its_interval_and_about_the_truth() -> None:
    inside = []
    for seed in range(20):
        estimate = tracked(MeanGradients(0.95), noisy(conflicting(), (5 / 400) ** 0.5, 40, seed))
        scale, interval = noise_scale(estimate), noise_scale_interval(estimate)
        assert bool(((interval[:, 0] <= scale) & (scale <= interval[:, 1])).all())
        truth = 5 / torch.tensor([1.0, 0.64, 2.25], dtype=torch.float64)
        inside.append((interval[:, 0] <= truth) & (truth <= interval[:, 1]))
    assert torch.stack(inside).double().mean() > 0.85


def test_a_noise_scale_that_cannot_be_told_has_a_lower_end() -> None:
    estimate = tracked(MeanGradients(0.95), noisy(torch.zeros(2, 300, dtype=torch.float64), 0.1, 30, 1))
    assert bool(noise_scale(estimate).isnan().all())
    interval = noise_scale_interval(estimate)
    assert bool((interval[:, 1] == torch.inf).all())
    assert bool((interval[:, 0] > 1).all())


# --------------------------------------------------------------------------------------------------------------------
# Invariances and bookkeeping


@given(power=st.integers(-30, 30), seed=st.integers(0, 100))
@examples(20)
def test_follows_a_common_scale(power: int, seed: int) -> None:
    """A power of two: floating point then loses nothing."""
    scale = 2.0**power
    steps = noisy(conflicting(), 0.1, 12, seed)
    one = tracked(MeanGradients(0.9), steps)
    other = tracked(MeanGradients(0.9), [rows * scale for rows in steps])
    torch.testing.assert_close(other.gram, one.gram * scale**2, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.error, one.error * scale**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.evidence, one.evidence, rtol=0, atol=1e-6)


def test_looking_changes_nothing() -> None:
    steps = noisy(conflicting(), 0.1, 9, 0)
    once, often = MeanGradients(0.9), MeanGradients(0.9)
    for rows in steps:
        for other in (rows * 2, -rows, rows):
            often.look(of(other), torch.ones(3, dtype=torch.float64), ALL)
        found, expected = often, once.look(of(rows), torch.ones(3, dtype=torch.float64), ALL)
        assert found.take_over()
        assert found.take_over()  # with nothing to take over
        assert once.take_over()
        assert found.estimate is not None
        assert torch.equal(found.estimate.gram.nan_to_num(-1), expected.gram.nan_to_num(-1))


def test_rows_of_those_who_take_no_part_are_not_read() -> None:
    steps = noisy(conflicting(), 0.1, 9, 0)
    spoiled = [rows.index_fill(0, torch.tensor([t % 3]), torch.nan) for t, rows in enumerate(steps)]
    present = [[k != t % 3 for k in range(3)] for t in range(9)]
    estimate = tracked(MeanGradients(0.9), spoiled, present)
    torch.testing.assert_close(estimate.gram, over_pairs(steps, present, 0.9), rtol=1e-9, atol=1e-12)
    assert not estimate.of_step[8 % 3].any()


def test_sketches_of_another_kind_begin_anew() -> None:
    tracker = MeanGradients(0.9)
    steps = noisy(conflicting(), 0.1, 9, 0)
    tracked(tracker, steps)
    estimate = tracker.look(Sketches(steps[0], None, "another"), torch.ones(3, dtype=torch.float64), ALL)
    assert bool(estimate.gram.isnan().all())
    assert not tracker.take_over()
    tracker.look(Sketches(steps[1], None, "another"), torch.ones(3, dtype=torch.float64), ALL)
    assert tracker.take_over()


@pytest.mark.parametrize("way", ["state_dict", "copy", "pickle"])
@pytest.mark.parametrize("decay", [0.9, "auto"])
def test_goes_on_where_it_stood(way: str, decay: float | str) -> None:
    steps = noisy(conflicting(), 0.1, 14, 0)
    tracker = MeanGradients(decay)  # type: ignore[arg-type]
    tracked(tracker, steps[:7])
    if way == "state_dict":
        other = MeanGradients(decay)  # type: ignore[arg-type]
        other.load_state_dict(copy.deepcopy(tracker.state_dict()))
    else:
        other = copy.deepcopy(tracker) if way == "copy" else pickle.loads(pickle.dumps(tracker))
    one, two = tracked(tracker, steps[7:]), tracked(other, steps[7:])
    for mine, its in zip(one, two, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("decay", [0.9, "auto"])
def test_averages_move_to_the_device_of_the_sketches(decay: Any) -> None:
    """The meta device computes nothing, and mixes with no other."""
    tracker, loaded = MeanGradients(decay), MeanGradients(decay)
    tracked(tracker, noisy(conflicting(), 0.1, 8, 0))
    loaded.load_state_dict(tracker.state_dict())
    rows, losses = torch.empty(3, 400, dtype=torch.float64, device="meta"), torch.ones(3, device="meta")
    estimate = loaded.look(of(rows), losses, ALL.to("meta"))
    assert all(part.is_meta for part in estimate)
    loaded.take_over()
    assert all(part.is_meta for part in loaded.state_dict().values() if isinstance(part, Tensor))


def test_another_decay_keeps_the_averages() -> None:
    steps = noisy(conflicting(), 0.1, 14, 0)
    tracker = MeanGradients(0.9)
    tracked(tracker, steps[:7])
    estimate = tracked(tracker.with_decay(0.99), steps[7:])
    weights = [0.9 ** (6 - t) * 0.99**7 for t in range(7)] + [0.99 ** (13 - t) for t in range(7, 14)]
    pairs = [(s, t) for s in range(14) for t in range(14) if s != t]
    total = sum(weights[s] * weights[t] * (steps[s] @ steps[t].T) for s, t in pairs)
    torch.testing.assert_close(estimate.gram, total / sum(weights[s] * weights[t] for s, t in pairs))


def test_windows_of_auto_follow_the_noise_scale() -> None:
    """Signal in the first, hardly any in the second, none in the third."""
    means = torch.zeros(3, 400, dtype=torch.float64)
    means[0, 0], means[1, 1] = 1.0, 0.28
    tracker = MeanGradients("auto")
    windows = []
    for rows in noisy(means, 0.05, 260, 0):
        tracker.look(of(rows), torch.ones(3, dtype=torch.float64), ALL)
        tracker.take_over()
        windows.append(tracker.state_dict()["window"].clone())
    steps = torch.stack(windows)
    assert bool(((steps >= SHORTEST) & (steps <= LONGEST)).all())
    assert bool(((steps[1:] - steps[:-1]).abs() <= 1).all())
    last = steps[-60:].mean(0)
    assert last[0] == SHORTEST
    assert 15 < last[1] < 45  # a noise scale of 0.0025 · 400 / 0.0784 = 12.8
    assert steps[-1, 2] == LONGEST


def test_windows_of_auto_stand_still_while_an_objective_is_away() -> None:
    tracker = MeanGradients("auto")
    for t, rows in enumerate(noisy(conflicting(), 0.5, 60, 0)):
        tracker.look(of(rows), torch.ones(3, dtype=torch.float64), torch.tensor([True, t < 20, t >= 40]))
        tracker.take_over()
        if t == 20:
            left = tracker.state_dict()["window"][1].item()
        if t < 40:
            assert tracker.state_dict()["window"][2] == SHORTEST
    assert tracker.state_dict()["window"][1] == left
