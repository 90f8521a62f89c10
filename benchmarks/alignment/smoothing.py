"""How far the weights of a mini-batch are from those of all pairs, and whether averaging over steps brings them nearer.

In the demo's world, a model is aligned by MGDA-Decoupled. Three estimators see the same mini-batches: the weights of
each by itself, their exponential average (what `smoothing=` does), and the weights of the averaged Gram matrix and
losses. The reference is the weights of the mean gradients of many mini-batches. All weights are taken as shares,
w / Σw, and distances are sums over the objectives of absolute differences: 0 … 2.

- fixed: at checkpoints of the run, parameters rest, and mini-batches follow each other. Bias is the distance of the
  mean estimate from the reference, spread the mean distance of an estimate from that mean, error from the reference.
- moving: along the run itself, with a reference now and then.

Run: python benchmarks/alignment smoothing [--seeds 3] [--decay 0.9] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from machine import describe
from torch import Tensor

import mogeo
from alignment.compare import Sizes
from alignment.generated_world import Setting
from alignment.tables import summary
from mogeo import MultiObjectiveOptimizer
from mogeo.decide.steering import Steering
from mogeo.demo.recipe import Recipe
from mogeo.demo.world import OBJECTIVES
from mogeo.dpo.log_probs import sequence_log_probs
from mogeo.dpo.losses import dpo_loss
from mogeo.dpo.scoring import score_sequences
from mogeo.dpo.tokens import ShuffledEpochs, collate, tokenize_preferences
from mogeo.weightings import resolve

WEIGHTINGS = ("mgda-decoupled", "mgda", "mgda-normalized")
ESTIMATORS = ("as they come", "weights averaged", "Gram averaged")


class Seen(NamedTuple):
    """What a weighting sees of some pairs: Gram matrix [K, K] and losses [K], fp64."""

    gram: Tensor
    losses: Tensor


class Plan(NamedTuple):
    """Sizes of the study."""

    recipe: Recipe
    steps: int  # of the run
    checkpoints: tuple[int, ...]  # steps before which parameters rest for a while
    every: int  # steps between two references along the run
    draws: int  # mini-batches at each checkpoint
    settling: int  # of these, and of the run's, the first that no figure counts: the averages begin with one batch
    reference: int  # mini-batches of a reference


def plan(quick: bool) -> Plan:
    """The study's sizes, or such that only show that it runs."""
    if quick:
        return Plan(Sizes.tiny().recipe, 2, (1,), 1, 3, 1, 2)
    return Plan(Sizes().recipe, 100, (0, 50, 100), 10, 150, 30, 64)


# --------------------------------------------------------------------------------------------------------------------
# Estimators


def estimates(name: str, weighting: str, stream: Sequence[Seen], decay: float) -> list[Tensor]:
    """Shares [K] after each mini-batch."""
    steering = Steering(smoothing=decay if name == "weights averaged" else 0.0)
    found, average = [], stream[0]
    for seen in stream:
        if name == "Gram averaged":
            average = Seen(*(decay * old + (1 - decay) * new for old, new in zip(average, seen, strict=True)))
        weights = steering.weigh(resolve(weighting), *(average if name == "Gram averaged" else seen)).weights
        found.append(weights / weights.sum())
    return found


def distance(first: Tensor, second: Tensor) -> float:
    """‖first − second‖₁."""
    return float((first - second).abs().sum())


# --------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """One seed's model on its way, and the pairs it is aligned with."""

    def __init__(self, seed: int, sizes: Plan, scratch: Path) -> None:
        self.setting = setting = Setting(seed, "noisehelp", sizes.recipe, scratch)
        self.sizes, self.seed = sizes, seed
        self.config = setting.config(sizes.recipe.align.learning_rate)
        self.model = setting.start()
        self.pad = setting.tokenizer.pad_token_id
        self.tokens = tokenize_preferences(setting.train, setting.tokenizer, self.config.prompt_format, None)
        self.before = score_sequences(
            self.model, self.tokens.sequences, batch_size=64, pad=self.pad, precision=nullcontext()
        )
        self.parameters = list(self.model.parameters())

    def losses(self, order: str) -> Iterator[dict[str, Callable[[], Tensor]]]:
        """The objectives' losses on mini-batch after mini-batch; an order by another name draws others."""
        per_step = self.config.pairs_per_objective
        orders = {n: ShuffledEpochs(len(p), per_step, self.seed, n + order) for n, p in self.tokens.pairs.items()}
        step = 0
        while step := step + 1:
            yield {n: partial(self.loss, n, order_of(step)) for n, order_of in orders.items()}

    def loss(self, objective: str, rows: Tensor) -> Tensor:
        """The mean DPO loss of some pairs."""
        flat = self.tokens.pairs[objective][rows].T.flatten()
        batch = collate([self.tokens.sequences[i] for i in flat.tolist()], self.pad)
        chosen, rejected = (sequence_log_probs(self.model, *batch) - self.before[flat]).chunk(2)
        return dpo_loss(chosen - rejected, self.config.beta).mean()

    def rows(self, losses: dict[str, Callable[[], Tensor]]) -> tuple[Tensor, Tensor]:
        """Gradients [K, N], fp32, and losses [K], fp64, of a mini-batch."""
        values = [loss() for loss in losses.values()]
        gradients = [torch.autograd.grad(value, self.parameters) for value in values]
        rows = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients])
        return rows, torch.stack(values).detach().double()

    def stream(self, order: str) -> list[Seen]:
        """One mini-batch after another, at the parameters of now."""
        drawn = (self.rows(losses) for _, losses in zip(range(self.sizes.draws), self.losses(order), strict=False))
        return [Seen(mogeo.gram(rows), losses) for rows, losses in drawn]

    def reference(self, order: str) -> list[Seen]:
        """Of the mean gradients of many mini-batches, and of either half of them."""
        count = self.sizes.reference
        halves: list[Any] = [0, 0]
        for i, losses in zip(range(count), self.losses(order), strict=False):
            rows, values = self.rows(losses)
            halves[i % 2] = halves[i % 2] + torch.cat([rows.double(), values[:, None]], dim=1) / (count / 2)
        means = [(halves[0] + halves[1]) / 2, *halves]
        return [Seen(mogeo.gram(mean[:, :-1].contiguous()), mean[:, -1]) for mean in means]

    def __call__(self) -> tuple[list[tuple[list[Seen], list[Seen]]], list[Seen], dict[int, list[Seen]]]:
        """(stream, references) of each checkpoint, what each step of the run saw, and references by step."""
        fixed, seen, references = [], [], {}
        adam = torch.optim.AdamW(self.parameters, lr=self.config.learning_rate, betas=self.config.betas)
        optimizer = MultiObjectiveOptimizer(adam, "mgda-decoupled", objectives=OBJECTIVES)
        self.model.train()
        training = self.losses("")
        for step in range(self.sizes.steps + 1):
            if step in self.sizes.checkpoints:
                fixed.append((self.stream(f" at rest {step}"), self.reference(f" of rest {step}")))
            if step == self.sizes.steps:
                break
            optimizer.zero_grad()
            if step >= self.sizes.settling and step % self.sizes.every == 0:
                references[step] = self.reference(f" of {step}")
            optimizer.backward(next(training))
            report = optimizer.combine()
            seen.append(Seen(report.gram.clone(), report.losses.clone()))
            optimizer.step()
        return fixed, seen, references


def measured(seed: int, sizes: Plan, decay: float, scratch: Path) -> list[dict[str, Any]]:
    """One seed: a record for each weighting and estimator."""
    fixed, seen, references = Run(seed, sizes, scratch)()
    records = []
    for weighting in WEIGHTINGS:

        def shares(seen: Seen, weighting: str = weighting) -> Tensor:
            return estimates("as they come", weighting, [seen], decay)[0]

        pairs = [reference for _, reference in fixed] + list(references.values())
        doubt = fmean(distance(shares(first), shares(second)) for _, first, second in pairs)
        for estimator in ESTIMATORS:
            bias, spread, error = [], [], []
            for stream, (best, *_) in fixed:
                found = estimates(estimator, weighting, stream, decay)[sizes.settling :]
                mean = torch.stack(found).mean(0)
                bias.append(distance(mean, shares(best)))
                spread.append(fmean(distance(each, mean) for each in found))
                error.append(fmean(distance(each, shares(best)) for each in found))
            found = estimates(estimator, weighting, seen, decay)
            moving = fmean(distance(found[step], shares(best)) for step, (best, *_) in references.items())
            records.append(
                {
                    "seed": seed, "weighting": weighting, "estimator": estimator, "bias": fmean(bias),
                    "spread": fmean(spread), "error": fmean(error), "moving": moving, "halves": doubt,
                }
            )  # fmt: skip
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """Markdown: means over seeds, with the half-width of a 95 % interval."""
    columns = ("bias", "spread", "error", "moving")
    print("|  |  | fixed: bias | fixed: spread | fixed: error | moving: error |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for weighting in WEIGHTINGS:
        for estimator in ESTIMATORS:
            chosen = [r for r in records if (r["weighting"], r["estimator"]) == (weighting, estimator)]
            cells = []
            for column in columns:
                cells.append(summary([record[column] for record in chosen], digits=3, signed=False))
            print(f"| `{weighting}` | {estimator} |", " | ".join(cells), "|")
    doubts = {w: fmean(r["halves"] for r in records if r["weighting"] == w) for w in WEIGHTINGS}
    print("\nBetween the two halves of a reference:", ", ".join(f"{w} {d:.3f}" for w, d in doubts.items()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python benchmarks/alignment smoothing`."""
    parser.add_argument("--seeds", type=int, default=3, help="worlds 0 … N−1 (default: %(default)s)")
    parser.add_argument("--decay", type=float, default=0.9, help="share of the past in each average (default: 0.9)")
    parser.add_argument("--json", type=Path, help="write every figure there")


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write JSON where asked."""
    torch.set_num_threads(1)
    machine = describe("transformers")
    print(*(f"{key}: {value}" for key, value in machine.items()), sep=" · ")
    sizes, records = plan(options.quick), []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            records += measured(seed, sizes, options.decay, Path(scratch))
            print(f"seed {seed} done", file=sys.stderr, flush=True)
    print_table(records)
    if options.json:
        document = {"machine": machine, "decay": options.decay, "records": records}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
