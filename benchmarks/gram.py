"""Gram and combine on the CPU: time, effective bandwidth and error, beside what the machine's memory gives.

`gram` must read each element once, K·N·size bytes; `combine` reads K rows and writes one, (K+1)·N·size bytes. Beside
them, in the same rounds: the plain product `rows @ rows.T`, and the sum of the same rows (one read) and the copy of one
matrix to another (a read and a write) as the practical limits. Errors are against fp64, relative to the largest
diagonal entry.

Run: python benchmarks/gram.py [--columns 10000000] [--rounds 9] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from machine import describe
from torch import Tensor

import mogeo


def reference(rows: Tensor) -> Tensor:
    """The Gram in fp64, a million columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for chunk in rows.split(1 << 20, dim=1):
        total += chunk.double() @ chunk.double().T
    return total


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, so that the machine's noise falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(-1, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if index >= 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(count: int, dtype: torch.dtype, columns: int, rounds: int) -> list[dict[str, object]]:
    """Rates and errors for one K and dtype."""
    torch.manual_seed(0)
    rows = torch.randn(count, columns).to(dtype)
    other = torch.empty_like(rows)
    weights = torch.full((count,), 1e-9)
    weights[0] = 1.0  # row 0 keeps its size, round after round
    exact = reference(rows)
    grams = {"gram": mogeo.gram(rows), "rows @ rows.T": (rows @ rows.T).double()}
    size = rows.numel() * rows.element_size()
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "gram": (lambda: mogeo.gram(rows), size),
        "rows @ rows.T": (lambda: rows @ rows.T, size),
        "sum (limit)": (lambda: rows.sum(), size),
        "combine": (lambda: mogeo.combine(rows, weights, out=rows[0]), size * (count + 1) / count),
        "copy (limit)": (lambda: other.copy_(rows), 2 * size),
    }
    timed = interleaved({name: call for name, (call, _) in calls.items()}, rounds)
    scale = exact.diagonal().max()
    return [
        {
            "k": count,
            "dtype": str(dtype).removeprefix("torch."),
            "what": name,
            "gb_per_s": sorted(calls[name][1] / value / 1e9 for value in seconds),
            "ms": 1e3 * statistics.median(seconds),
            "error": ((grams[name] - exact).abs().max() / scale).item() if name in grams else None,
        }
        for name, seconds in timed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=10_000_000, help="N (default 10 million)")
    parser.add_argument("--objectives", type=int, nargs="+", default=[2, 4, 8], help="K (default 2 4 8)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--json", help="also write the figures here")
    arguments = parser.parse_args()
    facts = describe("mogeo")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"N = {arguments.columns:,}; GB/s: median (lowest … highest) of {arguments.rounds} rounds\n")
    print(f"{'K':>3} {'dtype':9} {'what':16} {'ms':>8} {'GB/s':>26} {'error':>9}")
    results = []
    for count in arguments.objectives:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for record in measure(count, dtype, arguments.columns, arguments.rounds):
                rates, error = record["gb_per_s"], record["error"]
                print(
                    f"{count:3} {record['dtype']:9} {record['what']:16} {record['ms']:8.2f} "
                    f"{statistics.median(rates):10.1f} ({rates[0]:5.1f} … {rates[-1]:5.1f}) "
                    + ("" if error is None else f"{error:9.1e}")
                )
                results.append(record)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": facts, "columns": arguments.columns, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
