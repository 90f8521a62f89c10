"""When does it pay? The demo's world with a dial on how far its objectives agree, crossed with imbalance.

The dial is λ: helpfulness is rated (1 − λ) times as the world rates it and λ times as the mean of the other three, in
half points. At 0 it stands against the others, at 1 it is what they have in common. Texts stay the same; pairs, golden
responses and the judge follow the ratings. What the ratings then have in common is measured: correlations between
objectives of the four answers to a prompt, about the prompt's mean. For comparison: the mean over pairs of aspects is
0.45 in SummEval's human ratings (`summeval_4aspect.jsonl`, docs/real-model.md) and 0.58 in d2t's two; in HelpSteer2
helpfulness has 0.94 with correctness and 0.50 with coherence (Wang et al. 2024, arXiv 2406.08673), over all answers.

Imbalance is one of `IMBALANCES`. All methods have one learning rate, the demo's: nothing is chosen.

Run: python benchmarks/alignment map [--seeds 3] [--first-seed 20] [--dial 0 --dial 0.5] [--imbalance none]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy import stats

from alignment.cells import Cell, Result, run_cells
from alignment.compare import ADAPTIVE, GUARANTEED, TRACK, Sizes
from alignment.generated_world import Setting, aligned
from mogeo.demo.recipe import Recipe
from mogeo.demo.world import OBJECTIVES, World, flip_labels
from mogeo.dpo.data import Preferences, Row

DIALS = (0.0, 0.25, 0.5, 1.0)
"""λ, such that the mean correlation between objectives rises in about even steps."""

MINORITY = "helpfulness"
IMBALANCES = ("none", "flipped helpfulness", "flipped honesty", "few helpfulness")
"""What is wrong with an objective: nothing; a share of its training labels turned around; few training pairs."""
FLIPPED = 0.3
FEW = 0.05
"""The share of an objective's pairs that is left where there are few."""

METHODS = ("uniform", GUARANTEED + TRACK, ADAPTIVE + TRACK, ADAPTIVE)


class DialledWorld(World):
    """The demo's world, with a minority objective that agrees with the others as far as is asked for.

    Args:
        seed: as in `World`.
        agreement: λ in [0, 1].
    """

    def __init__(self, seed: int, agreement: float) -> None:
        super().__init__(seed)
        self.agreement = agreement

    def rate(self, prompt: str, response: str) -> dict[str, float]:
        """As in `World`, the minority's rating mixed."""
        ratings = super().rate(prompt, response)
        others = fmean(rating for name, rating in ratings.items() if name != MINORITY)
        mixed = (1 - self.agreement) * ratings[MINORITY] + self.agreement * others
        return {**ratings, MINORITY: round(2 * mixed) / 2}


class DialledSetting(Setting):
    """`Setting` in a world with a dial, and with an imbalance in place of a regime."""

    def __init__(self, seed: int, agreement: float, imbalance: str, recipe: Recipe, scratch: Path) -> None:
        super().__init__(seed, "base", recipe, scratch, DialledWorld(seed, agreement))
        self.imbalance = imbalance

    @property
    def train(self) -> Preferences:
        """The training pairs, with the imbalance."""
        return unbalanced(self.clean, self.imbalance, self.seed)


def unbalanced(pairs: Preferences, imbalance: str, seed: int) -> Preferences:
    """Training pairs with one of `IMBALANCES`."""
    kind, _, name = imbalance.partition(" ")
    if kind == "flipped":
        return flip_labels(pairs, {name: FLIPPED}, seed)
    if kind == "few":
        left = pairs.pairs[name][: max(1, round(FEW * len(pairs.pairs[name])))]
        return Preferences({**pairs.pairs, name: left}, pairs.counts)
    return pairs


def correlations(rows: Sequence[Row], objectives: Sequence[str]) -> dict[str, list[list[float]]]:
    """How far the ratings of a prompt's answers agree between K > 2 objectives, [K][K].

    Ratings are compared about the prompt's mean, so that prompts that are easy for everybody do not count as
    agreement: "pearson" correlates them, "spearman" their ranks.
    """
    centred = []
    for row in rows:
        answers = row["completions"]
        ratings = np.array([[float(c["annotations"][name]["Rating"]) for name in objectives] for c in answers])
        centred.append(ratings - ratings.mean(0))
    table = np.concatenate(centred)
    found = {"pearson": np.corrcoef(table.T), "spearman": np.asarray(stats.spearmanr(table).statistic)}
    return {name: matrix.tolist() for name, matrix in found.items()}


def mean_correlation(matrix: Sequence[Sequence[float]]) -> float:
    """Over all pairs of objectives."""
    return fmean(matrix[i][j] for i, j in combinations(range(len(matrix)), 2))


# ---- cells -----------------------------------------------------------------------------------------------------------


def cells(seeds: Sequence[int], dials: Sequence[float], imbalances: Sequence[str]) -> list[Cell]:
    """All cells, seed by seed, so that the map of a seed is complete before that of the next begins."""
    return [
        {"dial": dial, "imbalance": imbalance, "method": method, "seed": seed}
        for seed in seeds
        for imbalance in imbalances
        for dial in dials
        for method in METHODS
    ]


def compute(cell: Cell, recipe: Recipe, scratch: Path) -> Result:
    """Align with the cell's method in the cell's world, and judge."""
    setting = DialledSetting(cell["seed"], cell["dial"], cell["imbalance"], recipe, scratch)
    model = copy.deepcopy(setting.start())
    result = aligned(setting, model, cell["method"], recipe.align.learning_rate)
    return {**result, "correlations": correlations(setting.rows, OBJECTIVES)}


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python benchmarks/alignment map`."""
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=20, metavar="S", help="S ... S+N-1 (default: %(default)s)")
    parser.add_argument("--dial", type=float, action="append", help=f"repeat (default: {', '.join(map(str, DIALS))})")
    parser.add_argument("--imbalance", action="append", choices=IMBALANCES, help="repeat (default: all)")


def run(options: argparse.Namespace, folder: Path, scratch: Path) -> list[Result]:
    """The results of all cells; those that are not there are made first."""
    recipe = Sizes.tiny().recipe if options.quick else Recipe()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    asked = cells(seeds, options.dial or DIALS, options.imbalance or IMBALANCES)
    return run_cells(asked, partial(compute, recipe=recipe, scratch=scratch), folder, options.workers)
