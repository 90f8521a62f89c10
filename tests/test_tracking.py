"""`track`: weights, guarantee and report of mean gradients, where noise hides them. All ways of making a step."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given
from torch import Tensor, nn

import mogeo
from mogeo import MultiObjectiveOptimizer, Rows, Sketch
from mogeo.decide.steering import Steering
from mogeo.gradients import row_sketches
from mogeo.weightings import resolve
from tests.deciders import QUICK_WAYS, WAYS, let_decide
from tests.noisy import Chosen, cosines, draws, independent, optimizer_of, reports, with_a_victim
from tests.profiles import examples, slow_but
from tests.reference.mean_gradients import over_pairs

COLUMNS = 600
ANY_WAY: dict[str, Any] = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}
ALWAYS = (True, True, True)
THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64)


# Where rows lie makes no difference to tracking: that has a test of its own.
@pytest.fixture(autouse=True, params=slow_but([way for way in WAYS if way != "rows apart"], *QUICK_WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file holds however a step is made."""
    let_decide(request.param, monkeypatch)
    return str(request.param)


def equal(gram: Tensor, losses: Tensor) -> Tensor:
    """`uniform`, but with a Gram matrix, so that reports speak of alignment without `track` as well."""
    return torch.full_like(losses, 1 / len(losses))


def trained(steps: Any, weighting: object = "uniform", values: Any = None, **options: Any) -> list[mogeo.StepReport]:
    """Reports of a new run over these gradients."""
    net = Chosen(COLUMNS)
    return reports(optimizer_of(net, weighting, **options), net, steps, values)


def some(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


# --------------------------------------------------------------------------------------------------------------------
# What noise hides


@given(seed=st.integers(0, 10_000), count=st.integers(2, 5), conflict=st.floats(2.0, 4.0), noise=st.floats(9.0, 15.0))
@examples(10, **ANY_WAY)
def test_an_objective_that_is_hurt_behind_noise_is_seen(seed: int, count: int, conflict: float, noise: float) -> None:
    """At least nine tenths of every ‖g‖² are noise, with which the mini-batch's own alignment is positive."""
    means = with_a_victim(count, conflict, COLUMNS, seed)
    truth = cosines(means.mean(0), means)
    own = [some(report.alignment)[0] for report in trained(draws(means, noise, seed, 12), equal, track=None)]
    report = trained(draws(means, noise, seed, 40))[-1]
    assert truth[0] < -0.1
    assert min(own) > 0
    assert some(report.alignment)[0] < -0.1
    assert bool(some(report.hurt)[0])
    off = (some(report.alignment) - truth).abs()
    assert bool((off < 4 * some(report.alignment_error)).all())
    assert report.alignment_of == "mean gradients"


@given(seed=st.integers(0, 10_000), weighting=st.sampled_from(["uniform", "mgda", "linear(1, 0, 2)"]))
@examples(8, **ANY_WAY)
def test_what_cannot_be_told_from_zero_has_no_direction(seed: int, weighting: str) -> None:
    """The second objective's gradient is noise alone, so that its estimates have any sign."""
    means = independent([1.0, 1.0, 1.0], COLUMNS)
    without = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64) * means
    found = trained([rows - without for rows in draws(means, 4.0, seed, 40)], weighting)
    for report in found:
        known = some(report.evidence) > 0
        assert torch.equal(some(report.alignment).isfinite(), known)
        assert not bool((some(report.hurt) & ~known).any())
        assert torch.equal(some(report.mean_cosines).isfinite(), known[:, None] & known)
    known = torch.stack([some(report.evidence) > 0 for report in found])
    assert known[-1, [0, 2]].all()
    assert not known[:, 1].all()


@given(
    seed=st.integers(0, 10_000),
    weighting=st.sampled_from(["mgda-decoupled", "uniform", "linear(3, 1, 2)", "upgrad", "gapo(0.5)", "cagrad"]),
    options=st.sampled_from([{}, {"guarantee_descent": True}, {"max_grad_norm": 0.3}, {"refresh_every": 3}]),
)
@examples(12, **ANY_WAY)
def test_weighing_by_the_mini_batch_changes_reports_alone(seed: int, weighting: str, options: dict[str, Any]) -> None:
    """Weights are those without `track`, and what is told of mean gradients is what `track` tells."""
    steps = list(draws(with_a_victim(3, 2.5, COLUMNS), 9.0, seed, 12))
    plain_net, net = Chosen(COLUMNS), Chosen(COLUMNS)
    plain = optimizer_of(plain_net, weighting, track=None, **options)
    watched = optimizer_of(net, weighting, weigh_by="mini-batch", **options)
    following = trained(steps, weighting, **options)
    for rows, follower in zip(steps, following, strict=True):
        (report,), (expected,) = reports(watched, net, [rows]), reports(plain, plain_net, [rows])
        torch.testing.assert_close(report.weights, expected.weights, rtol=1e-12, atol=0)
        torch.testing.assert_close(report.clip_factor, expected.clip_factor, rtol=1e-9, atol=0)
        torch.testing.assert_close(net.grad(), plain_net.grad(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(report.mean, follower.mean, rtol=0, atol=0, equal_nan=True)
        if expected.gram is not None:
            torch.testing.assert_close(report.gram, expected.gram, rtol=1e-12, atol=0)
    assert report.alignment_of == "mean gradients"
    assert report.to_dict()["evidence"] == follower.to_dict()["evidence"]


def test_what_decides_can_be_changed_between_steps() -> None:
    """Averages go on, and held weights are solved for anew."""
    steps = list(draws(with_a_victim(3, 2.5, COLUMNS), 9.0, 0, 12))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda", weigh_by="mini-batch", refresh_every=4)
    following = trained(steps, "mgda")
    reports(optimizer, net, steps[:1])
    optimizer.weigh_by, optimizer.refresh_every = "mean", 1
    (report,) = reports(optimizer, net, steps[1:2])
    torch.testing.assert_close(report.weights, following[1].weights, rtol=1e-12, atol=0)
    reports(optimizer, net, steps[2:8])
    optimizer.weigh_by = "mini-batch"
    (report,) = reports(optimizer, net, steps[8:9])
    torch.testing.assert_close(report.mean, following[8].mean, rtol=0, atol=0)
    own = trained(steps[8:9], "mgda", track=None)[0]
    torch.testing.assert_close(report.weights, own.weights, rtol=1e-9, atol=0)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate", "raise"])
@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform"])
def test_what_is_not_finite_stays_out_of_reports_too(weighting: str, nonfinite: str) -> None:
    """Under "skip" the objective is left out, and known at its next step; the others lose the whole step."""
    steps = list(draws(independent([1.0, 1.0, 1.0], COLUMNS), 4.0, 0, 9))
    bad = [rows.clone() for rows in steps]
    bad[7][1, 3] = math.inf
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, weighting, weigh_by="mini-batch", nonfinite=nonfinite)
    before = reports(optimizer, net, bad[:7])[-1]
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="objective '1'"):
            reports(optimizer, net, bad[7:8])
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        (report,) = reports(optimizer, net, bad[7:8])
    assert report.nonfinite.tolist() == [False, True, False]
    assert (report.weights[1] == 0) if nonfinite == "skip" else bool(report.weights.isnan().all())
    if nonfinite == "skip":
        assert some(report.mean_gram)[1, 1] == some(before.mean_gram)[1, 1]
        assert some(report.mean_gram)[0, 0] != some(before.mean_gram)[0, 0]


@pytest.mark.parametrize(
    ("weighting", "values"),
    [
        ("mgda-decoupled", [1.0, -1.0, 1.0]),
        ("mgda-decoupled", [1.0, None, 1.0]),
        ("mgda-decoupled", [1.0, math.nan, 1.0]),
        ("mgda-decoupled", [math.nan] * 3),
        ("linear(1, 0, 2)", [1.0, -1.0, 1.0]),
        ("linear(1, 0, 2)", [1.0, None, 1.0]),
        ("group-dro", [1.0, None, 1.0]),
    ],
)
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_odd_losses_are_met_as_without_track(weighting: str, values: list[float | None], nonfinite: str) -> None:
    """A loss of 0 or less, an absent objective, and losses that are not finite; and weights that hold after them."""
    steps = list(draws(with_a_victim(3, 2.5, COLUMNS), 9.0, 0, 5))
    nets = [Chosen(COLUMNS), Chosen(COLUMNS)]
    shared: dict[str, Any] = {"nonfinite": nonfinite, "refresh_every": 3, "objectives": ("0", "1", "2")}
    plain = optimizer_of(nets[0], weighting, track=None, **shared)
    watched = optimizer_of(nets[1], weighting, weigh_by="mini-batch", **shared)
    for rows, of_step in zip(steps, [values, *[[1.0] * 3] * 4], strict=True):
        expected, found = attempt(plain, nets[0], rows, of_step), attempt(watched, nets[1], rows, of_step)
        assert (expected is None) == (found is None)
        one, other = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets)
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12, equal_nan=True)


def attempt(
    optimizer: MultiObjectiveOptimizer, net: Chosen, rows: Tensor, values: Sequence[float | None]
) -> mogeo.StepReport | None:
    """The report of a step on these gradients and losses; None where a loss is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return reports(optimizer, net, [rows], values)[0]
        except ValueError:
            return None


def test_a_lost_step_does_not_speak_of_the_mini_batch() -> None:
    steps = list(draws(independent([1.0, 1.0, 1.0], COLUMNS), 4.0, 0, 3))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda", weigh_by="mini-batch", objectives=("0", "1", "2"))
    reports(optimizer, net, steps[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        (report,) = reports(optimizer, net, steps[2:], [math.nan] * 3)
    assert report.alignment is None or bool(report.alignment.isnan().all())
    assert report.alignment is None or report.alignment_of == "mean gradients"


@pytest.mark.parametrize("before", ["mean", None])
def test_held_weights_of_the_other_kind_are_not_loaded(before: str | None) -> None:
    """Also those of a version that knew only one."""
    steps = list(draws(with_a_victim(3, 2.5, COLUMNS), 9.0, 0, 3))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda", refresh_every=9)
    reports(optimizer, net, steps[:2])
    state = optimizer.state_dict()
    if before is None:
        for group in state["param_groups"]:
            own = json.loads(group["mogeo"])
            del own["settings"]["weigh_by"]
            group["mogeo"] = json.dumps(own)
    other = optimizer_of(net, "mgda", refresh_every=9, weigh_by="mini-batch")
    with pytest.warns(UserWarning, match="saved with weigh_by='mean'"):
        other.load_state_dict(state)
    (report,) = reports(other, net, steps[2:])
    assert report.age == 0
    torch.testing.assert_close(report.weights, trained(steps[2:], "mgda", track=None)[0].weights, rtol=1e-9, atol=0)


def test_the_papers_own_weights_and_a_true_report() -> None:
    """An objective whose own noise makes each step look good to it is seen to be hurt."""
    steps = list(draws(with_a_victim(4, 3.0, COLUMNS), 12.0, 0, 40))
    plain = trained(steps, "mgda-decoupled", track=None)
    watched = trained(steps, "mgda-decoupled", weigh_by="mini-batch")
    assert min(some(report.alignment)[0] for report in plain) > 0
    assert all(some(report.evidence)[0] == 1 for report in watched[10:])
    assert all(bool(some(report.hurt)[0]) for report in watched[10:])


@given(seed=st.integers(0, 10_000), count=st.integers(2, 4), conflict=st.floats(1.5, 4.0))
@examples(8, **ANY_WAY)
def test_a_guarantee_guards_in_expectation(seed: int, count: int, conflict: float) -> None:
    """Products of the direction's mean with mean gradients, within the error of what is known of them."""
    means = with_a_victim(count, conflict, COLUMNS, seed)
    gram = means @ means.T
    report = trained(draws(means, 9.0, seed, 40), guarantee_descent=True)[-1]
    error = (some(report.mean_gram_error).square() @ report.weights.square()).sqrt()
    assert (gram @ torch.full((count,), 1 / count, dtype=torch.float64))[0] < -0.1
    assert bool((gram @ report.weights > -4 * error).all())
    assert some(report.correction)[0] > 0
    unguarded = trained(draws(means, 9.0, seed, 2), equal, track=None, guarantee_descent=True)[-1]
    assert not some(unguarded.correction).any()  # the mini-batch sees nobody hurt


@pytest.mark.parametrize("size", [30.0, 1e6])
def test_one_huge_gradient_hides_nobody_who_is_hurt(size: float) -> None:
    steps = [rows.clone() for rows in draws(with_a_victim(4, 2.5, COLUMNS), 9.0, 0, 60)]
    steps[40][0] *= size
    for report in trained(steps)[40:]:
        assert some(report.evidence)[0] == 1
        assert some(report.alignment)[0] < -0.1
    for report in trained(steps, guarantee_descent=True)[40:]:
        assert some(report.correction)[0] > 0


@pytest.mark.parametrize("weighting", ["uniform", "linear(1, 2, 3)"])
def test_where_nobody_is_hurt_in_expectation_a_guarantee_changes_no_bit(weighting: str) -> None:
    means = independent([1.0, 1.0, 1.0], COLUMNS)
    plain = trained(draws(means, 9.0, 0, 1), weighting, track=None)[0]
    for report in trained(draws(means, 9.0, 0, 30), weighting, guarantee_descent=True):
        assert torch.equal(report.weights, plain.weights)


@pytest.mark.parametrize(
    "weighting", slow_but(["mgda", "mgda-decoupled", "mgda-normalized", "upgrad", "cagrad"], "mgda-decoupled")
)
def test_weights_are_those_of_mean_gradients(weighting: str) -> None:
    means = with_a_victim(3, 1.8, COLUMNS)
    noise, values = [30.0, 9.0, 15.0], [1.0, 1.5, 0.5]
    expected = resolve(weighting)(means @ means.T, torch.tensor(values, dtype=torch.float64))

    def off(report: mogeo.StepReport) -> float:
        return float((report.weights / report.weights.sum() - expected / expected.sum()).abs().sum())

    tracked = trained(draws(means, noise, 0, 40), weighting, values)[-1]
    own = trained(draws(means, noise, 0, 1), weighting, values, track=None)[-1]
    assert off(tracked) < 0.12
    assert off(own) > 0.3


@pytest.mark.parametrize("scale", slow_but([1e-20, 1e-3, 1e20], 1e-3))
def test_an_objective_of_another_scale_weighs_alike(scale: float) -> None:
    """Gradients whose lengths differ by orders of magnitude keep their weights, in units of those lengths."""
    means = with_a_victim(3, 1.8, COLUMNS)
    steps = list(draws(means, 9.0, 0, 20))
    scales = torch.tensor([1.0, scale, 1.0], dtype=torch.float64)
    same = trained(steps, "mgda-normalized")[-1]
    other = trained([rows * scales[:, None] for rows in steps], "mgda-normalized")[-1]
    torch.testing.assert_close(other.weights * scales, same.weights, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other.noise_scale, same.noise_scale, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other.mean_cosines, same.mean_cosines, rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# Without evidence


def noise_alone(seed: int, steps: int, lengths: Sequence[float] = (1.0, 1.0, 1.0)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    each = torch.tensor(lengths, dtype=torch.float64)[:, None] / COLUMNS**0.5
    return [torch.randn(3, COLUMNS, dtype=torch.float64, generator=generator) * each for _ in range(steps)]


@pytest.mark.parametrize("preference", [None, (1.0, 2.0, 5.0)])
@pytest.mark.parametrize("weighting", ["mgda", "mgda-decoupled", "upgrad"])
def test_weights_are_the_preference_where_nothing_is_known(weighting: str, preference: Any) -> None:
    expected = torch.tensor(preference or (1.0, 1.0, 1.0), dtype=torch.float64)
    found = trained(noise_alone(0, 30), weighting, preference=preference)
    known = [report for report in found if bool(some(report.evidence).any())]
    assert len(known) <= 6  # one in forty is taken for a signal by chance, for some steps on end
    for report in found:
        if report not in known:
            torch.testing.assert_close(report.weights / report.weights.sum(), expected / expected.sum())
            assert bool(some(report.noise_scale).isnan().all())


@pytest.mark.parametrize("weighting", ["uniform", "linear(1, 2, 3)", "group-dro"])
def test_a_guarantee_leaves_weights_alone_where_nothing_is_known(weighting: str) -> None:
    plain = trained(noise_alone(0, 30), weighting, track=None)
    for report, alike in zip(trained(noise_alone(0, 30), weighting, guarantee_descent=True), plain, strict=True):
        if not bool(some(report.evidence).any()):
            torch.testing.assert_close(report.weights, alike.weights, rtol=0, atol=0)
            assert not some(report.correction).any()


def test_normalised_weights_keep_their_units_where_nothing_is_known() -> None:
    """Equal weights on gradients of lengths 1 and 100 would follow the longer one."""
    lengths = torch.tensor([1.0, 100.0, 10.0], dtype=torch.float64)
    for report in trained(noise_alone(0, 5, lengths.tolist()), "mgda-normalized"):
        assert not some(report.evidence).any()
        shares = report.weights * lengths
        torch.testing.assert_close(shares / shares.sum(), THIRDS, rtol=0.2, atol=0)


def test_an_objective_without_evidence_keeps_its_share_of_the_sum() -> None:
    """Also where the weighting gives it everything, or weights that are no shares."""
    steps = [rows + 10 * independent([1.0, 0.0, 0.0], COLUMNS) for rows in noise_alone(0, 12)]
    given = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    report = trained(steps, lambda gram, losses: given)[-1]
    assert some(report.evidence).tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(report.weights, THIRDS)
    given = torch.tensor([-0.5, 1.0, 0.5], dtype=torch.float64)
    assert torch.equal(trained(steps, lambda gram, losses: given)[-1].weights, given)


@given(
    seed=st.integers(0, 1000),
    noise=st.lists(st.sampled_from([0.1, 9.0, 300.0, 1e5]), min_size=3, max_size=3),
    lengths=st.lists(st.floats(0.3, 3.0), min_size=3, max_size=3),
    preference=st.sampled_from([None, (1.0, 1.0, 4.0)]),
    weighting=st.sampled_from(["mgda", "mgda-decoupled", "upgrad"]),
)
@examples(20, **ANY_WAY)
def test_a_floor_holds_however_much_is_known(
    seed: int, noise: list[float], lengths: list[float], preference: Any, weighting: str
) -> None:
    """As `Steering` promises it: under a preference the MGDA family's is m min(p) / p_k."""
    floor = torch.full((3,), 0.2, dtype=torch.float64)
    if preference and weighting != "upgrad":
        floor = floor / torch.tensor(preference, dtype=torch.float64)
    steps = draws(independent(lengths, COLUMNS, seed), noise, seed, 9)
    for report in trained(steps, weighting, min_weight=0.2, preference=preference):
        assert bool((report.weights >= floor * report.weights.sum() - 1e-12).all())


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform"])
def test_steering_goes_on_where_all_is_known(weighting: str) -> None:
    means, values = with_a_victim(3, 1.8, COLUMNS), [1.0, 1.5, 0.5]
    options: dict[str, Any] = {"preference": (1.0, 2.0, 4.0), "min_weight": 0.1, "smoothing": 0.5}
    steering = Steering(**options)
    steps = list(draws(means, 0.01, 0, 16))
    for t, report in enumerate(trained(steps, weighting, values, **options)):
        mean = some(report.mean)  # type: ignore[arg-type]
        if t < 6:
            continue
        assert bool((mean.evidence == 1).all())
        steering.remembered = None if t == 6 else steering.remembered
        expected = steering.weigh(resolve(weighting), means @ means.T, torch.tensor(values, dtype=torch.float64))
        if t > 12:
            torch.testing.assert_close(report.weights, expected.weights, rtol=0, atol=0.03)


# --------------------------------------------------------------------------------------------------------------------
# Noise scales


@pytest.mark.parametrize("noise", slow_but([4.0, 20.0], 4.0))
def test_a_noise_scale_lies_in_its_interval(noise: float, way: str) -> None:
    if way != "host":
        pytest.skip("is about statistics")
    inside, told = [], 0
    for seed in range(8):
        report = trained(draws(independent([1.0, 3.0, 0.2], COLUMNS), noise, seed, 30))[-1]
        interval, scale = some(report.noise_scale_interval), some(report.noise_scale)
        inside.append((interval[:, 0] <= noise) & (noise <= interval[:, 1]))
        told += int(scale.isfinite().sum())
    assert torch.stack(inside).double().mean() > 0.8
    assert told > 20


# --------------------------------------------------------------------------------------------------------------------
# What is averaged


@pytest.mark.parametrize(
    ("memory", "precision"),
    [
        ({}, 1e-6),
        ({"memory": Rows(dtype=torch.float32)}, 1e-5),
        ({"memory": Rows(dtype=torch.bfloat16)}, 2e-2),
        ({"memory": Rows(device="cpu")}, 1e-6),
        ({"memory": Sketch(1 << 12)}, 1e-6),
    ],
)
def test_is_over_all_pairs_of_steps_however_gradients_are_kept(
    memory: dict[str, Any], precision: float, way: str
) -> None:
    if memory and way != "host":
        pytest.skip("a way of its own")
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    report = trained(steps, "mgda", track=0.8, **memory)[-1]
    expected = over_pairs(steps, [ALWAYS] * 8, 0.8)
    lengths = torch.stack(steps).square().sum(2).mean(0).sqrt()
    off = (some(report.mean_gram) - expected).abs() / torch.outer(lengths, lengths)
    assert off.max() < precision
    own = (some(report.gram) - steps[-1] @ steps[-1].T).abs() / torch.outer(lengths, lengths)
    assert own.max() < precision


def test_short_sketches_are_right_to_their_precision(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    dimension = 256
    monkeypatch.setattr(row_sketches, "DIMENSION", dimension)
    options = {"sketch": dimension} if way in ("sketched", "replayed") else {}
    found = []
    for seed in range(4):
        means = with_a_victim(3, 1.8, COLUMNS, seed)
        report = trained(draws(means, 0.5, seed, 25), "mgda", **options)[-1]
        lengths = means.norm(dim=1)
        found.append((some(report.mean_gram) - means @ means.T) / torch.outer(lengths, lengths))
        assert bool((some(report.mean_gram_error) > 0.8 * (means @ means.T).diagonal().min() / dimension**0.5).all())
    assert 0 < torch.stack(found).square().mean().sqrt() < 2 * (2 / dimension) ** 0.5


def test_accumulated_calls_are_one_step() -> None:
    net, twin = Chosen(COLUMNS), Chosen(COLUMNS)
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    once, often = optimizer_of(net, "mgda"), optimizer_of(twin, "mgda", objectives=("0", "1", "2"))
    for rows in steps:
        often.zero_grad()
        often.backward(twin.losses(rows / 2, [0.5] * 3))
        for name, loss in twin.losses(rows / 2, [0.5] * 3).items():
            often.backward(some(loss), objective=name)
        often.step()
    report = reports(once, net, steps)[-1]
    assert often.report is not None
    torch.testing.assert_close(often.report.mean_gram, report.mean_gram, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(often.report.weights, report.weights, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(some(often.report.mean).losses, THIRDS * 3)  # type: ignore[arg-type]


def test_each_objective_has_a_clock_of_its_own() -> None:
    """One that takes no part has weight 0 in that step, and its averages wait."""
    present = [(True, t % 3 != 1, t % 2 == 0) for t in range(12)]
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 12))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", track=0.8, objectives=("0", "1", "2"))
    for t, rows in enumerate(steps):
        values = [float(t) if here else None for here in present[t]]
        (report,) = reports(optimizer, net, [rows], [None if value is None else 1 + value for value in values])
        assert (report.weights[~torch.tensor(present[t])] == 0).all()
        assert report.weights.sum().item() == pytest.approx(1)
        torch.testing.assert_close(
            report.mean_gram, over_pairs(steps[: t + 1], present[: t + 1], 0.8), rtol=1e-6, atol=1e-8, equal_nan=True
        )
    torch.testing.assert_close(net.grad(), report.weights @ steps[-1])


def test_an_objective_that_never_comes() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 12))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", objectives=("0", "1", "2"))
    report = reports(optimizer, net, steps, [1.0, None, 1.0])[-1]
    assert bool(some(report.mean_gram)[1].isnan().all())
    assert bool(some(report.mean_gram_error)[1].isinf().all())
    assert bool(some(report.alignment)[1].isnan())
    assert some(report.evidence)[1] == 0
    json.dumps(report.to_dict())
    first = reports(optimizer, net, steps)[0]
    assert first.weights.isfinite().all()
    assert first.weights[1] == pytest.approx(1 / 3)


def test_held_steps_report_what_the_last_solve_knew() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 24))
    found = trained(steps, "mgda", refresh_every=3, track=0.9)
    for t, report in enumerate(found):
        solved = found[t - t % 3]
        assert report.age == t % 3
        torch.testing.assert_close(report.mean, solved.mean, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(report.weights, solved.weights)
        torch.testing.assert_close(report.alignment, solved.alignment, equal_nan=True)
    expected = over_pairs(steps[::3], [ALWAYS] * 8, 0.9)
    torch.testing.assert_close(found[-1].mean_gram, expected, rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# What is not finite, and what fails


@pytest.mark.parametrize("what", ["nan", "inf", "overflow", "loss"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_is_no_step_of_its_objective(what: str, first: bool) -> None:
    """Not the first one either; and nothing of it stays in the averages."""
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    bad = 0 if first else 4
    spoiled = [rows.clone() for rows in steps]
    spoiled[bad][1, 5] = {"nan": math.nan, "inf": math.inf, "overflow": 1e200, "loss": 1.0}[what]
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", track=0.8)
    with pytest.warns(RuntimeWarning, match="left objective '1' out"):
        for t, rows in enumerate(spoiled):
            values = [1.0, math.nan if (what, t) == ("loss", bad) else 1.0, 1.0]
            (report,) = reports(optimizer, net, [rows], values)
            assert report.nonfinite.tolist() == [False, t == bad, False]
            if t == bad:
                assert report.weights[1] == 0
                torch.testing.assert_close(net.grad(), report.weights[[0, 2]] @ rows[[0, 2]])
        optimizer.zero_grad()
        optimizer.backward(net.losses(steps[0]))  # where a device decided, the host hears of it
    present = [(True, t != bad, True) for t in range(8)]
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, present, 0.8), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(some(report.mean).losses, THIRDS * 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
def test_a_step_that_is_not_taken_does_not_count(nonfinite: str) -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", track=0.8, nonfinite=nonfinite)
    reports(optimizer, net, steps[:4])
    spoiled = steps[0].clone()
    spoiled[1, 5] = math.inf
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="objective '1'.*not finite"):
            reports(optimizer, net, [spoiled])
    else:
        (report,) = reports(optimizer, net, [spoiled])
        assert net.grad().isnan().any()
    report = reports(optimizer, net, steps[4:])[-1]
    assert net.grad().isfinite().all()
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, [ALWAYS] * 8, 0.8), rtol=1e-6, atol=1e-9)


def test_a_step_with_nobody_left_does_not_count() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", track=0.8)
    with pytest.warns(RuntimeWarning, match="left objective '0', '1', '2' out"):
        for t, rows in enumerate(steps):
            if t == 3:
                reports(optimizer, net, [rows], [math.nan] * 3)
            (report,) = reports(optimizer, net, [rows])
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, [ALWAYS] * 8, 0.8), rtol=1e-6, atol=1e-9)


def test_a_combine_that_failed_can_be_repeated_and_counts_once(way: str) -> None:
    """A mean loss ≤ 0 under a weighting that divides by it: nothing is lost, and another weighting goes on."""
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", track=0.8)
    reports(optimizer, net, steps[:7])
    optimizer.zero_grad()
    optimizer.backward(net.losses(steps[7], [1.0, -100.0, 1.0]))
    if way == "device":  # made zero, and told at the next step
        report = optimizer.combine()
        assert not net.grad().any()
        with pytest.raises(ValueError, match="objective '1' has loss -.*; mgda-decoupled divides by the loss"):
            optimizer.backward(net.losses(steps[7]))
    else:
        for _ in range(2):
            with pytest.raises(ValueError, match="objective '1' has loss -.*; mgda-decoupled divides by the loss"):
                optimizer.combine()
        optimizer.weighting = "mgda"
        report = optimizer.combine()
        torch.testing.assert_close(net.grad(), report.weights @ steps[7])
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, [ALWAYS] * 8, 0.8), rtol=1e-6, atol=1e-9)


def test_a_loss_that_is_negative_for_once_still_divides_by_its_mean() -> None:
    steps = draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 12)
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", track=0.9)
    for t, rows in enumerate(steps):
        (report,) = reports(optimizer, net, [rows], [1.0, -0.2 if t == 8 else 1.0, 1.0])
    assert 0 < some(report.mean).losses[1] < 1  # type: ignore[arg-type]
    assert report.weights.isfinite().all()


def test_gradients_dropped_before_a_step_do_not_count() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda", track=0.8)
    for rows in steps:
        optimizer.zero_grad()
        optimizer.backward(net.losses(rows * 7))
        (report,) = reports(optimizer, net, [rows])
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, [ALWAYS] * 8, 0.8), rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# Beside what else an optimizer does


@pytest.mark.parametrize("weighting", ["uniform", "mgda-decoupled"])
def test_the_direction_is_clipped_to_the_norm_that_it_has(weighting: str) -> None:
    """Not to that of the mean gradients."""
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, weighting, max_grad_norm=0.01)
    for rows in draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8):
        (report,) = reports(optimizer, net, [rows])
        assert net.grad().norm().item() == pytest.approx(0.01)
        assert report.direction_norm.item() == pytest.approx((report.weights @ rows).norm().item())


def test_groups_outside_the_geometry_take_the_mean() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    inside = net.matrix.numel()
    groups = [{"params": [net.matrix]}, {"params": [net.vector], "multi_objective": False}]
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(groups, lr=0.1), "mgda", track=0.8)
    report = reports(optimizer, net, steps)[-1]
    torch.testing.assert_close(net.grad()[:inside], report.weights @ steps[-1][:, :inside])
    torch.testing.assert_close(net.grad()[inside:], steps[-1][:, inside:].mean(0))
    expected = over_pairs([rows[:, :inside] for rows in steps], [ALWAYS] * 8, 0.8)
    torch.testing.assert_close(report.mean_gram, expected, rtol=1e-6, atol=1e-9)


def test_several_bases_and_the_matrix_of_each_parameter(way: str) -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    bases = [torch.optim.SGD([net.matrix], lr=0.1, momentum=0.9), torch.optim.AdamW([net.vector], lr=0.1)]
    optimizer = MultiObjectiveOptimizer(bases, "mgda", track=0.8, gram_by_parameter=way in ("host", "rows apart"))
    report = reports(optimizer, net, steps)[-1]
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, [ALWAYS] * 8, 0.8), rtol=1e-6, atol=1e-9)
    if report.gram_by_parameter is not None:
        torch.testing.assert_close(report.gram_by_parameter.sum(0), report.gram)
    twin_net = copy.deepcopy(net)
    twin_bases = [
        torch.optim.SGD([twin_net.matrix], lr=0.1, momentum=0.9),
        torch.optim.AdamW([twin_net.vector], lr=0.1),
    ]
    twin = MultiObjectiveOptimizer(twin_bases, "mgda", track=0.8, gram_by_parameter=way in ("host", "rows apart"))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(reports(optimizer, net, steps)[-1].weights, reports(twin, twin_net, steps)[-1].weights)


def test_under_a_grad_scaler_a_scale_that_falls_changes_no_weight_for_long() -> None:
    """Its steps that overflow do not count; a scale of half the size is a common factor, which fades."""
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 0.5, 0, 30))
    net, twin = Chosen(COLUMNS), Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", track=0.8, nonfinite="propagate")
    plain = reports(optimizer_of(twin, "mgda-decoupled", track=0.8), twin, steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t, rows in enumerate(steps):
        for spoiled in [True, False] if t == 15 else [False]:
            optimizer.zero_grad()
            losses = net.losses(rows * math.inf if spoiled else rows)
            optimizer.backward(losses, backward=lambda loss, **options: scaler.scale(loss).backward(**options))
            report = optimizer.combine()
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(report.weights, plain[t].weights, rtol=0, atol=0.05 if t < 15 else 0.2)
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(report.weights, plain[-1].weights, rtol=0, atol=0.02)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.01)


# --------------------------------------------------------------------------------------------------------------------
# What changes on the way

BEGIN_ANEW = r"averages of gradients over steps \(track=\) begin anew"


def test_added_frozen_and_thawed_parameters_begin_averages_anew() -> None:
    """Told once for each change; and the sizes alone do not tell: layers may be trained in turn."""
    net = nn.ParameterList([nn.Parameter(torch.zeros(40, dtype=torch.float64)) for _ in range(3)])
    first, second, late = net
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([first, second], lr=0.1), "mgda", track=0.8)
    generator = torch.Generator().manual_seed(0)

    def step() -> mogeo.StepReport:
        rows = 1 + torch.randn(2, 120, dtype=torch.float64, generator=generator)
        inner = rows @ torch.cat(list(net))
        optimizer.zero_grad()
        optimizer.backward({"a": inner[0] + 1, "b": inner[1] + 1})
        report = optimizer.combine()
        optimizer.step()
        return report

    def add() -> None:
        optimizer.add_param_group({"params": [late]})

    def freeze(parameter: nn.Parameter) -> Callable[[], object]:
        return lambda: parameter.requires_grad_(False)

    def swap() -> None:
        first.requires_grad_(True)
        second.requires_grad_(False)

    late.requires_grad_(False)
    step(), step()
    late.requires_grad_(True)
    for change in (add, freeze(first), swap):
        change()
        with pytest.warns(UserWarning, match=BEGIN_ANEW) as told:
            report = step()
        assert len(told) == 1
        assert bool(some(report.mean_gram).isnan().all())
        for _ in range(3):
            report = step()
        assert bool(some(report.mean_gram).isfinite().all())


def test_another_decay_keeps_averages_and_none_drops_them() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda", track=0.8)
    reports(optimizer, net, steps[:6])
    optimizer.track = 0.6
    report = reports(optimizer, net, steps[6:])[-1]
    weights = [0.8 ** (5 - t) * 0.36 for t in range(6)] + [0.6, 1.0]
    pairs = [(s, t) for s in range(8) for t in range(8) if s != t]
    total = sum((weights[s] * weights[t] * (steps[s] @ steps[t].T) for s, t in pairs), torch.zeros(3, 3))
    torch.testing.assert_close(report.mean_gram, total / sum(weights[s] * weights[t] for s, t in pairs))
    optimizer.track = None
    (report,) = reports(optimizer, net, steps[:1])
    assert report.mean is None
    assert report.alignment_of == "mini-batch"
    torch.testing.assert_close(report.weights, resolve("mgda")(steps[0] @ steps[0].T, torch.ones(3)))
    optimizer.track = "auto"
    (report,) = reports(optimizer, net, steps[:1])
    assert bool(some(report.mean_gram).isnan().all())


def test_a_decay_may_change_between_backward_and_step_but_not_what_is_kept() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 2))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "uniform", track=None)
    optimizer.backward(net.losses(steps[0]))
    with pytest.raises(RuntimeError, match="do not suit 0.9 as track"):
        optimizer.track = 0.9
    assert optimizer.track is None
    assert optimizer.combine().mean is None
    optimizer.track = 0.9
    optimizer.zero_grad()
    optimizer.backward(net.losses(steps[1]))
    optimizer.track = 0.8
    with pytest.raises(RuntimeError, match="do not suit None as track"):
        optimizer.track = None
    assert optimizer.track == 0.8
    assert optimizer.combine().mean is not None


def test_memory_may_change_on_the_way(way: str) -> None:
    if way in ("sketched", "replayed"):
        pytest.skip("is about both")
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 4))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda", track=0.8)
    reports(optimizer, net, steps)
    optimizer.memory = Sketch(1 << 12)
    with pytest.warns(UserWarning, match=BEGIN_ANEW):
        reports(optimizer, net, steps[:1])
    reports(optimizer, net, steps[1:])
    optimizer.memory = Rows()
    with pytest.warns(UserWarning, match=BEGIN_ANEW):
        reports(optimizer, net, steps[:1])
    report = reports(optimizer, net, steps[1:])[-1]
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, [ALWAYS] * 4, 0.8), rtol=1e-6, atol=1e-9)


def test_another_weighting_keeps_averages() -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 9.0, 0, 8))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "uniform", track=0.8)
    reports(optimizer, net, steps[:5])
    optimizer.weighting = "mgda"
    report = reports(optimizer, net, steps[5:])[-1]
    torch.testing.assert_close(report.mean_gram, over_pairs(steps, [ALWAYS] * 8, 0.8), rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# What is saved


def through_text(state: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "mogeo": json.dumps(json.loads(group["mogeo"]))} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "json": through_text,
    "torch.save": through_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("options", [{"track": 0.9}, {"track": "auto", "refresh_every": 2, "smoothing": 0.5}])
@pytest.mark.parametrize("how", slow_but(COPIES, "torch.save", "deepcopy"))
def test_resumes_bit_for_bit(how: str, options: dict[str, Any]) -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 4.0, 0, 16))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda-decoupled", **options)
    reports(optimizer, net, steps[:9])
    if how in ("deepcopy", "pickle"):
        twin_net, twin = COPIES[how]((net, optimizer))
    else:
        twin_net = copy.deepcopy(net)
        twin = optimizer_of(twin_net, "mgda-decoupled", **options)
        twin.load_state_dict(COPIES[how](optimizer.state_dict()))
    ours, theirs = reports(optimizer, net, steps[9:]), reports(twin, twin_net, steps[9:])
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine.weights, its.weights)
        for part in ("gram", "error", "evidence", "seen", "losses"):
            mine_part, its_part = getattr(mine.mean, part), getattr(its.mean, part)
            torch.testing.assert_close(mine_part, its_part, rtol=0, atol=0, equal_nan=True)
    assert optimizer.state_dict()["param_groups"][0]["mogeo"] == twin.state_dict()["param_groups"][0]["mogeo"]
    assert torch.equal(net.vector, twin_net.vector)


def test_the_bare_base_loads_it_and_the_text_is_not_much_longer_than_the_averages() -> None:
    steps = list(draws(with_a_victim(3, 1.8, 1 << 13), 4.0, 0, 4))
    net = Chosen(1 << 13)
    optimizer = optimizer_of(net)
    reports(optimizer, net, steps)
    state = optimizer.state_dict()
    assert optimizer._state.tracked is not None
    kept = [value for value in optimizer._state.tracked.state_dict().values() if isinstance(value, Tensor)]
    assert len(state["param_groups"][0]["mogeo"]) < 1.4 * sum(value.nbytes for value in kept) + 5_000
    bare = torch.optim.SGD(net.parameters(), lr=0.1)
    bare.load_state_dict(state)
    again = optimizer_of(net)
    again.load_state_dict(bare.state_dict())
    assert again.own_state()["objectives"] == ["0", "1", "2"]


@pytest.mark.parametrize(("saved", "loaded"), [(None, 0.9), (0.9, None), (0.9, 0.6)])
def test_a_state_of_another_setting_loads_with_a_word(saved: float | None, loaded: float | None) -> None:
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 4.0, 0, 8))
    net = Chosen(COLUMNS)
    optimizer = optimizer_of(net, "mgda", track=saved)
    reports(optimizer, net, steps[:4])
    twin = optimizer_of(net, "mgda", track=loaded)
    with pytest.warns(UserWarning, match=f"saved with track={saved}; this optimizer keeps its own"):
        twin.load_state_dict(optimizer.state_dict())
    report = reports(twin, net, steps[4:5])[-1]
    assert (report.mean is None) == (loaded is None)
    if loaded is not None:
        assert bool(some(report.mean_gram).isnan().all()) == (saved is None)


def test_a_state_of_before_there_was_tracking_loads() -> None:
    net = Chosen(COLUMNS)
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 4.0, 0, 2))
    optimizer = optimizer_of(net, "mgda")
    reports(optimizer, net, steps[:1])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        own = json.loads(group["mogeo"])
        del own["tracked"], own["settings"]["track"]
        group["mogeo"] = json.dumps(own)
    twin = optimizer_of(net, "mgda")
    twin.load_state_dict(state)
    assert bool(some(reports(twin, net, steps[1:])[-1].mean_gram).isnan().all())


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoints_bring_averages_back(flat: bool, tmp_path: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    steps = list(draws(with_a_victim(3, 1.8, COLUMNS), 4.0, 0, 10))
    net, twin_net = Chosen(COLUMNS), Chosen(COLUMNS)
    optimizer, twin = optimizer_of(net, "mgda"), optimizer_of(twin_net, "mgda")
    reports(optimizer, net, steps[:6])
    assert len(twin.param_groups) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        model, state = get_state_dict(net, optimizer, options=options)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        model, state = get_state_dict(twin_net, twin, options=options)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(twin_net, twin, model_state_dict=model, optim_state_dict=state, options=options)
    assert torch.equal(reports(optimizer, net, steps[6:])[-1].weights, reports(twin, twin_net, steps[6:])[-1].weights)


# --------------------------------------------------------------------------------------------------------------------
# Odd problems


@pytest.mark.parametrize("weighting", ["uniform", "mgda-decoupled", "upgrad", "group-dro"])
@pytest.mark.parametrize("count", slow_but([1, 2, 33], 1))
def test_few_and_many_objectives(weighting: str, count: int) -> None:
    means = independent([1.0] * count, COLUMNS)
    report = trained(draws(means, 0.5, 0, 12), weighting, guarantee_descent=True)[-1]
    assert report.weights.sum().item() == pytest.approx(1, rel=0.2)
    assert bool((some(report.alignment) > 0).all())
    json.dumps(report.to_dict())


@pytest.mark.parametrize("columns", [4, 5])
def test_few_parameters(columns: int) -> None:
    net = Chosen(columns)
    found = reports(optimizer_of(net, "mgda"), net, draws(torch.eye(3, columns, dtype=torch.float64), 4.0, 0, 20))
    assert all(report.weights.isfinite().all() for report in found)


@pytest.mark.parametrize("weighting", ["mgda", "mgda-decoupled", "uniform", "upgrad", "cagrad"])
def test_identical_and_zero_gradients(weighting: str) -> None:
    """Two that are one, and one that is solved."""
    steps = [
        rows[[0, 0, 1, 1]] * torch.tensor([[1.0], [1.0], [1.0], [0.0]])
        for rows in draws(independent([1.0, 1.0], COLUMNS), 4.0, 0, 20)
    ]
    for report in trained(steps, weighting, guarantee_descent=True):
        assert report.weights.isfinite().all()
        assert report.weights[:3].sum() > 0
        assert bool(some(report.alignment)[3].isnan())
    assert bool((some(report.alignment)[:3] > 0).all())
    if weighting.startswith("mgda"):
        assert report.weights[3] == 0
        assert (report.weights[:2].sum() - report.weights[2]).abs() < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", slow_but([1e-20, 1e20], 1e20))
def test_huge_and_tiny_gradients(scale: float, dtype: torch.dtype) -> None:
    """Squares of fp32 gradients would leave fp32's range."""
    steps = [rows.to(dtype) for rows in draws(with_a_victim(3, 1.8, COLUMNS), 4.0, 0, 16)]
    found = []
    for factor in (1.0, scale):
        net = Chosen(COLUMNS, dtype)
        optimizer = optimizer_of(net, "mgda", guarantee_descent=True)
        optimizer.param_groups[0]["lr"] = 0.0
        found.append(reports(optimizer, net, [rows * factor for rows in steps])[-1])
    torch.testing.assert_close(found[1].weights, found[0].weights, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1].noise_scale, found[0].noise_scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("track", [0.51, 0.7, 0.99])
def test_every_decay_that_is_accepted_finds_evidence_in_the_end(track: float) -> None:
    report = trained([with_a_victim(3, 1.8, COLUMNS)] * 9, "mgda", track=track)[-1]
    assert some(report.evidence).tolist() == [1.0] * 3


def test_gradients_without_noise_are_known_at_once_that_errors_are() -> None:
    steps = [with_a_victim(3, 1.8, COLUMNS)] * 8
    found = trained(steps, "mgda-decoupled")
    assert found[4].evidence.tolist() == [0.0] * 3  # type: ignore[union-attr]
    assert found[5].evidence.tolist() == [1.0] * 3  # type: ignore[union-attr]
    torch.testing.assert_close(found[-1].mean_gram, steps[0] @ steps[0].T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[-1].noise_scale, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
