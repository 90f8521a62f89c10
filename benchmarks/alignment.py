"""The paper's comparison of methods, on what a CPU can do: a generated world with verifiable answers, and a real model.

world   9 methods and a static twin in two regimes of the demo's world: learning rates chosen per method on other seeds
        by one rule, then net win rates against golden responses, greedy and sampled, over the seeds 0 ... N-1.
study   on that world, what would make adaptive weights pay: variants of MGDA-Decoupled, each beside its static twin.
real    `mogeo align` with four weightings on a real model and human-rated pairs: held-out accuracy and margin.
report  tables and pictures of all that has been run, into the output folder.

Every run is a cell, a file under --output: an interrupted command goes on where it was, a new seed adds to the others.
"Mean ± x" is a 95 % interval by Student's t over the seeds; differences are paired by seed.

Run: python benchmarks/alignment.py world [--seeds 5] [--output runs/alignment] [--workers 2]
     python benchmarks/alignment.py study [--seeds 5]
     python benchmarks/alignment.py real --model M --data rated.jsonl [--seeds 3]
     python benchmarks/alignment.py report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import alignment_real
import alignment_tables as tables
import alignment_world
from alignment_cells import Cell, Result, run_cells
from alignment_world import cell_of, static_method

from mogeo.demo.recipe import Recipe
from mogeo.demo.world import OBJECTIVES

REGIMES = ("noisehelp", "base")
METHODS = (
    "uniform",
    "linear(0.4, 0.2, 0.2, 0.2)",
    "group-dro",
    "mgda",
    "mgda-normalized",
    "mgda-decoupled",
    "gapo(0.5)",
    "modpo",
    "cdpo",
)
ADAPTIVE = "mgda-decoupled"
RATES = (1e-4, 3e-4, 1e-3)
SELECTION_SEEDS = (100, 101)  # worlds of their own, that no other table shows
SELECTION_REGIME = "noisehelp"  # the rates are used in both: half the time, and one question less
FRESH = 10  # seeds from here on were not looked at when variants were thought of
REAL_WEIGHTINGS = ("uniform", "group-dro", "mgda-normalized", ADAPTIVE)
VARIANTS = ("uniform", ADAPTIVE, "smoothed(0.9)", "smoothed gram(0.9)", "gram of 4", "apart", "loss+", "descent")
TWINNED = (ADAPTIVE, "smoothed gram(0.9)", "gram of 4")  # with a twin that holds the means of their weights fixed
DRIFTING = ("uniform", ADAPTIVE, "smoothed gram(0.9)")  # what is tried where labels change half-way


def merit(result: Result) -> float:
    """What a learning rate is chosen by: the overall net win rate, the mean of greedy and sampled answers."""
    return fmean((result["greedy"]["overall"], result["sampled"]["overall"]))


def chosen_rates(selection: list[Result]) -> dict[str, float]:
    """Method → the learning rate with the highest mean merit over the selection seeds."""
    merits: dict[str, dict[float, list[float]]] = {}
    for result in selection:
        cell = result["cell"]
        merits.setdefault(cell["method"], {}).setdefault(cell["lr"], []).append(merit(result))
    return {method: max(rates, key=lambda rate: fmean(rates[rate])) for method, rates in merits.items()}


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    recipe: Recipe = field(default_factory=Recipe)
    methods: tuple[str, ...] = METHODS
    rates: tuple[float, ...] = RATES
    selection_seeds: tuple[int, ...] = SELECTION_SEEDS

    @classmethod
    def tiny(cls) -> Sizes:
        """Every path once, too small to mean anything."""
        full = Recipe()
        align = replace(full.align, max_steps=4, pairs_per_objective=2)
        recipe = replace(
            full, train_prompts=20, held_out_prompts=6, samples_per_prompt=1, sft_steps=2, sft_batch=4, align=align
        )
        return cls(recipe, ("uniform", ADAPTIVE, "modpo", "cdpo"), RATES[:1], SELECTION_SEEDS[:1])


class World:
    """The cells of the generated world, on disk or to be run."""

    def __init__(self, folder: Path, workers: int, sizes: Sizes) -> None:
        self.folder, self.workers, self.sizes = folder, workers, sizes
        self.compute = alignment_world.bound(sizes.recipe, folder / "scratch")

    def run(self, name: str, cells: list[Cell]) -> list[Result]:
        return run_cells(cells, self.compute, self.folder / name, self.workers)

    def starts(self, seeds: list[int], controlled: tuple[str, ...] = REGIMES) -> list[Result]:
        """The models that alignment begins with: trained before others need them, and judged."""
        cells = [cell_of("base", "before", 0.0, seed) for seed in seeds]
        return self.run("before", cells + [cell_of(r, "before cdpo", 0.0, seed) for seed in seeds for r in controlled])

    def rates(self) -> dict[str, float]:
        """The learning rate of each method."""
        self.starts(list(self.sizes.selection_seeds), controlled=(SELECTION_REGIME,))
        return chosen_rates(
            self.run(
                "selection",
                [
                    cell_of(SELECTION_REGIME, method, rate, seed)
                    for seed in self.sizes.selection_seeds
                    for method in self.sizes.methods
                    for rate in self.sizes.rates
                ],
            )
        )

    def test(self, seeds: list[int]) -> list[Result]:
        """All methods at their learning rates, and the twin of ADAPTIVE that holds the means of its weights fixed."""
        rates = self.rates()
        self.starts(seeds)
        results = []
        for regime in REGIMES:
            cells = [cell_of(regime, method, rates[method], seed) for seed in seeds for method in self.sizes.methods]
            found = self.run("test", cells)
            results += found + self.twins("test", found, ADAPTIVE)
        return results

    def twins(self, name: str, results: list[Result], method: str) -> list[Result]:
        """A run for each of `method`, with the means of its weights held fixed."""
        of = [result for result in results if result["cell"]["method"] == method]
        return self.run(name, [{**result["cell"], "method": static_method(result), "twin of": method} for result in of])

    def study(self, seeds: list[int], variants: Sequence[str] | None = None) -> list[Result]:
        """Variants at ADAPTIVE's learning rate, where labels are spoiled evenly and where they drift, with twins."""
        rate = self.rates()[ADAPTIVE]
        self.starts(seeds, controlled=())
        results = []
        for regime, usual in (("noisehelp", VARIANTS), (alignment_world.DRIFT, DRIFTING)):
            shown = [variant for variant in usual if variants is None or variant in variants]
            cells = [cell_of(regime, f"study {variant}", rate, seed) for seed in seeds for variant in shown]
            found = self.run("study", cells)
            results += found
            for variant in shown:
                if variant in TWINNED:
                    results += self.twins("study", found, f"study {variant}")
        return results


# ---- the report ------------------------------------------------------------------------------------------------------

WORLD_COLUMNS: dict[str, tables.Metric] = {
    "greedy overall": tables.net("greedy", "overall"),
    "greedy worst": tables.net("greedy", "worst"),
    "sampled overall": tables.net("sampled", "overall"),
    "sampled worst": tables.net("sampled", "worst"),
    "accuracy mean": tables.held_out("accuracy", "mean"),
    "accuracy worst": tables.held_out("accuracy", "worst"),
}


def report(folder: Path) -> None:
    """Write tables.md, cells.json and pictures, of all cells that are there, and print the tables."""
    parts = [*_world_report(folder), *_study_report(folder), *_real_report(folder)]
    text = "\n\n".join(parts) + "\n"
    (folder / "tables.md").write_text(text, "utf-8")
    cells = {
        str(path.relative_to(folder)): [_without_series(result) for result in tables.read(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_dir() and any(path.glob("*.json")) and path != folder
    }
    with (folder / "cells.json").open("w", encoding="utf-8") as file:
        json.dump(cells, file)
    print(text)


def _world_report(folder: Path) -> list[str]:
    parts = []
    selection, before = (tables.read(folder / "world" / name) for name in ("selection", "before"))
    if selection:
        parts += ["## Learning rates (merit on the selection seeds)", tables.selection(selection, merit)]
    for regime in REGIMES:
        tested = [r for r in tables.read(folder / "world" / "test") if r["cell"]["regime"] == regime]
        if not tested:
            continue
        seeds = {r["cell"]["seed"] for r in tested}
        starts = [r for r in before if r["cell"]["seed"] in seeds and r["cell"]["regime"] in ("base", regime)]
        # "before" does not depend on the regime; "before cdpo" does.
        starts = [r for r in starts if r["cell"]["method"] == "before" or r["cell"]["regime"] == regime]
        order = ("before", "before cdpo", *METHODS)
        results = sorted([*starts, *tested], key=lambda r: _rank(r, order))
        runs = tables.by_label(results)
        parts += [f"## World, {regime}", tables.levels(runs, WORLD_COLUMNS)]
        for kind in ("greedy", "sampled"):
            columns = {name: tables.net(kind, name) for name in ("overall", *OBJECTIVES)}
            parts += [f"### {kind}, by objective", tables.levels(runs, columns)]
        parts += [
            "### minus uniform, paired by seed",
            tables.differences(runs, WORLD_COLUMNS, lambda label: tables.BASELINE),
            "### why",
            tables.explanation(runs, OBJECTIVES),
        ]
        for kind in ("greedy", "sampled"):
            title = f"World, {regime}: net win rate of {kind} answers, %"
            tables.draw_trade_offs(folder / f"trade-off-{regime}-{kind}.png", runs, OBJECTIVES, kind, title)
        tables.draw_weights(folder / f"weights-{regime}.png", runs, OBJECTIVES, f"World, {regime}: weights")
    return parts


def _study_report(folder: Path) -> list[str]:
    parts = []
    results = tables.read(folder / "world" / "study")
    for regime in dict.fromkeys(r["cell"]["regime"] for r in results):
        ours = [r for r in results if r["cell"]["regime"] == regime]
        fresh = sorted({r["cell"]["seed"] for r in ours})
        for seeds in ([s for s in fresh if s < FRESH], [s for s in fresh if s >= FRESH]):
            order = tuple(f"study {variant}" for variant in VARIANTS)
            chosen = sorted((r for r in ours if r["cell"]["seed"] in seeds), key=lambda r: _rank(r, order))
            if not chosen:
                continue
            runs = tables.by_label(chosen)
            parts += [
                f"## Study, {regime}, seeds {seeds[0]} to {seeds[-1]}",
                tables.levels(runs, WORLD_COLUMNS),
                "### minus uniform",
                tables.differences(runs, WORLD_COLUMNS, lambda label: tables.BASELINE),
                "### minus its static twin",
                tables.differences(runs, WORLD_COLUMNS, lambda label: f"{tables.TWIN} of {label}"),
                "### why",
                tables.explanation(runs, OBJECTIVES),
            ]
            tables.draw_weights(
                folder / f"weights-study-{regime}-{seeds[0]}.png", runs, OBJECTIVES, f"Study, {regime}: weights"
            )
    return parts


def _real_report(folder: Path) -> list[str]:
    parts = []
    for data in sorted((folder / "real").glob("*")):
        results = tables.read(data)
        if not results:
            continue
        objectives = results[0]["objectives"]
        runs = tables.by_label(sorted(results, key=lambda r: _rank(r, REAL_WEIGHTINGS)))
        parts.append(f"## {data.name}")
        for key, digits in (("accuracy", 1), ("margin", 3)):
            columns = {f"{key}: {name}": tables.held_out(key, name) for name in ("mean", "worst", *objectives)}
            parts += [
                f"### held-out {key}",
                tables.levels(runs, columns, digits),
                tables.differences(runs, columns, lambda label: tables.BASELINE, digits),
            ]
        parts += ["### why", tables.explanation(runs, objectives)]
        tables.draw_weights(folder / f"weights-{data.name}.png", runs, objectives, f"{data.name}: weights")
    return parts


def _rank(result: Result, order: Sequence[str]) -> tuple[int, int, int]:
    """Methods in the order of the tables, each followed by its twin; by seed."""
    cell = result["cell"]
    method = cell.get("twin of", cell["method"])
    return (order.index(method) if method in order else len(order), "twin of" in cell, cell["seed"])


def _without_series(result: Result) -> Result:
    explained = result.get("explained")
    if not explained:
        return result
    return {**result, "explained": {key: value for key, value in explained.items() if key != "weights"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"), help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="sizes too small to mean anything: does it run?")
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world")
    world.add_argument("--seeds", type=int, default=5, metavar="N")
    study = commands.add_parser("study")
    study.add_argument("--seeds", type=int, default=5, metavar="N")
    study.add_argument("--first-seed", type=int, default=0, metavar="S", help="S ... S+N-1: fresh ones for a winner")
    study.add_argument("--variant", action="append", choices=VARIANTS, help="repeat (default: all)")
    real = commands.add_parser("real")
    real.add_argument("--model", required=True, help="what `mogeo align --model` takes")
    real.add_argument("--data", type=Path, required=True, help="rated rows")
    real.add_argument("--weighting", action="append", help=f"repeat (default: {', '.join(REAL_WEIGHTINGS)})")
    real.add_argument("--seeds", type=int, default=3, metavar="N")
    real.add_argument("--steps", type=int, default=80)
    real.add_argument("--pairs", type=int, default=4, help="of each objective in a step")
    real.add_argument("--held-out", type=int, default=120, help="prompts")
    real.add_argument("--lr", type=float, default=1e-5)
    commands.add_parser("report")
    options = parser.parse_args()

    setting = World(options.output / "world", options.workers, Sizes.tiny() if options.quick else Sizes())
    if options.command == "world":
        setting.test(list(range(options.seeds)))
    elif options.command == "study":
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        setting.study(list(seeds), options.variant)
    elif options.command == "real":
        weightings = options.weighting or list(REAL_WEIGHTINGS)
        cells = alignment_real.cells(
            options.data.stem, weightings, options.seeds, options.steps, options.pairs, options.held_out, options.lr
        )
        folder = options.output / "real" / options.data.stem
        compute = alignment_real.bound(options.model, options.data, folder / "scratch")
        run_cells(cells, compute, folder, options.workers)
    else:
        report(options.output)


if __name__ == "__main__":
    main()
