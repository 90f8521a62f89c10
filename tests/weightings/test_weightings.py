"""mogeo.weightings: each weighting against its formula, its named properties, and the registry."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import mogeo
from mogeo.weightings import MGDA, NAMES, GroupDRO, LinearScalarization, Weighting, gapo, resolve
from mogeo.weightings.upgrad import UPGrad
from tests.strategies import FAMILIES

MGDA_FAMILY = ["mgda", "mgda-normalized", "mgda-decoupled", "gapo(0.5)"]
ALL = ["uniform", "linear(0.1, 0.2, 0.3, 0.4)", "group-dro", *MGDA_FAMILY]
AVERSE = ["cagrad(0.5)", "raco(0.5)"]
# Where the decoupled direction has no freedom left to blur a comparison of weights.
WELL_POSED = ["gaussian, N = 1000", "gaussian, N = K + 1", "strong conflict"]


@st.composite
def problems(draw: st.DrawFn, k: int = 4) -> tuple[Tensor, Tensor]:
    """(gram [k, k], losses [k] in 0.01 … 10) from a well-posed family."""
    family = draw(st.sampled_from(WELL_POSED))
    seed = draw(st.integers(0, 2**31))
    gram = torch.from_numpy(FAMILIES[family](np.random.default_rng(seed), k))
    losses = draw(st.lists(st.floats(0.01, 10.0), min_size=k, max_size=k))
    return gram, torch.tensor(losses, dtype=torch.float64)


def weights_of(name: str, gram: Tensor, losses: Tensor) -> Tensor:
    return resolve(name)(gram, losses)


def assert_same_weights(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def reference(gram: Tensor, losses: Tensor, normalizers: Tensor, raw: bool) -> Tensor:
    """The MGDA family by its definition, in numpy: normalise, solve, apply."""
    n = normalizers.numpy()
    alpha = mogeo.min_norm_weights(torch.from_numpy(gram.numpy() / n[:, None] / n[None, :])).weights
    return alpha if raw else alpha / normalizers


@given(problems())
def test_mgda_family_is_its_formula(problem: tuple[Tensor, Tensor]) -> None:
    gram, losses = problem
    norms = gram.diagonal().sqrt()
    for weighting, normalizers, raw in [
        (MGDA(), torch.ones(4), True),
        (MGDA("l2", apply_to="normalized"), norms, False),
        (MGDA("l2"), norms, True),
        (MGDA("loss"), losses, True),
        (MGDA("loss", power=2.0, apply_to="normalized"), losses**2, False),
        (MGDA("loss+"), losses * norms, True),
        (gapo(0.5), norms**0.5, False),
    ]:
        assert_same_weights(weighting(gram, losses), reference(gram, losses, normalizers.double(), raw))


@given(problems())
def test_mgda_never_conflicts(problem: tuple[Tensor, Tensor]) -> None:
    gram, losses = problem
    weights = weights_of("mgda", gram, losses)
    slopes = gram @ weights
    assert (slopes >= weights @ slopes - 1e-12 * gram.diagonal().max()).all()


@pytest.mark.parametrize("name", [*ALL, *AVERSE])
@given(problem=problems(), order=st.permutations(range(4)))
def test_permutation_equivariant(name: str, problem: tuple[Tensor, Tensor], order: list[int]) -> None:
    gram, losses = problem
    permuted = gram[order][:, order], losses[order]
    if name.startswith("linear"):
        name = f"linear({', '.join(str((i + 1) / 10) for i in order)})"
        assert_same_weights(weights_of(name, *permuted), torch.tensor(order).double().add(1) / 10)
        return
    assert_same_weights(weights_of(name, *permuted), weights_of(name, gram, losses)[order])


@pytest.mark.parametrize("name", ["uniform", "linear(0.1, 0.2, 0.3, 0.4)", "mgda", "mgda-decoupled", *AVERSE])
@given(problem=problems(), exponent=st.integers(-20, 20))
def test_grad_scaler_changes_no_bit(name: str, problem: tuple[Tensor, Tensor], exponent: int) -> None:
    """GradScaler multiplies gradients (and, where they are passed scaled, losses) by a power of two."""
    gram, losses = problem
    scale = 2.0**exponent
    expected = weights_of(name, gram, losses)
    assert torch.equal(weights_of(name, gram * scale**2, losses), expected)
    assert torch.equal(weights_of(name, gram * scale**2, losses * scale), expected)


@pytest.mark.parametrize("name", ["mgda-normalized", "gapo(0.5)"])
@given(problem=problems(), scale=st.floats(1e-6, 1e6))
def test_normalized_direction_follows_scale_to_the_power_left(
    name: str, problem: tuple[Tensor, Tensor], scale: float
) -> None:
    """What the docstring warns of: with w = α/‖g‖^p, scaling g by s scales d by s^(1−p), not by s."""
    gram, losses = problem
    power = 1.0 if name == "mgda-normalized" else 0.5
    assert_same_weights(weights_of(name, gram * scale**2, losses), weights_of(name, gram, losses) / scale**power, 1e-7)


@given(problems(), st.floats(0.01, 10.0))
def test_decoupled_is_mgda_at_equal_losses(problem: tuple[Tensor, Tensor], loss: float) -> None:
    gram, _ = problem
    losses = torch.full((4,), loss, dtype=torch.float64)
    assert_same_weights(weights_of("mgda-decoupled", gram, losses), weights_of("mgda", gram, losses))


@given(problems(2), st.floats(1.0, 100.0))
def test_of_two_objectives_a_larger_loss_never_lowers_its_own_coefficient(
    problem: tuple[Tensor, Tensor], factor: float
) -> None:
    gram, losses = problem
    larger = losses * torch.tensor([factor, 1.0])
    before, after = (weights_of("mgda-decoupled", gram, values)[0] for values in (losses, larger))
    assert after >= before - 1e-12


def test_a_normaliser_that_underflows_gives_no_nan() -> None:
    weights = mogeo.weightings.MGDA("loss", power=2.0, apply_to="normalized")(
        torch.eye(3, dtype=torch.float64), torch.tensor([1.0, 1e-200, 1.0], dtype=torch.float64)
    )
    assert bool(weights.isfinite().all())


def test_decoupled_may_conflict() -> None:
    """The statement in the documentation that its direction is not guaranteed to help everybody, shown once."""
    rng = np.random.default_rng(0)
    conflicts = 0
    for _ in range(300):
        rows = rng.standard_normal((4, 5))
        gram = torch.from_numpy(rows @ rows.T)
        losses = torch.from_numpy(rng.uniform(0.3, 0.9, 4))
        slopes = gram @ weights_of("mgda-decoupled", gram, losses)
        conflicts += bool((slopes < -1e-9).any())
    assert 0 < conflicts < 150


def test_solved_objectives_are_left_out_and_may_have_any_loss() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    gram = rows @ rows.T
    for name in MGDA_FAMILY:
        weights = weights_of(name, gram, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
        assert weights[1] == 0
        assert (weights[[0, 2]] > 0).all()


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
@pytest.mark.parametrize("loss", [0.0, -0.3])
def test_a_loss_that_divides_must_be_positive(normalize: str, loss: float) -> None:
    gram = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"objective '1' has loss .*needs it positive.*mgda-normalized"):
        MGDA(normalize)(gram, torch.tensor([1.0, loss]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*ALL, *AVERSE, "upgrad"])
@given(problem=problems(), scale=st.floats(0.01, 100.0))
def test_a_preference_without_a_favourite_changes_no_direction(
    name: str, problem: tuple[Tensor, Tensor], scale: float
) -> None:
    gram, losses = problem
    equal = torch.full((4,), scale, dtype=torch.float64)
    preferred = resolve(name).preferring(equal, gram, losses)
    assert_same_weights(
        preferred / preferred.sum(), weights_of(name, gram, losses) / weights_of(name, gram, losses).sum()
    )


@given(problem=problems())
def test_upgrad_is_the_mean_of_its_projections_and_says_how_sure_it_is(problem: tuple[Tensor, Tensor]) -> None:
    gram, losses = problem
    solved = UPGrad().solve(gram, losses)
    projected = [mogeo.descent_weights(gram, alone) for alone in torch.eye(4, dtype=torch.float64)]
    assert_same_weights(solved.weights, torch.stack([each.weights for each in projected]).mean(0))
    assert torch.equal(solved.weights, UPGrad()(gram, losses))
    assert int(solved.status) == mogeo.Status.OPTIMAL
    assert (gram @ solved.weights >= -1e-9 * gram.diagonal().sqrt() * gram.diagonal().max().sqrt()).all()


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        ([0, 0, 0], mogeo.Status.OPTIMAL),
        ([0, 5, 0], mogeo.Status.UNDECIDED),
        ([5, 0, 1], mogeo.Status.STALLED),
        ([0, 1, 0], mogeo.Status.STALLED),
        ([2, 2, 2], mogeo.Status.ZERO),
        ([3, 3, 3], mogeo.Status.NONFINITE),
    ],
)
def test_upgrads_status_is_the_worst_of_its_problems(
    statuses: list[int], worst: mogeo.Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solved(gram: Tensor, weights: Tensor) -> mogeo.Descent:
        return mogeo.Descent(weights, torch.zeros_like(weights), torch.tensor(statuses))

    monkeypatch.setattr("mogeo.weightings.upgrad.descent_weights", solved)
    assert int(UPGrad().solve(torch.eye(3, dtype=torch.float64), torch.ones(3)).status) == worst


def test_upgrad_tells_where_gradients_balance_out() -> None:
    """The nearest harmless direction of the third gradient hangs on the last digit of the first two."""
    rows = torch.tensor([[0.6, 0.8, 0.0], [-0.6, -0.8, 0.0], [0.3, 0.1, 1.0]], dtype=torch.float64)
    assert int(UPGrad().solve(rows @ rows.T, torch.ones(3)).status) == mogeo.Status.UNDECIDED
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert int(UPGrad().solve(zero, torch.ones(3)).status) == mogeo.Status.ZERO
    assert int(UPGrad().solve(zero + torch.nan, torch.ones(3)).status) == mogeo.Status.NONFINITE


@pytest.mark.parametrize("name", MGDA_FAMILY)
@given(problem=problems(), favourite=st.integers(0, 3))
def test_the_familys_preference_keeps_the_sum_of_its_coefficients(
    name: str, problem: tuple[Tensor, Tensor], favourite: int
) -> None:
    gram, losses = problem
    preference = torch.ones(4, dtype=torch.float64)
    preference[favourite] = 3.0
    norms = gram.diagonal().sqrt()
    n = {"mgda-normalized": norms, "gapo(0.5)": norms.sqrt()}.get(name, torch.ones_like(norms))
    coefficients = resolve(name).preferring(preference, gram, losses) * n
    assert coefficients.sum().item() == pytest.approx(1.0, rel=1e-12)


def test_linear_weights() -> None:
    losses = torch.ones(2, dtype=torch.float64)
    assert LinearScalarization()(None, losses).tolist() == [0.5, 0.5]
    assert LinearScalarization([3, 1])(None, losses).tolist() == [0.75, 0.25]
    with pytest.raises(ValueError, match=r"linear\(3, 1\) has 2 weights for 3 objectives"):
        LinearScalarization([3, 1])(None, torch.ones(3))
    for bad in ([0.0, 0.0], [1.0, -1.0], [math.nan, 1.0], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="finite, ≥ 0, and not all zero"):
            LinearScalarization(bad)


def group_dro_reference(history: list[list[float]], step_size: float) -> list[float]:
    """Algorithm 1 of Sagawa et al. with every group seen at every step, in Python floats."""
    q = [1 / len(history[0])] * len(history[0])
    for losses in history:
        q = [weight * math.exp(step_size * loss) for weight, loss in zip(q, losses, strict=True)]
        q = [weight / sum(q) for weight in q]
    return q


@given(st.lists(st.lists(st.floats(0, 50), min_size=3, max_size=3), min_size=1, max_size=8), st.floats(0, 0.5))
def test_group_dro_is_its_formula(history: list[list[float]], step_size: float) -> None:
    weighting = GroupDRO(step_size)
    for losses in history:
        weights = weighting(None, torch.tensor(losses, dtype=torch.float64))
    assert weights.tolist() == pytest.approx(group_dro_reference(history, step_size), rel=1e-9)


def test_group_dro_survives_losses_that_overflow_exp() -> None:
    weights = GroupDRO(1.0)(None, torch.tensor([1e4, 1.0, 0.0], dtype=torch.float64))
    assert weights.tolist() == [1.0, 0.0, 0.0]


def test_group_dro_resumes() -> None:
    first, second = GroupDRO(0.5), GroupDRO(0.5)
    losses = torch.tensor([1.0, 2.0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(None, losses), first(None, losses))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(None, losses), second(None, losses))
    with pytest.raises(ValueError, match="holds 2 weights, but got 3 losses"):
        first(None, torch.ones(3))


@pytest.mark.parametrize("name", [*ALL, *AVERSE, "upgrad", "cagrad", "raco"])
def test_repr_is_the_name(name: str) -> None:
    canonical = {"group-dro": "group-dro(0.01)", "cagrad": "cagrad(0.4)", "raco": "raco(0.4)"}.get(name, name)
    assert repr(resolve(name)) == canonical
    assert repr(resolve(canonical)) == canonical


def test_registry_knows_every_name() -> None:
    arguments = {"linear": "(1, 2)", "gapo": "(2)"}
    for name in NAMES:
        assert isinstance(resolve(name + arguments.get(name, "")), Weighting)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mgda-decopled", "unknown weighting 'mgda-decopled': choose one of uniform, linear, group-dro, mgda"),
        ("", "unknown weighting"),
        ("linear", r"write linear\(0.3, 0.7\)"),
        ("gapo", r"write gapo\(0.5\)"),
        ("gapo(1, 2)", r"write gapo\(0.5\)"),
        ("mgda(2)", "write mgda"),
        ("linear(a, b)", "must be numbers"),
        ("group-dro(-1)", "step_size -1.0"),
        ("cagrad(-0.1)", "c=-0.1: pass a finite number ≥ 0"),
        ("raco(inf)", "c=inf"),
        ("raco(0.4, 1)", r"write raco, or raco\(0.4\)"),
    ],
)
def test_a_bad_name_says_what_to_write(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(spec)


def test_any_callable_is_a_weighting() -> None:
    def mine(gram: Tensor, losses: Tensor) -> Tensor:
        return losses

    assert resolve(mine) is mine
    with pytest.raises(TypeError, match="weighting=3: pass a name"):
        resolve(3)  # type: ignore[arg-type]


def test_bad_settings_name_the_choices() -> None:
    with pytest.raises(ValueError, match="choose 'none', 'l2', 'loss' or 'loss\\+'"):
        MGDA("l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose 'raw' or 'normalized'"):
        MGDA("l2", apply_to="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="power=nan"):
        MGDA("l2", power=math.nan)
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        MGDA()(None, torch.ones(2))
