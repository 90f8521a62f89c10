"""The paper's comparison of methods, on what a CPU can do: a generated world with verifiable answers, and a real model.

world      9 methods and a static twin in two regimes of the demo's world: learning rates chosen per method on other
           seeds by one rule, then net win rates against golden responses, greedy and sampled, over the seeds 0 ... N-1.
study      on that world, what would make adaptive weights pay: variants of MGDA-Decoupled, each beside its static twin.
real       `mogeo align` with four weightings on a real model and human-rated pairs: held-out accuracy and margin.
tracked    methods with tracked gradients and without, static twins of the former, on fresh seeds of the world.
map        when it pays: that world with a dial on how far objectives agree, crossed with what is wrong with one.
estimators how far the weights of a mini-batch are from those of all pairs, and what brings them nearer.
realised   how often the step that AdamW really takes hurts an objective, and what the reports said of it.
report     tables and pictures of all that has been run, into the output folder.
cdpo       the data of CDPO, another paper's method, made from rated rows.

Every run is a cell, a file under --output: an interrupted command goes on where it was, a new seed adds to the others.
"Mean ± x" is a 95 % interval by Student's t over the seeds; differences are paired by seed.

Run: python benchmarks/alignment world [--seeds 5]
     python benchmarks/alignment study [--seeds 5]
     python benchmarks/alignment real --model M --data rated.jsonl [--seeds 3]
     python benchmarks/alignment tracked [--seeds 5] [--first-seed 20] [--regime noisehelp] [--method M]
     python benchmarks/alignment map [--seeds 3] [--first-seed 20] [--dial D] [--imbalance I]
     python benchmarks/alignment estimators [--seeds 3] [--first-seed 20] [--decay 0.95] [--json PATH]
     python benchmarks/alignment realised [--seeds 3] [--first-seed 20]
     python benchmarks/alignment report
     python benchmarks/alignment cdpo --data D --objectives A,B --output cdpo
Options of all of them stand before the name: python benchmarks/alignment --output runs/alignment --workers 2 world
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# Python has put this folder on its path; what lies beside it is needed as well, and this folder as a package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from alignment import cdpo, compare, dial, estimators, noise_report, real_model, realised, report  # noqa: E402
from alignment.cells import run_cells  # noqa: E402

MEASUREMENTS: dict[str, Any] = {"map": dial, "estimators": estimators, "realised": realised}
TABLES: dict[str, Any] = {
    "map": noise_report.of_map,
    "estimators": noise_report.of_estimators,
    "realised": noise_report.of_realised_steps,
}


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
    tracked = commands.add_parser("tracked")
    tracked.add_argument("--seeds", type=int, default=5, metavar="N")
    tracked.add_argument("--first-seed", type=int, default=20, metavar="S", help="S ... S+N-1 (default: %(default)s)")
    tracked.add_argument("--regime", action="append", choices=compare.REGIMES, help="repeat (default: all)")
    tracked.add_argument("--method", action="append", metavar="M", help="repeat (default: those of the table)")
    tracked.add_argument("--lr", type=float, help="one learning rate for all (default: chosen for each method)")
    for name, measurement in MEASUREMENTS.items():
        measurement.add_arguments(commands.add_parser(name))
    real_model.add_arguments(commands.add_parser("real"))
    commands.add_parser("report")
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
    elif options.command == "tracked":
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        setting.tracked(list(seeds), options.regime or compare.REGIMES, options.method, options.lr)
    elif options.command in MEASUREMENTS:
        setting.starts(list(range(options.first_seed, options.first_seed + options.seeds)), controlled=())
        found = MEASUREMENTS[options.command].run(options, options.output / options.command, setting.scratch)
        print("\n\n".join(TABLES[options.command](found)))
    else:
        cdpo.run(options)


if __name__ == "__main__":
    main()
