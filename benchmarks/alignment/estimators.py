"""How far the weights that a step finds are from those of the mean gradients, by what they are estimated from.

In the demo's world, a model is aligned by MGDA-Decoupled. All estimators see the same mini-batches, one after another:
the weights of each by itself, their exponential average (what `smoothing=` does), the weights of averaged Gram
matrices, as they are or without bias from micro-batches, and what `track=` finds. All weights are taken as shares,
w / Σw, and distances are sums over the objectives of absolute differences: 0 … 2.

The reference is exact: the gradients of all training pairs, of which every mini-batch is a sample, and which all
estimators therefore estimate. How far one gets with as many mini-batches as the estimators see, at rest, is said
beside it: by the U-statistic over all of them, and over either half.

- at rest: at checkpoints of the run, parameters rest, and mini-batches follow each other. Bias is the distance of the
  mean estimate from the reference, spread the mean distance of an estimate from that mean, error from the reference.
- along the run: with a reference now and then; also with weights that are refreshed at every T-th step only, averaged
  over the T steps at which such a period can begin.

Run: python benchmarks/alignment estimators [--seeds 3] [--first-seed 20] [--decay 0.95] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from machine import describe
from torch import Tensor

import mogeo
from alignment.cells import Cell, Result, run_cells
from alignment.compare import Sizes
from alignment.mini_batches import Gradients, Run, mean_of, replayed, watched, watcher
from mogeo import MultiObjectiveOptimizer
from mogeo.decide.steering import Steering
from mogeo.demo.recipe import Recipe
from mogeo.demo.world import OBJECTIVES
from mogeo.geometry.ops import psd_part
from mogeo.weightings import resolve

WEIGHTINGS = ("mgda-decoupled", "mgda-normalized")
MICRO_BATCHES = 4  # in a mini-batch
TRACKS: tuple[float | str, ...] = (0.9, 0.95, 0.98, "auto")
BY_MICRO_BATCH = 0.95
"""The decay with which micro-batches are tracked one by one, so that those of one step are compared as well."""
AVERAGES = ("mini-batch", "weights averaged", "Gram averaged", "micro-batches")
ALONG = "along the run"


class Plan(NamedTuple):
    """Sizes of the study."""

    recipe: Recipe
    checkpoints: tuple[int, ...]  # steps after which parameters rest for a while
    references: tuple[int, ...]  # steps of the run at which the gradients of all pairs are computed
    draws: int  # mini-batches at each checkpoint
    settling: int  # of these, the first that no figure counts: averages begin with one batch
    ages: tuple[int, ...]  # T: steps between refreshes


def plan(quick: bool) -> Plan:
    """The study's sizes, or such that only show that it runs."""
    if quick:
        tiny = Sizes.tiny().recipe
        tiny = replace(tiny, align=replace(tiny.align, pairs_per_objective=MICRO_BATCHES))
        return Plan(tiny, (1,), (3,), 4, 2, (1, 2))
    return Plan(Recipe(), (0, 50, 100), (30, 50, 70, 90, 100), 100, 40, (1, 5, 10, 25))


def tracked_name(track: float | str, by_micro_batch: bool = False) -> str:
    """An estimator's name in tables."""
    return f"tracked {track}" + (", micro-batches too" if by_micro_batch else "")


ESTIMATORS = (*AVERAGES, *map(tracked_name, TRACKS), tracked_name(BY_MICRO_BATCH, True))


# ---- estimators ------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What averages know of a mini-batch: Gram matrices [K, K], the second without bias, and losses [K]; fp64."""

    gram: Tensor
    unbiased: Tensor
    losses: Tensor


def u_statistic(total: Tensor, grams: Tensor, count: int) -> Tensor:
    """⟨ḡ_i, ḡ_j⟩ without bias, from products of different mini-batches only: (ΣgΣgᵀ − Σggᵀ) / (n(n − 1)), [K, K].

    Args:
        total: Σg, fp64 [K, N].
        grams: Σggᵀ, fp64 [K, K].
        count: n, how many mini-batches were summed.
    """
    return (total @ total.T - grams) / (count * (count - 1))


def shares(weighting: str, gram: Tensor, losses: Tensor) -> Tensor:
    """w / Σw of a Gram matrix and losses, [K]."""
    weights = resolve(weighting)(gram, losses)
    return weights / weights.sum()


def averaged(name: str, weighting: str, stream: Sequence[Seen], decay: float) -> list[Tensor]:
    """The shares [K] that one of `AVERAGES` finds after each mini-batch."""
    steering = Steering(smoothing=decay if name == "weights averaged" else 0.0)
    found, average = [], stream[0]
    for number, seen in enumerate(stream):
        if name in ("Gram averaged", "micro-batches") and number:
            average = Seen(*(decay * old + (1 - decay) * new for old, new in zip(average, seen, strict=True)))
        else:
            average = seen
        gram = psd_part(average.unbiased) if name == "micro-batches" else average.gram
        weights = steering.weigh(resolve(weighting), gram, average.losses).weights
        found.append(weights / weights.sum())
    return found


def distance(first: Tensor, second: Tensor) -> float:
    """‖first − second‖₁."""
    return float((first - second).abs().sum())


class Stream:
    """Every estimator's answer after each mini-batch of one sequence of them.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.seen: list[Seen] = []
        self.watchers: dict[tuple[str, str], Any] = {}
        for weighting in WEIGHTINGS:
            for track in TRACKS:
                self._watch(tracked_name(track), weighting, track)
            # A quarter of a step's decay for each of four micro-batches.
            self._watch(tracked_name(BY_MICRO_BATCH, True), weighting, BY_MICRO_BATCH ** (1 / MICRO_BATCHES))
        self.found: dict[tuple[str, str], list[Tensor]] = {key: [] for key in self.watchers}
        self.reports: dict[str, list[Any]] = {tracked_name(track): [] for track in TRACKS}

    def _watch(self, name: str, weighting: str, track: float | str) -> None:
        options = {"weighting": weighting, "objectives": OBJECTIVES, "track": track}
        self.watchers[name, weighting] = watcher(self.parameters, **options)

    def see(self, parts: Sequence[Gradients]) -> Gradients:
        """Let all see a mini-batch, given as its micro-batches; returns it as a whole."""
        batch = mean_of(parts)
        total = torch.stack([part.rows.double() for part in parts]).sum(0)
        within = torch.stack([mogeo.gram(part.rows) for part in parts]).sum(0)
        self.seen.append(Seen(mogeo.gram(batch.rows), u_statistic(total, within, len(parts)), batch.losses))
        for (name, weighting), optimizer in self.watchers.items():
            pieces = parts if name == tracked_name(BY_MICRO_BATCH, True) else [batch]
            for piece in pieces:
                report = watched(optimizer, self.parameters, piece)
            self.found[name, weighting].append(report.weights / report.weights.sum())
            if name in self.reports and weighting == WEIGHTINGS[0]:
                self.reports[name].append(report)
        return batch

    def answers(self, decay: float) -> dict[tuple[str, str], list[Tensor]]:
        """(estimator, weighting) → the shares [K] after each mini-batch."""
        plain = {
            (name, weighting): averaged(name, weighting, self.seen, decay)
            for name in AVERAGES
            for weighting in WEIGHTINGS
        }
        return {**plain, **self.found}


# ---- cells -----------------------------------------------------------------------------------------------------------


def cells(seeds: Sequence[int], sizes: Plan, decay: float) -> list[Cell]:
    """A cell for each seed and place."""
    places = (*(f"at rest {step}" for step in sizes.checkpoints), ALONG)
    return [{"seed": seed, "where": place, "decay": decay} for seed in seeds for place in places]


def compute(cell: Cell, sizes: Plan, scratch: Path) -> Result:
    """Every estimator at one place of one seed's run."""
    run = Run(cell["seed"], sizes.recipe, scratch)
    if cell["where"] == ALONG:
        return along(run, sizes, cell["decay"])
    return at_rest(run, int(cell["where"].split()[-1]), sizes, cell["decay"])


def at_rest(run: Run, step: int, sizes: Plan, decay: float) -> Result:
    """Errors of the estimators at the parameters after some steps, and how far their own intervals can be believed."""
    run.train(_optimizer(run), step)
    truth = run.of_all_pairs()
    stream, order = Stream(run.parameters), f" at rest {step}"
    sums = [torch.zeros_like(truth.rows) for _ in range(2)]  # of every other mini-batch
    for number, drawn in enumerate(islice(run.drawn(order), sizes.draws)):
        sums[number % 2] += stream.see(run.micro_batches(drawn, MICRO_BATCHES)).rows.double()
    gram = truth.rows @ truth.rows.T
    records = []
    for (name, weighting), answers in stream.answers(decay).items():
        best, counted = shares(weighting, gram, truth.losses), answers[sizes.settling :]
        mean = torch.stack(counted).mean(0)
        records.append(
            {
                "weighting": weighting,
                "estimator": name,
                "bias": distance(mean, best),
                "spread": fmean(distance(each, mean) for each in counted),
                "error": fmean(distance(each, best) for each in counted),
                "shares": mean.tolist(),
            }
        )
    squares = torch.stack([seen.gram.diagonal() for seen in stream.seen]).mean(0)
    noise_scale = squares / gram.diagonal() - 1
    return {
        "records": records,
        "exact": {weighting: shares(weighting, gram, truth.losses).tolist() for weighting in WEIGHTINGS},
        "sampled": _sampled(stream.seen, sums, gram, truth.losses),
        "noise_scale": dict(zip(OBJECTIVES, noise_scale.tolist(), strict=True)),
        "covered": {n: covered(told[sizes.settling :], gram, noise_scale) for n, told in stream.reports.items()},
    }


def _sampled(seen: Sequence[Seen], sums: Sequence[Tensor], gram: Tensor, losses: Tensor) -> dict[str, dict[str, float]]:
    """By weighting: how far the U-statistic over all mini-batches of a stream is from the truth, and its halves apart.

    Args:
        seen: the stream.
        sums: fp64 [K, N], of the gradients of its mini-batches with an even number, and of the others.
        gram: the true Gram matrix.
        losses: the true losses.
    """
    grams = torch.stack([one.gram for one in seen])
    whole = u_statistic(sums[0] + sums[1], grams.sum(0), len(seen))
    halves = [u_statistic(total, grams[i::2].sum(0), len(grams[i::2])) for i, total in enumerate(sums)]
    told = {}
    for weighting in WEIGHTINGS:
        best, found, *apart = (shares(weighting, psd_part(each), losses) for each in (gram, whole, *halves))
        told[weighting] = {"error": distance(found, best), "halves": distance(*apart)}
    return told


def covered(reports: Sequence[Any], gram: Tensor, noise_scale: Tensor) -> dict[str, float | None]:
    """Shares of the estimates whose interval of two standard errors holds the truth, None where no estimate is told.

    Args:
        reports: of a tracking optimizer, at rest.
        gram: the true Gram matrix of mean gradients [K, K].
        noise_scale: the true noise scale [K].

    Returns:
        "gram": of the entries of the Gram matrix; "noise_scale": of noise scales; "told": the share of noise scales
        that were told at all.
    """
    upper = torch.ones_like(gram, dtype=torch.bool).triu()
    entries = torch.stack([((r.mean_gram - gram).abs() <= 2 * r.mean_gram_error)[upper] for r in reports])
    finite = torch.stack([r.mean_gram_error.isfinite()[upper] for r in reports])
    low, high = torch.stack([r.noise_scale_interval for r in reports]).unbind(-1)
    told = ~torch.stack([r.noise_scale for r in reports]).isnan()
    within = (low <= noise_scale) & (noise_scale <= high)

    def share(right: Tensor, of: Tensor) -> float | None:
        return float(right[of].double().mean()) if bool(of.any()) else None

    return {"gram": share(entries, finite), "noise_scale": share(within, told), "told": float(told.double().mean())}


def along(run: Run, sizes: Plan, decay: float) -> Result:
    """Errors of the estimators along the run, at the steps with a reference."""
    optimizer, stream = _optimizer(run), Stream(run.parameters)
    truths: dict[int, Gradients] = {}
    run.model.train()
    for step, drawn in zip(range(1, run.steps + 1), run.drawn(""), strict=False):
        if step in sizes.references:
            truths[step] = run.of_all_pairs()
        batch = stream.see(run.micro_batches(drawn, MICRO_BATCHES))
        run.at_step(step, optimizer)
        optimizer.zero_grad()
        optimizer.backward(replayed(run.parameters, batch))
        optimizer.step()
    records = []
    for (name, weighting), answers in stream.answers(decay).items():
        best = {s: shares(weighting, t.rows @ t.rows.T, t.losses) for s, t in truths.items()}
        by_age = {
            age: fmean(distance(answers[step - 1 - late], truth) for step, truth in best.items() for late in range(age))
            for age in sizes.ages
        }
        by_step = {step: distance(answers[step - 1], truth) for step, truth in best.items()}
        records.append(
            {
                "weighting": weighting,
                "estimator": name,
                "error": fmean(by_step.values()),
                "by step": by_step,
                "by age": by_age,
            }
        )
    return {"records": records}


def _optimizer(run: Run) -> MultiObjectiveOptimizer:
    """That of the run which all estimators watch."""
    return MultiObjectiveOptimizer(run.adam(), "mgda-decoupled", objectives=OBJECTIVES)


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python benchmarks/alignment estimators`."""
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=20, metavar="S", help="S ... S+N-1 (default: %(default)s)")
    parser.add_argument("--decay", type=float, default=0.95, help="share of the past in averages (default: 0.95)")
    parser.add_argument("--json", type=Path, help="write every figure there as well")


def run(options: argparse.Namespace, folder: Path, scratch: Path) -> list[Result]:
    """The results of all cells; those that are not there are measured first."""
    sizes = plan(options.quick)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found = run_cells(
        cells(seeds, sizes, options.decay), partial(compute, sizes=sizes, scratch=scratch), folder, options.workers
    )
    machine = describe("transformers")
    print(*(f"{key}: {value}" for key, value in machine.items()), sep=" · ")
    if options.json:
        document = {"machine": machine, "records": found}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return found
