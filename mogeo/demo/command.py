"""`mogeo demo`: options, checks, and one process per seed.

What is done with each seed is in `experiment`, and what is made of the outcomes in `report`. Must not import torch at
the top: `mogeo demo --help` has to answer at once.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from mogeo.demo.recipe import BASELINE, GUARDED, METHODS, PAPER, REPORTED, TRACKED, Recipe
from mogeo.errors import InputError

DEFAULT_SEEDS = 2

_DESCRIPTION = """\
See four conflicting objectives balanced on a small world that generates itself: nothing to download, minutes on a CPU.

A tiny model learns to answer questions about 24 towns from answers of mixed quality, rated for helpfulness, honesty,
truthfulness and instruction following. Guessing pays for helpfulness and costs the other three. The model is then
aligned with DPO, one preference set per objective, under each weighting, and its answers are judged against the best of
the rated answers ("golden"). At the end: one table, one sentence, a picture and a report.
"""

_EPILOG = f"""\
methods
  {BASELINE}                  the mean of the four gradients: what is usually done
  {PAPER}           the paper's weights, from the geometry of each step's mini-batch, most of which is noise
  {TRACKED}  its weights from the geometry of mean gradients, tracked over the steps
  {GUARDED}     equal weights, turned aside where the mean gradients say that somebody would be hurt

examples
  mogeo demo --seeds 8                                  tighter numbers
  mogeo demo --weighting mgda --weighting 'gapo(0.5)'   more methods in the same table
  mogeo demo --regime base                              clean labels (default: a quarter of helpfulness' are flipped)
"""


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
    rate = Recipe().align.learning_rate
    parser.add_argument(
        "--lr", type=float, default=rate, help="learning rate of the alignment, for every method (default: %(default)s)"
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
    """Carry out the command.

    Returns:
        The exit code, 0.

    Raises:
        InputError: something that the user can mend.
    """
    recipe = Recipe()
    config = replace(recipe.align, learning_rate=args.lr, device=args.device)
    return run_recipe(replace(recipe, align=config), args)


def run_recipe(recipe: Recipe, args: argparse.Namespace) -> int:
    """Carry out the command with other sizes.

    Args:
        recipe: the sizes, and the settings of the alignment.
        args: the options of the command line.

    Returns:
        The exit code, 0.

    Raises:
        InputError: something that the user can mend.
    """
    from mogeo.demo.experiment import run_seed
    from mogeo.demo.report import terminal, write
    from mogeo.demo.world import OBJECTIVES
    from mogeo.dpo.processes import resolve_device
    from mogeo.dpo.train import check_settings

    # Everything that can be wrong is found before any work is done.
    if args.seeds < 1:
        raise InputError(f"--seeds has to be at least 1, got {args.seeds}")
    for settings in (*METHODS.values(), *({"weighting": weighting, **REPORTED} for weighting in args.weighting)):
        check_settings(replace(recipe.align, **settings), OBJECTIVES)
    on_cpu = resolve_device(recipe.align.device) == "cpu"
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output '{args.output}' cannot be made a folder ({error.strerror})") from None

    started = time.time()
    job = functools.partial(
        run_seed, recipe=recipe, regime=args.regime, extra=args.weighting, started=None if args.quiet else started
    )
    workers = min(args.seeds, _cores()) if on_cpu else 1
    if workers == 1:
        results = [job(seed) for seed in range(args.seeds)]
    else:
        # One process per seed, with one thread: matrices are too small for a second thread to help.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(job, range(args.seeds)))
    seconds = time.time() - started
    print("\n" + terminal(results))
    command = shlex.join(["mogeo", *getattr(args, "argv", ["demo"])])
    written = write(args.output, results, command, seconds)
    print(f"\n{seconds:.0f} s; written: {', '.join(map(str, written))}")
    return 0


def _cores() -> int:
    """Number of cores that this process may use. In a container, the machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
