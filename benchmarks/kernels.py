"""Gram, combine, sketch and solver: milliseconds and GB/s beside what the memory gives and what else computes the same.

Bytes that an operation must move: gram and sketch K·N·size (each element read once), combine (K+1)·N·size, copy twice
what is copied. GB/s is these bytes over the time, whatever the contestant really moved. `% copy` is the share of a
large copy on the same device in the same run, `% peak` that of the data sheet. The error of a Gram matrix is against
fp64, relative to its largest diagonal entry; that of a combination relative to its largest element.

On a GPU: input sets that together exceed three times the L2, one after another in a CUDA graph, whose replays are timed
by events after the cache was filled with other memory; the solver also launch by launch, on the host's clock. On a CPU:
the host's clock, caches as they are, and the CPU code of mogeo, for Triton's interpreter says nothing about time. There
and here contestants run round by round in rotating order.

The solver comes first, and is timed twice: replayed again and again, which finds its code in the instruction caches,
and within a step (`inside_a_step`), which does not. A contestant that fails is written down and the run goes on; the
exit code is 1 if it was one of mogeo's. No setting starts after the seconds of --budget: what is left out is said.

Run: python benchmarks/kernels.py [--device cuda] [--quick] [--budget SECONDS] [--json PATH] [--plot PATH]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import clocks, data_sheet_bandwidth, describe, free_bytes, l2_bytes
from timing import (
    Call,
    Clock,
    behind,
    captured,
    copy_bandwidth,
    device_clock,
    first_line,
    interleaved,
    rounds_of,
    spread,
    wall_clock,
)
from torch import Tensor

import mogeo
from mogeo.geometry.projection import SignedSketch

# The families of Gram matrices live beside the tests: a checkout is needed, an installed package is not enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class Sizes(NamedTuple):
    """What is measured unless the options say otherwise."""

    columns: tuple[int, ...]
    objectives: tuple[int, ...]
    rounds: int


SIZES = {
    "cuda": Sizes((10**6, 10**7, 10**8, 5 * 10**8), (2, 4, 8, 16, 32), 30),
    "cpu": Sizes((10**6,), (2, 4, 8), 9),
}
QUICK = {"cuda": Sizes((10**6, 10**8), (2, 4, 16), 10), "cpu": Sizes((10**5,), (2, 4), 3)}
# Compiling takes seconds per shape, and tells most where there is most to read.
COMPILED_UP_TO = 10**8
# Seconds that one contestant may take of one setting: slower ones sit out rounds.
LIMIT = 1.0
SOLVER_LIMIT = 0.1  # the same for one Gram matrix and solver
BUCKETS = 1 << 18  # of a sketch
SAMPLES = 4  # Gram matrices of each family for the solver
IN_A_STEP = "gaussian, N = K + 1"  # the family of the Gram matrix that is solved within a step

OPERATIONS = ("gram", "combine", "sketch", "limit")

Rows = Callable[[Tensor], Tensor]


class Contestant(NamedTuple):
    """Something to time on rows [K, N]."""

    operation: str  #: "gram", "combine", "sketch" or "limit"
    name: str
    n_bytes: float  #: that the operation must move
    flops: float
    call: Callable[[Tensor], object]  #: on one input set
    result: Rows | None  #: what to hold against fp64


class Ceilings(NamedTuple):
    """A device, how time is taken on it, and what its memory gives, in GB/s."""

    device: torch.device
    clock: Clock
    copy: float
    peak: float | None


class LeftOut:
    """What this run did not measure, and why: printed as it turns up, and written down."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def note(self, what: str, why: str) -> None:
        """Each once."""
        if what not in self.reasons:
            self.reasons[what] = why
            print(f"left out: {what}: {why}", flush=True)


class Failures:
    """What of mogeo's ran into an error: printed at once, and written down. Other contestants are `LeftOut` then."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def note(self, name: str, error: BaseException, **where: Any) -> None:
        """A contestant, and what it was doing."""
        self.records.append({"name": name, **where, "error": first_line(error)})
        print(f"failed: {name}: {self.records[-1]}", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Gram and combine


def dots(rows: Tensor) -> Tensor:
    """K(K+1)/2 dot products, one by one."""
    return torch.stack([torch.dot(rows[i], rows[j]) for i in range(len(rows)) for j in range(i, len(rows))])


def gram_of_dots(rows: Tensor) -> Tensor:
    """The same as a matrix."""
    gram = rows.new_empty(len(rows), len(rows))
    i, j = torch.triu_indices(len(rows), len(rows), device=rows.device)
    gram[i, j] = gram[j, i] = dots(rows)
    return gram


def blocked(rows: Tensor) -> Tensor:
    """A batched product over blocks of columns, summed in fp32: what plain torch does best."""
    count, columns = rows.shape
    n_blocks = next(n for n in range(min(1024, columns), 0, -1) if columns % n == 0)
    blocks = rows.view(count, n_blocks, -1).transpose(0, 1)
    return torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))


def products(rows: Tensor) -> Tensor:
    """For a compiler to fuse: all products of all pairs, summed in fp32."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (wide[:, None] * wide[None]).sum(-1)


def gram_functions(compiling: bool, left_out: LeftOut) -> dict[str, Rows]:
    """What computes G Gᵀ."""
    functions: dict[str, Rows] = {
        "mogeo.gram": mogeo.gram,
        "rows @ rows.T": lambda rows: rows @ rows.T,
        "bmm of blocks": blocked,
        "K(K+1)/2 dots": gram_of_dots,
    }
    try:
        from torchjd._linalg import compute_gramian

        functions["torchjd Gramian"] = compute_gramian
    except ImportError as error:
        left_out.note("torchjd Gramian", first_line(error))
    if compiling:
        functions["compiled rows @ rows.T"] = torch.compile(lambda rows: rows @ rows.T, dynamic=False)
        functions["compiled products"] = torch.compile(products, dynamic=False)
    return functions


def combine_functions(weights: Tensor, dtype: torch.dtype, compiling: bool) -> dict[str, Rows]:
    """What computes wᵀG, for fp64 weights."""
    narrow = weights.to(dtype)
    wide = weights.to(torch.promote_types(dtype, torch.float32))

    def weighted_sum(rows: Tensor) -> Tensor:
        return (wide[:, None] * rows).sum(0).to(dtype)

    functions: dict[str, Rows] = {
        "mogeo.combine": lambda rows: mogeo.combine(rows, weights),
        "weights @ rows": lambda rows: narrow @ rows,
    }
    if compiling:
        functions["compiled weights @ rows"] = torch.compile(lambda rows: narrow @ rows, dynamic=False)
        functions["compiled weighted sum"] = torch.compile(weighted_sum, dynamic=False)
    return functions


def sketch_functions(rows: Tensor, left_out: LeftOut) -> dict[str, Rows]:
    """What makes sketches [K, BUCKETS] of all rows, of one distribution: an element to a bucket, with a random sign."""
    columns = rows.shape[1]
    signed = SignedSketch([columns], BUCKETS, device=rows.device)
    functions: dict[str, Rows] = {
        "mogeo SignedSketch": partial(sketches, lambda sketch, row: signed.add_(sketch, 0, row)),
    }
    if columns <= COMPILED_UP_TO:
        generator = torch.Generator(rows.device).manual_seed(0)
        buckets = torch.randint(BUCKETS, (columns,), device=rows.device, generator=generator)
        signs = 1.0 - 2.0 * torch.randint(2, (columns,), device=rows.device, generator=generator)

        def by_elements(sketch: Tensor, row: Tensor) -> None:
            sketch.index_add_(0, buckets, row.to(sketch.dtype) * signs.to(sketch.dtype))

        functions["index_add of hashed buckets"] = partial(sketches, by_elements)
    else:
        left_out.note(f"index_add of hashed buckets at N = {columns:,}", "its tables take 12·N bytes")
    return functions


def sketches(add: Callable[[Tensor, Tensor], object], rows: Tensor) -> Tensor:
    """[K, BUCKETS], by `add(sketch, row)` for each row."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    found = torch.zeros(len(rows), BUCKETS, dtype=dtype, device=rows.device)
    for sketch, row in zip(found, rows, strict=True):
        add(sketch, row)
    return found


def contestants(
    rows: Tensor, weights: Tensor, compiling: bool, left_out: LeftOut, operations: Sequence[str] = OPERATIONS
) -> Iterator[Contestant]:
    """All there is to time on rows [K, N]."""
    count, columns = rows.shape
    size = columns * rows.element_size()
    for name, function in gram_functions(compiling, left_out).items() if "gram" in operations else ():
        call: Callable[[Tensor], object] = dots if function is gram_of_dots else function
        yield Contestant("gram", name, count * size, float(count * (count + 1) * columns), call, function)
    for name, function in combine_functions(weights, rows.dtype, compiling).items() if "combine" in operations else ():
        # In place, as the optimizer does it; the weights are convex, so that row 0 stays bounded.
        call = partial(combine_in_place, weights) if name == "mogeo.combine" else function
        yield Contestant("combine", name, (count + 1) * size, 2.0 * count * columns, call, function)
    for name, function in sketch_functions(rows, left_out).items() if "sketch" in operations else ():
        yield Contestant("sketch", name, count * size, 2.0 * count * columns, function, None)
    yield Contestant("limit", "sum of all", count * size, float(count * columns), torch.sum, None)
    # As many bytes as gram reads: half of the rows, read and written; from 1 GiB on a copy is as fast as it gets.
    target = rows.new_empty(min(rows.numel() // 2, 2**30 // rows.element_size()))
    n_bytes = 2 * target.numel() * target.element_size()
    yield Contestant("limit", "copy", n_bytes, 0.0, lambda rows: target.copy_(rows.view(-1)[: len(target)]), None)


def combine_in_place(weights: Tensor, rows: Tensor) -> Tensor:
    """wᵀG over row 0."""
    return mogeo.combine(rows, weights, out=rows[0])


def error_of(contestant: Contestant, rows: Tensor, weights: Tensor) -> float | None:
    """The largest deviation from fp64, a million columns at a time."""
    if contestant.result is None:
        return None
    got = contestant.result(rows)
    chunks = rows.split(1 << 20, dim=1)
    if contestant.operation == "gram":
        exact = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for chunk in chunks:
            exact += chunk.double() @ chunk.double().T
        return float((got - exact).abs().max() / exact.diagonal().max())
    worst = largest = torch.zeros((), dtype=torch.float64, device=rows.device)
    for chunk, part in zip(chunks, got.split(1 << 20), strict=True):
        right = weights @ chunk.double()
        worst = torch.maximum(worst, (part - right).abs().max())
        largest = torch.maximum(largest, right.abs().max())
    return float(worst / largest)


def measure(
    count: int,
    columns: int,
    dtype: str,
    rounds: int,
    compiling: bool,
    ceilings: Ceilings,
    left_out: LeftOut,
    failures: Failures,
    operations: Sequence[str] = OPERATIONS,
    names: Collection[str] | None = None,
    limit: float = LIMIT,
) -> list[dict[str, Any]]:
    """Every contestant on K rows of N columns; or those of some operations, and with some names."""
    device = ceilings.device
    size = count * columns * DTYPES[dtype].itemsize
    n_sets = max(1, -(-3 * l2_bytes(device) // size)) if device.type == "cuda" else 1
    # Beside the rows: the target of the copy, a direction per contestant, fp64 chunks, tables, and a GiB to breathe.
    tables = 24 * columns if columns <= COMPILED_UP_TO else 0
    needed = n_sets * size + min(size // 2, 2**30) + 5 * size // count + count * 2**24 + tables + 2**30
    if needed > (free := free_bytes(device)):
        left_out.note(f"K = {count}, N = {columns:,}, {dtype}", f"{needed / 1e9:.1f} GB of {free / 1e9:.1f} free")
        return []
    if compiling:
        torch._dynamo.reset()  # or the limit of recompilations is reached, and what is timed is not compiled
    generator = torch.Generator(device).manual_seed(0)
    sets = torch.empty(n_sets, count, columns, dtype=DTYPES[dtype], device=device).normal_(generator=generator)
    weights = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    weights /= weights.sum()

    errors: dict[str, float | None] = {}
    chosen: dict[str, Contestant] = {}
    calls: dict[str, Call] = {}
    how: dict[str, str] = {}
    for contestant in contestants(sets[0], weights, compiling, left_out, operations):
        if names is not None and contestant.name not in names:
            continue
        key = f"{contestant.operation}: {contestant.name}"
        try:
            errors[key] = error_of(contestant, sets[0], weights)
            call = partial(run_all, contestant.call, sets)
            calls[key], reason = captured(call, device) if device.type == "cuda" else (call, None)
        except Exception as error:  # whatever keeps one from running here, the others run
            if contestant.name.startswith("mogeo"):
                failures.note(contestant.name, error, k=count, n=columns, dtype=dtype)
            else:
                left_out.note(f"{contestant.name}, {dtype}", first_line(error))
            continue
        chosen[key] = contestant
        how[key] = "wall" if device.type == "cpu" else "launches" if reason else "graph"
        if reason:
            left_out.note(f"graph replay of {contestant.name}", reason)

    records = []
    for key, seconds in interleaved(calls, rounds, ceilings.clock, limit).items():
        contestant = chosen[key]
        milliseconds = spread([1e3 * value / n_sets for value in seconds])
        rates = spread([contestant.n_bytes * n_sets / value / 1e9 for value in seconds])
        records.append(
            {
                "operation": contestant.operation,
                "name": contestant.name,
                "k": count,
                "n": columns,
                "dtype": dtype,
                "input_sets": n_sets,
                "timed": how[key],
                "bytes": contestant.n_bytes,
                "flops_per_byte": contestant.flops / contestant.n_bytes,
                "ms": milliseconds,
                "gb_per_s": rates,
                "of_copy": rates["p50"] / ceilings.copy,
                "of_peak": None if ceilings.peak is None else rates["p50"] / ceilings.peak,
                "error": errors[key],
            }
        )
    return records


def run_all(call: Callable[[Tensor], object], sets: Tensor) -> None:
    """One call per input set."""
    for rows in sets:
        call(rows)


def print_bandwidths(records: list[dict[str, Any]]) -> None:
    """One line per contestant."""
    for record in records:
        ms, error, peak = record["ms"], record["error"], record["of_peak"]
        print(
            f"{record['k']:3} {record['n']:11,} {record['dtype']:5} {record['operation']:8} {record['name']:24}"
            f"{ms['p50']:10.4f} ({ms['p20']:9.4f} … {ms['p80']:9.4f}) {record['gb_per_s']['p50']:8.1f}"
            f" {record['of_copy']:7.0%} {'unknown' if peak is None else format(peak, '7.0%')}"
            + ("" if error is None else f" {error:8.1e}")
            + (" (with launches)" if record["timed"] == "launches" else "")
        )


# --------------------------------------------------------------------------------------------------------------------
# Solver


def solvers(left_out: LeftOut, others: bool = True) -> dict[str, Callable[[Tensor], object]]:
    """Gram matrix → weights."""
    functions: dict[str, Callable[[Tensor], object]] = {"mogeo": mogeo.min_norm_weights}
    for name in ("MGDAWeighting", "UPGradWeighting") if others else ():
        try:
            import torchjd.aggregation

            functions[f"torchjd {name.removesuffix('Weighting')}"] = getattr(torchjd.aggregation, name)()
        except ImportError as error:
            left_out.note(f"torchjd {name}", first_line(error))
    return functions


class Cold(NamedTuple):
    """Microseconds that the solver adds to a step, its code not in the instruction caches."""

    difference: dict[str, float]  #: of two CUDA graphs of a step, with and without it; quantiles over rounds
    events: dict[str, float]  #: between two events around it, behind the other kernels of a step


def inside_a_step(count: int, gram: Tensor, rounds: int, ceilings: Ceilings) -> Cold:
    """The solver between a Gram matrix, a combination, and kernels such as a backward launches.

    By difference: two graphs, of everything and of everything but the solver, replayed in turn; a difference is taken
    within a round. By events: launched one by one; while the device works on what comes first, the host is ahead, so
    that launching does not count. What comes first reads three times the L2, and its kernels (products, softmax, sort,
    reductions, Gram) are more code than the instruction caches of a multiprocessor hold.
    """
    device = ceilings.device
    generator = torch.Generator(device).manual_seed(0)
    columns = 10**6 if device.type == "cuda" else 10**3
    rows = torch.empty(count, columns, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    square = torch.empty(512, 512, device=device).normal_(generator=generator)

    def others() -> None:
        hidden = torch.nn.functional.layer_norm(torch.nn.functional.gelu(square @ square), (512,))
        hidden.softmax(-1).log().sort(-1).values.cumsum(-1).var(-1)
        half = square.to(torch.bfloat16)
        (half @ half).float().tanh().sum()

    weights = torch.full((count,), 1 / count, dtype=torch.float64, device=device)

    def step(solve: bool) -> None:
        others()
        mogeo.gram(rows)
        solved = mogeo.min_norm_weights(gram).weights if solve else weights
        mogeo.combine(rows, solved, out=rows[0])

    with_it: Call = partial(step, True)
    without: Call = partial(step, False)
    if device.type == "cuda":
        (with_it, reason), (without, other_reason) = captured(with_it, device), captured(without, device)
        if reason or other_reason:
            raise RuntimeError(reason or other_reason)
    differences = [
        1e6 * (seconds["with"] - seconds["without"])
        for seconds in rounds_of({"with": with_it, "without": without}, rounds, ceilings.clock)
    ]
    solve = partial(mogeo.min_norm_weights, gram)
    return Cold(spread(differences), spread([1e6 * behind(others, solve, device) for _ in range(rounds)]))


def measure_solvers(
    objectives: tuple[int, ...],
    samples: int,
    rounds: int,
    ceilings: Ceilings,
    left_out: LeftOut,
    failures: Failures,
    end: float = math.inf,
    others: bool = True,
) -> list[dict[str, Any]]:
    """Microseconds per family, size and solver, on the same fp64 Gram matrices.

    TorchJD's, which stop at a zero row or loop over it, get the Gram without zero rows, as in solver.py.
    """
    from tests.strategies import FAMILIES

    device = ceilings.device
    functions = solvers(left_out, others)
    wall = wall_clock(device)
    records: list[dict[str, Any]] = []
    for count in objectives:
        gram = torch.eye(count, dtype=torch.float64, device=device)
        replay, reason = (
            captured(partial(mogeo.min_norm_weights, gram), device) if device.type == "cuda" else (None, "")
        )
        if reason:
            left_out.note("graph replay of the solver", reason)
            replay = None
        for family, sample in FAMILIES.items():
            if time.monotonic() > end:
                left_out.note(f"solver, K = {count}, {family}", "no time left (--budget)")
                continue
            microseconds: dict[str, list[float]] = {}
            refused = dict.fromkeys(functions, 0)
            not_optimal = 0
            for index in range(samples):
                whole = torch.from_numpy(sample(np.random.default_rng([0, count, index]), count))
                kept = whole.diagonal() > 0
                calls: dict[str, Call] = {}
                for name, function in functions.items():
                    given = whole if name == "mogeo" else whole[kept][:, kept]
                    calls[name] = partial(function, given.to(device))
                    try:
                        calls[name]()
                    except (ValueError, ArithmeticError, RuntimeError) as error:
                        refused[name] += 1
                        del calls[name]
                        if name == "mogeo":
                            failures.note("mogeo", error, k=count, family=family)
                if "mogeo" not in calls:
                    continue
                not_optimal += int(mogeo.min_norm_weights(whole.to(device)).status) != 0
                for name, seconds in interleaved(calls, rounds, wall, SOLVER_LIMIT).items():
                    microseconds.setdefault(name, []).extend(1e6 * value for value in seconds)
                if replay is not None:
                    gram.copy_(whole)
                    seconds = interleaved({"replay": replay}, rounds, ceilings.clock, SOLVER_LIMIT)["replay"]
                    microseconds.setdefault("mogeo, graph replay", []).extend(1e6 * value for value in seconds)
            record: dict[str, Any] = {"k": count, "family": family, "samples": samples, "not_optimal": not_optimal}
            record["refused"] = refused
            record["microseconds"] = {name: spread(values) for name, values in microseconds.items()}
            if family == IN_A_STEP:
                try:
                    record["inside_a_step"] = inside_a_step(count, whole.to(device), rounds, ceilings)._asdict()
                except RuntimeError as error:
                    failures.note("mogeo, inside a step", error, k=count)
            records.append(record)
    return records


def print_solvers(records: list[dict[str, Any]]) -> None:
    """One line per size and solver: the family in the middle, and the slowest one."""
    print(f"\n{'K':>3} {'solver':22}{'µs of the middle family (20 … 80 %)':>38}  slowest family")
    for count in sorted({record["k"] for record in records}):
        chosen = [record for record in records if record["k"] == count]
        for name in dict.fromkeys(name for record in chosen for name in record["microseconds"]):
            entries = [
                (record["microseconds"][name], record["family"]) for record in chosen if name in record["microseconds"]
            ]
            entries.sort(key=lambda entry: entry[0]["p50"])
            middle, (slowest, family) = entries[len(entries) // 2][0], entries[-1]
            quantiles = f"({middle['p20']:.1f} … {middle['p80']:.1f})"
            print(f"{count:3} {name:22}{middle['p50']:14.1f} {quantiles:>23}  {slowest['p50']:.1f}, {family}")
        for cold in (record["inside_a_step"] for record in chosen if "inside_a_step" in record):
            told = (
                f"{what} {value['p50']:.1f} ({value['p20']:.1f} … {value['p80']:.1f})" for what, value in cold.items()
            )
            print(f"{count:3} {'mogeo, inside a step':22}{', '.join(told):>38}")


# --------------------------------------------------------------------------------------------------------------------
# The run


def parse() -> argparse.Namespace:
    """The options, defaults by device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    parser.add_argument("--columns", type=lambda text: int(float(text)), nargs="+", help="N, such as 1e6 1e8")
    parser.add_argument("--objectives", type=int, nargs="+", help="K")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 30 on a GPU, else 9)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, nothing compiled by torch")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start nothing after that")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--plot", type=Path, help="draw bandwidths against arithmetic intensity there")
    arguments = parser.parse_args()
    if arguments.device is None:
        arguments.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    sizes = (QUICK if arguments.quick else SIZES)[arguments.device.type]
    arguments.columns = tuple(sorted(arguments.columns or sizes.columns))
    arguments.objectives = tuple(sorted(arguments.objectives or sizes.objectives))
    arguments.rounds = arguments.rounds or sizes.rounds
    return arguments


def note_sizes(arguments: argparse.Namespace, left_out: LeftOut) -> None:
    """What a run on a GPU measures by default, and this one does not."""
    if arguments.device.type == "cpu":
        left_out.note("kernels, graph replay, cold caches", "no GPU in use: mogeo's CPU code runs here")
    for option, symbol in (("objectives", "K"), ("columns", "N")):
        missing = [value for value in getattr(SIZES["cuda"], option) if value not in getattr(arguments, option)]
        if missing:
            values = " ".join(f"{value:,}" for value in missing)
            left_out.note(f"{symbol} = {values}", f"not asked for (--{option})")
    if arguments.quick:
        left_out.note("torch.compile", "--quick")


def main() -> None:
    """Parse, measure, print; write the figures after each setting, so that a run cut short leaves what it has."""
    arguments = parse()
    end = time.monotonic() + arguments.budget
    device, left_out, failures = arguments.device, LeftOut(), Failures()
    facts = describe("triton", "torchjd", "mogeo", device=device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    note_sizes(arguments, left_out)
    clock = device_clock(device) if device.type == "cuda" else wall_clock(device)
    ceilings = Ceilings(device, clock, copy_bandwidth(device), data_sheet_bandwidth(device))
    peak = "unknown" if ceilings.peak is None else f"{ceilings.peak:.0f} GB/s"
    print(f"a large copy: {ceilings.copy:.1f} GB/s; data sheet: {peak}; {arguments.rounds} rounds")
    document: dict[str, Any] = {"machine": facts, "rounds": arguments.rounds}
    document |= {"copy_gb_per_s": ceilings.copy, "peak_gb_per_s": ceilings.peak}
    document |= {"left_out": left_out.reasons, "failed": failures.records, "results": [], "solver": []}

    def write() -> None:
        if arguments.json:
            document["clocks_last"] = clocks(device)
            arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")

    samples = 1 if arguments.quick else SAMPLES
    for count in arguments.objectives:
        try:
            document["solver"] += measure_solvers(
                (count,), samples, arguments.rounds, ceilings, left_out, failures, end
            )
        except ImportError as error:
            left_out.note("solver", first_line(error))
        write()
    print_solvers(document["solver"])

    print(f"\n{'K':>3} {'N':>11} {'dtype':5} {'':33}{'ms':>10} {'(20 … 80 %)':>23} ", end="")
    print(f"{'GB/s':>8} {'% copy':>7} {'% peak':>7} {'error':>8}")
    widest = max((n for n in arguments.columns if n <= COMPILED_UP_TO), default=0)
    for columns in arguments.columns:
        compiling = columns == widest and not arguments.quick
        if not compiling and not arguments.quick:
            left_out.note(f"torch.compile at N = {columns:,}", f"takes seconds per shape: done at N = {widest:,} only")
        for count in arguments.objectives:
            for dtype in arguments.dtypes:
                setting = f"K = {count}, N = {columns:,}, {dtype}"
                if time.monotonic() > end:
                    left_out.note(setting, "no time left (--budget)")
                    continue
                try:
                    records = measure(count, columns, dtype, arguments.rounds, compiling, ceilings, left_out, failures)
                except torch.OutOfMemoryError as error:
                    left_out.note(setting, first_line(error))
                    records = []
                print_bandwidths(records)
                document["results"] += records
                write()
                gc.collect()  # graphs and compiled functions hold memory in cycles
    write()
    if arguments.plot:
        from roofline import draw

        draw(document, arguments.plot)
    if failures.records:
        sys.exit(1)


if __name__ == "__main__":
    main()
