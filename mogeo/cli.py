"""The command `mogeo`: which subcommands there are. What each of them does is written beside what it uses.

Must not import torch: a subcommand's module is imported once it is asked for, so that `mogeo --help` answers at once.
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

_DESCRIPTION = """\
Balance several objectives while fine-tuning a language model.

  mogeo demo                          four conflicting objectives, a tiny model, a few minutes on a CPU
  mogeo plan --model M --objectives K
                                      memory, cost of a step and which mode to take, before anything is loaded
  mogeo align --model M --data D --output O
                                      DPO on your own model and rated data
  mogeo evaluate --model O --judge J --output E
                                      its answers against golden ones: net win rates, judged
"""

_COMMANDS = {
    "plan": ("mogeo.plan.command", "what a fine-tune with K objectives takes: memory by mode, cost of a step"),
    "align": ("mogeo.dpo.command", "fine-tune a model with one preference set per objective (DPO)"),
    "evaluate": ("mogeo.judging.command", "judge what models say against golden responses: net win rates"),
    "demo": ("mogeo.demo.command", "see it work: a small self-made world with four conflicting objectives"),
}
_PACKAGES = {"dpo": ("transformers", "datasets", "gguf", "tqdm")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); the exit code: 0 done, 2 user's error, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mogeo", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mogeo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in _COMMANDS.items():
        subparser = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in arguments[:1]:  # only the command asked for has to be known in full
            try:
                _module(module).add_arguments(subparser)
            except InputError as error:
                return _refuse(error)
    options = parser.parse_args(arguments)
    options.argv = arguments  # what was typed, for messages and reports
    # Our own logger only: the libraries underneath have their own ways to speak.
    notes = logging.StreamHandler()
    notes.setFormatter(logging.Formatter("mogeo: %(message)s"))
    logging.getLogger("mogeo").addHandler(notes)
    try:
        return int(_module(_COMMANDS[options.command][0]).run(options))
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("mogeo: interrupted", file=sys.stderr)
        return 130
    finally:
        logging.getLogger("mogeo").removeHandler(notes)


def _module(name: str) -> Any:
    """Import a subcommand's module, or say which extra it needs."""
    missing = [package for package in _PACKAGES["dpo"] if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} not installed; run: pip install 'mogeo[dpo]'")
    return importlib.import_module(name)


def _refuse(error: InputError) -> int:
    rank = os.environ.get("RANK", "0")  # set by a launcher of several processes, each of which may have its own error
    print(f"mogeo: error: {error}" if rank == "0" else f"mogeo: rank {rank}: error: {error}", file=sys.stderr)
    return 2
