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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import alignment_real
import alignment_world
from alignment_cells import Cell, Result, run_cells
from alignment_world import cell_of, static_method

from mogeo.dpo.recipe import Recipe

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
SELECTION_SEEDS = (100, 101)  # worlds of their own, that no table shows
REAL_WEIGHTINGS = ("uniform", "group-dro", "mgda-normalized", ADAPTIVE)
VARIANTS = (
    "uniform",
    ADAPTIVE,
    "smoothed(0.9)",
    "smoothed gram(0.9)",
    "gram of 4",
    "apart",
    "loss+",
    "loss^2",
    "descent",
)


def merit(result: Result) -> float:
    """What a learning rate is chosen by: the overall net win rate, the mean of greedy and sampled answers."""
    return fmean((result["greedy"]["overall"], result["sampled"]["overall"]))


def chosen_rates(selection: list[Result]) -> dict[tuple[str, str], float]:
    """(regime, method) → the learning rate with the highest mean merit over the selection seeds."""
    merits: dict[tuple[str, str], dict[float, list[float]]] = {}
    for result in selection:
        cell = result["cell"]
        merits.setdefault((cell["regime"], cell["method"]), {}).setdefault(cell["lr"], []).append(merit(result))
    return {key: max(rates, key=lambda rate: fmean(rates[rate])) for key, rates in merits.items()}


class World:
    """The cells of the generated world, on disk or to be run."""

    def __init__(self, folder: Path, workers: int, recipe: Recipe, rates: Sequence[float] = RATES) -> None:
        self.folder, self.workers, self.grid = folder, workers, rates
        self.compute = alignment_world.bound(recipe, folder / "scratch")

    def run(self, name: str, cells: list[Cell]) -> list[Result]:
        return run_cells(cells, self.compute, self.folder / name, self.workers)

    def starts(self, seeds: list[int], controlled: tuple[str, ...] = REGIMES) -> list[Result]:
        """The models that alignment begins with: trained before others need them, and judged."""
        cells = [cell_of("base", "before", 0.0, seed) for seed in seeds]
        return self.run("before", cells + [cell_of(r, "before cdpo", 0.0, seed) for seed in seeds for r in controlled])

    def rates(self) -> dict[tuple[str, str], float]:
        """The learning rate of each (regime, method)."""
        self.starts(list(SELECTION_SEEDS))
        return chosen_rates(
            self.run(
                "selection",
                [
                    cell_of(regime, method, rate, seed)
                    for regime in REGIMES
                    for seed in SELECTION_SEEDS
                    for method in METHODS
                    for rate in self.grid
                ],
            )
        )

    def test(self, seeds: list[int]) -> list[Result]:
        """All methods at their learning rates, and the twin of ADAPTIVE that holds the means of its weights fixed."""
        rates = self.rates()
        self.starts(seeds)
        results = []
        for regime in REGIMES:
            cells = [cell_of(regime, method, rates[regime, method], seed) for seed in seeds for method in METHODS]
            found = self.run("test", cells)
            results += found + self.twins("test", found, ADAPTIVE)
        return results

    def twins(self, name: str, results: list[Result], method: str) -> list[Result]:
        """A run for each of `method`, with the means of its weights held fixed."""
        of = [result for result in results if result["cell"]["method"] == method]
        return self.run(name, [{**result["cell"], "method": static_method(result), "twin of": method} for result in of])

    def study(self, seeds: list[int], variants: tuple[str, ...] = VARIANTS, name: str = "study") -> list[Result]:
        """Variants at ADAPTIVE's learning rate, where labels are spoiled evenly and where they drift, with twins."""
        rate = self.rates()["noisehelp", ADAPTIVE]
        self.starts(seeds, controlled=())
        results = []
        for regime in ("noisehelp", alignment_world.DRIFT):
            cells = [cell_of(regime, f"study {variant}", rate, seed) for seed in seeds for variant in variants]
            found = self.run(name, cells)
            results += found
            for variant in variants:
                if variant != "uniform":
                    results += self.twins(name, found, f"study {variant}")
        return results


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
    study.add_argument("--variant", action="append", help="of `alignment_study.variant`; repeat (default: all)")
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

    recipe, rates = Recipe(), RATES
    if options.quick:
        rates = RATES[:1]
        align = replace(recipe.align, max_steps=4, pairs_per_objective=2)
        recipe = replace(recipe, train_prompts=20, held_out_prompts=6, samples_per_prompt=1, sft_steps=2, align=align)
    setting = World(options.output / "world", options.workers, recipe, rates)
    if options.command == "world":
        setting.test(list(range(options.seeds)))
    elif options.command == "study":
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        setting.study(list(seeds), tuple(options.variant or VARIANTS))
    elif options.command == "real":
        weightings = options.weighting or list(REAL_WEIGHTINGS)
        cells = alignment_real.cells(
            options.data.stem, weightings, options.seeds, options.steps, options.pairs, options.held_out, options.lr
        )
        folder = options.output / "real" / options.data.stem
        compute = alignment_real.bound(options.model, options.data, folder / "scratch")
        run_cells(cells, compute, folder, options.workers)
    else:
        raise NotImplementedError


if __name__ == "__main__":
    main()
