"""An experiment as cells: each is one run, whose result is a file. Knows nothing of what a cell computes.

A cell whose file is there is not run again; the missing ones are run in several processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe

Cell = dict[str, Any]
"""What identifies a run: names and their values, which are strings and numbers. It decides the result."""

Result = dict[str, Any]


def path_of(folder: Path, cell: Cell) -> Path:
    """The file of a cell's result."""
    name = " ".join(f"{key}={value}" for key, value in cell.items())
    return folder / ("".join(c if c.isalnum() or c in "=.,()- " else "_" for c in name).replace(" ", "__") + ".json")


def run_cells(cells: Sequence[Cell], compute: Callable[[Cell], Result], folder: Path, workers: int) -> list[Result]:
    """The results of all cells, in order: read where they are on disk, else computed, and written one by one.

    Args:
        compute: a function at the top level of a module. Runs with one thread, in a process of its own if there are
            several workers.
        folder: one file a cell, holding {"cell", "machine", "seconds", "cpu_seconds", **result}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not path_of(folder, cell).exists()]
    print(f"{folder}: {len(cells) - len(missing)} of {len(cells)} cells are there", file=sys.stderr, flush=True)
    started = time.time()
    for number, cell in enumerate(_all_run(missing, compute, folder, workers), start=1):
        told = ", ".join(map(str, cell.values()))
        print(f"{time.time() - started:6.0f} s  {number}/{len(missing)}  {told}", file=sys.stderr, flush=True)
    return [json.loads(path_of(folder, cell).read_text("utf-8")) for cell in cells]


def _all_run(cells: Sequence[Cell], compute: Callable[[Cell], Result], folder: Path, workers: int) -> Iterator[Cell]:
    """Run the cells, and yield each once its result is on disk."""
    if workers == 1 or len(cells) < 2:
        _prepare()
        for cell in cells:
            _run(cell, compute, folder)
            yield cell
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare) as pool:
        waiting = {pool.submit(_run, cell, compute, folder): cell for cell in cells}
        for done in as_completed(waiting):
            done.result()
            yield waiting[done]


def _prepare() -> None:
    """Give this process one thread: results then do not depend on the number of cores."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def _run(cell: Cell, compute: Callable[[Cell], Result], folder: Path) -> None:
    clock, processor = time.time(), time.process_time()
    result = compute(cell)
    cost = {"seconds": round(time.time() - clock, 1), "cpu_seconds": round(time.process_time() - processor, 1)}
    written = {"cell": cell, "machine": describe("transformers"), **cost, **result}
    path = path_of(folder, cell)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # a run cut short leaves no half cell
    partial.write_text(json.dumps(written) + "\n", "utf-8")
    partial.replace(path)
