"""A cell of setting 2: a real model, human-rated pairs, one weighting, one seed; measured on held-out pairs.

What `mogeo align` does, called as a function.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from alignment_cells import Cell, Result
from alignment_explain import Measured, explain

from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import build_preferences, read_rows, split_rows
from mogeo.dpo.models import load_model
from mogeo.dpo.train import align


def cells(
    data: str, weightings: list[str], seeds: int, steps: int, pairs: int, held_out: int, rate: float
) -> list[Cell]:
    """All cells, the seeds outermost, so that a table is complete for as many seeds as there was time for."""
    fixed = {"steps": steps, "pairs": pairs, "held_out": held_out, "lr": rate}
    return [{"data": data, "method": w, "seed": seed, **fixed} for seed in range(seeds) for w in weightings]


def compute(cell: Cell, model: str, data: Path, scratch: Path) -> Result:
    """Align and measure.

    Args:
        model: what `mogeo align --model` takes.
        data: rated rows.
        scratch: where the reference's scores are kept, which all methods of a seed share.
    """
    train_rows, held_out_rows = split_rows(read_rows(data), int(cell["held_out"]), cell["seed"])
    train = build_preferences(train_rows, seed=cell["seed"])
    held_out = build_preferences(held_out_rows, train.objectives, seed=cell["seed"])
    config = AlignConfig(
        weighting=Measured(cell["method"]),
        learning_rate=cell["lr"],
        max_steps=cell["steps"],
        warmup_steps=min(10, cell["steps"] // 5),
        pairs_per_objective=cell["pairs"],
        seed=cell["seed"],
        eval_every=0,
        save_every=0,
    )
    scratch.mkdir(parents=True, exist_ok=True)
    shared = scratch / f"reference seed {cell['seed']}.pt"
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        run = Path(folder)
        if shared.exists():
            shutil.copy(shared, run / "reference.pt")  # `align` uses it only if it belongs to what is scored
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
    """`compute` with what is the same for all cells."""
    return partial(compute, model=model, data=data, scratch=scratch)
