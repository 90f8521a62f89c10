"""The paper's comparison of weightings, method by method, seed by seed; each run a file, so that it can be resumed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import alignment_real
from alignment_cells import run_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--workers", type=int, default=2)
    commands = parser.add_subparsers(dest="command", required=True)
    real = commands.add_parser("real")
    real.add_argument("--model", required=True)
    real.add_argument("--data", type=Path, required=True)
    real.add_argument("--weighting", action="append")
    real.add_argument("--seeds", type=int, default=3)
    real.add_argument("--steps", type=int, default=80)
    real.add_argument("--pairs", type=int, default=4)
    real.add_argument("--held-out", type=int, default=120)
    real.add_argument("--lr", type=float, default=1e-5)
    options = parser.parse_args()
    weightings = options.weighting or ["uniform", "group-dro", "mgda-normalized", "mgda-decoupled"]
    name = options.data.stem
    cells = alignment_real.cells(
        name, weightings, options.seeds, options.steps, options.pairs, options.held_out, options.lr
    )
    folder = options.output / "real" / name
    run_cells(cells, alignment_real.bound(options.model, options.data, folder / "scratch"), folder, options.workers)


if __name__ == "__main__":
    sys.exit(main())
