"""One seed of the demo: a world, a tiny model trained on its mixed completions, aligned in several ways, and judged.

Uses the library as anyone would: `mogeo align` calls `mogeo.dpo.train.align`, too. Knows nothing of command lines,
tables or pictures.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from mogeo.demo.recipe import BEFORE, METHODS, REPORTED, Recipe
from mogeo.demo.world import OBJECTIVES, REGIMES, World, flip_labels, tiny_model, tokenizer
from mogeo.dpo.data import Row, build_preferences, split_rows
from mogeo.dpo.processes import resolve_device
from mogeo.dpo.tokens import collate, encode_sequence
from mogeo.dpo.train import align
from mogeo.judging.generate import generate
from mogeo.judging.golden import golden_response
from mogeo.judging.judge import RatingJudge
from mogeo.judging.win_rates import NetWinRates, net_win_rates

_MAX_NEW_TOKENS = 26  # the longest answer in the training data has 24: four attributes in prose, each with a "maybe"


@dataclass(frozen=True)
class Outcome:
    """One model, judged.

    Attributes:
        label: its name in tables.
        weighting: what it was aligned with; None before alignment.
        greedy: net win rates of its greedy answers.
        sampled: net win rates of its sampled answers.
        accuracy: preference accuracy on held-out pairs, by objective.
        history: the records of its alignment; empty before alignment.
        answers: its greedy answer to each held-out prompt.
    """

    label: str
    weighting: str | None
    greedy: NetWinRates
    sampled: NetWinRates
    accuracy: dict[str, float]
    history: list[dict[str, Any]]
    answers: list[str]


@dataclass(frozen=True)
class SeedResult:
    """What came of one seed.

    Attributes:
        seed: it decides the world, the model and the order of the pairs.
        regime: which training labels were flipped.
        world: prompts, answers and raters.
        prompts: the held-out prompts.
        golden: the golden response to each.
        outcomes: one per model, the model before alignment first.
    """

    seed: int
    regime: str
    world: World
    prompts: list[str]
    golden: list[str]
    outcomes: list[Outcome]


def run_seed(
    seed: int, recipe: Recipe, regime: str, extra: Sequence[str] = (), started: float | None = None
) -> SeedResult:
    """Run the experiment of one seed.

    Args:
        seed: decides everything that is random.
        recipe: sizes and settings.
        regime: a key of `mogeo.demo.world.REGIMES`, which says what training labels are flipped.
        extra: weightings to compare besides METHODS.
        started: `time.time()` at the start, for the progress that is printed to stderr; None: nothing is printed.
    """

    def tell(text: str) -> None:
        if started is not None:
            print(f"{time.time() - started:5.0f} s  seed {seed}  {text}", file=sys.stderr, flush=True)

    with _one_thread():
        experiment = _Experiment(seed, recipe, regime, tell)
        outcomes = [experiment.before()]
        outcomes += [experiment.align(label, **settings) for label, settings in METHODS.items()]
        others = [name for name in dict.fromkeys(extra) if name not in METHODS]
        outcomes += [experiment.align(name, weighting=name, **REPORTED) for name in others]
    return SeedResult(seed, regime, experiment.world, experiment.prompts, experiment.golden, outcomes)


class _Experiment:
    """What all models of one seed have in common: world, data, judge, and the model that they start from."""

    def __init__(self, seed: int, recipe: Recipe, regime: str, tell: Callable[[str], None]) -> None:
        self.seed, self.recipe, self.tell = seed, recipe, tell
        self.world = World(seed)
        rows = self.world.rows(recipe.train_prompts + recipe.held_out_prompts)
        train_rows, held_out_rows = split_rows(rows, recipe.held_out_prompts, seed)
        clean = build_preferences(train_rows, OBJECTIVES, recipe.pairing, seed)
        self.train = flip_labels(clean, REGIMES[regime], seed)
        self.held_out = build_preferences(held_out_rows, OBJECTIVES, recipe.pairing, seed)
        self.prompts = [row["instruction"] for row in held_out_rows]
        self.golden = [golden_response(row, OBJECTIVES) for row in held_out_rows]
        self.judge = RatingJudge(self.world.rate, OBJECTIVES)

        self.tokenizer = tokenizer()
        self.model: Any = tiny_model(self.tokenizer, seed).to(resolve_device(recipe.align.device))
        parameters = sum(p.numel() for p in self.model.parameters())
        tell(f"a model of {parameters:,} parameters learns from {4 * len(train_rows):,} answers, good and bad ...")
        fine_tune(self.model, self.tokenizer, train_rows, recipe, seed, tell)

    def before(self) -> Outcome:
        """Judge the model that every method starts from. It is the reference model, so its accuracy is 1/2."""
        return self._judged(BEFORE, None, self.model, dict.fromkeys(OBJECTIVES, 0.5), [])

    def align(self, label: str, **settings: Any) -> Outcome:
        """Align a copy of that model with these settings, and judge it."""
        config = replace(self.recipe.align, seed=self.seed, **settings)
        start = copy.deepcopy(self.model)
        result = align(start, self.tokenizer, self.train, self.held_out, config, progress=False)
        return self._judged(label, settings["weighting"], result.model, result.after.accuracy, result.history)

    def _judged(
        self, label: str, weighting: str | None, model: Any, accuracy: dict[str, float], history: list[dict[str, Any]]
    ) -> Outcome:
        n = self.recipe.samples_per_prompt
        greedy = self._answers(model, self.prompts, temperature=0.0)
        sampled = self._answers(model, self.prompts * n, temperature=1.0)
        rates = net_win_rates(self.judge, self.prompts, greedy, self.golden)
        rates_sampled = net_win_rates(self.judge, self.prompts * n, sampled, self.golden * n)
        self.tell(f"{label}: greedy net win rate {100 * rates.overall:+.1f} %, worst {100 * rates.worst:+.1f} %")
        return Outcome(label, weighting, rates, rates_sampled, accuracy, history, greedy)

    def _answers(self, model: Any, prompts: Sequence[str], temperature: float) -> list[str]:
        return generate(
            model,
            self.tokenizer,
            prompts,
            max_new_tokens=_MAX_NEW_TOKENS,
            temperature=temperature,
            seed=self.seed,
            prompt_format=self.recipe.align.prompt_format,
        )


def fine_tune(
    model: Any, tokenizer: Any, rows: Sequence[Row], recipe: Recipe, seed: int, tell: Callable[[str], None]
) -> None:
    """Supervised training on all completions, good and bad alike: the next-token loss of their tokens.

    Args:
        model: a causal language model, which is changed in place.
        tokenizer: its tokenizer.
        rows: in UltraFeedback's shape; ratings are not used.
        recipe: number and size of the steps.
        seed: decides which completions are in which step.
        tell: called with the progress, four times.
    """
    sequences = []
    for row in rows:
        for completion in row["completions"]:
            sequences.append(encode_sequence(tokenizer, row["instruction"], completion["response"], "plain"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.sft_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup, steps = 50, recipe.sft_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * max(0.05, 1 - step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, steps + 1):
        drawn = torch.randint(len(sequences), (recipe.sft_batch,), generator=generator).tolist()
        batch = collate([sequences[i] for i in drawn], tokenizer.pad_token_id).to(model.device)
        # No attention mask is needed, since padding is on the right, where causal attention does not look; it is
        # faster.
        logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
        targets = batch.input_ids.masked_fill(~batch.completion_mask, -100)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 4) == 0:
            tell(f"supervised step {step} of {steps}: loss {loss.item():.2f}")
    model.eval()


def mean_weights(outcome: Outcome, objectives: Sequence[str]) -> list[float]:
    """Each objective's weight, averaged over the steps of an alignment.

    Args:
        outcome: of a model that was aligned.
        objectives: names, which decide the order.
    """
    steps = [record["weight"] for record in outcome.history if record["kind"] == "train"]
    return [sum(weight[name] for weight in steps) / len(steps) for name in objectives]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread within this context, so that results do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
