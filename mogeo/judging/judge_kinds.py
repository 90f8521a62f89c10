"""Which judges `mogeo evaluate --judge` can make, and where others add theirs.

A judge is named in one of three ways:

- by the name of a built-in kind: see `BUILT_IN`;
- by a name that another installed package registers, as an entry point in the group `mogeo.judges`;
- by `package.module:name`, for a class or function in a module that Python can import.

Must not import torch: `mogeo evaluate --help` has to answer at once. The module of a kind is imported when the kind is
needed, so that this package does not depend on the packages of its kinds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mogeo.errors import InputError
from mogeo.judging.golden import Question
from mogeo.judging.judge import Judge

if TYPE_CHECKING:
    from mogeo.judging.comparison import Comparisons

BUILT_IN = {
    "endpoint": "mogeo.judging.endpoint_kind:EndpointKind",
    "reward": "mogeo.judging.reward_kind:RewardKind",
    "world": "mogeo.demo.world_judge:WorldKind",
}
"""Name of a kind -> where it is, as "module:class". A new kind is a line here."""

ENTRY_POINTS = "mogeo.judges"
"""The group of entry points in which other packages register judges."""


@dataclass
class Session:
    """A judge at work.

    Attributes:
        judge: the judge.
        record: what `evaluation.json` is to say about the judging, in plain values; read when the session has ended.
        summary: what is printed below the tables; read when the session has ended.
    """

    judge: Judge
    record: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


class JudgeKind(ABC):
    """A kind of judge for the command line: its options, a check of them, and how the judge is made.

    Attributes:
        title: heading of its options in `mogeo evaluate --help`.
    """

    title: str = "judge"

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:  # noqa: B027  # most judges have no options
        """Declare the options of this kind, with their defaults."""

    def check(  # noqa: B027  # nothing to check is the usual case
        self, args: argparse.Namespace, objectives: Sequence[str], questions: Sequence[Question]
    ) -> None:
        """Find whatever is wrong before a model is loaded; called once, and must be quick.

        Args:
            args: the options of the command line.
            objectives: names to judge by, in order; empty if neither the data nor the user names any.
            questions: the prompts, with their golden responses.

        Raises:
            InputError: the judge could not be made, or could not judge these questions.
        """

    @abstractmethod
    def make(self, args: argparse.Namespace, objectives: Sequence[str]) -> Judge:
        """Make the judge.

        Args:
            args: the options of the command line.
            objectives: as in `check`.

        Raises:
            InputError: the judge cannot be made.
        """

    def session(
        self, args: argparse.Namespace, objectives: Sequence[str], comparisons: Comparisons
    ) -> AbstractContextManager[Session]:
        """A context in which the judge can be used; what it opens is closed at the end.

        Args:
            args: the options of the command line.
            objectives: as in `check`.
            comparisons: everything that the judge will be asked.
        """
        return self._plain_session(args, objectives)

    @contextmanager
    def _plain_session(self, args: argparse.Namespace, objectives: Sequence[str]) -> Iterator[Session]:
        yield Session(self.make(args, objectives))


class _Factory(JudgeKind):
    """A kind without options: a class or function that takes the objectives and returns a judge."""

    def __init__(self, name: str, factory: Callable[..., Any]) -> None:
        self.name, self.factory = name, factory

    def check(self, args: argparse.Namespace, objectives: Sequence[str], questions: Sequence[Question]) -> None:
        try:
            inspect.signature(self.factory).bind(tuple(objectives))
        except TypeError as error:
            raise InputError(
                f"judge '{self.name}' is called with one argument, the tuple of the objectives' names, and does not "
                f"take it ({error})"
            ) from None
        except ValueError:  # a callable written in C may have no signature to look at
            return

    def make(self, args: argparse.Namespace, objectives: Sequence[str]) -> Judge:
        judge = self.factory(tuple(objectives))
        lacking = [name for name in ("objectives", "compare") if not hasattr(judge, name)]
        if lacking:
            raise InputError(
                f"judge '{self.name}' made a {type(judge).__name__} without {' and '.join(lacking)}: a judge has "
                "objectives, a tuple of names, and compare(prompts, candidates, references)"
            )
        return judge  # type: ignore[no-any-return]  # a Judge, as far as can be told without asking it


def judge_names() -> dict[str, list[str]]:
    """Every registered name -> where its kinds are, as "module:attribute". More than one: the name was taken twice."""
    found = {name: [place] for name, place in BUILT_IN.items()}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        places = found.setdefault(point.name, [])
        if point.value not in places:  # a package may be found twice on Python's path
            places.append(point.value)
    return found


def judge_kind(name: str) -> JudgeKind:
    """The kind of judge behind a name.

    Args:
        name: as on the command line: registered, or "package.module:name".

    Raises:
        InputError: the name is unknown or taken twice, its module cannot be imported, or it names no judge.
    """
    known = judge_names()
    places = known.get(name, [name] if ":" in name else [])
    if not places:
        raise InputError(
            f"unknown judge '{name}': choose one of {', '.join(known)}, or name your own as package.module:name"
        )
    if len(places) > 1:
        raise InputError(
            f"several packages register the judge '{name}': name the one you mean by its place, {' or '.join(places)}"
        )
    found = _imported(name, places[0])
    if isinstance(found, JudgeKind):
        return found
    if isinstance(found, type) and issubclass(found, JudgeKind):
        return found()
    if callable(found):
        return _Factory(name, found)
    raise InputError(
        f"judge '{name}' is a {type(found).__name__}: name a class or function that takes the objectives and returns a "
        "judge, or a mogeo.judging.judge_kinds.JudgeKind"
    )


def _imported(name: str, place: str) -> Any:
    """What lies at "module:attribute"."""
    module_name, _, attribute = place.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(
                f"judge '{name}': there is no module '{error.name}'; install its package, or put its folder on "
                "Python's path: PYTHONPATH=folder mogeo evaluate ..."
            ) from None
        raise InputError(f"judge '{name}': module '{module_name}' cannot be imported ({error})") from error
    except Exception as error:  # the module is somebody else's, and may fail in any way
        raise InputError(
            f"judge '{name}': module '{module_name}' cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not hasattr(module, attribute):
        offered = ", ".join(sorted(n for n in vars(module) if not n.startswith("_"))) or "nothing"
        raise InputError(f"judge '{name}': module '{module_name}' has no '{attribute}'; it has {offered:.300}")
    return getattr(module, attribute)


# ---- on the command line ---------------------------------------------------------------------------------------------


def add_judge_arguments(parser: argparse.ArgumentParser, typed: Sequence[str]) -> None:
    """Declare `--judge`, the options of every built-in kind, and those of the kind that was typed.

    The parsed arguments then hold `judge`, the name, and `judge_kind`, the kind that it names.

    Args:
        parser: of `mogeo evaluate`.
        typed: the command line.

    Raises:
        InputError: the judge that was typed does not exist, or one of its options is taken.
    """
    parser.add_argument(
        "--judge", required=True, metavar="J",
        help=f"who compares: {', '.join(judge_names())}, each with options below; or package.module:name of your own",
    )  # fmt: skip
    kinds = {name: judge_kind(place) for name, place in BUILT_IN.items()}
    name = _value_of("--judge", typed)
    if name is not None and name not in kinds:
        kinds[name] = judge_kind(name)
    owners: dict[str, tuple[str, argparse.Action]] = {}
    for owner, kind in kinds.items():
        group = parser.add_argument_group(f"{kind.title} (--judge {owner})")
        try:
            kind.add_arguments(group)
        except argparse.ArgumentError as error:
            raise InputError(f"judge '{owner}' declares an option that mogeo evaluate has already ({error})") from None
        owners.update({action.dest: (owner, action) for action in group._group_actions})
    parser.set_defaults(judge_kind=kinds.get(name or ""), judge_owners=owners)


def foreign_options(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Options of other judges than the one named: attribute of `args` -> (that judge, the option as it is typed)."""
    return {
        dest: (owner, action.option_strings[-1])
        for dest, (owner, action) in args.judge_owners.items()
        if owner != args.judge
    }


def refuse_foreign_options(args: argparse.Namespace) -> None:
    """Raise InputError if an option was given that belongs to another judge than the one named."""
    for dest, (owner, option) in foreign_options(args).items():
        if getattr(args, dest) != args.judge_owners[dest][1].default:
            raise InputError(f"{option} is for --judge {owner}, and this is --judge {args.judge}")


def _value_of(option: str, typed: Sequence[str]) -> str | None:
    """The last value given to an option on a command line that has not been parsed yet."""
    value = None
    for word, following in zip(typed, [*typed[1:], None], strict=True):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value
