"""How often the step that is really taken hurts an objective: AdamW's, and not the direction that it was given.

AdamW moves along P·m, a preconditioned average of directions. Here the change Δθ of a step is compared with gradients
that the step did not see: those of independent mini-batches at the same parameters, of which the products with −Δθ
have a mean and a standard error. A negative mean: the step hurts the objective to first order. Beside it stands what
the optimizer's own report said of the same steps.

"In the metric" takes the Gram matrix in AdamW's own metric: rows divided by √s before they are tracked, with
s = √v̂ + 0.1 mean(√v̂), and v̂ with this step's own mean gradient in it (MAdam, arXiv 2606.03904, argues for the
metric). Weights then are those that make the preconditioned step harmless. It is simulated here, not an option: an
optimizer that moves nothing tracks the scaled rows, and its weights combine the rows as they are.

Run: python benchmarks/alignment realised [--seeds 3] [--first-seed 20]
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignment.cells import Cell, Result, run_cells
from alignment.compare import Sizes
from alignment.explain import HURT
from alignment.generated_world import Method
from alignment.mini_batches import Gradients, Run, replayed, watched, watcher
from mogeo import MultiObjectiveOptimizer
from mogeo.demo.recipe import Recipe
from mogeo.demo.world import OBJECTIVES

IN_THE_METRIC = ", in the metric"
METHODS = (
    "uniform",
    "mgda-decoupled",
    "mgda-decoupled, track 0.95",
    "uniform, guaranteed, track 0.95",
    "mgda-decoupled, track 0.95" + IN_THE_METRIC,
    "uniform, guaranteed, track 0.95" + IN_THE_METRIC,
)
DAMPING = 0.1


class Plan(NamedTuple):
    """Sizes of the study."""

    recipe: Recipe
    checks: tuple[int, ...]  # steps that are looked at
    reference: int  # independent mini-batches for each


def plan(quick: bool) -> Plan:
    """The study's sizes, or such that only show that it runs."""
    if quick:
        return Plan(Sizes.tiny().recipe, (2, 4), 4)
    return Plan(Recipe(), tuple(range(20, 101, 10)), 40)


# ---- steps -----------------------------------------------------------------------------------------------------------


class Euclidean:
    """Takes steps as a user does.

    Args:
        run: whose model is trained.
        method: weighting and options.
    """

    def __init__(self, run: Run, method: Method) -> None:
        self.run = run
        self.optimizer = MultiObjectiveOptimizer(run.adam(), objectives=OBJECTIVES, **method.options())

    def step(self, number: int, seen: Gradients) -> Any:
        """Take a step on these gradients; its report."""
        self.run.at_step(number, self.optimizer)
        self.optimizer.zero_grad()
        self.optimizer.backward(replayed(self.run.parameters, seen))
        report = self.optimizer.combine()
        self.optimizer.step()
        return report


class InTheMetric:
    """Takes steps whose weights were found in AdamW's metric; arguments as those of `Euclidean`."""

    def __init__(self, run: Run, method: Method) -> None:
        self.run, self.adam = run, run.adam()
        self.watcher = watcher(run.parameters, objectives=OBJECTIVES, **method.options())

    def step(self, number: int, seen: Gradients) -> Any:
        """Take a step on these gradients; the report of the optimizer that saw them scaled."""
        parameters = self.run.parameters
        scaled = Gradients(seen.rows / self._scale(number, seen.rows.mean(0)).sqrt(), seen.losses)
        report = watched(self.watcher, parameters, scaled)
        direction = report.weights.to(seen.rows.dtype) @ seen.rows
        for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        self.run.at_step(number, self.adam)
        self.adam.step()
        return report

    def _scale(self, number: int, gradient: Tensor) -> Tensor:
        """s [N]; its size does not matter, so its mean is 1.

        Args:
            number: of the step that is to be taken, from 1.
            gradient: [N], the mean gradient that goes into v̂ before the step.
        """
        decay = self.run.config.betas[1]
        kept = [self.adam.state[p].get("exp_avg_sq", torch.zeros_like(p)).flatten() for p in self.run.parameters]
        second = decay * torch.cat(kept) + (1 - decay) * gradient.square()
        root = (second / (1 - decay**number)).sqrt()
        scale = root + DAMPING * root.mean()
        return scale / scale.mean()


# ---- cells -----------------------------------------------------------------------------------------------------------


def cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, seed by seed."""
    return [{"method": method, "seed": seed} for seed in seeds for method in METHODS]


def compute(cell: Cell, sizes: Plan, scratch: Path) -> Result:
    """Align with the cell's method, look at some of its steps, and judge the model."""
    run = Run(cell["seed"], sizes.recipe, scratch)
    start = copy.deepcopy(run.model)
    method = Method.parse(cell["method"].removesuffix(IN_THE_METRIC))
    stepper = (InTheMetric if cell["method"].endswith(IN_THE_METRIC) else Euclidean)(run, method)
    reported, checks = [], []
    run.model.train()
    for number, losses in run.training():
        seen = run.gradients(losses)
        before = flat(run.parameters) if number in sizes.checks else None
        independent = []
        if before is not None:
            others = run.losses(f" beside step {number}")
            independent = [run.gradients(each).rows for each in islice(others, sizes.reference)]
        report = stepper.step(number, seen)
        alignment = {name: none_if_nan(v) for name, v in zip(OBJECTIVES, report.alignment.tolist(), strict=True)}
        reported.append(alignment)
        if before is not None:
            change = flat(run.parameters) - before
            checks.append({"step": number, "realised": hurts(change, independent), "reported": alignment})
    run.model.eval()
    judged, after = run.setting.judged(run.model), run.setting.measured(run.model, start, controls=False)
    return {**judged, "after": after.to_dict(), "checks": checks, "reported": reported_shares(reported)}


def flat(parameters: Sequence[Tensor]) -> Tensor:
    """All parameters, fp64 [N]."""
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).double()


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def hurts(change: Tensor, independent: Sequence[Tensor]) -> dict[str, dict[str, float | None]]:
    """By objective, how a change of the parameters sits to gradients of independent mini-batches.

    Args:
        change: Δθ, fp64 [N].
        independent: n rows [K, N].

    Returns:
        "z": mean of −⟨Δθ, g⟩ over its standard error; negative: the change hurts the objective. "cosine": of −Δθ and
        the mean gradient, whose length is estimated without bias; None where its square is estimated as negative.
        "halves agree": 1.0 if the products have the same sign in both halves of the mini-batches.
    """
    n = len(independent)
    products = torch.stack([-(rows.double() @ change) for rows in independent])  # [n, K]
    mean, error = products.mean(0), products.std(0) / math.sqrt(n)
    total = torch.stack([rows.double() for rows in independent]).sum(0)
    squares = torch.stack([rows.double().square().sum(1) for rows in independent]).sum(0)
    norms = ((total.square().sum(1) - squares) / (n * (n - 1))).sqrt()  # NaN of a negative estimate
    first, second = products[::2].mean(0), products[1::2].mean(0)
    told = {
        "z": mean / error,
        "cosine": mean / (norms * change.norm()),
        "halves agree": (first.sign() == second.sign()).double(),
    }
    return {
        name: {key: none_if_nan(values[index].item()) for key, values in told.items()}
        for index, name in enumerate(OBJECTIVES)
    }


def reported_shares(reported: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    """What the optimizer's reports said: the share of steps that hurt each objective, and anybody; and how many told.

    Args:
        reported: alignment by objective, of each step; None: the report cannot tell.
    """
    values = {name: [v for each in reported if (v := each[name]) is not None] for name in OBJECTIVES}
    return {
        "hurt": {name: fmean(v < HURT for v in told) if told else None for name, told in values.items()},
        "any": fmean(any(v is not None and v < HURT for v in each.values()) for each in reported),
        "told": fmean(len(told) / len(reported) for told in values.values()),
    }


# ---- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python benchmarks/alignment realised`."""
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=20, metavar="S", help="S ... S+N-1 (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path, scratch: Path) -> list[Result]:
    """The results of all cells; those that are not there are measured first."""
    sizes, seeds = plan(options.quick), range(options.first_seed, options.first_seed + options.seeds)
    return run_cells(cells(seeds), partial(compute, sizes=sizes, scratch=scratch), folder, options.workers)
