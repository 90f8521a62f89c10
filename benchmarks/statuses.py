"""What the status of a correction is worth: `descent_weights` on families of hard rows, beside an oracle on the rows.

Per family and number of objectives: how many of the samples are `OPTIMAL`, `UNDECIDED` and `STALLED`; the largest error
of those that are `OPTIMAL`, ‖v − v*‖ / max(‖d‖, 4e3 √ε Σ |w_j| ‖g_j‖), of which 1e-3 is allowed; of the others, how
many are off by more than that, which justifies the alarm; and how far the direction moves, at most, where the
objectives come in another order and the Gram is made anew. v* comes from the exact Gram of the rows, at 150 digits.

Run: python benchmarks/statuses.py [--samples 40] [--sizes 3 4 8 16] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from torch import Tensor

from mogeo import Status, descent_weights

# The judges live beside the tests: a checkout is needed, an installed package is not enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.reference import exact, nearest
from tests.strategies import ROW_FAMILIES

ROUNDING = 2.0**-50
ALLOWED = 1e-3


def length_of(gram: exact.Matrix, weights: list[Fraction]) -> float:
    """‖Gᵀ weights‖, without rounding."""
    return float(exact.value(gram, weights)) ** 0.5


def difference(first: Tensor, second: list[Fraction]) -> list[Fraction]:
    return [Fraction(a) - b for a, b in zip(first.tolist(), second, strict=True)]


def sample(family: str, k: int, seed: int) -> tuple[Status, float, float]:
    """Status; error, and what another order does, both relative to the length of what was given."""
    rng = np.random.default_rng([seed, k])
    rows = torch.from_numpy(ROW_FAMILIES[family](rng, k))
    weights = torch.from_numpy(np.full(k, 1 / k) if seed % 2 else rng.random(k))
    gram = nearest.inner_products(rows.tolist())
    given = [Fraction(w) for w in weights.tolist()]
    right = [w + m for w, m in zip(given, nearest.multipliers(gram, weights.tolist()), strict=True)]
    scale = max(length_of(gram, given), 4 * ROUNDING**0.5 / ALLOWED * float(weights @ rows.norm(dim=1)))
    found = descent_weights(rows @ rows.T, weights)
    order = torch.from_numpy(rng.permutation(k))
    other = torch.empty_like(weights)
    other[order] = descent_weights(rows[order] @ rows[order].T, weights[order]).weights
    moved = difference(other, [Fraction(w) for w in found.weights.tolist()])
    off = length_of(gram, difference(found.weights, right)) / scale
    return Status(int(found.status)), off, length_of(gram, moved) / scale


def measure(family: str, k: int, samples: int) -> dict[str, Any]:
    found = [sample(family, k, seed) for seed in range(samples)]
    said = [status for status, _, _ in found]
    errors = [error for status, error, _ in found if status == Status.OPTIMAL]
    return {
        "family": family,
        "k": k,
        "samples": samples,
        "optimal": said.count(Status.OPTIMAL),
        "undecided": said.count(Status.UNDECIDED),
        "stalled": said.count(Status.STALLED),
        "worst optimal": max(errors, default=None),
        "others off": sum(error > ALLOWED for status, error, _ in found if status != Status.OPTIMAL),
        "another order": max(moved for _, _, moved in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="rows per family and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[3, 4, 8, 16], help="numbers of objectives")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()

    machine = describe()
    print(" · ".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"{'family':26}{'K':>3}{'OPTIMAL':>9}{'UNDECIDED':>11}{'STALLED':>9}{'worst OPTIMAL':>15}", end="")
    print(f"{'others off':>12}{'another order':>15}")
    results = []
    for family in ROW_FAMILIES:
        for k in options.sizes:
            line = measure(family, k, options.samples)
            results.append(line)
            worst = "" if line["worst optimal"] is None else f"{line['worst optimal']:.0e}"
            others = line["undecided"] + line["stalled"]
            off = f"{line['others off']} of {others}" if others else ""
            print(
                f"{family:26}{k:>3}{line['optimal']:>9}{line['undecided']:>11}{line['stalled']:>9}{worst:>15}", end=""
            )
            print(f"{off:>12}{line['another order']:>15.0e}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
