"""One run on the demo's world: a regime, a method, a learning rate and a seed; judged on held-out prompts.

A method is a weighting of mogeo (`uniform`, `linear(...)`, ...), with or without `, guaranteed` and `, track 0.95`
after it; `modpo`, `cdpo`, one of the two models before alignment (`before`, `before cdpo`), or a variant of `variants`,
written `study ...`. With the same seed, all of them have the same world, the same pairs in the same order, and the same
supervised model to start from; only `cdpo` starts from a model that was trained with controls, for as many steps.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alignment.cdpo import control, controlled_completions, controlled_preferences, controlled_prompt, with_controls
from alignment.cells import Cell, Result
from alignment.explain import Measured, explain
from alignment.variants import train as train_variant
from mogeo.demo.experiment import fine_tune
from mogeo.demo.recipe import REPORTED, Recipe
from mogeo.demo.world import OBJECTIVES, REGIMES, World, flip_labels, tiny_model, tokenizer
from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Preferences, Row, build_preferences, split_rows
from mogeo.dpo.scoring import Evaluation, evaluate_preferences, score_sequences
from mogeo.dpo.tokens import tokenize_preferences
from mogeo.dpo.train import align
from mogeo.judging.generate import generate
from mogeo.judging.golden import golden_response
from mogeo.judging.judge import RatingJudge
from mogeo.judging.win_rates import net_win_rates

MAX_NEW_TOKENS = 26
BEST = dict.fromkeys(OBJECTIVES, 5.0)  # the ratings that a model with controls is asked for
DRIFT = "drift"
"""Regime: a quarter of helpfulness' training labels are flipped in the first half of the steps, of honesty's in the
second. Only variants of the study know how to train on labels that change."""


class Method(NamedTuple):
    """A weighting of mogeo, and what is around it.

    Attributes:
        weighting: its name.
        guaranteed: whether the direction must hurt no objective (`guarantee_descent`).
        track: decay with which gradients are tracked, or "auto"; None: weights are those of each mini-batch.
    """

    weighting: str
    guaranteed: bool = False
    track: float | str | None = None

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read "uniform", "uniform, guaranteed", "mgda-decoupled, track 0.95", or "uniform, guaranteed, track auto"."""
        match = re.fullmatch(r"(.+?)(, guaranteed)?(?:, track (auto|[\d.]+))?", text)
        assert match is not None
        track = match[3] if match[3] in (None, "auto") else float(match[3])
        return cls(match[1], match[2] is not None, track)

    def options(self) -> dict[str, Any]:
        """Arguments of `AlignConfig`, and of the optimizer.

        Under all of them conflicts can be counted, and the report tells whom a step hurts in expectation.
        """
        if self.track is not None:
            return {"weighting": self.weighting, "guarantee_descent": self.guaranteed, "track": self.track}
        return {"weighting": Measured(self.weighting), "guarantee_descent": self.guaranteed, **REPORTED}


class Setting:
    """What all methods have in common in one regime and with one seed: world, pairs, starting model, judge.

    Args:
        seed: of everything.
        regime: a key of `REGIMES`, or DRIFT.
        recipe: sizes and settings.
        scratch: folder in which supervised models are kept.
        world: what prompts, answers and ratings come from; None: the demo's world of this seed.
    """

    def __init__(self, seed: int, regime: str, recipe: Recipe, scratch: Path, world: World | None = None) -> None:
        self.seed, self.regime, self.recipe, self.scratch = seed, regime, recipe, scratch
        self.world = world or World(seed)
        rows = self.world.rows(recipe.train_prompts + recipe.held_out_prompts)
        self.rows, held_out_rows = split_rows(rows, recipe.held_out_prompts, seed)
        self.clean = build_preferences(self.rows, OBJECTIVES, recipe.pairing, seed)
        self.held_out = build_preferences(held_out_rows, OBJECTIVES, recipe.pairing, seed)
        self.prompts = [row["instruction"] for row in held_out_rows]
        self.golden = [golden_response(row, OBJECTIVES) for row in held_out_rows]
        self.tokenizer: Any = tokenizer()

    @property
    def train(self) -> Preferences:
        """The training pairs, their labels spoiled as the regime has it."""
        return flip_labels(self.clean, REGIMES[self.regime], self.seed)

    @property
    def halves(self) -> tuple[Preferences, Preferences]:
        """The training pairs of the first and of the second half of the steps."""
        if self.regime != DRIFT:
            return self.train, self.train
        first, second = ({"helpfulness": 0.25}, {"honesty": 0.25})
        return flip_labels(self.clean, first, self.seed), flip_labels(self.clean, second, self.seed)

    @cached_property
    def spoiled_rows(self) -> list[Row]:
        """The training rows, spoiled as the regime spoils pairs, for methods that learn from ratings.

        The regime turns a share of an objective's pairs around. Here the same share of the rows have the objective's
        ratings turned upside down, which turns all their pairs around.
        """
        rows: list[Row] = copy.deepcopy(self.rows)
        for name, share in REGIMES[self.regime].items():
            draw = random.Random(f"spoiled ratings {self.seed} {name}")
            for row in rows:
                if draw.random() < share:
                    marks = [c["annotations"][name] for c in row["completions"]]
                    values = [float(mark["Rating"]) for mark in marks]
                    for mark, value in zip(marks, values, strict=True):
                        mark["Rating"] = f"{max(values) + min(values) - value:g}"
        return rows

    def config(self, rate: float, weighting: Any = "uniform", **options: Any) -> AlignConfig:
        """Settings of the alignment, the recipe's but for these."""
        return replace(
            self.recipe.align, weighting=weighting, learning_rate=rate, seed=self.seed, eval_every=0, **options
        )

    def start(self, controlled: bool = False) -> Any:
        """The supervised model that alignment starts from: read from disk if it was trained before, else trained."""
        if controlled:
            self.tokenizer.add_tokens([control(name, rating) for name in OBJECTIVES for rating in range(1, 6)])
        model: Any = tiny_model(self.tokenizer, self.seed)
        # Controls are made of ratings, which the regime spoils. Plain supervised training does not see ratings.
        kind = f"controlled {self.regime}" if controlled else "plain"
        path = self.scratch / f"supervised {kind} seed {self.seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        rows = controlled_completions(self.spoiled_rows, OBJECTIVES) if controlled else self.rows
        fine_tune(model, self.tokenizer, rows, self.recipe, self.seed, lambda text: None)
        self.scratch.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{random.SystemRandom().random()}.partial")
        torch.save(model.state_dict(), partial_path)
        partial_path.replace(path)
        return model

    def judged(self, model: Any, controls: bool = False) -> Result:
        """Net win rates against the golden responses, of greedy answers and of sampled ones."""
        prompts = [controlled_prompt(p, BEST) for p in self.prompts] if controls else self.prompts
        n, judge = self.recipe.samples_per_prompt, RatingJudge(self.world.rate, OBJECTIVES)
        rates = {}
        for kind, temperature, times in (("greedy", 0.0, 1), ("sampled", 1.0, n)):
            answers = generate(
                model,
                self.tokenizer,
                prompts * times,
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=temperature,
                seed=self.seed,
                prompt_format="plain",
            )
            found = net_win_rates(judge, self.prompts * times, answers, self.golden * times)
            rates[kind] = {"overall": found.overall, **found.objectives}
        return rates

    def measured(self, policy: Any, reference: Any, controls: bool) -> Evaluation:
        """Accuracy and margin on held-out pairs, as `align` measures them."""
        held_out = with_controls(self.held_out, BEST) if controls else self.held_out
        tokens = tokenize_preferences(held_out, self.tokenizer, "plain", None)
        scores = [
            score_sequences(
                model, tokens.sequences, batch_size=64, pad=self.tokenizer.pad_token_id, precision=nullcontext()
            )
            for model in (policy, reference)
        ]
        return evaluate_preferences(*scores, tokens, self.recipe.align.beta)


def compute(cell: Cell, recipe: Recipe, scratch: Path) -> Result:
    """Align with the cell's method, and judge."""
    method, rate = cell["method"], cell["lr"]
    setting = Setting(cell["seed"], cell["regime"], recipe, scratch)
    controls = method == "cdpo" or method == "before cdpo"
    start = setting.start(controls)
    if method.startswith("before"):
        return setting.judged(start, controls)
    model = copy.deepcopy(start)
    explained = None
    if method == "modpo":
        config = replace(setting.config(rate), loss="modpo")
        after = align(model, setting.tokenizer, setting.train, setting.held_out, config, progress=False).after
    elif controls:
        pairs = controlled_preferences(setting.spoiled_rows, OBJECTIVES, pairing=recipe.pairing, seed=setting.seed)
        # As many pairs a step as the other methods take over all objectives.
        config = replace(setting.config(rate), pairs_per_objective=len(OBJECTIVES) * recipe.align.pairs_per_objective)
        align(model, setting.tokenizer, pairs, _few(pairs), config, progress=False)
        after = setting.measured(model, start, controls)
    elif method.startswith("study "):
        history = train_variant(
            model, setting.tokenizer, setting.halves, setting.config(rate), method.removeprefix("study ")
        )
        explained, after = explain(history, OBJECTIVES), setting.measured(model, start, controls)
    else:
        return aligned(setting, model, method, rate)
    return {**setting.judged(model, controls), "after": after.to_dict(), "explained": explained}


def aligned(setting: Setting, model: Any, method: str, rate: float) -> Result:
    """Align a model with one of mogeo's weightings (see `Method`), in place, as `mogeo align` does, and judge it."""
    config = setting.config(rate, **Method.parse(method).options())
    result = align(model, setting.tokenizer, setting.train, setting.held_out, config, progress=False)
    explained = explain(result.history, OBJECTIVES)
    return {**setting.judged(model), "after": result.after.to_dict(), "explained": explained}


def _few(pairs: Preferences) -> Preferences:
    """A few pairs for `align` to measure on, for runs whose measurements are not used."""
    return replace(pairs, pairs={name: listed[:2] for name, listed in pairs.pairs.items()})


def bound(recipe: Recipe, scratch: Path) -> Any:
    """`compute` with the arguments that are the same for all cells."""
    return partial(compute, recipe=recipe, scratch=scratch)


def cell_of(regime: str, method: str, rate: float, seed: int) -> Cell:
    """A cell. The models before alignment have the learning rate 0."""
    return {"regime": regime, "method": method, "lr": 0.0 if method.startswith("before") else rate, "seed": seed}


def static_method(result: Result, objectives: Sequence[str] = OBJECTIVES) -> str:
    """The method with weights fixed at the means of another run's weights."""
    means, loop = result["explained"]["weight"], "study " if result["cell"]["method"].startswith("study ") else ""
    return f"{loop}linear({', '.join(f'{means[name]:.4f}' for name in objectives)})"
