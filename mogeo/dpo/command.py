"""`mogeo align`: options, the order of the work, and what is shown. The training itself is in `train`.

Must not import torch at the top: `mogeo align --help` has to answer at once, and what is wrong has to be found before a
model is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mogeo.dpo.config import (
    AUTOCASTS,
    PROMPT_FORMATS,
    ROW_DTYPES,
    SCHEDULES,
    WEIGH_BY,
    AlignConfig,
    decay_or_auto,
    named_number,
    share_or_number,
)
from mogeo.dpo.data import COUNTS, PAIRINGS, Preferences, build_preferences, read_rows, split_rows
from mogeo.dpo.data_origin import DataOrigin
from mogeo.dpo.loss_names import LOSSES
from mogeo.errors import InputError
from mogeo.figures.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mogeo.dpo.processes import Processes
    from mogeo.dpo.train import AlignResult
    from mogeo.figures.records import StepRecord

logger = logging.getLogger("mogeo")

_DESCRIPTION = """\
Fine-tune a language model with DPO on completions that were rated by several objectives, so that no objective is left
behind: each gets its own preference pairs, and every step follows one direction that --weighting finds for all of them.
"""

_LOSSES = "\n".join(f"  {name:<20} {usage}" for name, (_, usage) in LOSSES.items())

_EPILOG = f"""\
data
  One row is {{"instruction": "...", "completions": [{{"response": "...",
              "annotations": {{"helpfulness": {{"Rating": "4"}}, "honesty": {{"Rating": "N/A"}}, ...}}}}, ...]}}
  as in openbmb/UltraFeedback. Objectives are the names found in "annotations". For each, completions with strictly
  different ratings become pairs; ties, ratings that are no number and empty responses are left out and counted.

weightings
  uniform              mean of the gradients, the cost of plain training     linear(0.3,0.7)   fixed weights
  mgda-decoupled       min-norm point of the gradients over their losses: objectives that lag behind count more
  mgda                 min-norm point: to first order, no objective gets worse    mgda-normalized   of unit gradients
  gapo(0.5)            of gradients over a power of their norm                    group-dro(0.01)   by losses alone
  upgrad               mean of the gradients, each first made to hurt no other objective
  cagrad(0.4)          mean of the gradients, turned by up to 0.4 of its length so that the least gain is largest
  raco(0.4)            the same, clipped by --preference

losses
{_LOSSES}

examples
  mogeo align --model Qwen/Qwen2.5-0.5B-Instruct --data openbmb/UltraFeedback --output runs/qwen
  mogeo align --model SmolLM2.gguf --data rated.jsonl --weighting uniform --lr 1e-5 --max-steps 200 --output runs/u
  mogeo align --model SmolLM2.gguf --data rated.jsonl --weighting uniform --lr 1e-5 --max-steps 200 --output runs/u \\
              --resume

several GPUs, or processes
  torchrun --nproc-per-node 2 -m mogeo align --model ...
  accelerate launch --num_processes 2 -m mogeo align --model ...
  Each rank takes its share of every step's pairs; the result is that of one process. The first rank prints and writes.

written to --output
  metrics.jsonl (a record a step)   model/ (transformers' format)   report.html and pictures
  run.json (the settings)   data.json (what was held out, for mogeo evaluate)   reference.pt (a cache)
  checkpoint.pt (only until the run is finished)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. Those that are settings of the run are stored under the names of `AlignConfig`'s fields."""
    default = AlignConfig()
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG

    need = parser.add_argument_group("what to train")
    need.add_argument("--model", required=True, metavar="M", help="hub name, folder, or .gguf file (dequantised)")
    need.add_argument("--data", required=True, metavar="D", help="hub name, or .jsonl, .json, .parquet file")
    need.add_argument("--output", required=True, metavar="O", type=Path, help="folder for everything that is written")
    need.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, bit for bit")

    method = parser.add_argument_group("objectives")
    method.add_argument("--weighting", default=default.weighting, metavar="W", help="see below (default: %(default)s)")
    method.add_argument(
        "--objectives", metavar="A,B", help="names and their order, comma-separated (default: all that the data rates)"
    )
    method.add_argument(
        "--pairing", choices=PAIRINGS, default="best-worst", help="pairs of a prompt: highest against lowest rating, "
        "all, or one at random (default: %(default)s)",
    )  # fmt: skip
    method.add_argument(
        "--held-out", type=share_or_number, default=0.1, metavar="H",
        help="prompts to measure on: a share (0.1) or a number (200); never trained on (default: %(default)s)",
    )  # fmt: skip

    method.add_argument(
        "--track", type=decay_or_auto, metavar="B",
        help="follow the gradients' averages over the last steps in place of one batch's, most of which is noise: the "
        "share of the past in them, such as 0.95, or auto. Weights, --guarantee-descent and what is reported then "
        "speak of the mean gradients (default: of each step's batch)",
    )  # fmt: skip
    method.add_argument(
        "--weigh-by", choices=WEIGH_BY, default=default.weigh_by,
        help="which gradients decide under --track. mean: the mean ones; mini-batch: those of each step's batch, as "
        "without --track, and only what is reported speaks of the mean ones (default: %(default)s)",
    )  # fmt: skip

    steering = parser.add_argument_group("steering (for adaptive weightings)")
    steering.add_argument(
        "--preference", type=named_number, nargs="+", metavar="NAME=P",
        help="which objectives should gain more, such as helpfulness=2 honesty=1: a positive number for each, of which "
        "the ratios count (default: all alike)",
    )  # fmt: skip
    steering.add_argument(
        "--min-weight", type=float, default=default.min_weight, metavar="M",
        help="floor under each weight, below 1/K for K objectives (default: none)",
    )  # fmt: skip
    steering.add_argument(
        "--smoothing", type=float, default=default.smoothing, metavar="S",
        help="share of the past in the weights, such as 0.9 (default: none)",
    )  # fmt: skip
    steering.add_argument(
        "--guarantee-descent", action="store_true", help="let no step hurt an objective, to first order"
    )

    large = parser.add_argument_group("large models (see mogeo plan)")
    large.add_argument(
        "--refresh-every", type=int, default=default.refresh_every, metavar="T",
        help="solve for the weights at every T-th step, and hold them in between (default: %(default)s)",
    )  # fmt: skip
    large.add_argument("--row-dtype", choices=ROW_DTYPES, help="keep gradient rows in it (default: as the weights)")
    large.add_argument("--host-rows", action="store_true", help="keep gradient rows in the host's memory")
    large.add_argument(
        "--sketch", type=int, metavar="D",
        help="keep D numbers per objective in place of a row, such as 262144; a step that solves then takes every "
        "forward and backward twice",
    )  # fmt: skip

    dpo = parser.add_argument_group("DPO")
    dpo.add_argument(
        "--beta", type=float, default=default.beta, help="pull towards the reference (default: %(default)s)"
    )
    dpo.add_argument("--loss", default=default.loss, metavar="L", help="see below (default: %(default)s)")

    train = parser.add_argument_group("optimizer (AdamW)")
    train.add_argument(
        "--lr", dest="learning_rate", type=float, default=default.learning_rate, metavar="R",
        help="peak learning rate (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help="(default: %(default)s)")
    train.add_argument(
        "--warmup-steps", type=int, default=default.warmup_steps, metavar="N", help="(default: %(default)s)"
    )
    train.add_argument(
        "--betas", type=float, nargs=2, default=default.betas, metavar=("B1", "B2"), help="(default: 0.9 0.999)"
    )
    train.add_argument("--weight-decay", type=float, default=default.weight_decay, help="(default: %(default)s)")
    train.add_argument(
        "--max-grad-norm", type=float, metavar="G", help="clip the shared direction (default: no clipping)"
    )
    train.add_argument(
        "--epochs", type=float, default=default.epochs,
        help="passes over the objective with the most pairs (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps, instead of --epochs")
    train.add_argument(
        "--pairs", dest="pairs_per_objective", type=int, default=default.pairs_per_objective, metavar="N",
        help="pairs of each objective in a step, over all ranks (default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="of these, pairs at once on a rank: lower it if memory runs out (default: all of the rank's)",
    )
    train.add_argument("--seed", type=int, default=0, help="of split, pairing, order and dropout (default: 0)")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--max-length", type=int, metavar="N",
        help="tokens of prompt and completion; longer pairs are left out and counted (default: the model's context)",
    )  # fmt: skip
    model.add_argument(
        "--prompt-format", choices=PROMPT_FORMATS, default=default.prompt_format,
        help="chat: the tokenizer's template; plain: the texts as they are (default: %(default)s)",
    )  # fmt: skip
    model.add_argument(
        "--autocast", choices=AUTOCASTS, default=default.autocast,
        help="precision of the forward pass; the weights are always fp32 (default: %(default)s)",
    )  # fmt: skip
    model.add_argument(
        "--device", default=default.device, help="cpu, cuda, cuda:1, ... (default: CUDA if there is one)"
    )
    model.add_argument(
        "--fsdp", action="store_true",
        help="of several ranks (see below), let each hold a shard of the model, by FSDP2, instead of all of it, by DDP",
    )  # fmt: skip

    habits = parser.add_argument_group("measuring and saving")
    habits.add_argument(
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between evaluations; 0: only before and after (default: a tenth)",
    )
    habits.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help="steps between checkpoints; 0: none but on Ctrl-C (default: a tenth)",
    )
    habits.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Carry out the command.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        InputError: something that the user can mend.
    """
    # Everything that can be wrong is found before the model is loaded, the cheapest first.
    config = _config(args)
    from mogeo.dpo.processes import join_processes, launched_processes
    from mogeo.dpo.train import check_settings

    check_settings(config, ranks=launched_processes().size)
    with join_processes(args.device) as ranks:
        return _run(args, config, ranks)


def _run(args: argparse.Namespace, config: AlignConfig, ranks: Processes) -> int:
    """The command in each of the processes that train together."""
    import torch
    import transformers

    from mogeo.dpo.models import check_model_source, load_model
    from mogeo.dpo.run_folder import check_output
    from mogeo.dpo.train import Interrupted, align, check_settings

    if not ranks.first:
        logger.setLevel(logging.ERROR)  # the first rank says the same
    ranks.on_first(lambda: check_output(args.output, args.resume))
    check_model_source(args.model)
    rows = read_rows(args.data)
    train, held_out = _preferences(rows, args)
    check_settings(config, train.objectives, ranks.size)
    if ranks.first:
        print(_data_table(train, held_out).text(), end="\n\n", flush=True)

    if args.quiet or not ranks.first:
        transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_model(args.model)
    try:
        result = align(
            model,
            tokenizer,
            train,
            held_out,
            config,
            output=args.output,
            resume=args.resume,
            progress=not args.quiet,
        )
    except torch.OutOfMemoryError as error:
        cure = "fewer pairs at once (--micro-batch), shorter ones (--max-length), or what mogeo plan recommends"
        raise InputError(f"{args.device}: out of memory; try {cure}") from error
    except Interrupted as stop:
        if ranks.first:
            print(f"mogeo: {stop}\nresume with: {_again(args, ranks)}", file=sys.stderr)
        return 130
    if not ranks.first:
        return 0
    train_rows, _ = split_rows(rows, args.held_out, args.seed)
    DataOrigin.of(args.data, args.held_out, args.seed, train.objectives, train_rows).write(args.output)
    tables = [held_out_table(result), *alignment_tables(result)]
    for table in tables:
        print("\n" + table.text())
    _write_report(args, result, [*tables, _data_table(train, held_out)])
    print(f"\nmodel, metrics and report are in {args.output}")
    return 0


def _again(args: argparse.Namespace, ranks: Processes) -> str:
    """The command line that goes on with this run where it was stopped."""
    launch = ["mogeo"] if ranks.size == 1 else ["torchrun", "--nproc-per-node", str(ranks.size), "-m", "mogeo"]
    return shlex.join([*launch, "align", *(a for a in args.argv[1:] if a != "--resume"), "--resume"])


def _config(args: argparse.Namespace) -> AlignConfig:
    """The settings of the run."""
    given = {item.name: getattr(args, item.name) for item in dataclasses.fields(AlignConfig)}
    return AlignConfig(**{**given, "betas": tuple(args.betas), "preference": _preference(args)})


def _preference(args: argparse.Namespace) -> dict[str, float] | None:
    """The values of `--preference` by objective; None if there are none."""
    if args.preference is None:
        return None
    given = dict(args.preference)
    for name in given:
        if sum(name == other for other, _ in args.preference) > 1:
            raise InputError(f"--preference names '{name}' more than once: give each objective one number")
    return given


def _preferences(rows: list[dict[str, object]], args: argparse.Namespace) -> tuple[Preferences, Preferences]:
    """Training and held-out preferences, with the same objectives in the same order."""
    names = None if args.objectives is None else [name.strip() for name in args.objectives.split(",")]
    train_rows, held_out_rows = split_rows(rows, args.held_out, args.seed)
    train = build_preferences(train_rows, names, args.pairing, args.seed)
    try:
        held_out = build_preferences(held_out_rows, train.objectives, args.pairing, args.seed)
    except InputError as error:
        raise InputError(f"held-out prompts: {error}; hold out more with --held-out") from None
    return train, held_out


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _data_table(train: Preferences, held_out: Preferences) -> Table:
    """How many pairs each objective has, and what was left out."""
    rows = [
        [f"{name} ({label})", *(str(preferences.counts[name][key]) for key in COUNTS)]
        for label, preferences in (("training", train), ("held-out", held_out))
        for name in preferences.objectives
    ]
    note = "; ".join(f"{key}: {meaning}" for key, meaning in COUNTS.items())
    return Table("Preferences", ["objective", *COUNTS], rows, note)


def held_out_table(result: AlignResult) -> Table:
    """Numbers on the held-out pairs before and after training: a row per objective, and the worst of each column."""
    before, after = result.before, result.after
    columns = [
        [
            (before.accuracy, "{:.3f}"),
            (after.accuracy, "{:.3f}"),
            (before.margin, "{:+.3f}"),
            (after.margin, "{:+.3f}"),
        ],
        [(before.likelihood_accuracy, "{:.3f}"), (after.likelihood_accuracy, "{:.3f}")],
    ]
    flat = [column for group in columns for column in group]
    rows = [
        [name, str(after.pairs[name]), *(form.format(values[name]) for values, form in flat)] for name in after.accuracy
    ]
    rows.append(["worst", "", *(form.format(min(values.values())) for values, form in flat)])
    header = ["objective", "pairs", "accuracy before", "after", "margin before", "after", "likelihood before", "after"]
    note = (
        "accuracy: share of pairs whose reward margin is positive (0.5 before training by definition); "
        "margin: mean reward margin, in nats times beta; likelihood: share of pairs whose chosen completion is likelier"
    )
    return Table("Held-out preferences, before and after", header, rows, note)


def alignment_tables(result: AlignResult) -> list[Table]:
    """How often the steps hurt each objective, and, where the run was tracked, how noisy its gradients are.

    One table; none for a run without alignments, whose weighting needed no objective's gradient by itself.
    """
    from mogeo.figures.records import column, mean, of_mean_gradients, of_training, share_hurt

    records = of_training(result.history, "alignment")
    if not records:
        return []
    tracked = of_mean_gradients(records)
    header, rows = ["objective", "mean alignment", "steps that hurt, %"], []
    if tracked:
        header += ["surely, %", "noise scale at the end", "mean evidence"]
    for name in result.after.accuracy:
        row = [name, _told(mean(column(records, "alignment", name)), "+.3f"), _told(100 * share_hurt(records, name))]
        if tracked:
            surely, evidence = share_hurt(records, name, errors=2), mean(column(records, "evidence", name))
            row += [_told(100 * surely), _noise_scale(records[-1:], name), f"{evidence:.2f}"]
        rows.append(row)
    note = _OF_MEAN_GRADIENTS if tracked else _OF_MINI_BATCHES
    return [Table("What the steps did to each objective", header, rows, note)]


_OF_MEAN_GRADIENTS = """\
alignment: cosine between a step's direction and the objective's mean gradient, as tracked; below zero, the step hurts
it, and surely so if by two standard errors. Steps whose mean gradient cannot be told from zero are left out. noise
scale: how many of a step's batches to average until the signal in the gradient equals the noise. evidence: how far the
mean gradient could be told from zero, 0 to 1."""

_OF_MINI_BATCHES = """\
alignment: cosine between a step's direction and the objective's gradient in the step's batch; below zero, the step
hurts it. The direction is made of the same gradients, and their noise flatters it: --track 0.95 --weigh-by mini-batch
tells what the same steps do on average."""


def _told(value: float, form: str = ".1f") -> str:
    return "unknown" if math.isnan(value) else f"{value:{form}}"


def _noise_scale(of_step: Sequence[StepRecord], name: str) -> str:
    """What a step's record says of an objective's noise scale: an estimate, or what it exceeds."""
    from mogeo.figures.records import column, lower_bounds

    (scale,), (least,) = column(of_step, "noise_scale", name), lower_bounds(of_step, name)
    if not math.isnan(scale):
        return f"{scale:.3g}"
    return f"over {least:.3g}" if least > 0 else "unknown"


def _write_report(args: argparse.Namespace, result: AlignResult, tables: list[Table]) -> None:
    """Write report.html and its charts. Without matplotlib, say that they are left out."""
    from mogeo.figures.html_report import write_report
    from mogeo.figures.panels import MissingMatplotlibError

    title = f"mogeo align: {Path(args.model).name}, {args.weighting}"
    notes = [*result.notes, f"Command: {shlex.join(['mogeo', *args.argv])}"]
    try:
        write_report(args.output, title, tuple(result.after.accuracy), {args.weighting: result.history}, tables, notes)
    except MissingMatplotlibError as error:
        logger.warning("no report.html: %s", error)
