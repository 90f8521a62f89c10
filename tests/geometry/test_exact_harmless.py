"""The nearest direction that hurts nobody: its definition, in rational arithmetic, on every family and backend."""

from __future__ import annotations

import itertools
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume
from torch import Tensor

import mogeo
from mogeo.geometry.exact_min_norm import Status
from tests.backends import FAST_BACKENDS, Backend, everywhere
from tests.min_norm_asserts import deficiency_of, hull_of
from tests.reference import exact, nearest
from tests.strategies import DECIDABLE, FAMILIES, ROW_FAMILIES, any_grams, grams, integer_grams, row_families

TOLERANCE = Fraction(1, 10**13)
#: ε, the rounding of an entry of an fp64 Gram that `OPTIMAL` allows for; and what follows from it (docs/solver.md).
ROUNDING = 2.0**-50
RIDGE = ROUNDING ** (2 / 3)
LEFT_OF_A_CONFLICT = ROUNDING ** (1 / 3) / 2
#: Families whose Gram is positive semi-definite but for the rounding of fp64.
DEFINITE = tuple(name for name in FAMILIES if name not in ("indefinite by rounding", "nearly opposed"))
#: And those of them that decide the nearest direction: integers may balance out exactly, which a Gram cannot tell.
DECIDED = tuple(name for name in DEFINITE if name != "integer ties")


def weights_for(gram: Tensor, seed: int, signed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(gram), dtype=torch.float64, generator=generator)
    return 2 * drawn - 1 if signed else drawn


def slopes_of(gram: Tensor, weights: list[Fraction]) -> tuple[list[Fraction], list[Fraction]]:
    """(M w)_k and ‖g_k‖, for the rows that have a gradient."""
    hull = hull_of(gram).tolist()
    m = exact.symmetric(gram[hull][:, hull].tolist())
    inside = [weights[k] for k in hull]
    norms = [Fraction(float(gram[k, k]) ** 0.5) for k in hull]
    return exact.products(m, inside), norms


def fractions(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.tolist()]


def assert_nearest(gram: Tensor, weights: Tensor, found: mogeo.Descent, tolerance: Fraction = TOLERANCE) -> None:
    """μ ≥ 0, s = M(w + μ) ≥ 0 and s_k = 0 where μ_k > 0, each to the rounding of row k."""
    assert bool((found.correction >= 0).all())
    assert torch.equal(found.weights, weights + found.correction)
    w, mu = fractions(weights), fractions(found.correction)
    hull = hull_of(gram).tolist()
    slopes, norms = slopes_of(gram, [a + b for a, b in zip(w, mu, strict=True)])
    spans = [abs(w[k]) + mu[k] for k in hull]
    reach = sum((span * norm for span, norm in zip(spans, norms, strict=True)), start=Fraction(0))
    for k, slope, norm in zip(hull, slopes, norms, strict=True):
        assert slope >= -tolerance * norm * reach
        assert mu[k] == 0 or slope <= tolerance * norm * reach


def assert_harmless(gram: Tensor, weights: Tensor, found: mogeo.Descent) -> None:
    """What is left of a conflict where nothing else is promised: ½ ε^⅓ ‖d‖ ‖g_k‖, and the rounding of the Gram."""
    assert bool((found.correction >= 0).all())
    slopes, norms = slopes_of(gram, fractions(found.weights))
    hull = hull_of(gram)
    inner = gram[hull][:, hull]
    length = float((weights[hull] @ inner @ weights[hull]).clamp(min=0)) ** 0.5
    reach = float((weights.abs() + found.correction)[hull] @ inner.diagonal().sqrt())
    for slope, norm in zip(slopes, norms, strict=True):
        assert slope >= -norm * Fraction(1.01 * LEFT_OF_A_CONFLICT * length + 4 * ROUNDING * reach)


@everywhere
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("signed", [False, True], ids=["weights", "signed"])
def test_hurts_nobody_and_is_the_nearest(backend: Backend, family: str, signed: bool) -> None:
    @backend.check(40, grams((family,), min_k=2, max_k=backend.max_k), st.integers(0, 1000))
    def check(gram: Tensor, seed: int) -> None:
        weights = weights_for(gram, seed, signed)
        found = backend.descent_weights(gram, weights)
        if found.status == Status.UNDECIDED:
            assert family not in DECIDED
            assert_harmless(gram, weights, found)
            return
        # Where fp32 has left its noise on the Gram, nothing is known better than that.
        noise = 0 if found.status == Status.OPTIMAL else max(20 * deficiency_of(gram), Fraction(2 * RIDGE))
        assert_nearest(gram, weights, found, TOLERANCE + noise)
        assert family not in DEFINITE or found.status == Status.OPTIMAL


@everywhere
def test_is_the_projection_that_enumeration_finds(backend: Backend) -> None:
    @backend.check(150, integer_grams(min_k=2, max_k=4), st.lists(st.integers(0, 3), min_size=4, max_size=4))
    def check(gram: Tensor, drawn: list[int]) -> None:
        weights = torch.tensor(drawn[: len(gram)], dtype=torch.float64)
        assume(bool(weights.any()))
        found = backend.descent_weights(gram, weights)
        expected = by_enumeration(gram, fractions(weights))
        # μ is not unique where gradients depend on each other, the direction is.
        difference = [a - b for a, b in zip(fractions(found.weights), expected, strict=True)]
        slopes, norms = slopes_of(gram, difference)
        reach = sum((b * n for b, n in zip(expected, norms, strict=True)), start=Fraction(0))
        assert all(abs(slope) <= TOLERANCE * norm * reach for slope, norm in zip(slopes, norms, strict=True))


def by_enumeration(gram: Tensor, weights: list[Fraction]) -> list[Fraction]:
    """w + μ, trying every set of multipliers: rational arithmetic, integer Grams without a zero row."""
    m = exact.symmetric(gram.tolist())
    start = exact.products(m, weights)
    size = len(m)
    for count in range(size + 1):
        for active in itertools.combinations(range(size), count):
            solved = solve([[m[i][j] for j in active] for i in active], [-start[i] for i in active])
            if solved is None or min(solved, default=Fraction(0)) < 0:
                continue
            total = list(weights)
            for k, value in zip(active, solved, strict=True):
                total[k] += value
            if min(exact.products(m, total)) >= 0:
                return total
    raise AssertionError("no set of multipliers fits")


def solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction] | None:
    """Gauss; None for a singular matrix."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next((r for r in range(i, len(rows)) if rows[r][i] != 0), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for r in range(len(rows)):
            if r != i:
                rows[r] = [a - rows[r][i] * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


@everywhere
def test_mgda_is_left_alone_and_so_is_what_was_corrected_before(backend: Backend) -> None:
    @backend.check(200, grams(DECIDED, max_k=backend.max_k), st.integers(0, 1000))
    def check(gram: Tensor, seed: int) -> None:
        point = mogeo.min_norm_weights(gram).weights
        found = backend.descent_weights(gram, point)
        assert torch.equal(found.weights, point)
        assert not found.correction.any()
        once = backend.descent_weights(gram, weights_for(gram, seed))
        twice = backend.descent_weights(gram, once.weights)
        assert torch.equal(twice.weights, once.weights)


# --------------------------------------------------------------------------------------------------------------------
# Of the rows, not of their Gram


def tolerated(rows: Tensor, weights: Tensor, rounding: float = ROUNDING) -> float:
    """max(1e-3 ‖d‖, 4 √ε Σ |w_j| ‖g_j‖): how far `OPTIMAL` may be from the nearest direction."""
    length = float((weights @ rows).norm())
    return max(1.01e-3 * length, 4 * rounding**0.5 * float(weights.abs() @ rows.norm(dim=1)))


def distance(exact_gram: exact.Matrix, first: list[Fraction], second: list[Fraction]) -> float:
    """‖Gᵀ(x − y)‖ for weights x and y, without any rounding."""
    difference = [a - b for a, b in zip(first, second, strict=True)]
    return float(exact.value(exact_gram, difference)) ** 0.5


def gram_of(rows: Tensor) -> Tensor:
    """As users make it: rounded."""
    return rows @ rows.T


@everywhere
@pytest.mark.parametrize("family", ROW_FAMILIES)
def test_optimal_is_a_promise_about_the_rows(backend: Backend, family: str) -> None:
    """Against an oracle that knows the rows; and whatever the status says, nobody is hurt by more than is allowed."""

    @backend.check(40, row_families((family,), max_k=min(backend.max_k, 12)), st.integers(0, 1000), st.booleans())
    def check(rows: Tensor, seed: int, uniform: bool) -> None:
        k = len(rows)
        weights = torch.full((k,), 1 / k, dtype=torch.float64) if uniform else weights_for(rows, seed)
        gram = gram_of(rows)
        found = backend.descent_weights(gram, weights)
        assert found.status in (Status.OPTIMAL, Status.UNDECIDED, Status.STALLED)
        if found.status == Status.OPTIMAL:
            exact_gram = nearest.inner_products(rows.tolist())
            mu = nearest.multipliers(exact_gram, weights.tolist())
            right = [w + m for w, m in zip(fractions(weights), mu, strict=True)]
            assert distance(exact_gram, fractions(found.weights), right) <= tolerated(rows, weights)
        if found.status != Status.STALLED:
            assert_harmless(gram, weights, found)
        assert family not in DECIDABLE or found.status == Status.OPTIMAL


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_what_a_gram_cannot_decide_is_called_so(backend: Backend) -> None:
    """No alarm without a cause: on fp32 rows that balance out, what is not called optimal is off, nearly always."""
    said = dict.fromkeys(Status, 0)
    off = 0
    for seed in range(60):
        rows = torch.from_numpy(ROW_FAMILIES["weakly stationary, fp32"](torch_rng(seed), 3 + seed % 6))
        weights = weights_for(rows, seed)
        found = backend.descent_weights(gram_of(rows), weights)
        said[Status(int(found.status))] += 1
        if found.status != Status.OPTIMAL:
            exact_gram = nearest.inner_products(rows.tolist())
            mu = nearest.multipliers(exact_gram, weights.tolist())
            right = [w + m for w, m in zip(fractions(weights), mu, strict=True)]
            off += distance(exact_gram, fractions(found.weights), right) > tolerated(rows, weights)
    assert min(said[Status.OPTIMAL], said[Status.UNDECIDED]) >= 10
    assert off >= 0.9 * (60 - said[Status.OPTIMAL])


@everywhere
@pytest.mark.parametrize("family", ROW_FAMILIES)
def test_the_order_of_objectives_does_not_matter(backend: Backend, family: str) -> None:
    """Also where nothing is decided: the Gram is made anew for the permuted rows, and may be rounded otherwise."""

    @backend.check(40, row_families((family,), max_k=min(backend.max_k, 20)), st.integers(0, 1000))
    def check(rows: Tensor, seed: int) -> None:
        weights = weights_for(rows, seed)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        found = backend.descent_weights(gram_of(rows), weights)
        permuted = backend.descent_weights(gram_of(rows[order]), weights[order])
        if found.status != permuted.status:  # so near to the bound that rounding decides what is said
            assert {int(found.status), int(permuted.status)} <= {Status.OPTIMAL, Status.UNDECIDED, Status.STALLED}
            return
        moved = found.weights[order] - permuted.weights
        exact_gram = nearest.inner_products(rows[order].tolist())
        zero = [Fraction(0)] * len(rows)
        assert distance(exact_gram, fractions(moved), zero) <= 2 * tolerated(rows, weights)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("k", [2, 4, 16, 64])
@pytest.mark.parametrize("family", DECIDABLE)
def test_no_false_alarm(backend: Backend, family: str, k: int) -> None:
    """Rows that do not nearly balance out are decided."""
    for seed in range(10 if k < 64 else 2):
        rows = torch.from_numpy(ROW_FAMILIES[family](torch_rng(seed), k))
        for weights in (weights_for(rows, seed), torch.eye(k, dtype=torch.float64)[0]):
            assert backend.descent_weights(gram_of(rows), weights).status == Status.OPTIMAL


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("k", [2, 4, 8])
def test_no_false_alarm_where_products_are_summed_in_fp32(backend: Backend, k: int) -> None:
    """From the Gram that mogeo makes of fp32 rows, with the error that it may have; and the promise holds there too."""
    for seed in range(10):
        rows = torch.from_numpy(ROW_FAMILIES["conflicting"](torch_rng(seed), k)).float()
        weights = weights_for(rows, seed)
        found = backend.descent_weights(backend.gram(rows), weights, rounding=1e-6)
        assert found.status == Status.OPTIMAL
        exact_gram = nearest.inner_products(rows.tolist())
        mu = nearest.multipliers(exact_gram, weights.tolist())
        right = [w + m for w, m in zip(fractions(weights), mu, strict=True)]
        assert distance(exact_gram, fractions(found.weights), right) <= tolerated(rows.double(), weights, 1e-6)


@everywhere
def test_a_gram_of_few_digits_decides_less(backend: Backend) -> None:
    """A combination of rows of length 1e-5: beyond doubt in fp64, and not to be seen where entries are off by 1e-7."""
    left = 1e-5
    rows = torch.tensor([[1.0, 0.0, 0.0], [-1.0, left, 0.0], [0.0, -0.6, 0.8]], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.2, 1.0], dtype=torch.float64)
    gram = gram_of(rows)
    assert backend.descent_weights(gram, weights).status == Status.OPTIMAL
    coarse = backend.descent_weights(gram, weights, rounding=1e-7)
    assert coarse.status == Status.UNDECIDED
    # What balances out to rounding is taken to do so exactly: nothing is said against the second column.
    torch.testing.assert_close(
        coarse.weights @ rows, torch.tensor([0.0, -0.6, 0.8], dtype=torch.float64), atol=1e-3, rtol=0
    )


def test_the_digits_of_a_gram_are_those_of_its_dtype() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 2.0**-10, 0.0], [0.0, -0.6, 0.8]], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.2, 1.0], dtype=torch.float64)
    narrow = gram_of(rows).float()
    found = mogeo.descent_weights(narrow, weights)
    same = mogeo.descent_weights(narrow.double(), weights, rounding=2.0**-21)
    assert found.status == same.status == Status.UNDECIDED
    assert torch.equal(found.weights, same.weights)


@pytest.mark.parametrize("rounding", [0.0, -1e-9, 1.0, float("nan")])
def test_a_rounding_out_of_range_is_named(rounding: float) -> None:
    with pytest.raises(ValueError, match=r"rounding=.*> 0 and < 1"):
        mogeo.descent_weights(torch.eye(2), torch.ones(2), rounding=rounding)


@everywhere
def test_weights_of_any_size(backend: Backend) -> None:
    """Their squares would leave the range of fp64."""
    rows = torch.from_numpy(ROW_FAMILIES["conflicting"](torch_rng(3), 3))
    gram, weights = gram_of(rows), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    plain = backend.descent_weights(gram, weights)
    assert plain.correction.any()
    for power in (-700, 700):
        scaled = backend.descent_weights(gram, weights * 2.0**power)
        assert torch.equal(scaled.correction, plain.correction * 2.0**power)
        assert scaled.status == plain.status == Status.OPTIMAL


@everywhere
def test_a_power_of_two_changes_no_bit(backend: Backend) -> None:
    @backend.check(60, any_grams(max_k=backend.max_k), st.integers(0, 1000), st.integers(-20, 20))
    def check(gram: Tensor, seed: int, power: int) -> None:
        weights = weights_for(gram, seed)
        plain = backend.descent_weights(gram, weights)
        assert torch.equal(backend.descent_weights(gram * 4.0**power, weights).correction, plain.correction)
        scaled = backend.descent_weights(gram, weights * 2.0**power)
        assert torch.equal(scaled.correction, plain.correction * 2.0**power)


@everywhere
def test_objectives_without_a_gradient_take_no_part(backend: Backend) -> None:
    gram = torch.tensor(
        [[1.0, -2.0, 0.0, torch.nan], [-2.0, 4.5, 0.0, 0.0], [0.0] * 4, [torch.nan, 0.0, 0.0, torch.inf]]
    )
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    found = backend.descent_weights(gram.double(), weights)
    inner = backend.descent_weights(gram[:2, :2].double(), weights[:2])
    assert inner.correction.any()
    assert found.correction.tolist() == [*inner.correction.tolist(), 0.0, 0.0]
    nothing = backend.descent_weights(torch.zeros(2, 2, dtype=torch.float64), weights[:2])
    assert (nothing.weights.tolist(), int(nothing.status)) == ([1.0, 1.0], Status.ZERO)


@everywhere
def test_a_batch_is_its_problems(backend: Backend) -> None:
    problems = torch.stack([torch.from_numpy(FAMILIES["gaussian, N = K + 1"](torch_rng(s), 3)) for s in range(4)])
    weights = torch.stack([weights_for(gram, 7) for gram in problems])
    together = backend.descent_weights(problems.reshape(2, 2, 3, 3), weights.reshape(2, 2, 3))
    assert together.status.shape == (2, 2)
    for at, (gram, given) in enumerate(zip(problems, weights, strict=True)):
        alone = backend.descent_weights(gram, given)
        assert torch.equal(together.weights.reshape(4, 3)[at], alone.weights)


def torch_rng(seed: int):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.random.default_rng(seed)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(TypeError, match="real floating-point"):
        mogeo.descent_weights(torch.ones(2, 2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match="square"):
        mogeo.descent_weights(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"weights have shape \(3,\)"):
        mogeo.descent_weights(torch.eye(2), torch.ones(3))
