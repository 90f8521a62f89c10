"""Inputs that are hard on purpose: Gram and symmetric matrices by family, rows by dtype and layout, what to sketch.

Knows nothing of mogeo. `FAMILIES[name](rng, k)` gives one fp64 Gram [k, k] of that family from a numpy Generator, so
that the benchmark and the tests measure the same matrices; the hypothesis strategies below draw a family, a size and a
seed, or small integers and rationals that shrink to a readable counterexample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sampler = Callable[[np.random.Generator, int], NDArray[np.float64]]


# --------------------------------------------------------------------------------------------------------------------
# Rows [k, n] in fp64, and their Gram


def gram_of(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows [k, n] -> their Gram [k, k], each entry summed pairwise so that it is symmetric to the last bit."""
    gram = np.empty((len(rows), len(rows)))
    for i in range(len(rows)):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = np.sum(rows[i] * rows[j])
    return gram


def convex_weights(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """A point well inside the simplex: no weight below 1 / (4k) or so."""
    weights = rng.uniform(0.25, 1.0, k)
    return weights / weights.sum()


def balanced(rows: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift the rows by one vector so that the convex combination `weights` of them is zero; a single row stays."""
    return rows - weights @ rows if len(rows) > 1 else rows


def log_uniform(rng: np.random.Generator, low: float, high: float, size: int) -> NDArray[np.float64]:
    """`size` numbers 10^u, u uniform in [low, high]."""
    return 10.0 ** rng.uniform(low, high, size)


# --------------------------------------------------------------------------------------------------------------------
# The families


def gaussian_wide(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Gaussian rows of length 1000: nearly orthogonal, as gradients of unrelated losses are."""
    return gram_of(rng.standard_normal((k, 1000)))


def gaussian_tight(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Gaussian rows of length k + 1: strong angles, the optimum on a small support."""
    return gram_of(rng.standard_normal((k, k + 1)))


def strong_conflict(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """The shared direction is 1.3 % of the longest gradient: every other component cancels in the hull."""
    rows = np.zeros((k, 1001))
    rows[:, :1000] = balanced(rng.standard_normal((k, 1000)), convex_weights(rng, k))
    # Orthogonal to all the rest, so that it is the min-norm point, exactly where the convex weights put it.
    rows[:, 1000] = 0.013 * np.sqrt(np.max(np.sum(rows**2, axis=1)))
    return gram_of(rows)


def norms_apart(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Norms from 1e-6 to 1e3: objectives in different units."""
    rows = rng.standard_normal((k, 1000)) / np.sqrt(1000)
    return gram_of(rows * log_uniform(rng, -6, 3, k)[:, None])


def norms_far_apart(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Norms 1e-12, 1 or 1e12, at random: 48 decades between the entries of one Gram."""
    rows = rng.standard_normal((k, k + 1))
    return gram_of(rows * (10.0 ** (12 * rng.integers(-1, 2, k)))[:, None])


def near_collinear(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """One gradient and k copies of it that differ by 1e-8 … 1e-2 of it: the Gram is singular to working precision."""
    base, noise, eta = rng.standard_normal(1000), rng.standard_normal((k, 1000)), log_uniform(rng, -8, -2, 1)
    if rng.random() < 0.5:  # across the base only, so that no copy is the shortest by far and the optimum lies inside
        noise -= (1 - eta) * np.outer(noise @ base, base) / (base @ base)
    return gram_of(base + eta * noise)


def duplicates(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Rows that occur several times, to the last bit: infinitely many optima."""
    distinct = rng.standard_normal((max(1, (k + 1) // 2), k + 1))
    return gram_of(distinct[rng.integers(0, len(distinct), k)])


def hull_through_zero(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Zero is a convex combination of the rows: the direction vanishes, and the Gram knows it up to rounding only."""
    return gram_of(balanced(rng.standard_normal((k, k + 1)), convex_weights(rng, k)))


def zero_rows(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Some objectives are solved already (gradient zero), one at least is not."""
    solved = rng.random(k) < 0.4
    solved[rng.integers(k)] = False
    return gram_of(np.where(solved[:, None], 0.0, rng.standard_normal((k, k + 1))))


def indefinite(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """A low-rank Gram with the rounding noise of fp32 on it: eigenvalues of both signs near zero."""
    gram = gram_of(rng.standard_normal((k, max(1, k // 2))))
    norms = np.sqrt(np.diagonal(gram))
    noise = 2.0**-24 * rng.uniform(-1, 1, (k, k))
    return gram + np.triu(noise, 1) * np.outer(norms, norms) + np.triu(noise, 1).T * np.outer(norms, norms)


def integer_ties(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Tiny integers: exact ties in every comparison an active-set method makes."""
    rows = rng.integers(-2, 3, (k, max(2, k // 2))).astype(np.float64)
    rows[~rows.any(axis=1), 0] = 1.0
    return gram_of(rows)


def low_rank(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Rank about k / 3, shifted off zero half of the time, so that the optimum is a face of dependent rows."""
    rows = rng.standard_normal((k, max(1, k // 3)))
    return gram_of(rows + rng.integers(0, 2) * 3.0)


def low_rank_norms_apart(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Rank 2, norms from 1e-4 to 1e4: zero is in the hull of the long rows, whose rounding hides the short ones."""
    return gram_of(rng.standard_normal((k, 2)) * log_uniform(rng, -4, 4, k)[:, None])


def nearly_opposed(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Pairs g, -g(1 + η) + η·noise, η from 1e-9 to 1e-3, at norms from 1e-3 to 1e3: huge cancellation, tiny optimum."""
    rows = rng.standard_normal((k, k + 1)) * log_uniform(rng, -3, 3, k)[:, None]
    eta = log_uniform(rng, -9, -3, 1)
    for i in range(0, k - 1, 2):
        rows[i + 1] = -rows[i] * (1 + eta) + eta * np.linalg.norm(rows[i]) * rng.standard_normal(k + 1)
    return gram_of(rows)


def graded(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Singular values from 1 down to 1e-8: ill conditioned, but not because of the rows' norms."""
    left, _ = np.linalg.qr(rng.standard_normal((k, k)))
    right, _ = np.linalg.qr(rng.standard_normal((k, k)))
    return gram_of((left * np.logspace(0, -8, k)) @ right)


def vertex(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """One short gradient that all others agree with: the optimum is a vertex, and several ties lead to it."""
    rows = np.abs(rng.standard_normal((k, k + 1)))
    rows[rng.integers(k)] = 1e-3
    return gram_of(rows)


def tight_cone(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Equal norms, all cosines close to the most negative ones possible, -1 / (k - 1): a simplex about zero."""
    if k == 1:
        return np.ones((1, 1))
    cosine = -1 / (k - 1) * (1 - log_uniform(rng, -6, -1, 1)[0])
    rows = np.linalg.cholesky(np.eye(k) * (1 - cosine) + cosine)
    return gram_of(rows + 1e-9 * rng.standard_normal((k, k)))


FAMILIES: dict[str, Sampler] = {
    "gaussian, N = 1000": gaussian_wide,
    "gaussian, N = K + 1": gaussian_tight,
    "strong conflict": strong_conflict,
    "norms 1e-6 … 1e3": norms_apart,
    "norms 1e±12": norms_far_apart,
    "near-collinear": near_collinear,
    "duplicates": duplicates,
    "hull through zero": hull_through_zero,
    "zero rows": zero_rows,
    "indefinite by rounding": indefinite,
    "integer ties": integer_ties,
    "low rank": low_rank,
    "low rank, norms apart": low_rank_norms_apart,
    "nearly opposed": nearly_opposed,
    "graded spectrum": graded,
    "vertex": vertex,
    "tight cone": tight_cone,
}

# Families whose Grams are positive semi-definite, up to the rounding of fp64.
SEMI_DEFINITE = tuple(family for family in FAMILIES if family != "indefinite by rounding")

# Families whose Gram determines its optimum far beyond its own rounding, at every K: here nothing excuses an error.
WELL_POSED = ("gaussian, N = 1000", "strong conflict", "norms 1e-6 … 1e3", "near-collinear", "vertex")


# --------------------------------------------------------------------------------------------------------------------
# Families of rows [k, n], for what is said of the rows and not of their Gram


def weakly_stationary(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Some of the rows balance out, to fp64; the others share a component across them, so that a direction is left.

    The directions that hurt nobody then have no interior, as near a Pareto optimum: the last digits of the rows decide
    which there are.
    """
    n = int(rng.integers(2, k + 3))
    cut = int(rng.integers(2, k)) if k > 2 else k
    rows = rng.standard_normal((k, n))
    rows[:cut, -1], rows[cut:, -1] = 0.0, rng.uniform(0.2, 2.0, k - cut)
    rows[:cut] = balanced(rows[:cut], convex_weights(rng, cut))
    turn, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return rows @ turn


def weakly_stationary_fp32(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """The same rounded to fp32, as gradients are: what is left of the balance is 1e-8 of the rows, and exact."""
    return weakly_stationary(rng, k).astype(np.float32).astype(np.float64)


def nearly_stationary(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """The same with 1e-12 … 1e-1 of noise on the rows: from what no Gram matrix shows to what every one does."""
    rows = weakly_stationary(rng, k)
    return rows + log_uniform(rng, -12, -1, 1) * rng.standard_normal(rows.shape)


def opposite_pairs(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Integer rows, of which the first two are opposite to the last bit; the others are anything."""
    rows = rng.integers(-3, 4, (k, max(2, k - 1))).astype(np.float64)
    rows[~rows.any(axis=1), 0] = 1.0
    rows[1] = -rows[0]
    return rows


def conflicting(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Independent rows that conflict: 0.9 of what they share is gone, and norms lie two decades apart."""
    rows = rng.standard_normal((k, 2 * k + 10))
    return (rows - 0.9 * rows.mean(axis=0)) * log_uniform(rng, -1, 1, k)[:, None]


def tight(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Rows of `gaussian_tight`."""
    return rng.standard_normal((k, k + 1))


def repeated(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Rows of `duplicates`."""
    return rng.standard_normal((max(1, (k + 1) // 2), k + 1))[rng.integers(0, max(1, (k + 1) // 2), k)]


ROW_FAMILIES: dict[str, Sampler] = {
    "conflicting": conflicting,
    "gaussian, N = K + 1": tight,
    "duplicates": repeated,
    "opposite pairs": opposite_pairs,
    "nearly stationary": nearly_stationary,
    "weakly stationary": weakly_stationary,
    "weakly stationary, fp32": weakly_stationary_fp32,
}

# Families whose nearest harmless direction a Gram matrix decides, at every K.
DECIDABLE = ("conflicting", "gaussian, N = K + 1", "duplicates")


# --------------------------------------------------------------------------------------------------------------------
# Symmetric matrices [k, k] that are no Gram


def symmetric(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Gaussian: eigenvalues of both signs alike."""
    entries = rng.standard_normal((k, k))
    return entries + entries.T


def less_noise(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """A Gram less what noise is thought to add to its diagonal, which may be more than there is."""
    gram = gaussian_tight(rng, k)
    return gram - np.diag(np.diagonal(gram) * rng.uniform(0, 1.5, k))


def units_apart(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Rows and columns in units from 1e-8 to 1e8."""
    units = log_uniform(rng, -8, 8, k)
    return symmetric(rng, k) * np.outer(units, units)


def coinciding_eigenvalues(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Eigenvalues -1, 0, 1 and 1 + 1e-9: most of them several times, up to rounding."""
    vectors, _ = np.linalg.qr(rng.standard_normal((k, k)))
    found = (vectors * rng.choice([-1, 0, 1, 1 + 1e-9], k)) @ vectors.T
    return (found + found.T) / 2


def small_integers(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Ties on the diagonal, and zeros."""
    entries = np.triu(rng.integers(-1, 2, (k, k))).astype(np.float64)
    return entries + entries.T


def some_rows_zero(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Some rows and their columns are zero, perhaps all."""
    there = rng.random(k) < 0.6
    return np.where(np.outer(there, there), symmetric(rng, k), 0.0)


def diagonal(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    """Eigenvalues of both signs, and zeros, each with a unit vector."""
    return np.diag(rng.standard_normal(k) * rng.integers(0, 2, k))


SYMMETRIC: dict[str, Sampler] = {
    "gaussian": symmetric,
    "Gram less noise": less_noise,
    "units apart": units_apart,
    "coinciding eigenvalues": coinciding_eigenvalues,
    "small integers": small_integers,
    "some rows zero": some_rows_zero,
    "diagonal": diagonal,
    "nearly PSD": indefinite,
    "low rank": low_rank,
}


def symmetric_matrices(max_k: int = 5) -> st.SearchStrategy[Tensor]:
    """An fp64 symmetric matrix [k, k] of one of the families; shrinks as `grams`."""

    def sample(family: str, k: int, seed: int) -> Tensor:
        return torch.from_numpy(SYMMETRIC[family](np.random.default_rng(seed), k))

    return st.builds(sample, st.sampled_from(tuple(SYMMETRIC)), st.integers(1, max_k), st.integers(0, 2**20))


# --------------------------------------------------------------------------------------------------------------------
# Hypothesis: Grams


def grams(families: Sequence[str] = tuple(FAMILIES), min_k: int = 1, max_k: int = 5) -> st.SearchStrategy[Tensor]:
    """An fp64 Gram [k, k] of one of the families; shrinks towards the first family, the smallest k and seed 0."""

    def sample(family: str, k: int, seed: int) -> Tensor:
        return torch.from_numpy(FAMILIES[family](np.random.default_rng(seed), k))

    return st.builds(sample, st.sampled_from(families), st.integers(min_k, max_k), st.integers(0, 2**20))


def row_families(
    families: Sequence[str] = tuple(ROW_FAMILIES), min_k: int = 2, max_k: int = 8
) -> st.SearchStrategy[Tensor]:
    """Fp64 rows [k, n] of one of the families; shrinks towards the first family, the smallest k and seed 0."""

    def sample(family: str, k: int, seed: int) -> Tensor:
        return torch.from_numpy(ROW_FAMILIES[family](np.random.default_rng(seed), k))

    return st.builds(sample, st.sampled_from(families), st.integers(min_k, max_k), st.integers(0, 2**20))


@st.composite
def integer_grams(draw: st.DrawFn, min_k: int = 1, max_k: int = 5) -> Tensor:
    """G Gᵀ of a small integer matrix G: exactly positive semidefinite, full of ties, and shrinkable by the entry."""
    k, n = draw(st.integers(min_k, max_k)), draw(st.integers(1, 4))
    entry = st.integers(-4, 4)
    rows = draw(st.lists(st.lists(entry, min_size=n, max_size=n).filter(any), min_size=k, max_size=k))
    g = torch.tensor(rows, dtype=torch.float64)
    return g @ g.T


@st.composite
def rational_grams(draw: st.DrawFn, min_k: int = 1, max_k: int = 4) -> Tensor:
    """G Gᵀ of small fractions, rounded once to fp64: nearly singular whenever the fractions are dependent."""
    k, n = draw(st.integers(min_k, max_k)), draw(st.integers(1, 3))
    entry = st.fractions(-3, 3, max_denominator=9)
    rows = draw(st.lists(st.lists(entry, min_size=n, max_size=n).filter(any), min_size=k, max_size=k))

    def inner(a: list[Fraction], b: list[Fraction]) -> float:
        return float(sum((x * y for x, y in zip(a, b, strict=True)), start=Fraction(0)))

    return torch.tensor([[inner(a, b) for b in rows] for a in rows], dtype=torch.float64)


def any_grams(max_k: int = 5) -> st.SearchStrategy[Tensor]:
    """Whatever is above: the strategy of a property that must hold for every Gram."""
    return st.one_of(grams(max_k=max_k), integer_grams(max_k=max_k), rational_grams(max_k=min(4, max_k)))


# --------------------------------------------------------------------------------------------------------------------
# Hypothesis: rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "padded", "every second", "transposed", "offset")
# Empty, single, around vector widths, and around block edges a summation is likely to have.
LENGTHS = (0, 1, 2, 3, 7, 8, 15, 17, 31, 33, 255, 1000, 4095, 4096, 4097, 8191, 12289)


def lay_out(rows: Tensor, layout: str) -> Tensor:
    """The same values [k, n] in another memory layout (strides, offsets), so that kernels meet what users pass."""
    k, n = rows.shape
    if layout == "contiguous":
        return rows.clone()
    if layout == "padded":
        return torch.full((k, n + 5), 7.0, dtype=rows.dtype).index_copy_(1, torch.arange(n), rows)[:, :n]
    if layout == "every second":
        return torch.full((k, 2 * n), 7.0, dtype=rows.dtype).index_copy_(1, torch.arange(0, 2 * n, 2), rows)[:, ::2]
    if layout == "transposed":
        return rows.T.contiguous().T
    if layout == "offset":
        return torch.cat([torch.full((1,), 7.0, dtype=rows.dtype), rows.flatten()])[1:].view(k, n)
    raise ValueError(f"unknown layout {layout!r}: use one of {LAYOUTS}")


def spread_out(folder: Path, rows: Tensor, stride: tuple[int, int]) -> Tensor:
    """The same values [k, n] with any strides, in a file with holes: gigabytes apart, they take a few pages."""
    size = sum((length - 1) * step for length, step in zip(rows.shape, stride, strict=True)) + 1
    sparse = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=rows.dtype)
    return sparse.as_strided(rows.shape, stride).copy_(rows)


@st.composite
def rows(draw: st.DrawFn, max_k: int = 32, dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
    """Gaussian rows [k, n] of some dtype, length, layout, and scale between the rows."""
    k, n = draw(st.integers(1, max_k)), draw(st.sampled_from(LENGTHS))
    dtype, layout = draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.randn(k, n, dtype=torch.float64, generator=generator)
    values *= 10.0 ** draw(st.sampled_from([0, 2])) ** torch.rand(k, 1, dtype=torch.float64, generator=generator)
    return lay_out(values.to(dtype), layout)


@st.composite
def segmented_rows(draw: st.DrawFn, max_k: int = 32) -> tuple[Tensor, list[int]]:
    """Rows [k, n], and boundaries 0 = b_0 ≤ … ≤ b_S = n anywhere: segments may be empty, and cut any block or tile."""
    drawn = draw(rows(max_k))
    n = drawn.shape[1]
    return drawn, [0, *sorted(draw(st.lists(st.integers(0, n), max_size=6))), n]


# --------------------------------------------------------------------------------------------------------------------
# Hypothesis: sketches

# One bucket, odd and prime numbers, with vectors of 2, 4 and 8, and more than any block of a kernel at these sizes.
SKETCH_DIMENSIONS = (1, 2, 7, 12, 16, 24, 37, 64, 100, 104, 1000)


class Sketched(NamedTuple):
    """What a sketch is made of, and a gradient to add to a row."""

    sizes: list[int]
    dimension: int
    seed: int
    index: int  #: which of the tensors the gradient is of
    gradient: Tensor  #: of that size, some dtype and layout
    row: Tensor  #: [dimension], what is there already


@st.composite
def sketched(draw: st.DrawFn, max_size: int = 300, dimensions: Sequence[int] = SKETCH_DIMENSIONS) -> Sketched:
    """A gradient [k, n] among other tensors, of less than a chunk or of many, and empty ones; rows of fp32 or fp64."""
    k = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, max_size // k).map(lambda n: n * k), min_size=1, max_size=3))
    index, dimension = draw(st.integers(0, len(sizes) - 1)), draw(st.sampled_from(dimensions))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(k, sizes[index] // k, dtype=torch.float64, generator=generator).to(dtype)
    wide = dtype == torch.float64 or draw(st.booleans())
    row = torch.randn(dimension, dtype=torch.float64 if wide else torch.float32, generator=generator)
    return Sketched(sizes, dimension, seed, index, lay_out(gradient, layout), row)
