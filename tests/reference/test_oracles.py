"""The judges are judged: independent oracles agree with each other and with closed forms, on every family."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests import strategies
from tests.profiles import examples
from tests.reference import definiteness, exact, high_precision, nearest_psd, published, rows
from tests.strategies import FAMILIES, SYMMETRIC

# Families whose Grams rounding makes indefinite; the active set must find the global minimum of all others.
NOISY = ("indefinite by rounding", "hull through zero", "low rank", "low rank, norms apart", "graded spectrum")

SOME = examples(60)


def positive_part(gram: np.ndarray) -> list[list[float]]:
    """The rows an oracle takes: those with a positive diagonal."""
    kept = np.diagonal(gram) > 0
    return gram[np.ix_(kept, kept)].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_enumeration_and_active_set_agree(family: str) -> None:
    for k in (1, 2, 3, 5):
        for seed in range(3):
            gram = positive_part(FAMILIES[family](np.random.default_rng([seed, k, 7]), k))
            best, certified = exact.min_norm_point(exact.symmetric(gram)), high_precision.min_norm_point(gram)
            # A Gram that rounding made indefinite may have several minima, and the active set finds one of them.
            norms = [Fraction(gram[i][i] ** 0.5) for i in range(len(gram))]
            reach = [sum(w * n for w, n in zip(x, norms, strict=True)) for x in (best.weights, certified.weights)]
            noise = Fraction(definiteness.deficiency(np.array(gram))) if family in NOISY else Fraction(1, 10**50)
            excess = (certified.value - best.value) / (reach[0] ** 2 + reach[1] ** 2)
            assert Fraction(-1, 10**50) <= excess <= noise
            assert certified.relative_gap <= 1e-50


@SOME
@given(strategies.integer_grams(), st.integers(0, 2**20))
def test_nothing_on_the_simplex_is_below_the_enumerated_optimum(gram: Tensor, seed: int) -> None:
    m = exact.symmetric(gram.tolist())
    best = exact.min_norm_point(m)
    assert min(best.weights) >= 0
    assert sum(best.weights) == 1
    assert exact.value(m, best.weights) == best.value
    for weights in np.random.default_rng(seed).dirichlet(np.full(len(m), 0.5), 20):
        assert exact.value(m, exact.on_simplex(weights.tolist())) >= best.value


@SOME
@given(strategies.integer_grams(max_k=4), st.fractions(0, Fraction(9, 40), max_denominator=40), st.integers(0, 2**20))
def test_nothing_above_the_floor_is_below_the_enumerated_optimum(gram: Tensor, floor: Fraction, seed: int) -> None:
    m = exact.symmetric(gram.tolist())
    best = exact.min_norm_point(m, floor)
    assert min(best.weights) >= floor
    assert sum(best.weights) == 1
    for weights in np.random.default_rng(seed).dirichlet(np.full(len(m), 0.5), 20):
        inside = [floor + (1 - len(m) * floor) * w for w in exact.on_simplex(weights.tolist())]
        assert exact.value(m, inside) >= best.value


def test_enumeration_knows_indefinite_matrices() -> None:
    """αᵀMα of [[1, -3], [-3, 1]] is 1 - 8·α_1·α_2: -1 in the middle, though both vertices are at 1."""
    best = exact.min_norm_point(exact.symmetric([[1.0, -3.0], [-3.0, 1.0]]))
    assert best == (-1, [Fraction(1, 2), Fraction(1, 2)])


def test_the_high_precision_solver_does_not_stop_at_sixteen_digits() -> None:
    """Norms 1 and 2^40, at right angles: f* = 2^80 / (2^80 + 1), which fp64 cannot tell from 1."""
    tall = Fraction(2**80)
    certified = high_precision.min_norm_point([[1.0, 0.0], [0.0, float(tall)]])
    assert abs(certified.value - tall / (tall + 1)) < Fraction(1, 10**100)
    assert certified.value < 1


@pytest.mark.parametrize("family", ["gaussian, N = 1000", "gaussian, N = K + 1", "strong conflict"])
def test_quadprog_agrees_where_it_is_accurate(family: str) -> None:
    gram = FAMILIES[family](np.random.default_rng(5), 6)
    weights = [float(w) for w in high_precision.min_norm_point(gram.tolist()).weights]
    np.testing.assert_allclose(published.min_norm_weights(gram), weights, rtol=0, atol=1e-9)


def test_strong_conflict_is_as_strong_as_it_says() -> None:
    """‖d*‖ is 1.3 % of the longest gradient: the family is built so, and here is checked to be."""
    for k in (2, 4, 8):
        gram = FAMILIES["strong conflict"](np.random.default_rng(k), k)
        best = high_precision.min_norm_point(gram.tolist()).value
        assert float(best / Fraction(gram.diagonal().max())) ** 0.5 == pytest.approx(0.013, rel=1e-3)


def test_row_references_on_small_numbers() -> None:
    g = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert torch.equal(rows.gram(g), torch.tensor([[5.0, 1.0], [1.0, 10.0]], dtype=torch.float64))
    assert torch.equal(rows.combine(g, torch.tensor([2.0, 1.0])), torch.tensor([5.0, 3.0], dtype=torch.float64))
    g[1] = torch.nan
    assert torch.equal(rows.combine(g, torch.tensor([2.0, 0.0])), torch.tensor([2.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize("family", SYMMETRIC)
def test_the_nearest_psd_matrix_is_a_projection(family: str) -> None:
    """Moreau: M = P - N is solved by one pair of positive semi-definite matrices with ⟨P, N⟩ = 0, by the nearest P."""
    for k in (1, 2, 3, 5):
        matrix = torch.from_numpy(SYMMETRIC[family](np.random.default_rng(k), k))
        size = float(torch.linalg.matrix_norm(matrix, 2))
        nearest = nearest_psd.psd_part(matrix)
        rest = nearest - matrix
        assert np.linalg.eigvalsh(nearest.numpy())[0] >= -1e-14 * size
        assert np.linalg.eigvalsh(rest.numpy())[0] >= -1e-14 * size
        assert abs(float((nearest * rest).sum())) <= 1e-14 * size**2
