"""A cell of setting 1: the demo's world, one regime, method, learning rate and seed; judged on held-out prompts.

Methods: a weighting of mogeo (`uniform`, `linear(...)`, ...), `modpo`, `cdpo`, `before` and `before cdpo` (no
alignment), and the variants of `alignment_study`, written `study ...`. All share, by seed, the world, the pairs in
their order, and the supervised model that alignment begins with; `cdpo` begins with one that was trained with controls,
for as many steps.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import alignment_study
import torch
from alignment_cells import Cell, Result
from alignment_explain import Measured, explain

from mogeo.demo.experiment import fine_tune
from mogeo.demo.recipe import Recipe
from mogeo.demo.world import OBJECTIVES, REGIMES, World, flip_labels, tiny_model, tokenizer
from mogeo.dpo.cdpo import control, controlled_completions, controlled_preferences, controlled_prompt, with_controls
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
BEST = dict.fromkeys(OBJECTIVES, 5.0)  # what a controlled model is asked for
DRIFT = "drift"
"""Regime: a quarter of helpfulness' training labels are flipped in the first half of the steps, of honesty's in the
second. Only variants of the study know how to train on labels that change."""


class Setting:
    """What the methods of one seed and regime share."""

    def __init__(self, seed: int, regime: str, recipe: Recipe, scratch: Path) -> None:
        self.seed, self.regime, self.recipe, self.scratch = seed, regime, recipe, scratch
        self.world = World(seed)
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
        """The rows, in as many of which the regime's objectives have their ratings turned upside down.

        For methods that learn from ratings, not from pairs: all pairs of such a row are then turned around.
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

    def config(self, rate: float, weighting: Any = "uniform") -> AlignConfig:
        """Settings of the alignment, the recipe's."""
        return replace(self.recipe.align, weighting=weighting, learning_rate=rate, seed=self.seed, eval_every=0)

    def start(self, controlled: bool = False) -> Any:
        """The supervised model: read where a cell has trained it already, else trained."""
        if controlled:
            self.tokenizer.add_tokens([control(name, rating) for name in OBJECTIVES for rating in range(1, 6)])
        model: Any = tiny_model(self.tokenizer, self.seed)
        # Controls are made of ratings, which the regime spoils; plain supervised training sees none.
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
        history = alignment_study.train(
            model, setting.tokenizer, setting.halves, setting.config(rate), method.removeprefix("study ")
        )
        explained, after = explain(history, OBJECTIVES), setting.measured(model, start, controls)
    else:
        config = setting.config(rate, Measured(method))
        result = align(model, setting.tokenizer, setting.train, setting.held_out, config, progress=False)
        explained, after = explain(result.history, OBJECTIVES), result.after
    return {**setting.judged(model, controls), "after": after.to_dict(), "explained": explained}


def _few(pairs: Preferences) -> Preferences:
    """Held-out pairs for `align` to measure on where nobody reads the result."""
    return replace(pairs, pairs={name: listed[:2] for name, listed in pairs.pairs.items()})


def bound(recipe: Recipe, scratch: Path) -> Any:
    """`compute` with what is the same for all cells."""
    return partial(compute, recipe=recipe, scratch=scratch)


def cell_of(regime: str, method: str, rate: float, seed: int) -> Cell:
    """One cell; a method without alignment has no learning rate."""
    return {"regime": regime, "method": method, "lr": 0.0 if method.startswith("before") else rate, "seed": seed}


def static_method(result: Result, objectives: Sequence[str] = OBJECTIVES) -> str:
    """Fixed weights with the means that another run's had."""
    means, loop = result["explained"]["weight"], "study " if result["cell"]["method"].startswith("study ") else ""
    return f"{loop}linear({', '.join(f'{means[name]:.4f}' for name in objectives)})"
