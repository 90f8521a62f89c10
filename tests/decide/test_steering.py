"""mogeo.decide.steering: preference, floor and memory against definitions, optimality conditions and oracles."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton
from hypothesis import assume, given
from torch import Tensor

from mogeo import weightings
from mogeo.decide.steering import AnyWeighting, Steering
from mogeo.geometry.exact_min_norm import Status
from mogeo.geometry.ops import MinNorm
from mogeo.weightings import MGDA, CAGrad, GroupDRO, UPGrad, Weighting, cagrad, mgda, resolve, upgrad
from tests.decide.test_on_device import nothing_waits
from tests.profiles import examples
from tests.reference import exact
from tests.strategies import WELL_POSED, any_grams, grams, integer_grams

# What each divides the gradients by, and whether its coefficients go to the raw gradients.
FAMILY = {
    "mgda": (lambda norms, losses: torch.ones_like(norms), True),
    "mgda-normalized": (lambda norms, losses: norms, False),
    "mgda-decoupled": (lambda norms, losses: losses, True),
    "gapo(0.5)": (lambda norms, losses: norms.sqrt(), False),
}
NEVER_HURT = ("mgda", "mgda-normalized", "gapo(0.5)")
FEW = examples(40)
MANY_SOLVED = st.one_of(any_grams(), grams(["zero rows"], min_k=2))


def signed(gram: Tensor | None, losses: Tensor) -> list[float]:
    """A user's weighting, which returns a list, and negative weights."""
    return [(-1.0) ** k * (k + 1) for k in range(losses.numel())]


def every_weighting(count: int) -> list[AnyWeighting]:
    """One of each kind, fresh."""
    ascending = ", ".join(str(k + 1) for k in range(count))
    named = ["uniform", f"linear({ascending})", "group-dro(0.5)", *FAMILY, "upgrad", "cagrad", "raco"]
    return [*map(resolve, named), signed]


def problem(gram: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Losses within a decade, and a preference within a factor of 4: of mean 1, as `Steering` makes it."""
    rng = np.random.default_rng(seed)
    losses = torch.from_numpy(rng.uniform(0.3, 3.0, len(gram)))
    preference = torch.from_numpy(rng.uniform(0.5, 2.0, len(gram)))
    return losses, preference / preference.mean()


def normalizers(name: str, gram: Tensor, losses: Tensor) -> Tensor:
    norms = gram.diagonal().sqrt()
    return torch.where(norms > 0, FAMILY[name][0](norms, losses), 1.0)


def coefficients(name: str, weights: Tensor, gram: Tensor, losses: Tensor) -> Tensor:
    """Those of the normalised gradients, from weights on the raw ones."""
    return weights if FAMILY[name][1] else weights * normalizers(name, gram, losses)


def assert_bits(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


# --------------------------------------------------------------------------------------------------------------------
# Nothing to steer


@FEW
@given(MANY_SOLVED, st.integers(0, 99), st.floats(1e-3, 1e3))
def test_a_uniform_preference_changes_no_bit(gram: Tensor, seed: int, each: float) -> None:
    losses, _ = problem(gram, seed)
    steerings = (Steering(), Steering([each] * len(gram)), Steering(None, 0.0, 0.0))
    for position, plain in enumerate(every_weighting(len(gram))):
        expected = plain(gram.clone(), losses.clone())
        gap = status = None
        if isinstance(plain, (MGDA, UPGrad, CAGrad)):
            _, gap, status = plain.solve(gram, losses)[:3]
        for steering in steerings:
            found = steering.weigh(every_weighting(len(gram))[position], gram, losses)
            assert_bits(found[0], torch.as_tensor(expected, dtype=torch.float64))
            assert_bits(found[1], gap)
            assert_bits(found[2], status)
            if isinstance(plain, Weighting):
                assert steering.constant(plain, len(gram)) == plain.constant(len(gram))


# --------------------------------------------------------------------------------------------------------------------
# Preference


@pytest.mark.parametrize("name", FAMILY)
@FEW
@given(grams(WELL_POSED, min_k=2, max_k=4), st.integers(0, 99))
def test_the_family_solves_for_gradients_divided_by_the_preference(name: str, gram: Tensor, seed: int) -> None:
    losses, preference = problem(gram, seed)
    weights, gap, status = Steering(preference.tolist()).weigh(resolve(name), gram, losses)[:3]
    divisors = (normalizers(name, gram, losses) * preference).numpy()
    best = exact.min_norm_point(exact.symmetric((gram.numpy() / divisors / divisors[:, None]).tolist()))
    expected = torch.tensor([float(alpha) for alpha in best.weights], dtype=torch.float64) / preference
    torch.testing.assert_close(
        coefficients(name, weights, gram, losses), expected / expected.sum(), rtol=1e-6, atol=1e-9
    )
    assert gap is not None
    assert status == Status.OPTIMAL


@pytest.mark.parametrize("name", FAMILY)
@FEW
@given(grams(["gaussian, N = 1000"], min_k=2), st.integers(0, 99))
def test_where_all_weights_are_positive_descent_is_in_proportion(name: str, gram: Tensor, seed: int) -> None:
    losses, preference = problem(gram, seed)
    weights, _, _ = Steering(preference.tolist()).weigh(resolve(name), gram, losses)[:3]
    assume(bool((weights > 0).all()))
    n = normalizers(name, gram, losses)
    inner = weights / losses if name == "mgda-decoupled" else weights  # its coefficients come from another direction
    per_preference = (gram @ inner) / n / preference
    torch.testing.assert_close(per_preference, per_preference.mean().expand(len(gram)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [*NEVER_HURT, "upgrad"])
@FEW
@given(any_grams(), st.integers(0, 99))
def test_under_a_preference_nobody_is_hurt(name: str, gram: Tensor, seed: int) -> None:
    losses, preference = problem(gram, seed)
    weights, _, status = Steering(preference.tolist()).weigh(resolve(name), gram, losses)[:3]
    assume(status is None or status != Status.STALLED)  # a Gram that fp32 made indefinite
    norms = gram.diagonal().clamp(min=0).sqrt()
    # upgrad's certificate says less where the Gram is not semi-definite; it does not tell.
    tolerance = 1e-12 if name != "upgrad" else 1e-4
    assert bool((gram @ weights >= -tolerance * norms * (weights @ norms)).all())


@pytest.mark.parametrize(("name", "most"), [*((name, 5) for name in NEVER_HURT), ("mgda-decoupled", 2)])
@FEW
@given(st.data())
def test_more_preference_never_lowers_the_cosine(name: str, most: int, data: st.DataObject) -> None:
    """With x(p) the shortest x of ⟨x, g̃_j⟩ ≥ p_j, along d, and V = ‖x‖²/2, convex with ∇V = μ ≥ 0, 2V = Σ_j p_j μ_j:
    where μ_k > 0, cos² is p_k²/2V, and has the sign of Σ_{j ≠ k} p_j μ_j for its slope; else x ignores p_k. Of two
    objectives, `mgda-decoupled` gives the preferred one the larger share of the weights, and so turns towards it.
    """
    gram = data.draw(grams(WELL_POSED, min_k=2, max_k=most))
    seed, factor = data.draw(st.integers(0, 99)), data.draw(st.floats(1.0, 100.0))
    losses, preference = problem(gram, seed)
    cosines = []
    for p_0 in (preference[0].item(), preference[0].item() * factor):
        weights, _, _ = Steering([p_0, *preference[1:].tolist()]).weigh(resolve(name), gram, losses)[:3]
        slopes = gram @ weights
        cosines.append(float(slopes[0] / (weights @ slopes).sqrt() / gram[0, 0].sqrt()))
    assert cosines[1] >= cosines[0] - 1e-7


def test_more_preference_may_lower_the_inner_product() -> None:
    """Weight moves to the preferred gradient, which is the shorter one: d turns towards it, but shrinks."""
    rows = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    gram, losses = rows @ rows.T, torch.ones(2, dtype=torch.float64)
    before, after = (Steering([p, 2.2]).weigh(resolve("mgda"), gram, losses)[0] for p in (1.0, 1.05))
    assert (gram @ before)[0] > (gram @ after)[0] + 0.1


@FEW
@given(st.one_of(grams(WELL_POSED), integer_grams()), st.integers(0, 99))
def test_upgrad_takes_torchjds_preference_vector(gram: Tensor, seed: int) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    squares = gram.diagonal()
    assume(squares.min() > 1e-2 * squares.max())  # theirs adds 1e-4 of the trace to the diagonal, and drowns short rows
    losses, preference = problem(gram, seed)
    weights, _, _ = Steering(preference.tolist()).weigh(resolve("upgrad"), gram, losses)[:3]
    theirs = torchjd.UPGradWeighting(pref_vector=preference / len(gram))(gram)
    difference = weights - theirs  # weights may differ where gradients are dependent, directions not
    reach = weights @ gram.diagonal().sqrt()
    assert difference @ gram @ difference <= (1e-2 * reach) ** 2


@FEW
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6))
def test_uniform_with_a_preference_is_linear(preference: list[float]) -> None:
    losses = torch.ones(len(preference), dtype=torch.float64)
    found = Steering(preference).constant(resolve("uniform"), len(preference))
    expected = weightings.LinearScalarization(preference).constant(len(preference))
    assert found == pytest.approx(expected, rel=1e-14)
    assert Steering(preference).weigh(resolve("uniform"), None, losses)[0].tolist() == list(found)


@FEW
@given(any_grams(), st.integers(0, 99))
def test_other_weights_are_multiplied(gram: Tensor, seed: int) -> None:
    losses, preference = problem(gram, seed)
    for make in (lambda: GroupDRO(0.5), lambda: signed):
        weights, gap, status = Steering(preference.tolist()).weigh(make(), gram, losses)[:3]
        plain = torch.as_tensor(make()(gram, losses), dtype=torch.float64)
        torch.testing.assert_close(weights, plain * preference, rtol=1e-12, atol=0)
        assert gap is None
        assert status is None


# --------------------------------------------------------------------------------------------------------------------
# Floor


@st.composite
def floors(draw: st.DrawFn, count: int) -> float:
    """0 < m < 1/K, often close to either end."""
    return draw(st.one_of(st.floats(1e-6, 0.999), st.sampled_from([1e-3, 0.5, 1 - 1e-9]))) / count


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("preferred", [False, True])
@examples(25)
@given(st.data())
def test_the_floor_is_the_enumerated_optimum(name: str, preferred: bool, data: st.DataObject) -> None:
    gram = data.draw(st.one_of(grams(WELL_POSED, max_k=4), integer_grams(max_k=4)))
    floor = data.draw(floors(len(gram)))
    losses, preference = problem(gram, data.draw(st.integers(0, 99)))
    preference = preference if preferred else torch.ones_like(preference)
    weights, _, status = Steering(preference.tolist(), floor).weigh(resolve(name), gram, losses)[:3]
    assert status == Status.OPTIMAL
    alpha = coefficients(name, weights, gram, losses) * preference
    n = (normalizers(name, gram, losses) * preference).numpy()
    hull = exact.symmetric((gram.numpy() / n / n[:, None]).tolist())
    best = exact.min_norm_point(hull, Fraction(floor))
    found = exact.value(hull, exact.on_simplex(alpha.tolist()))
    reach = sum(float(w) * math.sqrt(row[i]) for i, (w, row) in enumerate(zip(best.weights, hull, strict=True)))
    assert float(found - best.value) <= 1e-12 * reach**2
    assert (alpha / alpha.sum()).min() >= floor * (1 - 1e-12)


@examples(150)
@given(MANY_SOLVED, st.data())
def test_the_floor_satisfies_the_conditions_of_the_shrunken_simplex(gram: Tensor, data: st.DataObject) -> None:
    """(Mα)_i is the same λ for all α_i > m, and no less where α_i = m, to the rounding of the shrunken hull's vertices;
    a solved objective takes no part.
    """
    floor = data.draw(floors(len(gram)))
    weights, gap, status = Steering(min_weight=floor).weigh(resolve("mgda"), gram, torch.ones(len(gram)))[:3]
    assert status is not None
    assume(status != Status.STALLED)  # a Gram that fp32 made indefinite
    live = (gram.diagonal() > 0).nonzero().flatten().tolist()
    m = exact.symmetric(gram[live][:, live].tolist())
    alpha = [Fraction(weights[k].item()) for k in live]
    assert abs(sum(alpha) - 1) <= 1e-14
    assert min(alpha) >= floor
    assert weights.count_nonzero() == len(live)
    scale, norms = 1 - len(live) * floor, [math.sqrt(m[i][i]) for i in range(len(m))]
    reach = sum(float(a) * norm for a, norm in zip(alpha, norms, strict=True))
    slopes = exact.products(m, alpha)
    # of the free part alone: (α − m) / (1 − Km) is a point of the simplex
    level = sum((a - Fraction(floor)) * slope for a, slope in zip(alpha, slopes, strict=True)) / Fraction(scale)
    for slope, norm in zip(slopes, norms, strict=True):
        rounding = 1e-12 * (scale * norm + 2 * floor * sum(norms)) * reach
        assert scale * float(level - slope) <= rounding + gap.item()
        assert gap.item() <= rounding + 1e-12 * (max(norms) * scale + 2 * floor * sum(norms)) * reach


def test_a_vertex_of_the_shrunken_hull_may_be_zero() -> None:
    """v_1 = g_1/2 + (g_1 + g_2)/4 = 0 of g = 1, −3 at m = 1/4: the optimum, and no solved objective."""
    gram = torch.tensor([[1.0, -3.0], [-3.0, 9.0]], dtype=torch.float64)
    weights, _, _ = Steering(min_weight=0.25).weigh(resolve("mgda"), gram, torch.ones(2))[:3]
    assert weights.tolist() == pytest.approx([0.75, 0.25], abs=1e-12)


@FEW
@given(MANY_SOLVED, st.data())
def test_other_weights_are_mixed_with_their_mean(gram: Tensor, data: st.DataObject) -> None:
    floor = data.draw(floors(len(gram)))
    losses, preference = problem(gram, data.draw(st.integers(0, 99)))
    live = gram.diagonal() > 0
    count = int(live.sum())
    for weighting in every_weighting(len(gram)):
        if isinstance(weighting, MGDA):
            continue
        everyone = not getattr(weighting, "needs_gram", True)
        takes_part = torch.ones_like(live) if everyone else live
        k = len(gram) if everyone else count
        before, _, _ = Steering(preference.tolist()).weigh(weighting, gram, losses)[:3]
        if isinstance(weighting, GroupDRO):
            weighting = GroupDRO(0.5)
        after, _, _ = Steering(preference.tolist(), floor).weigh(weighting, gram, losses)[:3]
        total = before[takes_part].sum()
        size = before.abs().sum()
        torch.testing.assert_close(
            after[takes_part], before[takes_part] * (1 - k * floor) + floor * total, rtol=0, atol=1e-14 * float(size)
        )
        assert torch.equal(after[~takes_part], before[~takes_part])
        assert float((after[takes_part].sum() - total).abs()) <= 1e-14 * float(size)
        if bool((before >= 0).all()):
            assert bool((after[takes_part] >= floor * total * (1 - 1e-12)).all())


@pytest.mark.parametrize("name", [*FAMILY, "upgrad", "raco"])
@given(grams(WELL_POSED, min_k=2), st.integers(-60, 60), st.integers(0, 99))
@FEW
def test_a_common_scale_of_the_gradients_scales_the_weights(name: str, gram: Tensor, exponent: int, seed: int) -> None:
    """Norms from 1e-20 to 1e20 or so: nothing on the way under- or overflows."""
    losses, preference = problem(gram, seed)
    steering = Steering(preference.tolist(), 0.5 / len(gram))
    before, _, _ = steering.weigh(resolve(name), gram, losses)[:3]
    after, _, _ = steering.weigh(resolve(name), gram * 4.0**exponent, losses)[:3]
    torch.testing.assert_close(after / after.sum(), before / before.sum(), rtol=1e-6, atol=1e-9)


@given(grams(["gaussian, N = 1000"], min_k=2), st.data())
@FEW
def test_losses_and_norms_may_lie_decades_apart(gram: Tensor, data: st.DataObject) -> None:
    powers = data.draw(st.lists(st.integers(-20, 20), min_size=len(gram), max_size=len(gram)))
    losses = 10.0 ** torch.tensor(
        data.draw(st.lists(st.integers(-8, 8), min_size=len(gram), max_size=len(gram))), dtype=torch.float64
    )
    scale = 10.0 ** torch.tensor(powers, dtype=torch.float64)
    preference = [1.0 + k for k in range(len(gram))]
    for name in FAMILY:
        for floor in (0.0, 0.5 / len(gram)):
            spread = gram * scale * scale[:, None]
            weights, _, status = Steering(preference, floor).weigh(resolve(name), spread, losses)[:3]
            assert bool(weights.isfinite().all())
            assert bool((weights >= 0).all())
            assert status == Status.OPTIMAL


# --------------------------------------------------------------------------------------------------------------------
# Edges


@pytest.mark.parametrize("preference", [None, (3.0,)])
def test_one_objective_keeps_its_weight(preference: tuple[float, ...] | None) -> None:
    gram, losses = torch.tensor([[4.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    for weighting in every_weighting(1):
        expected = torch.as_tensor(weighting(gram, losses), dtype=torch.float64)
        steering = Steering(preference, 0.9, 0.5)
        torch.testing.assert_close(steering.weigh(weighting, gram, losses)[0], expected, rtol=1e-15, atol=0)


def test_where_all_are_solved_weights_are_finite() -> None:
    gram, losses = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for weighting in every_weighting(3):
        weights, _, status = Steering([1, 2, 3], 0.1, 0.5).weigh(weighting, gram, losses)[:3]
        assert bool(weights.isfinite().all())
        assert status is None or status == Status.ZERO


def test_the_only_objective_with_a_gradient_gets_all() -> None:
    gram = torch.diag(torch.tensor([0.0, 4.0, 0.0], dtype=torch.float64))
    losses = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)
    for name in FAMILY:
        weights, _, _ = Steering([1, 2, 3], 0.3, 0.5).weigh(resolve(name), gram, losses)[:3]
        assert coefficients(name, weights, gram, losses).tolist() == pytest.approx([0, 1, 0], abs=1e-15)


@pytest.mark.parametrize("loss", [0.0, -0.3])
@pytest.mark.parametrize("steering", [Steering([1, 2]), Steering(min_weight=0.1)])
def test_a_loss_that_may_not_divide_gives_nan(steering: Steering, loss: float) -> None:
    gram, losses = torch.eye(2, dtype=torch.float64), torch.tensor([1.0, loss], dtype=torch.float64)
    weights, _, status = steering.weigh(resolve("mgda-decoupled"), gram, losses)[:3]
    assert bool(weights.isnan().all())
    assert status == Status.NONPOSITIVE_LOSS
    gram[1] = gram[:, 1] = 0.0
    assert steering.weigh(resolve("mgda-decoupled"), gram, losses)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"preference \(\): pass one finite number > 0"),
        (([1.0, 0.0],), "finite number > 0"),
        (([1.0, -1.0],), "finite number > 0"),
        (([1.0, math.nan],), "finite number > 0"),
        (([1.0, math.inf],), "finite number > 0"),
        (([1, 1], 0.5), r"min_weight=0.5 for K = 2 objectives.*less than 1/K = 0.5"),
        ((None, -0.1), r"min_weight=-0.1: pass a number ≥ 0"),
        ((None, math.nan), "min_weight=nan"),
        ((None, 0.0, 1.0), "smoothing=1.0: pass a number s, 0 ≤ s < 1"),
        ((None, 0.0, -0.1), "smoothing=-0.1"),
        ((None, 0.0, math.nan), "smoothing=nan"),
    ],
)
def test_a_value_out_of_range_says_what_to_pass(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steering(*arguments)  # type: ignore[arg-type]


def test_what_does_not_fit_the_objectives_is_said_at_the_first_weigh() -> None:
    gram, losses = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for weighting in every_weighting(3):
        with pytest.raises(ValueError, match=r"min_weight=0.4 for K = 3 objectives"):
            Steering(min_weight=0.4).weigh(weighting, gram, losses)
        with pytest.raises(ValueError, match="preference has 2 values for 3 objectives: pass one for each"):
            Steering([1, 2]).weigh(weighting, gram, losses)
        with pytest.raises(ValueError, match="preference has 2 values for 3 objectives"):
            Steering([1, 2]).constant(weighting, 3)


@pytest.mark.parametrize("returned", [None, [1.0], "half", torch.ones(2, 2)])
@pytest.mark.parametrize("steering", [Steering(), Steering([1, 2], 0.1, 0.9)])
def test_a_weighting_that_returns_anything_else_is_named(steering: Steering, returned: object) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)returned .* for 2 objectives: it must return one finite weight"):
        steering.weigh(lambda gram, losses: returned, torch.eye(2, dtype=torch.float64), torch.ones(2))


# --------------------------------------------------------------------------------------------------------------------
# Memory


class Replay(Weighting):
    """Returns what it was told to, step by step."""

    def __init__(self, steps: list[list[float]], needs_gram: bool = True) -> None:
        self.steps, self.needs_gram = iter(steps), needs_gram

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        return torch.tensor(next(self.steps), dtype=torch.float64)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]]]:
    """Weights of 1 … 6 steps, and who has a gradient in each."""
    count, steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    weight, live = st.floats(-10, 10), st.booleans()
    return (
        draw(st.lists(st.lists(weight, min_size=count, max_size=count), min_size=steps, max_size=steps)),
        draw(st.lists(st.lists(live, min_size=count, max_size=count), min_size=steps, max_size=steps)),
    )


@given(histories(), st.floats(0.01, 0.99), st.integers(0, 5))
def test_the_memory_is_its_recursion_and_survives_json(
    history: tuple[list[list[float]], list[list[bool]]], smoothing: float, saved_after: int
) -> None:
    weights, lives = history
    steering, weighting = Steering(smoothing=smoothing), Replay(weights)
    average: list[float | None] = [None] * len(weights[0])
    for step, (new, live) in enumerate(zip(weights, lives, strict=True)):
        expected = list(new)
        for k, has_gradient in enumerate(live):
            if has_gradient:
                before = average[k]
                average[k] = expected[k] = new[k] if before is None else smoothing * before + (1 - smoothing) * new[k]
        gram = torch.diag(torch.tensor(live, dtype=torch.float64))
        found, _, _ = steering.weigh(weighting, gram, torch.ones(len(live)))[:3]
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        if step == saved_after:
            state = json.loads(json.dumps(steering.state_dict(), allow_nan=False))
            steering = Steering(smoothing=smoothing)
            steering.load_state_dict(state)
            assert steering.state_dict() == state


def test_a_fresh_state_is_restored_as_fresh() -> None:
    steering = Steering(smoothing=0.5)
    steering.load_state_dict(json.loads(json.dumps(Steering(smoothing=0.5).state_dict())))
    assert steering.weigh(Replay([[1.0, 3.0]]), None, torch.ones(2))[0].tolist() == [1.0, 3.0]


def test_without_a_gram_matrix_everyone_is_remembered() -> None:
    steering, weighting = Steering(smoothing=0.5), Replay([[1.0, 3.0], [3.0, 1.0]], needs_gram=False)
    for expected in ([1.0, 3.0], [2.0, 2.0]):
        assert steering.weigh(weighting, torch.zeros(2, 2), torch.ones(2))[0].tolist() == expected


@pytest.mark.parametrize("needs_gram", [True, False])
def test_weights_that_are_not_finite_are_not_remembered(needs_gram: bool) -> None:
    steering, weighting = Steering(smoothing=0.5), Replay([[1.0, 1.0], [math.nan, 3.0], [3.0, 4.0]], needs_gram)
    gram = torch.eye(2, dtype=torch.float64)
    steering.weigh(weighting, gram, torch.ones(2))
    assert math.isnan(steering.weigh(weighting, gram, torch.ones(2))[0][0])
    assert steering.weigh(weighting, gram, torch.ones(2))[0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    "weighting", [Replay([[0.5, 0.5], [0.5, 0.5]]), resolve("uniform")], ids=["memory", "constant"]
)
def test_what_is_returned_is_the_callers(weighting: Weighting) -> None:
    steering, gram = Steering(smoothing=0.5), torch.eye(2, dtype=torch.float64)
    steering.weigh(weighting, gram, torch.ones(2))[0].zero_()
    assert steering.weigh(weighting, gram, torch.ones(2))[0].tolist() == [0.5, 0.5]


def test_a_memory_of_other_objectives_is_refused() -> None:
    steering = Steering(smoothing=0.5)
    steering.weigh(Replay([[1.0, 1.0]]), None, torch.ones(2))
    with pytest.raises(ValueError, match="2 weights are remembered, but 3 came"):
        steering.weigh(Replay([[1.0, 1.0, 1.0]]), None, torch.ones(3))


# --------------------------------------------------------------------------------------------------------------------
# On a GPU


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solvers, which on a GPU are launches, are stood in for; the rest must not ask the host."""

    def solved(gram: Tensor, *arguments: object) -> MinNorm:
        return MinNorm(
            torch.ones_like(gram[0]) / len(gram), gram[0, 0], torch.zeros_like(gram[0, 0], dtype=torch.int64)
        )

    monkeypatch.setattr(mgda, "normalized_min_norm", solved)
    monkeypatch.setattr(mgda, "min_norm_weights", solved)
    monkeypatch.setattr(upgrad, "descent_weights", lambda gram, weights: solved(gram)._replace(weights=weights))
    monkeypatch.setattr(cagrad, "conflict_averse_weights", lambda gram, *arguments, clipped: solved(gram))
    gram, losses = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for weighting in [*every_weighting(2)[:-1], lambda gram, losses: losses]:
        for steering in (Steering(), Steering([1, 2]), Steering(None, 0.1), Steering([1, 2], 0.1, 0.9)):
            steering.weigh(weighting, gram, losses)  # constants are copied to the device once
            with nothing_waits(monkeypatch):
                steering.weigh(weighting, gram, losses)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="with a GPU the kernels run there")
def test_a_loss_that_may_not_divide_is_told_and_not_remembered_by_the_kernel_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mogeo.geometry import triton_backend

    monkeypatch.setattr(mgda, "normalized_min_norm", lambda *arguments: MinNorm(*triton_backend.min_norm(*arguments)))
    steering, gram = Steering(smoothing=0.5), torch.eye(2, dtype=torch.float64)
    losses = [torch.tensor(pair, dtype=torch.float64) for pair in ([1.0, 1.0], [1.0, -1.0], [1.0, 1.0])]
    found = [steering.weigh(resolve("mgda-decoupled"), gram, each)[:3] for each in losses]
    assert [status.item() for _, _, status in found] == [Status.OPTIMAL, Status.NONPOSITIVE_LOSS, Status.OPTIMAL]
    assert bool(found[1][0].isnan().all())
    assert found[2][0].tolist() == pytest.approx([0.5, 0.5], rel=1e-12)
