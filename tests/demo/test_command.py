"""The command refuses what cannot work before it begins, and then prints a table and writes what it promises."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mogeo.demo import command
from mogeo.demo.experiment import run_seed
from mogeo.demo.recipe import BEFORE, METHODS
from mogeo.demo.world import REGIMES
from mogeo.errors import InputError
from tests.recipes import SMALL


def arguments(*typed: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(typed)


def test_every_regime_can_be_asked_for() -> None:
    assert {arguments("--regime", regime).regime for regime in REGIMES} == set(REGIMES)
    with pytest.raises(SystemExit):
        arguments("--regime", "fog")


def test_the_command_prints_a_table_and_writes_a_picture_a_page_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments("--seeds", "1", "--weighting", "group-dro", "--output", str(tmp_path / "out"))
    assert command.run_recipe(SMALL, args) == 0
    shown = capsys.readouterr()
    for label in (BEFORE, *METHODS, "group-dro"):
        assert label in shown.out
        assert f"seed 0  {label}: " in shown.err
    assert {"demo.png", "report.html", "results.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["label"] for run in written["runs"]] == [BEFORE, *METHODS, "group-dro"]
    assert written["command"] == "mogeo demo"


@pytest.mark.slow
def test_seeds_in_processes_give_what_they_give_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    recipe = replace(SMALL, sft_steps=4, align=replace(SMALL.align, max_steps=2))
    args = arguments("--seeds", "2", "--regime", "base", "--quiet", "--output", str(tmp_path))
    assert command.run_recipe(recipe, args) == 0
    assert capsys.readouterr().err == ""
    written = json.loads((tmp_path / "results.json").read_text())["runs"]
    alone = [o for seed in (0, 1) for o in run_seed(seed, recipe, "base").outcomes]
    assert [(run["label"], run["weighting"]) for run in written] == [(o.label, o.weighting) for o in alone]
    for run, o in zip(written, alone, strict=True):
        assert run["sampled"]["worst"] == round(100 * o.sampled.worst, 3)
        assert run["accuracy"]["helpfulness"] == round(100 * o.accuracy["helpfulness"], 3)


@pytest.mark.parametrize(
    ("typed", "culprit"),
    [
        (("--seeds", "0"), "--seeds has to be at least 1, got 0"),
        (("--weighting", "fairest"), "fairest"),
        (("--weighting", "linear(1,2)"), "2 weights for 4 objectives"),
        (("--lr", "-1"), "learning_rate"),
        (("--device", "abacus"), "abacus"),
        (("--output", __file__), "cannot be made a folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    typed: tuple[str, ...], culprit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mogeo.demo.experiment.run_seed", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(InputError) as caught:
        command.run(arguments("--output", str(tmp_path), *typed))
    assert culprit in str(caught.value)


def test_the_code_on_the_page_about_the_demo_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/demo.md", "exec"), names)
