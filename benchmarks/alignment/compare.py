"""The comparison on a generated world: methods, seeds, learning rates, and which runs they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from alignment.cells import Cell, Result, run_cells
from alignment.generated_world import DRIFT, bound, cell_of, static_method
from mogeo.demo.recipe import Recipe

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
SELECTION_SEEDS = (100, 101)  # learning rates are chosen on these seeds, which no table of results uses
SELECTION_REGIME = "noisehelp"  # rates are chosen in this regime and used in both, which halves the time that it takes
FRESH = 10  # seeds from 10 on were not looked at while the variants were designed
VARIANTS = ("uniform", ADAPTIVE, "smoothed(0.9)", "smoothed gram(0.9)", "gram of 4", "apart", "loss+", "descent")
TWINNED = (ADAPTIVE, "smoothed gram(0.9)", "gram of 4")  # with a twin that holds the means of their weights fixed
DRIFTING = ("uniform", ADAPTIVE, "smoothed gram(0.9)")  # what is tried where labels change half-way
TRACK = ", track 0.95"
RIVALS = (ADAPTIVE, "mgda-normalized", "gapo(0.5)", "upgrad", "raco(0.4)")  # with gradients tracked, and without
GUARANTEED = "uniform, guaranteed"
TRACKED = ("uniform", GUARANTEED, GUARANTEED + TRACK, *(name + end for name in RIVALS for end in ("", TRACK)))
TRACKED_RATES = (1e-4, 3e-4)  # 1e-3 was too much for everybody


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
    """How much is run.

    Attributes:
        recipe: sizes of one run.
        methods: those that are compared.
        tracked: those that are compared with and without tracked gradients.
        rates: learning rates to choose from.
        tracked_rates: those for the latter.
        selection_seeds: seeds on which they are chosen.
    """

    recipe: Recipe = field(default_factory=Recipe)
    methods: tuple[str, ...] = METHODS
    tracked: tuple[str, ...] = TRACKED
    rates: tuple[float, ...] = RATES
    tracked_rates: tuple[float, ...] = TRACKED_RATES
    selection_seeds: tuple[int, ...] = SELECTION_SEEDS

    @classmethod
    def tiny(cls) -> Sizes:
        """Sizes at which everything runs once, in a minute; the figures mean nothing."""
        full = Recipe()
        align = replace(full.align, max_steps=4, pairs_per_objective=2)
        recipe = replace(
            full, train_prompts=20, held_out_prompts=6, samples_per_prompt=1, sft_steps=2, sft_batch=4, align=align
        )
        tracked = ("uniform", GUARANTEED + TRACK, ADAPTIVE, ADAPTIVE + TRACK)
        methods = ("uniform", ADAPTIVE, "modpo", "cdpo")
        return cls(recipe, methods, tracked, RATES[:1], TRACKED_RATES[:1], SELECTION_SEEDS[:1])


class World:
    """The runs of the comparison: read from disk if they are there, else made.

    Args:
        folder: where results are kept.
        workers: number of processes.
        sizes: how much is run.

    Attributes:
        scratch: the folder of supervised models.
    """

    def __init__(self, folder: Path, workers: int, sizes: Sizes) -> None:
        self.folder, self.workers, self.sizes = folder, workers, sizes
        self.scratch = folder / "scratch"
        self.compute = bound(sizes.recipe, self.scratch)

    def run(self, name: str, cells: list[Cell]) -> list[Result]:
        """The results of some cells, which are kept in a subfolder."""
        return run_cells(cells, self.compute, self.folder / name, self.workers)

    def starts(self, seeds: list[int], controlled: tuple[str, ...] = REGIMES) -> list[Result]:
        """Train the models that alignment starts from, before several runs need them at once, and judge them."""
        cells = [cell_of("base", "before", 0.0, seed) for seed in seeds]
        return self.run("before", cells + [cell_of(r, "before cdpo", 0.0, seed) for seed in seeds for r in controlled])

    def rates(self) -> dict[str, float]:
        """The learning rate of each method."""
        self.starts(list(self.sizes.selection_seeds), controlled=(SELECTION_REGIME,))
        return self._chosen("selection", self.sizes.methods, self.sizes.rates)

    def _chosen(self, name: str, methods: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
        cells = [
            cell_of(SELECTION_REGIME, method, rate, seed)
            for seed in self.sizes.selection_seeds
            for method in methods
            for rate in rates
        ]
        return chosen_rates(self.run(name, cells))

    def test(self, seeds: list[int]) -> list[Result]:
        """All methods, each at its own learning rate; and ADAPTIVE's twin, with weights fixed at ADAPTIVE's means."""
        rates = self.rates()
        self.starts(seeds)
        results = []
        for regime in REGIMES:
            cells = [cell_of(regime, method, rates[method], seed) for seed in seeds for method in self.sizes.methods]
            found = self.run("test", cells)
            results += found + self.twins("test", found, ADAPTIVE)
        return results

    def twins(self, name: str, results: list[Result], *methods: str) -> list[Result]:
        """For each run of some methods, a run with weights fixed at the means of that run's weights."""
        of = [result for result in results if result["cell"]["method"] in methods]
        twins = [{**r["cell"], "method": static_method(r), "twin of": r["cell"]["method"]} for r in of]
        return self.run(name, twins)

    def tracked(
        self, seeds: list[int], regimes: Sequence[str], methods: Sequence[str] | None = None, rate: float | None = None
    ) -> list[Result]:
        """Methods with and without tracked gradients, each at its own learning rate, and static twins of the former.

        Args:
            seeds: of the runs.
            regimes: in which they are compared.
            methods: such as those in `TRACKED`; None: all of these.
            rate: one learning rate for all, kept apart; None: each method has the one that is chosen for it.
        """
        methods = methods or self.sizes.tracked
        if rate is not None:
            self.starts(seeds, controlled=())
            cells = [cell_of(r, method, rate, seed) for r in regimes for seed in seeds for method in methods]
            return self.run("tracked at one rate", cells)
        self.starts([*self.sizes.selection_seeds, *seeds], controlled=())
        rates = self._chosen("selection tracked", methods, self.sizes.tracked_rates)
        results = []
        for regime in regimes:
            cells = [cell_of(regime, method, rates[method], seed) for seed in seeds for method in methods]
            found = self.run("tracked", cells)
            results += found + self.twins("tracked", found, *(name for name in methods if name.endswith(TRACK)))
        return results

    def study(self, seeds: list[int], variants: Sequence[str] | None = None) -> list[Result]:
        """Variants of ADAPTIVE at its learning rate, with twins: under the usual labels, and where labels drift.

        Args:
            seeds: of the runs.
            variants: names, as in `VARIANTS`; None: all.
        """
        rate = self.rates()[ADAPTIVE]
        self.starts(seeds, controlled=())
        results = []
        for regime, usual in (("noisehelp", VARIANTS), (DRIFT, DRIFTING)):
            shown = [variant for variant in usual if variants is None or variant in variants]
            cells = [cell_of(regime, f"study {variant}", rate, seed) for seed in seeds for variant in shown]
            found = self.run("study", cells)
            results += found
            results += self.twins("study", found, *(f"study {variant}" for variant in shown if variant in TWINNED))
        return results
