"""Which room of mogeo may import which: the drawing in CONTRIBUTING.md is the rule, and this holds the code to it.

Every import statement counts, wherever it stands: at the top of a file, in a function, or for type checkers only. A
module that is named in a string (a subcommand, a kind of judge) is not an import: that is how a room offers a place to
others without knowing them.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE = re.compile(r"^  (?P<room>\w+)(?:/|\.py)? {2,}(?P<purpose>\S.*?) +\| (?P<kind>only|not) (?P<names>[\w, ]+)$")
FILE = re.compile(r"^    (?P<file>\w+\.py) {2,}\S.*$")


# ---- the drawing -----------------------------------------------------------------------------------------------------


def drawing() -> str:
    """The block of CONTRIBUTING.md that shows the tree."""
    blocks = re.findall(r"```text\n(mogeo/\n.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 1, "CONTRIBUTING.md has to draw the tree once, in a block ```text that begins with mogeo/"
    return str(blocks[0])


def rules() -> dict[str, tuple[str, set[str]]]:
    """Room -> "only" or "not", and the rooms that it may import only, or must not import."""
    found = {}
    for line in drawing().splitlines():
        if match := LINE.match(line):
            names = {name.strip() for name in match["names"].split(",")} - {"nothing"}
            found[match["room"]] = (match["kind"], names)
    return found


def users() -> set[str]:
    """The rooms that use the library, and that the library must not know."""
    below = drawing().split("what uses it", 1)[1]
    return {match["room"] for line in below.splitlines() if (match := LINE.match(line))}


# ---- the code --------------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module of mogeo by its name, kernels included."""
    folders = {"mogeo": ROOT / "mogeo", "mogeo.kernels": ROOT / "kernels"}
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            if package == "mogeo" and inner[0] == "kernels":  # a link to the folder above, where there is one
                continue
            found[".".join([package, *inner]).removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of mogeo that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "mogeo")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports of mogeo in full"
            if node.module is not None and node.module.partition(".")[0] == "mogeo":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in known else node.module


@functools.cache
def every_import() -> set[tuple[str, str]]:
    """(module, what it imports), for every import statement."""
    known = modules()
    return {(name, target) for name, path in known.items() for target in imported(path, known) if target != name}


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    found: dict[str, set[str]] = {name: set() for name in modules()}
    for module, target in every_import():
        found[module].add(target)
    return found


def room_of(module: str) -> str:
    """`geometry` for mogeo.geometry.ops, `optimizer` for mogeo.optimizer, `mogeo` for mogeo itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "mogeo"


def room_graph() -> dict[str, set[str]]:
    """Room -> the rooms that it imports."""
    rooms: dict[str, set[str]] = {}
    for module, targets in graph().items():
        own = room_of(module)
        rooms.setdefault(own, set()).update({room_of(target) for target in targets} - {own})
    return rooms


def cycle(arrows: Mapping[str, set[str]]) -> list[str]:
    """The nodes of one cycle; empty if there is none."""
    finished: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in finished:
            return []
        for target in sorted(arrows.get(node, ())):
            if found := walk(target, [*way, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := walk(node, []))), [])


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_every_room_is_drawn_and_every_room_drawn_is_there() -> None:
    assert set(rules()) == {room_of(module) for module in modules()} - {"mogeo", "__main__"}


def test_every_file_drawn_is_there() -> None:
    room = ""
    for line in drawing().splitlines():
        if match := LINE.match(line):
            room = match["room"]
        elif match := FILE.match(line):
            assert (ROOT / "mogeo" / room / match["file"]).is_file(), f"{room}/{match['file']}"


@pytest.mark.parametrize("room", sorted(rules()))
def test_a_room_imports_what_it_may(room: str) -> None:
    kind, names = rules()[room]
    assert names <= set(rules()) | {"mogeo"}, f"CONTRIBUTING.md, {room}: no such room: {names - set(rules())}"
    targets = room_graph()[room]
    wrong = targets - names if kind == "only" else targets & names
    if room not in users():
        wrong |= targets & users()
    culprits = [
        f"{module} imports {target}"
        for module, found in graph().items()
        for target in found
        if room_of(module) == room and room_of(target) in wrong
    ]
    assert not culprits, f"CONTRIBUTING.md: {room} {kind} {', '.join(sorted(names)) or 'nothing'}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycle(graph()) == []


def test_no_room_imports_itself_by_way_of_others() -> None:
    assert cycle(room_graph()) == []


def test_a_cycle_is_found_where_there_is_one() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
