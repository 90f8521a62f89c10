"""What each mode of the optimizer costs and gives: step time, peak memory, error of the weights, quality at the end.

time     A block of T steps (10) of each mode per round, in rotating order, so that a period of `refresh_every=T` is
         whole; a ratio is taken to plain training within its round. Each block has a fresh model and optimizer, and two
         steps before the clock starts, the first of which solves and the second holds. Losses are callables; some modes
         are timed with loss tensors as well, against plain training that takes one backward of their sum.
memory   The peak of torch's allocations over T + 1 steps, the first and the last of which solve, model and AdamW
         included; one pair per objective, or activations would hide what modes differ in.
error    ‖w − w_exact‖₁ at each step of one exact run in the demo's world. Every mode is given the very gradients and
         losses of the exact run, at every step: those of the same parameters and the same mini-batches.
quality  A run of its own per mode in the demo's world, all from one start and on the same mini-batches, judged as in
         benchmarks/alignment.

Time and memory are taken on --device, with the models of benchmarks/step_overhead.py; the world is trained on the CPU,
with one thread, in its regime `noisehelp`. Figures are written after every round and mode; a mode that fails is written
down, the others go on, and the exit code is 1. Nothing starts after the seconds of --budget.

Run: python benchmarks/memory_modes.py [--parts time memory error quality] [--modes exact tracked] [--seeds 4]
     [--rounds 5] [--device cuda] [--budget SECONDS] [--quick] [--json PATH] [--plot PATH]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from alignment import tables
from alignment.compare import Sizes
from alignment.estimators import distance
from alignment.mini_batches import Run, replayed, watched, watcher
from alignment.tables import WORLD_COLUMNS
from machine import clocks, describe
from plan_check import MIB, allocated
from step_overhead import Setting, make_model, prepared, release
from timing import Clock, cpu_clock, first_line, rotated, wall_clock
from torch import nn

from mogeo import MultiObjectiveOptimizer
from mogeo.demo.recipe import Recipe

PARTS = ("time", "memory", "error", "quality")
PLAIN, EXACT = "plain", "exact"

Figures = dict[str, Any]
"""What a part found out about a mode."""


class Mode(NamedTuple):
    """A way to train with several objectives."""

    keywords: Mapping[str, Any] | None
    """Of `MultiObjectiveOptimizer`; None: plain training, the gradients of all losses summed up in `p.grad`."""

    tensors: bool = False
    """Timed with loss tensors as well."""

    twin: str = ""
    """The mode that has the same weights and direction: nothing to learn in the world that it does not tell."""

    needs_gpu: bool = False


def modes(period: int, on_gpu: bool = True) -> dict[str, Mode]:
    """All modes by name; those that a GPU is needed for only where there is one."""
    every = {"refresh_every": period}
    listed = {
        PLAIN: Mode(None, tensors=True),
        "uniform": Mode({"weighting": "uniform"}),
        EXACT: Mode({}, tensors=True),
        "bf16 rows": Mode({"row_dtype": torch.bfloat16}),
        "host rows": Mode({"host_rows": True}, twin=EXACT, needs_gpu=True),
        "sketch 2^12": Mode({"sketch": 2**12}),
        "sketch 2^14": Mode({"sketch": 2**14}),
        "sketch 2^16": Mode({"sketch": 2**16}),
        "refresh": Mode(every, tensors=True),
        "sketch 2^14, refresh": Mode({**every, "sketch": 2**14}),
        "smoothing 0.9": Mode({"smoothing": 0.9}),
        "tracked": Mode({"track": 0.95}, tensors=True),
        "sketch 2^14, tracked": Mode({"sketch": 2**14, "track": 0.95}),
        "refresh, tracked": Mode({**every, "track": 0.95}, tensors=True),
    }
    return {name: mode for name, mode in listed.items() if on_gpu or not mode.needs_gpu}


def optimizer_of(mode: Mode, base: torch.optim.Optimizer) -> MultiObjectiveOptimizer:
    """The base, wrapped as the mode has it."""
    assert mode.keywords is not None
    return MultiObjectiveOptimizer(base, **mode.keywords)


def in_world(listed: Mapping[str, Mode]) -> dict[str, Mode]:
    """Modes whose weights differ: all that weigh, without twins."""
    return {name: mode for name, mode in listed.items() if mode.keywords is not None and not mode.twin}


# --------------------------------------------------------------------------------------------------------------------
# Time and memory


def step_of(mode: Mode, model: nn.Module, setting: Setting, tensors: bool = False) -> Callable[[], None]:
    """One training step, as a function; losses are callables, or tensors."""
    base, losses = prepared(model, setting)
    if mode.keywords is None:

        def step() -> None:
            base.zero_grad()
            if tensors:
                torch.stack([loss() for loss in losses]).sum().backward()
            else:
                for loss in losses:
                    loss().backward()
            base.step()

    else:
        optimizer = optimizer_of(mode, base)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.backward([loss() for loss in losses] if tensors else losses)
            optimizer.step()

    return step


@dataclass
class Course:
    """How far a run has come, and what it could not do: in JSON as it stands whenever figures are written."""

    end: float = math.inf  #: nothing starts after that, on the clock of `time.monotonic`
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def leave_out(self, what: str, why: str) -> None:
        """Say and note it."""
        self.left_out[what] = why
        print(f"left out: {what}: {why}", flush=True)

    def is_over(self, what: str) -> bool:
        """Whether there is no time left for something, which is noted then."""
        if over := time.monotonic() > self.end:
            self.leave_out(what, "no time left (--budget)")
        return over

    def fail(self, what: str, error: BaseException) -> None:
        """Say and note it."""
        self.failed[what] = first_line(error)
        print(f"failed: {what}: {error}", flush=True)


def time_of(
    listed: Mapping[str, Mode], setting: Setting, period: int, rounds: int, clock: Clock, course: Course
) -> Iterator[dict[str, Figures]]:
    """Milliseconds a step and ratios to plain, by mode: medians and quartiles over the rounds so far, round by round.

    A mode that fails takes no further part.
    """
    model = make_model(setting)
    contestants = [*listed, *(f"{name}, tensors" for name, mode in listed.items() if mode.tensors)]
    found: list[dict[str, float]] = []

    def seconds_of(name: str) -> float:
        mode, tensors = listed[name.removesuffix(", tensors")], name.endswith(", tensors")
        step = step_of(mode, copy.deepcopy(model), setting, tensors)
        for _ in range(2):
            step()
        return clock(partial(_repeat, step, period)) / period

    def figures(name: str, plain: str) -> Figures:
        milliseconds = [1e3 * seconds[name] for seconds in found]
        ratios = [seconds[name] / seconds[plain] for seconds in found]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        return {"ms": statistics.median(milliseconds), "ratio": quartiles, "ms_by_round": milliseconds}

    for turn in range(rounds):
        if course.is_over(f"time: rounds from {turn + 1} on"):
            break
        seconds = {}
        for name in rotated(contestants, turn):
            try:
                seconds[name] = seconds_of(name)
            except Exception as error:  # whatever it is, the others go on
                course.fail(f"time: {name}", error)
            release(setting.device)
        contestants = [name for name in contestants if name in seconds]
        found.append(seconds)
        print(f"time: round {turn + 1} of {rounds} done", file=sys.stderr, flush=True)
        if len(found) < 2 or PLAIN not in contestants:
            continue
        told = {name: figures(name, PLAIN) for name in listed if name in contestants}
        for name in told:
            if f"{name}, tensors" in contestants and f"{PLAIN}, tensors" in contestants:
                told[name]["tensors"] = figures(f"{name}, tensors", f"{PLAIN}, tensors")
        yield told


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def memory_of(mode: Mode, setting: Setting, period: int) -> int:
    """Bytes of torch's allocations at their highest, over what there was before: the same in any process."""
    release(setting.device)

    def work() -> None:
        _repeat(step_of(mode, make_model(setting), setting), period + 1)

    if setting.device.type != "cuda":
        return allocated(work)
    before = torch.cuda.memory_allocated(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    work()
    return torch.cuda.max_memory_allocated(setting.device) - before


def memory_by_mode(
    listed: Mapping[str, Mode], setting: Setting, period: int, course: Course
) -> Iterator[tuple[str, int]]:
    """The same of every mode, one by one, after steps that leave what the process keeps, such as workspaces."""
    memory_of(listed[PLAIN], setting, 1)
    for name, mode in listed.items():
        if course.is_over(f"memory: {name}"):
            continue
        try:
            yield name, memory_of(mode, setting, period)
        except Exception as error:
            course.fail(f"memory: {name}", error)


# --------------------------------------------------------------------------------------------------------------------
# The demo's world


def errors_along(run: Run, listed: Mapping[str, Mode]) -> dict[str, list[float]]:
    """‖w − w_exact‖₁ of each mode at each step of an exact run, which trains the model."""
    exact = MultiObjectiveOptimizer(run.adam())
    watchers = {name: watcher(run.parameters, **(mode.keywords or {})) for name, mode in listed.items()}
    errors: dict[str, list[float]] = {name: [] for name in watchers}
    run.model.train()
    for step, losses in run.training():
        seen = run.gradients(losses)
        run.at_step(step, exact)
        exact.zero_grad()
        exact.backward(replayed(run.parameters, seen))
        weights = exact.combine().weights.clone()
        for name, optimizer in watchers.items():
            errors[name].append(distance(watched(optimizer, run.parameters, seen).weights, weights))
        exact.step()
    return errors


def quality_of(name: str, mode: Mode, run: Run, start: nn.Module) -> dict[str, Any]:
    """A mode's model, trained from the start and judged; in the form of the cells of benchmarks/alignment."""
    run.model.load_state_dict(start.state_dict())
    run.train(optimizer_of(mode, run.adam()))
    judged = run.setting.judged(run.model)
    after = run.setting.measured(run.model, start, controls=False).to_dict()
    return {"cell": {"method": name, "seed": run.seed}, **judged, "after": after}


def world_of(
    seed: int, listed: Mapping[str, Mode], parts: Sequence[str], recipe: Recipe
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One seed: mean error over the steps by mode, and judged models; empty where not asked for."""
    errors: dict[str, float] = {}
    judged = []
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(seed, recipe, Path(scratch))
        start = copy.deepcopy(run.model)
        if "error" in parts:
            errors = {name: fmean(steps) for name, steps in errors_along(run, listed).items()}
        if "quality" in parts:
            judged = [quality_of(name, mode, run, start) for name, mode in listed.items()]
    return errors, judged


def world(
    listed: Mapping[str, Mode], seeds: int, parts: Sequence[str], recipe: Recipe, workers: int
) -> tuple[dict[str, Figures], list[dict[str, Any]]]:
    """Errors by mode, and judged models, of all seeds: a process a seed, with one thread."""
    listed = in_world(listed)
    spawn, found = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for one in pool.map(partial(world_of, listed=listed, parts=parts, recipe=recipe), range(seeds)):
            found.append(one)
            print(f"world: {len(found)} of {seeds} seeds done", file=sys.stderr, flush=True)
    by_mode = {name: [errors[name] for errors, _ in found] for name in listed if "error" in parts}
    told = {n: {"mean": fmean(e), "half_width": tables.interval(e), "by_seed": e} for n, e in by_mode.items()}
    return told, [result for _, judged in found for result in judged]


# --------------------------------------------------------------------------------------------------------------------
# Tables


def table(results: Sequence[Figures], runs: tables.Runs) -> str:
    """A row per mode, in Markdown; a dash where nothing was measured, or a twin tells the figure."""
    by_mode = {result["mode"]: result for result in results}
    rows = []
    for name, result in by_mode.items():
        cells = [*_time_cells(result.get("time")), *_time_cells(result.get("time", {}).get("tensors"))]
        if "peak_bytes" in result:
            plain = by_mode[PLAIN].get("peak_bytes")
            over = "–" if plain is None else f"{(result['peak_bytes'] - plain) / MIB:+.1f}"
            cells += [f"{result['peak_bytes'] / MIB:.1f}", over]
        else:
            cells += ["–", "–"]
        error = result.get("error")
        cells.append(tables.summary(error["by_seed"], digits=3, signed=False) if error else "–")
        for column in ("greedy worst", "greedy overall"):
            judged = runs.get(name, {}).values()
            cells.append(tables.summary([WORLD_COLUMNS[column](r) for r in judged]) if judged else "–")
        rows.append([name, *(cell.replace("-", "−") for cell in cells)])
    header = [
        "mode", "ms a step", "over plain (quartiles)", "tensors: ms", "over plain (quartiles)", "peak MiB",
        "over plain", "‖w − w_exact‖₁", "worst", "overall",
    ]  # fmt: skip
    return tables.markdown(header, rows)


def _time_cells(figures: Figures | None) -> list[str]:
    if figures is None:
        return ["–", "–"]
    low, middle, high = figures["ratio"]
    return [f"{figures['ms']:.0f}", f"{middle:.3f} ({low:.3f} … {high:.3f})"]


def keep(earlier: Figures, document: Figures, parts: Sequence[str]) -> None:
    """Take over what an earlier run found in other parts, and where it ran."""
    field_of = {"time": "time", "memory": "peak_bytes", "error": "error"}
    fields = {field for part, field in field_of.items() if part not in parts}
    by_mode = {result["mode"]: result for result in earlier["results"]}
    for result in document["results"]:
        result |= {field: value for field, value in by_mode.get(result["mode"], {}).items() if field in fields}
    document |= {"judged": earlier["judged"], "earlier": [*earlier.get("earlier", []), earlier["machine"]]}
    if "time" not in parts and "clock" in earlier:
        document["clock"] = earlier["clock"]


def main() -> None:
    """Parse, measure part by part, print, and write JSON and picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help=f"besides {PLAIN} (default: all)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--refresh-every", type=int, default=10, metavar="T", help="steps between solves (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timed blocks, at least 2 (default: 5)")
    parser.add_argument("--seeds", type=int, default=4, help="worlds 0 … N−1 (default: 4)")
    parser.add_argument("--workers", type=int, default=2, help="processes for error and quality (default: 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for time (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of CPU, for a machine that is busy with other things; with --threads 1 (default: wall)",
    )
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start nothing after that")
    parser.add_argument("--keep", action="store_true", help="keep what the file of --json holds of other parts")
    parser.add_argument("--quick", action="store_true", help="sizes too small to mean anything: does it run?")
    parser.add_argument("--json", type=Path, help="write every figure there, after each part")
    parser.add_argument("--plot", type=Path, help="draw time, memory and error there; needs these three parts")
    options = parser.parse_args()
    course = Course(time.monotonic() + options.budget)
    on_gpu = options.device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.keep and not (options.json and options.json.exists()):
        parser.error("--keep: name the file of an earlier run in --json")
    if options.keep and options.modes:
        parser.error("--keep with --modes: what the file holds of other modes would be lost")
    if options.plot and not (options.keep or {"time", "memory", "error"} <= set(options.parts)):
        parser.error("--plot shows time, memory and error: name all three in --parts, or leave --parts out")
    if options.clock == "cpu" and (on_gpu or options.threads != 1):
        parser.error("--clock cpu: only for --device cpu, with --threads 1, for threads that wait for others count too")
    if options.refresh_every < 2 or options.rounds < 2 or min(options.seeds, options.workers) < 1:
        parser.error("--refresh-every and --rounds have to be at least 2, --seeds and --workers at least 1")

    torch.set_num_threads(options.threads)
    model = "qwen-shape-tiny" if options.quick else "qwen-0.5b" if on_gpu else "llama-8m"
    setting = Setting(model, options.device, "fp32", objectives=4, tokens=0)
    timed = setting._replace(tokens=setting.shape.tokens[0])
    weighed = setting._replace(tokens=2 * setting.shape.length)  # one pair per objective
    period, everything = options.refresh_every, modes(options.refresh_every)
    if unknown := set(options.modes or ()) - set(everything):
        parser.error(f"--modes {', '.join(sorted(unknown))}: choose from {', '.join(everything)}")
    asked = [name for name in everything if name == PLAIN or name in (options.modes or everything)]
    here = modes(period, on_gpu)
    listed = {name: here[name] for name in asked if name in here}
    missing = [name for name in asked if name not in here]
    results = {name: _described(name, mode) for name, mode in listed.items()}
    document = {
        "machine": describe("mogeo", "transformers", device=options.device),
        "model": model,
        "parameters": sum(p.numel() for p in make_model(setting).parameters()),
        "objectives": setting.objectives,
        "refresh_every": period,
        "tokens": {"time": timed.tokens, "memory": weighed.tokens},
        "results": list(results.values()),
        "judged": [],
        "left_out": course.left_out,
        "failed": course.failed,
    }
    if options.keep:
        keep(json.loads(options.json.read_text("utf-8")), document, options.parts)
    print(", ".join(f"{key} {value}" for key, value in document["machine"].items()))
    print(f"{model}: {document['parameters'] / 1e6:.2f} M parameters, K = {setting.objectives}, T = {period};", end=" ")
    print(f"tokens an objective: {timed.tokens} for time, {weighed.tokens} for memory")
    for name in missing:
        course.leave_out(name, "a CPU has one memory only")

    def save() -> None:
        if options.json:
            document["clocks_last"] = clocks(options.device)
            options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")

    if {"error", "quality"} & set(options.parts) and not course.is_over("error and quality"):
        recipe = Sizes.tiny().recipe if options.quick else Recipe()
        errors, judged = world(listed, options.seeds, options.parts, recipe, options.workers)
        document["judged"] = judged or document["judged"]
        for name, figures in errors.items():
            results[name]["error"] = figures
        save()
    if "time" in options.parts:
        clock = cpu_clock if options.clock == "cpu" else wall_clock(options.device)
        document["clock"] = options.clock
        for so_far in time_of(listed, timed, period, options.rounds, clock, course):
            for name, figures in so_far.items():
                results[name]["time"] = figures
            save()

    if "memory" in options.parts:  # last: what a profile leaves behind would be in the clock's way
        for name, peak in memory_by_mode(listed, weighed, period, course):
            results[name]["peak_bytes"] = peak
            save()
    save()
    runs = tables.by_label(document["judged"])
    print("\n" + table(document["results"], runs))
    if runs:
        print("\nNet win rates and held-out accuracy, %:\n\n" + tables.levels(runs, WORLD_COLUMNS))
        print(f"\nMinus {EXACT}, paired by seed:\n\n" + tables.differences(runs, WORLD_COLUMNS, lambda label: EXACT))
    if options.plot:
        from memory_modes_figure import draw

        draw(document, options.plot)
    if course.failed:
        sys.exit(1)


def _described(name: str, mode: Mode) -> Figures:
    """A mode in JSON, with nothing measured yet."""
    keywords = None if mode.keywords is None else {key: str(value) for key, value in mode.keywords.items()}
    return {"mode": name, "keywords": keywords, "twin": mode.twin or None}


if __name__ == "__main__":
    main()
