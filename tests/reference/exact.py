"""The min-norm problem in exact rational arithmetic: min αᵀMα over the simplex, M an fp64 Gram taken as exact.

Every fp64 number is a fraction, so a given Gram has an exact optimum, also when rounding made it indefinite.
Enumeration finds it for K ≤ 5 or so; evaluating given weights (value, products) is cheap for any K. Knows nothing of
mogeo, nor of floating-point tolerances: those belong to the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

Matrix = Sequence[Sequence[Fraction]]


class Optimum(NamedTuple):
    """The global minimum over the simplex and one point that attains it."""

    value: Fraction
    weights: list[Fraction]


def symmetric(gram: Sequence[Sequence[float]]) -> list[list[Fraction]]:
    """(M + Mᵀ)/2 as fractions, [k, k]: the quadratic form sees no other part of M."""
    rows = [[Fraction(x) for x in row] for row in gram]
    return [[(rows[i][j] + rows[j][i]) / 2 for j in range(len(rows))] for i in range(len(rows))]


def products(m: Matrix, weights: Sequence[Fraction]) -> list[Fraction]:
    """Mα, [k]: the inner product of the direction with each gradient."""
    return [sum((x * w for x, w in zip(row, weights, strict=True)), start=Fraction(0)) for row in m]


def value(m: Matrix, weights: Sequence[Fraction]) -> Fraction:
    """αᵀMα: the squared length of the direction."""
    return sum((w * p for w, p in zip(weights, products(m, weights), strict=True)), start=Fraction(0))


def on_simplex(weights: Sequence[float]) -> list[Fraction]:
    """Fp64 weights as fractions that sum to one exactly, so that rounding of their sum counts for nothing."""
    fractions = [Fraction(w) for w in weights]
    return [w / sum(fractions) for w in fractions]


def solve(a: Matrix, b: Sequence[Fraction]) -> list[Fraction] | None:
    """The solution of Ax = b by Gauss-Jordan elimination, or None where A is singular."""
    n = len(b)
    rows = [[*row, right] for row, right in zip(a, b, strict=True)]
    for column in range(n):
        pivot = next((r for r in range(column, n) if rows[r][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [x / rows[column][column] for x in rows[column]]
        for r in range(n):
            if r != column and rows[r][column]:
                factor = rows[r][column]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[column], strict=True)]
    return [row[-1] for row in rows]


def min_norm_point(m: Matrix, floor: Fraction = Fraction(0)) -> Optimum:
    """The global minimum of αᵀMα over the simplex where α ≥ floor, for any symmetric M, by enumerating the supports.

    The support S are the weights above the floor. Take a minimiser of smallest support. It is stationary there:
    (Mα)_S = λ1, Σα = 1. Were this bordered system singular, there would be v ≠ 0 on S with Σv = 0 and M_SS v = μ1: f is
    constant along v, for its slope is 2λΣv = 0 and its curvature 2μΣv = 0, and moving along ±v until a weight hits the
    floor gives a minimiser of smaller support. So the system is regular, and the regular systems with solutions ≥ floor
    contain the answer. No definiteness is assumed.
    """
    k = len(m)
    best: Optimum | None = None
    for size in range(1, k + 1):
        for support in combinations(range(k), size):
            bordered = [[*(m[i][j] for j in support), Fraction(-1)] for i in support]
            bordered.append([Fraction(1)] * size + [Fraction(0)])
            rest = [j for j in range(k) if j not in support]
            pull = [-floor * sum((m[i][j] for j in rest), start=Fraction(0)) for i in support]
            solution = solve(bordered, [*pull, 1 - floor * len(rest)])
            if solution is None or min(solution[:-1]) < floor:
                continue
            weights = [floor] * k
            for i, w in zip(support, solution[:-1], strict=True):
                weights[i] = w
            if best is None or value(m, weights) < best.value:
                best = Optimum(value(m, weights), weights)
    assert best is not None  # the vertices are regular: [[m_ii, -1], [1, 0]]
    return best
