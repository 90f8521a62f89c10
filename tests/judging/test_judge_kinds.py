"""Judges by name: built in, registered by other packages, or named by their place; and what goes wrong with each."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mogeo import cli
from mogeo.demo.world import World
from mogeo.errors import InputError
from mogeo.judging.judge_kinds import BUILT_IN, JudgeKind, judge_kind, judge_names

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"


def example() -> str:
    """The judge of one's own in docs/evaluate.md."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL) if "LengthJudge" in b)
    return str(block)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module that can be imported; returns its name, which no other test has."""
    monkeypatch.syspath_prepend(tmp_path / "path")
    (tmp_path / "path").mkdir()

    def write(source: str) -> str:
        name = f"judges_{abs(hash((source, str(tmp_path))))}"
        (tmp_path / "path" / f"{name}.py").write_text(source, "utf-8")
        return name

    return write


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package that registers judges, as far as Python can tell."""

    def install(package: str, **judges: str) -> None:
        folder = tmp_path / "installed" / f"{package}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {place}\n" for name, place in judges.items())
        (folder / "entry_points.txt").write_text(f"[mogeo.judges]\n{lines}")
        monkeypatch.syspath_prepend(tmp_path / "installed")

    return install


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Judge two responses that exist; returns the exit code, and what was printed."""
    rows = World(0).rows(2)
    said = [{"model": "m", "prompt": row["instruction"], "responses": ["x" * 200]} for row in rows]
    for name, lines in (("rows", rows), ("said", said)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")

    def go(judge: str, *options: str) -> tuple[int, str, str]:
        place = ["--data", str(tmp_path / "rows.jsonl"), "--all-prompts", "--responses", str(tmp_path / "said.jsonl")]
        code = cli.main(["evaluate", *place, "--output", str(tmp_path / "out"), "--quiet", "--judge", judge, *options])
        told = capsys.readouterr()
        return code, told.out, told.err

    return go


# ---- finding a judge -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_kind_is_found_and_declares_its_options_without_torch(name: str) -> None:
    code = (
        "import argparse, sys\n"
        "from mogeo.judging.judge_kinds import judge_kind\n"
        f"judge_kind({name!r}).add_arguments(argparse.ArgumentParser().add_argument_group())\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_judge_on_the_page_judges_from_the_command_line(module: Any, evaluate: Any, tmp_path: Path) -> None:
    place = f"{module(example())}:LengthJudge"
    code, told, _ = evaluate(place, "--objectives", "honesty")
    assert code == 0
    assert "Net win rate against the golden responses" in told
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert found["judged_by"] == {"judge": place}
    assert found["models"]["m"]["net_win_rate"]["honesty"]["losses"] == 2  # golden responses are shorter than these
    assert set(found["options"]) & {"judge_kind", "judge_owners", "world_seed", "base_url"} == set()


def test_a_package_registers_a_judge_under_a_name(module: Any, register: Any, evaluate: Any, capsys: Any) -> None:
    register("some-package", shortest=f"{module(example())}:LengthJudge")
    assert "shortest" in judge_names()
    assert evaluate("shortest", "--objectives", "honesty")[0] == 0
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert "shortest" in capsys.readouterr().out


def test_a_kind_of_ones_own_has_options_a_check_and_a_session(module: Any, evaluate: Any, tmp_path: Path) -> None:
    place = module(
        "from contextlib import contextmanager\n"
        "from mogeo.errors import InputError\n"
        "from mogeo.judging.judge import RatingJudge\n"
        "from mogeo.judging.judge_kinds import JudgeKind, Session\n"
        "class Letters(JudgeKind):\n"
        "    title = 'judge: counts a letter'\n"
        "    def add_arguments(self, group):\n"
        "        group.add_argument('--letter', default='e')\n"
        "    def check(self, args, objectives, questions):\n"
        "        if len(args.letter) != 1: raise InputError('--letter is one letter')\n"
        "    def make(self, args, objectives):\n"
        "        return RatingJudge(lambda p, r: {n: r.count(args.letter) for n in objectives}, objectives)\n"
        "    @contextmanager\n"
        "    def session(self, args, objectives, comparisons):\n"
        "        session = Session(self.make(args, objectives))\n"
        "        yield session\n"
        "        session.record, session.summary = {'pairs': len(comparisons.prompts)}, 'counted'\n"
    )
    code, told, _ = evaluate(f"{place}:Letters", "--objectives", "honesty", "--letter", "x")
    assert code == 0
    assert "\ncounted\n" in told
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert found["judged_by"] == {"judge": f"{place}:Letters", "pairs": 2}
    assert found["options"]["letter"] == "x"
    assert found["models"]["m"]["net_win_rate"]["honesty"]["wins"] == 2
    assert evaluate(f"{place}:Letters", "--letter", "xy")[2] == "mogeo: error: --letter is one letter\n"
    code, _, errors = evaluate(f"{place}:Letters", "--world-seed", "1")
    assert (code, "--world-seed is for --judge world" in errors) == (2, True)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "fairest", r"unknown judge 'fairest': choose one of endpoint, reward, world, .*package\.module:name"),
        ("", "no_such_package.judges:Judge", "there is no module 'no_such_package'; install its package, or put"),
        ("import no_such_thing", "@:Judge", r"cannot be imported \(No module named 'no_such_thing'\)"),
        ("1 / 0", "@:Judge", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("Other = 1", "@:Judge", "has no 'Judge'; it has Other"),
        ("Judge = 1", "@:Judge", "is a int: name a class or function that takes the objectives and returns a judge"),
        ("def judge(): ...", "@:judge", "is called with one argument, the tuple of the objectives' names"),
        ("def judge(objectives): return 3", "@:judge", "made a int without objectives and compare"),
    ],
)
def test_a_judge_that_cannot_be_used_says_why_and_what_to_do(
    module: Any, evaluate: Any, source: str, name: str, message: str
) -> None:
    code, _, errors = evaluate(name.replace("@", module(source)), "--objectives", "honesty")
    assert code == 2
    assert re.search(message, errors), errors


def test_a_name_that_is_taken_says_how_to_name_either(register: Any) -> None:
    register("one-package", reward="one:Judge", careful="one:Careful")
    register("another-package", careful="another:Careful")
    with pytest.raises(InputError, match=r"several packages register the judge 'reward'.*RewardKind or one:Judge"):
        judge_kind("reward")
    with pytest.raises(InputError, match=r"'careful': name the one you mean by its place, .*one:Careful"):
        judge_kind("careful")


def test_an_option_that_is_taken_is_named(module: Any, evaluate: Any) -> None:
    place = module(
        "from mogeo.judging.judge_kinds import JudgeKind\n"
        "class Greedy(JudgeKind):\n"
        "    def add_arguments(self, group):\n"
        "        group.add_argument('--seed')\n"
        "    def make(self, args, objectives): ...\n"
    )
    assert "declares an option that mogeo evaluate has already (argument --seed" in evaluate(f"{place}:Greedy")[2]


def test_a_judge_that_skips_a_comparison_is_named(module: Any, evaluate: Any) -> None:
    place = module(
        "class Lazy:\n"
        "    def __init__(self, objectives): self.objectives = objectives\n"
        "    def compare(self, prompts, candidates, references): return []\n"
    )
    assert "Lazy returned 0 verdicts for 2 comparisons" in evaluate(f"{place}:Lazy", "--objectives", "honesty")[2]


def test_a_kind_needs_no_options() -> None:
    class Plain(JudgeKind):
        def make(self, args: argparse.Namespace, objectives: Any) -> Any: ...

    group = argparse.ArgumentParser().add_argument_group()
    Plain().add_arguments(group)
    Plain().check(argparse.Namespace(), [], [])
    assert group._group_actions == []
