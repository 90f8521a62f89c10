"""The paper's comparison of methods, on what a CPU can do: a generated world with verifiable answers, and a real model.

world      9 methods and a static twin in two regimes of the demo's world: learning rates chosen per method on other
           seeds by one rule, then net win rates against golden responses, greedy and sampled, over the seeds 0 ... N-1.
study      on that world, what would make adaptive weights pay: variants of MGDA-Decoupled, each beside its static twin.
real       `mogeo align` with four weightings on a real model and human-rated pairs: held-out accuracy and margin.
report     tables and pictures of all that has been run, into the output folder.
smoothing  how far the weights of a mini-batch are from those of all pairs, and whether averaging brings them nearer.
cdpo       the data of CDPO, another paper's method, made from rated rows.

Every run is a cell, a file under --output: an interrupted command goes on where it was, a new seed adds to the others.
"Mean ± x" is a 95 % interval by Student's t over the seeds; differences are paired by seed.

Run: python benchmarks/alignment world [--seeds 5]
     python benchmarks/alignment study [--seeds 5]
     python benchmarks/alignment real --model M --data rated.jsonl [--seeds 3]
     python benchmarks/alignment report
     python benchmarks/alignment smoothing [--seeds 3] [--decay 0.9] [--json PATH]
     python benchmarks/alignment cdpo --data D --objectives A,B --output cdpo
Options of all of them stand before the name: python benchmarks/alignment --output runs/alignment --workers 2 world
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Python has put this folder on its path; what lies beside it is needed as well, and this folder as a package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from alignment import cdpo, compare, real_model, report, smoothing  # noqa: E402
from alignment.cells import run_cells  # noqa: E402


def main() -> None:
    """Parse the command line, and run what it asks for."""
    parser = argparse.ArgumentParser(
        prog="alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"), help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="sizes too small to mean anything: does it run?")
    commands = parser.add_subparsers(dest="command", required=True)
    world = commands.add_parser("world")
    world.add_argument("--seeds", type=int, default=5, metavar="N")
    study = commands.add_parser("study")
    study.add_argument("--seeds", type=int, default=5, metavar="N")
    study.add_argument("--first-seed", type=int, default=0, metavar="S", help="S ... S+N-1: fresh ones for a winner")
    study.add_argument("--variant", action="append", choices=compare.VARIANTS, help="repeat (default: all)")
    real_model.add_arguments(commands.add_parser("real"))
    commands.add_parser("report")
    smoothing.add_arguments(commands.add_parser("smoothing"))
    cdpo.add_arguments(commands.add_parser("cdpo"))
    options = parser.parse_args()

    sizes = compare.Sizes.tiny() if options.quick else compare.Sizes()
    setting = compare.World(options.output / "world", options.workers, sizes)
    if options.command == "world":
        setting.test(list(range(options.seeds)))
    elif options.command == "study":
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        setting.study(list(seeds), options.variant)
    elif options.command == "real":
        folder = options.output / "real" / options.data.stem
        compute = real_model.bound(options.model, options.data, folder / "scratch")
        run_cells(real_model.cells(options), compute, folder, options.workers)
    elif options.command == "report":
        report.report(options.output)
    elif options.command == "smoothing":
        smoothing.run(options)
    else:
        cdpo.run(options)


if __name__ == "__main__":
    main()
