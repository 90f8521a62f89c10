"""`min_norm_weights` before judges that do not round: named properties over every family of hard Gram matrices.

Tolerances, their units and the asserts are those of tests/min_norm_asserts.py.
"""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

import mogeo
from tests import strategies
from tests.backends import FAST_BACKENDS, Backend, everywhere
from tests.min_norm_asserts import (
    RELATIVE,
    assert_gap_is_true,
    assert_kkt,
    assert_on_simplex,
    assert_optimal,
    assert_same_direction,
    hull_of,
    judge,
    optimum_of,
)
from tests.profiles import slow_but
from tests.reference import exact, high_precision, nearest, published
from tests.strategies import FAMILIES, ROW_FAMILIES, WELL_POSED, row_families

# Diagonal entries of rows that take no part: solved objectives, rounding below zero, overflow.
LEFT_OUT = (0.0, -1e-30, math.nan, math.inf, -math.inf)

# Examples of a property.
MANY = 150
SOME = 60


# --------------------------------------------------------------------------------------------------------------------
# Every family, every size


@everywhere
@pytest.mark.parametrize("k", slow_but([1, 2, 3, 4, 5, 8, 16], 1, 4, 8))
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_on_every_family(backend: Backend, family: str, k: int) -> None:
    for seed in range(backend.some(5)):
        gram = torch.from_numpy(FAMILIES[family](np.random.default_rng([seed, k]), k))
        result = backend.min_norm_weights(gram)
        assert_on_simplex(gram, result.weights)
        judged = judge(gram, result.weights)
        assert_kkt(judged)
        assert_optimal(gram, result.weights)
        assert_gap_is_true(judged, result.gap)
        assert int(result.status) == mogeo.Status.OPTIMAL


@everywhere
@pytest.mark.parametrize("k", slow_but([2, 4, 8, 16], 2, 8))
@pytest.mark.parametrize("family", WELL_POSED)
def test_well_posed_families_have_no_excuse(backend: Backend, family: str, k: int) -> None:
    for seed in range(10, 10 + backend.some(10)):
        gram = torch.from_numpy(FAMILIES[family](np.random.default_rng([seed, k]), k))
        best, _ = optimum_of(gram)
        assert best > 0
        assert judge(gram, backend.min_norm_weights(gram).weights).value - best <= RELATIVE * best


def assert_solved(gram: Tensor, result: mogeo.MinNorm) -> None:
    """As `test_exact_on_every_family`, but for the value of the optimum, which takes the oracles too long."""
    assert_on_simplex(gram, result.weights)
    judged = judge(gram, result.weights)
    assert_kkt(judged)
    assert_gap_is_true(judged, result.gap)
    assert int(result.status) == mogeo.Status.OPTIMAL


@everywhere
@pytest.mark.parametrize("family", slow_but(FAMILIES, "gaussian, N = 1000", "strong conflict", "duplicates"))
def test_as_many_objectives_as_the_kernels_take(backend: Backend, family: str) -> None:
    gram = torch.from_numpy(FAMILIES[family](np.random.default_rng(32), 32))
    assert_solved(gram, backend.min_norm_weights(gram))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("k", slow_but([33, 64], 33))
@pytest.mark.parametrize("family", FAMILIES)
def test_many_objectives(backend: Backend, family: str, k: int) -> None:
    gram = torch.from_numpy(FAMILIES[family](np.random.default_rng(k), k))
    assert_solved(gram, backend.min_norm_weights(gram))


@everywhere
@pytest.mark.parametrize("family", ["gaussian, N = 1000", "gaussian, N = K + 1", "strong conflict"])
def test_agrees_with_a_published_solver(backend: Backend, family: str) -> None:
    for seed in range(backend.some(5)):
        gram = FAMILIES[family](np.random.default_rng([seed, 12]), 12)
        weights = backend.min_norm_weights(torch.from_numpy(gram)).weights.numpy()
        np.testing.assert_allclose(weights, published.min_norm_weights(gram), rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# Properties, on whatever hypothesis finds


@everywhere
def test_kkt_and_gap(backend: Backend) -> None:
    @backend.check(MANY, strategies.any_grams())
    def holds(gram: Tensor) -> None:
        result = backend.min_norm_weights(gram)
        assert_on_simplex(gram, result.weights)
        judged = judge(gram, result.weights)
        assert_kkt(judged)
        assert_gap_is_true(judged, result.gap)


@everywhere
def test_suboptimality(backend: Backend) -> None:
    @backend.check(MANY, strategies.any_grams(max_k=4))
    def holds(gram: Tensor) -> None:
        assert_optimal(gram, backend.min_norm_weights(gram).weights)


@everywhere
def test_suboptimality_beyond_enumeration(backend: Backend) -> None:
    @backend.check(SOME, strategies.grams(min_k=6, max_k=12))
    def holds(gram: Tensor) -> None:
        assert_optimal(gram, backend.min_norm_weights(gram).weights)


@everywhere
def test_deterministic_to_the_bit(backend: Backend) -> None:
    @backend.check(SOME, strategies.any_grams(max_k=min(24, backend.max_k)))
    def holds(gram: Tensor) -> None:
        before = gram.clone()
        first, second = backend.min_norm_weights(gram), backend.min_norm_weights(gram.clone())
        assert torch.equal(first.weights, second.weights)
        assert torch.equal(first.gap, second.gap)
        assert torch.equal(first.status, second.status)
        assert torch.equal(gram, before)


@everywhere
def test_permutation_leaves_the_direction(backend: Backend) -> None:
    @backend.check(MANY, strategies.any_grams(), st.randoms(use_true_random=False))
    def holds(gram: Tensor, random: object) -> None:
        order = list(range(len(gram)))
        random.shuffle(order)  # type: ignore[attr-defined]
        permuted = backend.min_norm_weights(gram[order][:, order]).weights
        back = torch.empty_like(permuted)
        back[order] = permuted
        assert_same_direction(gram, backend.min_norm_weights(gram).weights, back)


@everywhere
def test_common_power_of_two_changes_no_bit(backend: Backend) -> None:
    @backend.check(MANY, strategies.any_grams(), st.integers(-800, 800))
    def holds(gram: Tensor, exponent: int) -> None:
        result, scaled = backend.min_norm_weights(gram), backend.min_norm_weights(gram * 2.0**exponent)
        assert torch.equal(result.weights, scaled.weights)
        assert torch.equal(result.gap * 2.0**exponent, scaled.gap)


@everywhere
def test_common_scale_leaves_the_direction(backend: Backend) -> None:
    @backend.check(SOME, strategies.any_grams(), st.floats(1e-30, 1e30))
    def holds(gram: Tensor, scale: float) -> None:
        assert_same_direction(
            gram, backend.min_norm_weights(gram).weights, backend.min_norm_weights(gram * scale).weights
        )


@everywhere
def test_a_duplicate_leaves_the_direction(backend: Backend) -> None:
    @backend.check(MANY, strategies.any_grams(max_k=4), st.data())
    def holds(gram: Tensor, data: st.DataObject) -> None:
        k = len(gram)
        twin = data.draw(st.integers(0, k - 1))
        order = [*range(k), twin]
        weights = backend.min_norm_weights(gram[order][:, order]).weights
        merged = weights[:k].clone()
        merged[twin] += weights[k]
        assert_same_direction(gram, backend.min_norm_weights(gram).weights, merged)


@everywhere
def test_zero_and_nonfinite_rows_are_left_out(backend: Backend) -> None:
    @backend.check(SOME, strategies.any_grams(max_k=4), st.data(), st.sampled_from(LEFT_OUT), st.booleans())
    def holds(gram: Tensor, data: st.DataObject, entry: float, spread: bool) -> None:
        k = len(gram)
        at = data.draw(st.integers(0, k))
        kept = [i for i in range(k + 1) if i != at]
        larger = torch.zeros(k + 1, k + 1, dtype=torch.float64)
        larger[torch.tensor(kept)[:, None], torch.tensor(kept)] = gram
        larger[at, at] = entry
        if spread and not math.isfinite(entry):  # a NaN row spoils its whole row and column of the Gram
            larger[at, :] = larger[:, at] = entry
        alone, beside = backend.min_norm_weights(gram), backend.min_norm_weights(larger)
        assert beside.weights[at] == 0
        assert torch.equal(beside.weights[kept], alone.weights)
        assert torch.equal(beside.gap, alone.gap)
        assert torch.equal(beside.status, alone.status)


@everywhere
def test_survives_what_is_no_gram_at_all(backend: Backend) -> None:
    """Any symmetric matrix, also with negative diagonals and |M_ij| > ‖g_i‖‖g_j‖: honest weights, gap and status."""

    @backend.check(MANY, st.integers(1, 6), st.integers(0, 2**20), st.sampled_from([1e-3, 1.0, 1e3]))
    def holds(k: int, seed: int, spread: float) -> None:
        values = np.random.default_rng(seed).standard_normal((k, k)) * spread
        gram = torch.from_numpy(values + values.T + np.diag(np.random.default_rng(seed + 1).standard_normal(k)))
        result = backend.min_norm_weights(gram)
        if not len(hull_of(gram)):
            assert int(result.status) == mogeo.Status.ZERO
            return
        assert_on_simplex(gram, result.weights)
        judged = judge(gram, result.weights)
        true_gap = judged.value - min(judged.products)
        largest = Fraction(gram.abs().max().item())
        assert abs(Fraction(result.gap.item()) - true_gap) <= Fraction(1, 10**12) * largest
        if int(result.status) == mogeo.Status.OPTIMAL:
            assert true_gap <= Fraction(1, 10**9) * largest
        else:
            assert int(result.status) == mogeo.Status.STALLED


# --------------------------------------------------------------------------------------------------------------------
# Two objectives in closed form; and what the losses of mgda-decoupled do to its coefficients (docs/solver.md)


def decoupled(backend: Backend, gram: Tensor, losses: Tensor) -> Tensor:
    """The coefficients α of mgda-decoupled: the min-norm weights of M_ij / (L_i L_j)."""
    return backend.min_norm_weights(gram / (losses[:, None] * losses)).weights


def loss_vectors(k: int) -> st.SearchStrategy[Tensor]:
    """K losses between 0.01 and 100."""
    values = st.lists(st.floats(1e-2, 1e2), min_size=k, max_size=k)
    return values.map(lambda losses: torch.tensor(losses, dtype=torch.float64))


@everywhere
def test_two_objectives_closed_form(backend: Backend) -> None:
    @backend.check(MANY, strategies.any_grams(max_k=2))
    def holds(gram: Tensor) -> None:
        if len(hull_of(gram)) < 2:
            return
        (a, b), (_, c) = exact.symmetric(gram.tolist())
        if a + c - 2 * b <= Fraction(1, 10**6) * min(a, c):
            return  # nearly equal gradients: every weight is a minimiser to rounding, as the suboptimality tests judge
        first = min(max((c - b) / (a + c - 2 * b), Fraction(0)), Fraction(1))
        assert abs(Fraction(backend.min_norm_weights(gram).weights[0].item()) - first) <= Fraction(1, 10**9)


@everywhere
def test_a_larger_loss_never_lowers_its_own_coefficient(backend: Backend) -> None:
    @backend.check(MANY, st.data(), st.integers(2, 6), st.floats(1.01, 1e2))
    def holds(data: st.DataObject, k: int, growth: float) -> None:
        gram = data.draw(strategies.grams((*WELL_POSED, "gaussian, N = K + 1"), min_k=k, max_k=k))
        losses, own = data.draw(loss_vectors(k)), data.draw(st.integers(0, k - 1))
        grown = losses.clone()
        grown[own] *= growth
        assert decoupled(backend, gram, grown)[own] >= decoupled(backend, gram, losses)[own] - 1e-9


@everywhere
def test_coefficients_are_monotone_in_the_logarithms_of_the_losses(backend: Backend) -> None:
    """⟨α(L) - α(L'), log L - log L'⟩ ≥ 0, whatever changes: the losses that grow most gain coefficients on balance."""

    @backend.check(MANY, st.data(), st.integers(2, 6))
    def holds(data: st.DataObject, k: int) -> None:
        gram = data.draw(strategies.grams((*WELL_POSED, "gaussian, N = K + 1"), min_k=k, max_k=k))
        first, second = data.draw(loss_vectors(k)), data.draw(loss_vectors(k))
        change = decoupled(backend, gram, first) - decoupled(backend, gram, second)
        assert change @ (first.log() - second.log()) >= -1e-9


# --------------------------------------------------------------------------------------------------------------------
# From rows to direction


@everywhere
@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("conflict", [0.0, 0.9, 0.99])
def test_mgda_direction_conflicts_with_no_gradient(backend: Backend, k: int, conflict: float) -> None:
    """⟨d, g_i⟩ ≥ ‖d‖² > 0 for the gradients themselves, not only for their Gram."""
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(k, 5000, dtype=torch.float64, generator=generator)
    rows -= conflict * rows.mean(dim=0)
    direction = backend.combine(rows, backend.min_norm_weights(backend.gram(rows)).weights)
    inner = rows @ direction
    assert bool((inner >= direction @ direction * (1 - 1e-9)).all())
    assert bool((inner > 0).all())


@everywhere
@pytest.mark.parametrize("family", ROW_FAMILIES)
def test_the_direction_is_that_of_the_rows(backend: Backend, family: str) -> None:
    """‖d − d*‖² ≤ ερ² + (1e-13 + ε)ρρ* for the rows themselves, also where they balance out (docs/solver.md)."""

    @backend.check(30, row_families((family,), max_k=min(backend.max_k, 10)))
    def holds(rows: Tensor) -> None:
        result = backend.min_norm_weights(rows @ rows.T)
        assert int(result.status) == mogeo.Status.OPTIMAL
        gram = nearest.inner_products(rows.tolist())
        alpha, best = exact.on_simplex(result.weights.tolist()), high_precision.min_norm_point(gram).weights
        difference = [a - b for a, b in zip(alpha, best, strict=True)]
        norms = [Fraction(math.sqrt(gram[i][i])) for i in range(len(gram))]
        reach, best_reach = (sum(w * n for w, n in zip(weights, norms, strict=True)) for weights in (alpha, best))
        rounding, tolerance = Fraction(1, 2**50), Fraction(1, 10**13)
        allowed = rounding * reach**2 + (tolerance + rounding) * reach * best_reach
        assert exact.value(gram, difference) <= allowed


# --------------------------------------------------------------------------------------------------------------------
# Edges


@everywhere
@pytest.mark.parametrize("k", [1, 2, 7])
def test_all_zero(backend: Backend, k: int) -> None:
    result = backend.min_norm_weights(torch.zeros(k, k, dtype=torch.float64))
    assert int(result.status) == mogeo.Status.ZERO
    assert torch.equal(result.weights, torch.full((k,), 1 / k, dtype=torch.float64))
    assert result.gap.item() == 0


@everywhere
@pytest.mark.parametrize("entry", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_all_nonfinite(backend: Backend, k: int, entry: float) -> None:
    result = backend.min_norm_weights(torch.full((k, k), entry, dtype=torch.float64))
    assert int(result.status) == mogeo.Status.NONFINITE
    assert bool(result.weights.isfinite().all())
    assert result.gap.item() == 0


@everywhere
def test_a_nonfinite_row_among_zero_rows_gets_no_weight(backend: Backend) -> None:
    gram = torch.tensor([[0, math.nan, 0], [math.nan] * 3, [0, math.nan, 0]], dtype=torch.float64)
    result = backend.min_norm_weights(gram)
    assert int(result.status) == mogeo.Status.ZERO
    assert result.weights.tolist() == [0.5, 0.0, 0.5]


@everywhere
def test_a_nonfinite_entry_between_finite_rows_gives_no_nan(backend: Backend) -> None:
    gram = torch.tensor([[1, math.nan, 0.1], [math.nan, 1, 0.1], [0.1, 0.1, 2]], dtype=torch.float64)
    result = backend.min_norm_weights(gram)
    assert bool((result.weights >= 0).all())
    assert result.weights.sum().item() == pytest.approx(1)
    assert result.gap.isfinite()


@everywhere
def test_one_objective(backend: Backend) -> None:
    result = backend.min_norm_weights(torch.tensor([[3.0]], dtype=torch.float64))
    assert (result.weights.tolist(), result.gap.item(), int(result.status)) == ([1.0], 0.0, mogeo.Status.OPTIMAL)


@everywhere
@pytest.mark.parametrize(
    ("gram", "weights"),
    [
        ([[1e-300, 0.0], [0.0, 1e300]], [1.0, 0.0]),
        ([[1e-300, -0.5], [-0.5, 1e300]], [1.0, 0.0]),
        ([[1e-310, 1e-312], [1e-312, 1.0]], [1.0, 0.0]),
        ([[1e300, -9e299], [-9e299, 1e300]], [0.5, 0.5]),
        ([[1.7e308, -1.7e308], [-1.7e308, 1.7e308]], [0.5, 0.5]),
        ([[1e-300, -9e-301], [-9e-301, 1e-300]], [0.5, 0.5]),
    ],
    ids=["both ends", "both ends, opposed", "subnormal", "huge", "largest", "tiny"],
)
def test_the_ends_of_the_exponent_range(backend: Backend, gram: list[list[float]], weights: list[float]) -> None:
    result = backend.min_norm_weights(torch.tensor(gram, dtype=torch.float64))
    assert result.weights.tolist() == pytest.approx(weights, abs=0.01)
    assert int(result.status) == mogeo.Status.OPTIMAL


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_grams_are_solved_in_fp64(backend: Backend, dtype: torch.dtype) -> None:
    for seed in range(backend.some(5)):
        gram = torch.from_numpy(FAMILIES["gaussian, N = K + 1"](np.random.default_rng(seed), 6)).to(dtype)
        narrow, wide = backend.min_norm_weights(gram), backend.min_norm_weights(gram.to(torch.float64))
        assert torch.equal(narrow.weights, wide.weights)
        assert torch.equal(narrow.gap, wide.gap)
        assert_kkt(judge(gram.to(torch.float64), narrow.weights))


@everywhere
def test_rounding_may_have_made_it_unsymmetric(backend: Backend) -> None:
    @backend.check(SOME, strategies.any_grams(), st.integers(0, 2**20))
    def holds(gram: Tensor, seed: int) -> None:
        noise = torch.randn(gram.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        skew = (
            (noise - noise.T) * 2.0**-50 * gram.abs().max()
        )  # exactly antisymmetric: the quadratic form does not see it
        weights = backend.min_norm_weights(gram + skew).weights
        seen = (gram + skew + (gram + skew).T) / 2
        assert_on_simplex(seen, weights)
        assert torch.equal(weights, backend.min_norm_weights(seen).weights)


@everywhere
def test_a_batch_is_solved_one_by_one(backend: Backend) -> None:
    """[2, 3, K, K], every problem of another family, to the bit."""
    families = ("gaussian, N = K + 1", "zero rows", "nearly opposed", "duplicates", "norms 1e±12", "tight cone")
    grams = torch.stack([torch.from_numpy(FAMILIES[family](np.random.default_rng(1), 5)) for family in families])
    result = backend.min_norm_weights(grams.view(2, 3, 5, 5))
    assert (result.weights.shape, result.gap.shape, result.status.shape) == ((2, 3, 5), (2, 3), (2, 3))
    for i, gram in enumerate(grams):
        alone = backend.min_norm_weights(gram)
        assert torch.equal(result.weights.view(6, 5)[i], alone.weights)
        assert torch.equal(result.gap.view(6)[i], alone.gap)
        assert torch.equal(result.status.view(6)[i], alone.status)


@everywhere
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_an_empty_batch_is_empty(backend: Backend, batch: tuple[int, ...]) -> None:
    result = backend.min_norm_weights(torch.zeros(*batch, 3, 3))
    assert (result.weights.shape, result.gap.shape, result.status.shape) == ((*batch, 3), batch, batch)
    assert (result.weights.dtype, result.gap.dtype, result.status.dtype) == (torch.float64, torch.float64, torch.int64)


@everywhere
def test_strides_and_autograd_do_not_matter(backend: Backend) -> None:
    gram = torch.from_numpy(FAMILIES["gaussian, N = K + 1"](np.random.default_rng(0), 4))
    expected = backend.min_norm_weights(gram).weights
    strided = torch.full((8, 8), math.nan, dtype=torch.float64)
    strided[::2, ::2] = gram
    assert torch.equal(backend.min_norm_weights(strided[::2, ::2]).weights, expected)
    tracked = backend.min_norm_weights(gram.clone().requires_grad_()).weights
    assert torch.equal(tracked, expected)
    assert not tracked.requires_grad


@everywhere
def test_result_types(backend: Backend) -> None:
    result = backend.min_norm_weights(torch.eye(3))
    assert result._fields == ("weights", "gap", "status")
    assert (result.weights.dtype, result.gap.dtype, result.status.dtype) == (torch.float64, torch.float64, torch.int64)
    assert (result.weights.shape, result.gap.shape, result.status.shape) == ((3,), (), ())


@pytest.mark.parametrize("shape", [(0, 0), (3,), (2, 3), (2, 2, 3), ()])
def test_a_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gram.*" + str(shape).replace("(", r"\(").replace(")", r"\)")):
        mogeo.min_norm_weights(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_wrong_dtype_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"gram.*{dtype}.*float"):
        mogeo.min_norm_weights(torch.eye(2, dtype=dtype))
