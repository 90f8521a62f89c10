"""How exact and how fast: Gram matrix → weights, mogeo beside TorchJD and quadprog, on every family of hard Grams.

Contestants, all on the same fp64 Grams, interleaved call by call in rotating order, so that noise falls on all of them:

- mogeo: `min_norm_weights`, which also returns the optimality gap and a status.
- MGDA: TorchJD's `MGDAWeighting` at its defaults (Frank-Wolfe): the same problem.
- UPGrad: TorchJD's `UPGradWeighting`: another problem (projections onto the dual cone), so only its time and its
  conflicts compare.
- quadprog: `quadprog.solve_qp` called directly on numpy arrays (Goldfarb-Idnani): the same problem; it refuses Grams
  that are not numerically positive definite.

Accuracy is (f(α) - f*) / f*, f(α) evaluated in rational arithmetic, f* from the oracles of tests/reference (enumeration
for K ≤ 4, else an active-set method at 120 digits). Negative weights, which quadprog returns now and then, are clipped
first. Where zero lies in the hull, f* is rounding noise: one below zero counts as zero, and below 1e-9 of the smallest
diagonal entry the excess is divided by that entry instead, and the Gram is counted as "at 0".

A conflict is an output whose direction d has ⟨d, g_i⟩ < -1e-9·‖g_i‖·Σ|α_j|‖g_j‖ for some i: it raises objective i to
first order, by far more than rounding. TorchJD's documentation lists both MGDA and UPGrad as non-conflicting. Counted
over the Grams that are not at 0: there every min-norm solution descends on all objectives.

Zero rows are taken out beforehand for all but mogeo, which does that itself.

Run: python benchmarks/solver.py [--quick] [--seed 0] [--samples 20] [--repeats 3] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import quadprog
import torch
from machine import describe
from numpy.typing import NDArray
from torchjd.aggregation import MGDAWeighting, UPGradWeighting

from mogeo import min_norm_weights

# The judges live beside the tests: a checkout is needed, an installed package is not enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.reference import exact, high_precision
from tests.strategies import FAMILIES

Gram = NDArray[np.float64]
SIZES = (2, 3, 4, 8, 16)
SAME_PROBLEM = ("mogeo", "MGDA", "quadprog")
AT_ZERO = Fraction(1, 10**9)
CONFLICT = Fraction(1, 10**9)


class Problem(NamedTuple):
    """One Gram, the rows of it that form the hull, and the exact optimum over them."""

    gram: Gram
    hull: Gram
    kept: list[int]
    optimum: Fraction

    @property
    def at_zero(self) -> bool:
        """Whether the optimum is rounding noise: zero lies in the hull, or too near to tell."""
        return self.optimum <= AT_ZERO * Fraction(float(np.diagonal(self.hull).min()))


def mogeo(problem: Problem) -> Callable[[], Any]:
    """The call to time; its result goes to `weights_of`."""
    gram = torch.from_numpy(problem.gram)
    return lambda: min_norm_weights(gram)


def torchjd(weighting: Callable[[Any], Any]) -> Callable[[Problem], Callable[[], Any]]:
    """The same for a Gramian weighting of TorchJD."""

    def prepare(problem: Problem) -> Callable[[], Any]:
        hull = torch.from_numpy(problem.hull)
        return lambda: weighting(hull)

    return prepare


def quadprog_direct(problem: Problem) -> Callable[[], Any]:
    """The same for quadprog, its constraints prepared outside the clock."""
    k = len(problem.hull)
    linear, bounds = np.zeros(k), np.concatenate([[1.0], np.zeros(k)])
    constraints = np.concatenate([np.ones((k, 1)), np.eye(k)], axis=1)
    return lambda: quadprog.solve_qp(problem.hull, linear, constraints, bounds, meq=1)


CONTESTANTS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "mogeo": mogeo,
    "MGDA": torchjd(MGDAWeighting()),
    "UPGrad": torchjd(UPGradWeighting()),
    "quadprog": quadprog_direct,
}


def weights_of(contestant: str, result: Any, problem: Problem) -> list[float]:
    """Weights on the hull, as Python floats."""
    if contestant == "mogeo":
        return result.weights[problem.kept].tolist()
    return (result[0] if contestant == "quadprog" else result).tolist()


def make_problem(family: str, k: int, seed: int, index: int) -> Problem:
    """The `index`-th Gram of a family, with its optimum."""
    gram = FAMILIES[family](np.random.default_rng([seed, k, index]), k)
    kept = np.flatnonzero(np.diagonal(gram) > 0)
    hull = np.ascontiguousarray(gram[np.ix_(kept, kept)])
    rows = hull.tolist()
    best = exact.min_norm_point(exact.symmetric(rows)) if len(rows) <= 4 else high_precision.min_norm_point(rows)
    return Problem(gram, hull, kept.tolist(), best.value)


def score(contestant: str, problem: Problem, weights: list[float]) -> tuple[float | None, bool]:
    """Relative suboptimality (None for another problem's weights), and whether the direction hurts an objective."""
    m = exact.symmetric(problem.hull.tolist())
    norms = [Fraction(math.sqrt(m[i][i])) for i in range(len(m))]
    if contestant in SAME_PROBLEM:
        weights = [max(w, 0.0) for w in weights]
    alpha = [Fraction(w) for w in weights]
    reach = sum(abs(w) * n for w, n in zip(alpha, norms, strict=True))
    products = exact.products(m, alpha)
    conflict = any(p < -CONFLICT * n * reach for p, n in zip(products, norms, strict=True)) and not problem.at_zero
    if contestant not in SAME_PROBLEM:
        return None, conflict
    unit = min(m[i][i] for i in range(len(m))) if problem.at_zero else problem.optimum
    excess = exact.value(m, exact.on_simplex(weights)) - max(problem.optimum, Fraction(0))
    return float(max(excess, Fraction(0)) / unit), conflict


def measure(family: str, k: int, samples: int, repeats: int, seed: int) -> dict[str, Any]:
    """All contestants on `samples` Grams of one family and size."""
    problems = [make_problem(family, k, seed, index) for index in range(samples)]
    record: dict[str, Any] = {"family": family, "k": k, "samples": samples}
    record["at_zero"] = sum(problem.at_zero for problem in problems)
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    errors: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    conflicts = dict.fromkeys(CONTESTANTS, 0)
    refused = dict.fromkeys(CONTESTANTS, 0)
    names = list(CONTESTANTS)
    for turn, problem in enumerate(problems):
        calls = {name: prepare(problem) for name, prepare in CONTESTANTS.items()}
        for repeat in range(repeats + 1):  # the first round warms up, and is the one that is scored
            first = (turn + repeat) % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                try:
                    result = calls[name]()
                except (ValueError, ArithmeticError, RuntimeError):
                    refused[name] += repeat == 0
                    continue
                elapsed = time.perf_counter() - start
                if repeat:
                    times[name].append(elapsed * 1e6)
                    continue
                weights = weights_of(name, result, problem)
                if not all(map(math.isfinite, weights)):
                    refused[name] += 1
                    continue
                error, conflict = score(name, problem, weights)
                conflicts[name] += conflict
                if error is not None:
                    errors[name].append(error)
    for name in names:
        record[name] = {
            "conflicts": conflicts[name],
            "refused": refused[name],
            "suboptimality": spread(errors[name]),
            "microseconds": spread(times[name]),
        }
    return record


def spread(values: list[float]) -> dict[str, float] | None:
    """Median, quartiles and worst; None of nothing."""
    if not values:
        return None
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": middle, "q1": low, "q3": high, "worst": max(values)}


def print_accuracy(records: list[dict[str, Any]]) -> None:
    """One line per family and size."""
    print("\nRelative suboptimality, median / worst of the n Grams; r: so many refused")
    print(f"{'family':24}{'K':>3}{'n':>4}{'at 0':>6}", *(f"{name:>24}" for name in SAME_PROBLEM), sep="")
    for record in records:
        cells = []
        for name in SAME_PROBLEM:
            error, refused = record[name]["suboptimality"], record[name]["refused"]
            text = "" if error is None else f"{error['median']:.0e} / {error['worst']:.0e}"
            cells.append(f"{text.replace('0e+00', '0')} {refused}r" if refused else text.replace("0e+00", "0"))
        counts = f"{record['k']:3d}{record['samples']:4d}{record['at_zero']:6d}"
        print(f"{record['family']:24}{counts}", *(f"{cell:>24}" for cell in cells), sep="")


def print_conflicts(records: list[dict[str, Any]]) -> None:
    """One line per family: conflicting outputs by size."""
    sizes = sorted({record["k"] for record in records})
    print("\nOutputs that conflict, of the Grams that are not at 0, for K =", ", ".join(map(str, sizes)))
    print(f"{'family':24}{'of':>18}", *(f"{name:>18}" for name in CONTESTANTS), sep="")
    for family in FAMILIES:
        chosen = [record for record in records if record["family"] == family]
        possible = " ".join(str(record["samples"] - record["at_zero"]) for record in chosen)
        counts = [" ".join(str(record[name]["conflicts"]) for record in chosen) for name in CONTESTANTS]
        print(f"{family:24}{possible:>18}", *(f"{count:>18}" for count in counts), sep="")


def print_times(records: list[dict[str, Any]]) -> None:
    """One line per size: the family in the middle with its quartiles, and the slowest family."""
    print("\nMicroseconds, Gram → weights, median (quartiles) of the middle family; slowest family")
    print(f"{'K':>3}", *(f"{name:>26}" for name in CONTESTANTS), sep="")
    for k in sorted({record["k"] for record in records}):
        cells = []
        for name in CONTESTANTS:
            entries = [record[name]["microseconds"] for record in records if record["k"] == k]
            ranked = sorted((entry for entry in entries if entry), key=lambda entry: entry["median"])
            middle = ranked[len(ranked) // 2]
            quartiles = f"({middle['q1']:.0f}–{middle['q3']:.0f})"
            cells.append(f"{middle['median']:.0f} {quartiles} {ranked[-1]['median']:6.0f}")
        print(f"{k:3d}", *(f"{cell:>26}" for cell in cells), sep="")


def main() -> None:
    """Parse, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=20, help="Grams per family and size (default: 20)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per Gram and contestant (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="4 Grams per family, K up to 8: seconds")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    samples, sizes = (4, SIZES[:-1]) if arguments.quick else (arguments.samples, SIZES)

    torch.set_num_threads(1)
    machine = describe("numpy", "torchjd", "quadprog")
    print(*(f"{key}: {value}" for key, value in machine.items()), sep=" · ")
    print(f"seed {arguments.seed}, {samples} Grams per family and size, {arguments.repeats} timed calls each")
    records = []
    for family in FAMILIES:
        for k in sizes:
            if sys.stderr.isatty():
                print(f"\r{family}, K = {k}".ljust(60), end="", file=sys.stderr, flush=True)
            records.append(measure(family, k, samples, arguments.repeats, arguments.seed))
    if sys.stderr.isatty():
        print("\r".ljust(61), end="\r", file=sys.stderr)
    print_accuracy(records)
    print_conflicts(records)
    print_times(records)
    if arguments.json:
        document = {"machine": machine, "seed": arguments.seed, "repeats": arguments.repeats, "records": records}
        arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
