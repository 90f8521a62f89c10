"""Who is judged on what: labels, a run's own prompts, and never one that was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mogeo.dpo.data import split_rows
from mogeo.dpo.data_origin import DataOrigin
from mogeo.errors import InputError
from mogeo.judging.candidates import CandidateModel, find_candidates, responders
from mogeo.judging.prompts import PromptChoice, choose_questions


@pytest.fixture
def data(tmp_path: Path, rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def run(tmp_path: Path, rows, data: str) -> Path:
    """What `mogeo align` leaves, as far as it matters here."""
    folder = tmp_path / "a_run"
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"prompt_format": "plain"}))
    DataOrigin.of(data, 0.25, 3, ("size", "warm"), split_rows(rows, 0.25, 3)[0]).write(folder)
    return folder


def test_a_run_is_judged_on_what_it_held_out(run: Path, rows) -> None:
    found = find_candidates([str(run)])
    assert [(e.label, e.source, e.prompt_format) for e in found] == [("a_run", str(run / "model"), "plain")]
    asked, objectives = choose_questions(PromptChoice(), found)
    assert [q.prompt for q in asked] == [row["instruction"] for row in split_rows(rows, 0.25, 3)[1]]
    assert objectives == ("size", "warm")
    assert {q.golden for q in asked} == {"warm big"}


def test_what_a_run_was_trained_on_is_never_judged(run: Path, rows, caplog) -> None:
    found = find_candidates([str(run), "base=hub/base"])
    held_out = {row["instruction"] for row in split_rows(rows, 0.25, 3)[1]}
    for wanted in (PromptChoice(everything=True), PromptChoice(seed=8, held_out=20)):
        asked, _ = choose_questions(wanted, found)
        assert {q.prompt for q in asked} <= held_out
    assert "18 of 24 prompts left out: a run was trained on them" in caplog.messages[0]


def test_white_space_makes_no_new_prompt(run: Path) -> None:
    origin = DataOrigin.read(run)
    assert origin.trained_on("what is red like ?") or origin.trained_on("what is blue like ?")
    prompt = next(p for p in ("what is red like ?", "what is blue like ?") if origin.trained_on(p))
    assert origin.trained_on(f"  {prompt.replace(' ', '   ')}\n")
    assert origin == DataOrigin.read(run)


def test_prompts_all_trained_on_are_an_error(run: Path, rows, tmp_path: Path) -> None:
    trained = split_rows(rows, 0.25, 3)[0]
    path = tmp_path / "seen.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in trained), "utf-8")
    with pytest.raises(InputError, match=r"all 18 prompts of .* were trained on"):
        choose_questions(PromptChoice(data=str(path), everything=True), find_candidates([str(run)]))


def test_goldens_alone_will_do(tmp_path: Path) -> None:
    path = tmp_path / "goldens.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q{i}", "golden": f"g{i}"}) + "\n" for i in range(9)), "utf-8")
    asked, objectives = choose_questions(PromptChoice(data=str(path), everything=True), [])
    assert ([q.golden for q in asked], objectives) == ([f"g{i}" for i in range(9)], ())
    few, objectives = choose_questions(
        PromptChoice(data=str(path), everything=True, at_most=4, objectives=("wit",)), []
    )
    assert objectives == ("wit",)
    assert len(few) == 4
    assert [q for q in asked if q in few] == few
    assert few == choose_questions(PromptChoice(data=str(path), everything=True, at_most=4, objectives=("wit",)), [])[0]


def test_labels_come_before_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "x=y").mkdir()
    names = ["hub/model", "uniform=hub/other", str(tmp_path / "x=y")]
    assert [(e.label, e.source) for e in find_candidates(names)] == [
        ("model", "hub/model"), ("uniform", "hub/other"), ("x=y", names[2]),
    ]  # fmt: skip
    with pytest.raises(InputError, match="two models have the label model"):
        find_candidates(["a/model", "b/model"])
    with pytest.raises(InputError, match="SOURCE or LABEL=SOURCE"):
        find_candidates(["=hub/model"])


def test_prompt_formats_are_those_asked_for_or_trained_with() -> None:
    found = [CandidateModel("base", "b"), CandidateModel("run", "r", None, "plain")]
    assert [s.prompt_format for s in responders(found, None)] == ["plain", "plain"]
    assert [s.prompt_format for s in responders(found, "chat")] == ["chat", "chat"]
    assert [s.prompt_format for s in responders(found[:1], None)] == ["chat"]


def test_runs_that_cannot_be_judged_say_what_to_do(run: Path) -> None:
    (run / "data.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        find_candidates([str(run)])
    (run / "data.json").unlink()
    with pytest.raises(InputError, match=r"has no data\.json.*name its model: .*model, with --data"):
        find_candidates([str(run)])
    (run / "model").rmdir()
    with pytest.raises(InputError, match="not finished.*--resume"):
        find_candidates([str(run)])


def test_no_data_at_all() -> None:
    with pytest.raises(InputError, match="name the rows with --data"):
        choose_questions(PromptChoice(), [CandidateModel("base", "b")])
