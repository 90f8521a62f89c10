"""The command `mogeo`: which subcommands there are, and how an error is shown. What each one does is in its package.

Must not import torch: the module of a subcommand is imported only if that subcommand was typed, so that `mogeo --help`
answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from mogeo import __version__
from mogeo.errors import InputError

COMMANDS = {
    "plan": ("mogeo.plan.command", "memory and cost of a fine-tune with K objectives, before a model is loaded"),
    "align": ("mogeo.dpo.command", "fine-tune a model with one preference set per objective (DPO)"),
    "evaluate": ("mogeo.judging.command", "judge a model's answers against golden responses: net win rates"),
    "demo": ("mogeo.demo.command", "see it work: four conflicting objectives, a tiny model, minutes on a CPU"),
}
"""Subcommand -> its module and a line for `mogeo --help`.

The module has `add_arguments(parser)`, which declares options, and `run(args) -> int`, which returns the exit code.
Both may raise InputError. `args.argv` holds what was typed after `mogeo`, and so does `parser.get_default("argv")`.
"""

_PACKAGES = ("transformers", "datasets", "gguf", "tqdm")
"""What every subcommand needs: the extra `dpo`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: what was typed after `mogeo`; None: this process's own arguments.

    Returns:
        The exit code: 0 if all went well, 2 for an error that the user can mend, 130 after Ctrl-C.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    # Our own logger only: other libraries print their messages in their own way.
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter("mogeo: %(message)s"))
    logging.getLogger("mogeo").addHandler(notes)
    try:
        args = _parser(typed).parse_args(typed)
        return int(_module(args.command).run(args))
    except InputError as error:
        # A launcher such as torchrun starts several processes, and each may have an error of its own.
        rank = os.environ.get("RANK", "0")
        print(f"mogeo: error: {error}" if rank == "0" else f"mogeo: rank {rank}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mogeo: interrupted", file=sys.stderr)
        return 130
    finally:
        logging.getLogger("mogeo").removeHandler(notes)


def _parser(typed: list[str]) -> argparse.ArgumentParser:
    """A parser that knows the options of the subcommand that was typed, and the names of the others."""
    parser = argparse.ArgumentParser(
        prog="mogeo",
        description="Balance several objectives while fine-tuning a language model.",
        epilog="`mogeo COMMAND --help` lists a command's options, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"mogeo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        subparser.set_defaults(argv=typed)
        if typed[:1] == [name]:
            _module(name).add_arguments(subparser)
    return parser


def _module(command: str) -> Any:
    """Import the module of a subcommand.

    Raises:
        InputError: a package that it needs is not installed.
    """
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} not installed; run: pip install 'mogeo[dpo]'")
    return importlib.import_module(COMMANDS[command][0])
