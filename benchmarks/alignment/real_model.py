"""The comparison on a real model and human-rated pairs: one run per weighting and seed, measured on held-out pairs.

Each run is what `mogeo align` does, called as a function.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from alignment.cells import Cell, Result
from alignment.explain import explain
from alignment.generated_world import Method
from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import build_preferences, read_rows, split_rows
from mogeo.dpo.models import load_model
from mogeo.dpo.train import align

WEIGHTINGS = ("uniform", "group-dro", "mgda-normalized", "mgda-decoupled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python benchmarks/alignment real`."""
    parser.add_argument("--model", required=True, help="what `mogeo align --model` takes")
    parser.add_argument("--data", type=Path, required=True, help="rated rows")
    parser.add_argument("--method", action="append", help=f"as in `tracked`; repeat (default: {', '.join(WEIGHTINGS)})")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=4, help="of each objective in a step")
    parser.add_argument("--held-out", type=int, default=120, help="prompts")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--autocast", default=AlignConfig.autocast, help="as in `mogeo align` (default: %(default)s)")


def cells(options: argparse.Namespace) -> list[Cell]:
    """All cells, seed by seed, so that the runs of a seed are complete before those of the next begin."""
    fixed = {"steps": options.steps, "pairs": options.pairs, "held_out": options.held_out, "lr": options.lr}
    if options.autocast != AlignConfig.autocast:  # older cells have no such key, and go on counting
        fixed["autocast"] = options.autocast
    return [
        {"data": options.data.stem, "method": method, "seed": seed, **fixed}
        for seed in range(options.seeds)
        for method in options.method or WEIGHTINGS
    ]


def compute(cell: Cell, model: str, data: Path, scratch: Path) -> Result:
    """Align and measure.

    Args:
        cell: which run.
        model: what `mogeo align --model` takes.
        data: rated rows.
        scratch: folder for the reference's scores, which are the same for all methods of a seed.
    """
    train_rows, held_out_rows = split_rows(read_rows(data), int(cell["held_out"]), cell["seed"])
    train = build_preferences(train_rows, seed=cell["seed"])
    held_out = build_preferences(held_out_rows, train.objectives, seed=cell["seed"])
    config = AlignConfig(
        **Method.parse(cell["method"]).options(),
        learning_rate=cell["lr"],
        max_steps=cell["steps"],
        warmup_steps=min(10, cell["steps"] // 5),
        pairs_per_objective=cell["pairs"],
        seed=cell["seed"],
        eval_every=0,
        save_every=0,
        autocast=cell.get("autocast", AlignConfig.autocast),
    )
    scratch.mkdir(parents=True, exist_ok=True)
    shared = scratch / f"reference seed {cell['seed']}.pt"
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        run = Path(folder)
        if shared.exists():
            shutil.copy(shared, run / "reference.pt")  # `align` ignores it if it was made from something else
        loaded = load_model(model)
        result = align(loaded.model, loaded.tokenizer, train, held_out, config, output=run, progress=False)
        if not shared.exists():
            shutil.copy(run / "reference.pt", shared)
    return {
        "objectives": list(train.objectives),
        "before": result.before.to_dict(),
        "after": result.after.to_dict(),
        "explained": explain(result.history, train.objectives),
        "step_seconds": [round(r["seconds"], 2) for r in result.history if r["kind"] == "train"],
        "notes": result.notes,
    }


def bound(model: str, data: Path, scratch: Path) -> Any:
    """`compute` with the arguments that are the same for all cells."""
    return partial(compute, model=model, data=data, scratch=scratch)
