"""`mogeo demo`: four objectives that conflict, balanced in three ways, on a small world that generates itself.

For every seed: a world, a tiny model trained on its mixed completions, and from there, for each weighting, one run of
`mogeo.dpo.train.align`, the path of `mogeo align`; then the answers are judged. What is made of the outcomes is the
business of `demo_report`. Must not import torch at the top, so that `mogeo demo --help` answers at once.
"""

from __future__ import annotations

import argparse
import copy
import functools
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Row, build_preferences, split_rows

if TYPE_CHECKING:
    from mogeo.dpo.judge import NetWinRates
    from mogeo.dpo.world import World

BEFORE = "before alignment"
BASELINE = "uniform"
ADAPTIVE = "mgda-decoupled"
STATIC = "static"  # fixed at the means of ADAPTIVE's weights: shows what adapting them at every step adds
DEFAULT_SEEDS = 2
_MAX_NEW_TOKENS = 26  # the longest answer to three attributes, hedged throughout, takes 17

_DESCRIPTION = """\
See four conflicting objectives balanced on a small world that generates itself: nothing to download, minutes on a CPU.

A tiny model learns to answer questions about 24 towns from answers of mixed quality, rated for helpfulness, honesty,
truthfulness and instruction following. Guessing pays for helpfulness and costs the other three. The model is then
aligned with DPO, one preference set per objective, under each weighting, and its answers are judged against the best of
the rated answers ("golden"). At the end: one table, one sentence, a picture and a report.
"""

_EPILOG = f"""\
methods
  {BASELINE}          the mean of the four gradients: what is usually done
  {ADAPTIVE}   weights from the geometry of the gradients, found anew at every step
  {STATIC}           the means of {ADAPTIVE}'s weights, held fixed: what does adapting them add?

examples
  mogeo demo --seeds 5                                    tighter numbers
  mogeo demo --weighting mgda --weighting 'group-dro(0.01)'   more methods in the same table
  mogeo demo --regime base                                clean labels (default: a quarter of helpfulness' are flipped)
"""


@dataclass(frozen=True)
class Recipe:
    """The sizes of the demo. Every method gets the same settings, and the same pairs in the same order."""

    train_prompts: int = 1200
    held_out_prompts: int = 500
    samples_per_prompt: int = 2
    sft_steps: int = 500
    sft_batch: int = 64
    sft_learning_rate: float = 5e-3
    pairing: str = "all"
    align: AlignConfig = field(
        default_factory=lambda: AlignConfig(
            beta=0.2,
            learning_rate=1e-4,
            betas=(0.9, 0.95),
            schedule="constant",
            max_steps=100,
            pairs_per_objective=32,
            eval_every=25,
            autocast="none",  # bf16 would be slower for matrices of this size
            prompt_format="plain",
        )
    )


@dataclass(frozen=True)
class Outcome:
    """One model, judged."""

    label: str
    weighting: str | None  # what `align` was given; None before alignment
    greedy: NetWinRates
    sampled: NetWinRates
    accuracy: dict[str, float]  # of held-out preferences
    history: list[dict[str, Any]]
    answers: list[str]  # greedy, one a held-out prompt


@dataclass(frozen=True)
class SeedResult:
    """What one seed gave: the held-out prompts, their golden responses, and an outcome a model, BEFORE first."""

    seed: int
    regime: str
    world: World
    prompts: list[str]
    golden: list[str]
    outcomes: list[Outcome]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "--seeds", type=int, default=DEFAULT_SEEDS, metavar="N",
        help="repeat everything with N seeds, 0 to N-1: mean and spread (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--weighting", action="append", default=[], metavar="W",
        help="one more weighting to compare, as in `mogeo align`; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--regime", choices=("noisehelp", "base"), default="noisehelp",
        help="noisehelp: a quarter of helpfulness' training labels are flipped; base: none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--learning-rate", type=float, metavar="LR", help="of the alignment, for every method (default: 1e-4)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: CUDA if there is one)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/demo"),
        metavar="O",
        help="folder for what is written (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Carry out the command; raises InputError for what the user can mend."""
    recipe = Recipe()
    changes = {} if args.learning_rate is None else {"learning_rate": args.learning_rate}
    return run_recipe(replace(recipe, align=replace(recipe.align, device=args.device, **changes)), args)


def run_recipe(recipe: Recipe, args: argparse.Namespace) -> int:
    """`run` with sizes of one's own."""
    from mogeo.dpo import demo_report
    from mogeo.dpo.errors import InputError
    from mogeo.dpo.train import _device as resolve_device
    from mogeo.dpo.train import check_weighting
    from mogeo.dpo.world import OBJECTIVES

    # Whatever can be wrong is found before the first minute is spent.
    if args.seeds < 1:
        raise InputError(f"--seeds has to be at least 1, got {args.seeds}")
    for weighting in (BASELINE, *args.weighting):
        config = replace(recipe.align, weighting=weighting)
        config.check()
        check_weighting(config, len(OBJECTIVES))
    on_cpu = resolve_device(recipe.align.device) == "cpu"

    started = time.time()
    job = functools.partial(
        run_seed, recipe=recipe, regime=args.regime, extra=args.weighting, started=None if args.quiet else started
    )
    workers = min(args.seeds, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers == 1 or not on_cpu:
        results = [job(seed) for seed in range(args.seeds)]
    else:
        # A process a seed: matrices this small leave a second thread little to do, and a second process everything.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(job, range(args.seeds)))
    seconds = time.time() - started
    print("\n" + demo_report.terminal(results))
    command = shlex.join(["mogeo", *getattr(args, "argv", ["demo"])])
    written = demo_report.write(args.output, results, command, seconds)
    print(f"\n{seconds:.0f} s; written: {', '.join(map(str, written))}")
    return 0


# ---- one seed --------------------------------------------------------------------------------------------------------


def run_seed(
    seed: int, recipe: Recipe, regime: str, extra: Sequence[str] = (), started: float | None = None
) -> SeedResult:
    """Generate the world of a seed, train the tiny model, align it once for each weighting, and judge every model.

    Args:
        regime: a key of `mogeo.dpo.world.REGIMES`; it touches the training labels only.
        extra: weightings besides the three of the demo.
        started: `time.time()` from which progress is told, on stderr; None: it is not told.
    """
    from mogeo.dpo import world as small_world
    from mogeo.dpo.judge import golden_response
    from mogeo.dpo.train import align

    objectives = small_world.OBJECTIVES
    weightings = {BASELINE: BASELINE, ADAPTIVE: ADAPTIVE, STATIC: "", **{w: w for w in extra}}

    def tell(text: str) -> None:
        if started is not None:
            print(f"{time.time() - started:5.0f} s  seed {seed}  {text}", file=sys.stderr, flush=True)

    with _one_thread():
        world = small_world.World(seed)
        rows = world.rows(recipe.train_prompts + recipe.held_out_prompts)
        train_rows, held_out_rows = split_rows(rows, recipe.held_out_prompts, seed)
        clean = build_preferences(train_rows, objectives, recipe.pairing, seed)
        train = small_world.flip_labels(clean, small_world.REGIMES[regime], seed)
        held_out = build_preferences(held_out_rows, objectives, recipe.pairing, seed)
        prompts = [row["instruction"] for row in held_out_rows]
        result = SeedResult(
            seed, regime, world, prompts, [golden_response(row, objectives) for row in held_out_rows], []
        )

        tokenizer = small_world.tokenizer()
        model = small_world.tiny_model(tokenizer, seed)
        parameters = sum(p.numel() for p in model.parameters())
        tell(f"a model of {parameters:,} parameters learns from {4 * len(train_rows):,} answers, good and bad ...")
        fine_tune(model, tokenizer, train_rows, recipe, seed, tell)
        chance = dict.fromkeys(objectives, 0.5)  # the reference has no margin, and `evaluate` counts that one half
        result.outcomes.append(_judge(result, recipe, BEFORE, None, model, tokenizer, chance, []))
        tell(f"{BEFORE}: {_net(result.outcomes[-1])}")

        for label, weighting in weightings.items():
            if label == STATIC:
                adaptive = next(outcome for outcome in result.outcomes if outcome.label == ADAPTIVE)
                weighting = f"linear({','.join(f'{w:.4f}' for w in mean_weights(adaptive, objectives))})"
            config = replace(recipe.align, weighting=weighting, seed=seed)
            done = align(copy.deepcopy(model), tokenizer, train, held_out, config, progress=False)
            accuracy = done.after.accuracy
            result.outcomes.append(
                _judge(result, recipe, label, weighting, done.model, tokenizer, accuracy, done.history)
            )
            tell(f"{label}: {_net(result.outcomes[-1])}")
    return result


def _net(outcome: Outcome) -> str:
    return f"greedy net win rate {100 * outcome.greedy.overall:+.1f} %, worst {100 * outcome.greedy.worst:+.1f} %"


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread a process: the numbers do not depend on the number of cores, and processes do not wait for cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fine_tune(
    model: Any, tokenizer: Any, rows: Sequence[Row], recipe: Recipe, seed: int, tell: Callable[[str], None]
) -> None:
    """Supervised training, in place, on every completion alike, good or bad: next-token loss of the completions.

    `tell` is called with the progress, four times.
    """
    import torch
    from torch.nn import functional as F

    from mogeo.dpo.batches import TokenSequence, collate, encode_completion, encode_prompt
    from mogeo.dpo.train import _device as resolve_device

    device = resolve_device(recipe.align.device)
    model.to(device).train()
    sequences = []
    for row in rows:
        prompt = encode_prompt(tokenizer, row["instruction"], "plain")
        for completion in row["completions"]:
            answer = encode_completion(tokenizer, row["instruction"], completion["response"], "plain")
            sequences.append(TokenSequence((*prompt, *answer), len(prompt)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.sft_learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup, steps = 50, recipe.sft_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * max(0.05, 1 - step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        drawn = torch.randint(len(sequences), (recipe.sft_batch,), generator=generator).tolist()
        batch = collate([sequences[i] for i in drawn], tokenizer.pad_token_id).to(torch.device(device))
        # No attention mask: padding is on the right, where causal attention does not look, and without one is faster.
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


def _judge(
    result: SeedResult,
    recipe: Recipe,
    label: str,
    weighting: str | None,
    model: Any,
    tokenizer: Any,
    accuracy: dict[str, float],
    history: list[dict[str, Any]],
) -> Outcome:
    """Let the model answer the held-out prompts, greedily and sampled, and judge it against the golden responses."""
    from mogeo.dpo.judge import RatingJudge, generate, net_win_rates
    from mogeo.dpo.world import OBJECTIVES

    judge = RatingJudge(result.world.rate, OBJECTIVES)

    def answers(prompts: list[str], temperature: float) -> list[str]:
        return generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=_MAX_NEW_TOKENS,
            temperature=temperature,
            seed=result.seed,
            prompt_format="plain",
        )

    greedy = answers(result.prompts, 0.0)
    again = result.prompts * recipe.samples_per_prompt
    sampled = net_win_rates(judge, again, answers(again, 1.0), result.golden * recipe.samples_per_prompt)
    rates = net_win_rates(judge, result.prompts, greedy, result.golden)
    return Outcome(label, weighting, rates, sampled, accuracy, history, greedy)


def mean_weights(outcome: Outcome, objectives: Sequence[str]) -> list[float]:
    """The mean over the steps of each objective's weight."""
    steps = [record["weight"] for record in outcome.history if record["kind"] == "train"]
    return [sum(weight[name] for weight in steps) / len(steps) for name in objectives]
