"""From raw rows to a judged table by two commands; mistakes are found early, and nothing is done or paid for twice."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from mogeo import cli
from mogeo.demo.world import OBJECTIVES, World, tiny_model, tokenizer
from mogeo.dpo.data import read_rows, split_rows
from mogeo.judging import responses
from mogeo.judging.golden import golden_response
from tests.openai_stub import chat, error, serving
from tests.tiny import save, shape

KEY = "sk-not-a-real-key-91c2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rows.jsonl, goldens.jsonl, an untrained model `base`, and a run of `mogeo align` on the rows."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = World(0).rows(40)
    write(folder / "rows.jsonl", rows)
    goldens = [{"instruction": row["instruction"], "golden": golden_response(row, OBJECTIVES)} for row in rows]
    write(folder / "goldens.jsonl", goldens)
    words = tokenizer()
    save(folder / "base", tiny_model(words, 0), words)
    done = cli.main(
        ["align", "--model", str(folder / "base"), "--data", str(folder / "rows.jsonl"),
         "--output", str(folder / "run"), "--held-out", "0.3", "--seed", "5", "--max-steps", "2", "--lr", "1e-2",
         "--prompt-format", "plain",
         "--autocast", "none", "--eval-every", "0", "--save-every", "0", "--device", "cpu", "--quiet"]
    )  # fmt: skip
    assert done == 0
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def evaluate(place: Path, tmp_path: Path) -> Callable[..., int]:
    """Run `mogeo evaluate` in this process."""

    def go(*options: object, models: tuple[str, ...] = ("run",), judge: str = "world") -> int:
        named = [part for model in models for part in ("--model", model.replace("@", str(place) + "/"))]
        if models == ("run",):
            named = ["--model", str(place / "run")]
        fixed = ["--output", str(tmp_path / "out"), "--judge", judge, "--device", "cpu", "--quiet"]
        return cli.main(["evaluate", *named, *fixed, "--max-new-tokens", "6", *map(str, options)])

    return go


def record(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    return found


# ---- whole ways ------------------------------------------------------------------------------------------------------


def test_two_commands_go_from_rows_to_a_judged_table(place: Path, tmp_path: Path, evaluate, capsys) -> None:
    assert evaluate() == 0
    table = capsys.readouterr().out
    assert "Net win rate against the golden responses, %" in table
    for name in ("overall", *OBJECTIVES, "worst"):
        assert any(line.startswith(name) for line in table.splitlines())
    held_out = split_rows(read_rows(place / "rows.jsonl"), 0.3, 5)[1]
    judgements = read_rows(tmp_path / "out" / "judgements.jsonl")
    assert [j["prompt"] for j in judgements] == [row["instruction"] for row in held_out]
    rate = World(0).rate
    for judgement in judgements:
        said, golden = (rate(judgement["prompt"], judgement[which]) for which in ("response", "golden"))
        expected = {name: (said[name] > golden[name]) - (said[name] < golden[name]) for name in OBJECTIVES}
        total = sum(said.values()) - sum(golden.values())
        assert judgement["verdict"] == {"overall": (total > 0) - (total < 0), **expected}
    numbers = record(tmp_path)["models"]["run"]["net_win_rate"]
    for name, found in numbers.items():
        assert found["value"] == pytest.approx(sum(j["verdict"][name] for j in judgements) / 12)
        assert found["low"] <= found["value"] <= found["high"]


def test_several_models_sampled_are_paired_and_not_generated_twice(
    place, tmp_path, evaluate, monkeypatch, capsys
) -> None:
    models = ("base=@base", "@run")
    options = ("--temperature", "1", "--samples-per-prompt", "2", "--prompts", "5")
    assert evaluate(*options, models=models) == 0
    assert "Minus base, in points" in capsys.readouterr().out
    assert record(tmp_path)["minus_first"]["first"] == "base"
    assert record(tmp_path)["samples_per_prompt"] == 2
    before = (tmp_path / "out" / "judgements.jsonl").read_text()
    monkeypatch.setattr(responses, "respond", lambda *_: pytest.fail("generated again"))
    monkeypatch.setattr("mogeo.judging.command.respond", lambda *_: pytest.fail("generated again"))
    assert evaluate(*options, models=models) == 0
    assert (tmp_path / "out" / "judgements.jsonl").read_text() == before
    # The file serves any other judge, too, and no model is needed.
    file = tmp_path / "out" / "responses.jsonl"
    given = ("--responses", file, "--data", place / "rows.jsonl", "--held-out", "0.3", "--seed", "5", "--prompts", "5")
    assert evaluate(*given, models=()) == 0
    assert (tmp_path / "out" / "judgements.jsonl").read_text() == before


def test_a_reward_model_judges(place: Path, tmp_path: Path, evaluate) -> None:
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**shape(len(words), num_labels=2, id2label={0: "brave", 1: "kind"}))
    save(tmp_path / "reward", LlamaForSequenceClassification(config), words)
    labels = ("--reward-label", "wit=brave", "--reward-label", "tact=1")
    assert evaluate("--reward-model", tmp_path / "reward", *labels, judge="reward") == 0
    assert list(record(tmp_path)["models"]["run"]["net_win_rate"]) == ["overall", "wit", "tact"]


def test_an_endpoint_judges_tells_what_it_costs_and_keeps_the_key(
    place: Path, tmp_path: Path, evaluate, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda *_: chat('{"winner": "A"}', 100, 10)) as stub:
        options = ("--judge-model", "gpt", "--base-url", stub.url, "--api-key-env", "JUDGE_KEY", "--prompts", "3",
                   "--objectives", "helpfulness,honesty", "--price-in", "2.5", "--price-out", "10")  # fmt: skip
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal
        assert evaluate(*options, judge="endpoint") == 2
        told = capsys.readouterr()
        assert "3 comparisons: 18 requests to gpt (0 more are in the cache)" in told.out
        assert "not sent without consent: add --yes" in told.err
        assert stub.requests == []
        assert evaluate(*options, "--yes", judge="endpoint") == 0
        told = capsys.readouterr()
        assert len(stub.requests) == 18
        assert "1,800 prompt tokens and 180 of replies, as the server counts: 0.01" in told.out
        assert "in 9 of 9 pairs of orders it preferred the same position both times" in told.out
        assert evaluate(*options, judge="endpoint") == 0  # all in the cache: no consent needed
        assert len(stub.requests) == 18
        assert set(stub.authorizations) == {f"Bearer {KEY}"}
    found = record(tmp_path)
    assert found["models"]["run"]["net_win_rate"]["overall"] == {
        "wins": 0, "ties": 3, "losses": 0, "not_judged": 0, "value": 0.0, "low": 0.0, "high": 0.0,
    }  # fmt: skip
    assert found["judged_by"]["usage"]["cached"] == 18
    assert KEY not in told.out + told.err + capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert KEY.encode() not in path.read_bytes(), path


def test_asked_on_a_terminal_the_user_decides(evaluate, monkeypatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with serving(lambda *_: chat('{"winner": "tie"}')) as stub:
        options = ("--judge-model", "m", "--base-url", stub.url, "--prompts", "1", "--objectives", "honesty")
        monkeypatch.setattr(sys, "stdin", Terminal("\n"))
        assert evaluate(*options, judge="endpoint") == 2
        assert "nothing was sent" in capsys.readouterr().err
        assert stub.requests == []
        monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
        assert evaluate(*options, judge="endpoint") == 0
        assert len(stub.requests) == 4


def test_goldens_without_ratings_and_rubrics_of_ones_own(place: Path, tmp_path: Path, evaluate) -> None:
    (tmp_path / "mine.txt").write_text("Which one rhymes?")
    with serving(lambda *_: chat('{"winner": "B"}')) as stub:
        data = ("--data", place / "goldens.jsonl", "--all-prompts", "--prompts", "2", "--objectives", "rhyme")
        options = ("--judge-model", "m", "--base-url", stub.url, "--rubric", f"rhyme={tmp_path / 'mine.txt'}", "--yes",
                   "--judge-option", "max_tokens=null", "--judge-option", 'reasoning_effort="low"')  # fmt: skip
        assert evaluate(*data, *options, judge="endpoint", models=("@base",)) == 0
        assert any("Which one rhymes?" in r["messages"][0]["content"] for r in stub.requests)
        assert {frozenset(r) for r in stub.requests} == {
            frozenset(("messages", "model", "temperature", "reasoning_effort"))
        }


def test_a_run_that_stops_goes_on_where_it_was(evaluate, monkeypatch, capsys) -> None:
    with serving(lambda _, n: chat('{"winner": "tie"}') if n < 4 else error(500)) as stub:
        options = ("--judge-model", "m", "--base-url", stub.url, "--prompts", "3", "--objectives", "honesty", "--yes",
                   "--retries", "0", "--concurrency", "1")  # fmt: skip
        assert evaluate(*options, judge="endpoint") == 2
        assert "run the same command again to go on" in capsys.readouterr().err
        assert evaluate(*options, judge="endpoint") == 2
        assert "8 requests to m (4 more are in the cache)" in capsys.readouterr().out


def test_ctrl_c_says_that_work_is_kept(evaluate, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mogeo.judging.command.respond", interrupted)
    assert evaluate() == 130
    assert "run the same command to go on" in capsys.readouterr().err


# ---- mistakes --------------------------------------------------------------------------------------------------------

ENDPOINT = ("--judge-model", "m", "--base-url", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("judge", "options", "message"),
    [
        ("world", ("--world-seed", "0", "--judge-model", "m"), "--judge-model is for --judge endpoint"),
        ("world", ("--objectives", "wit"), "the world's raters know no wit"),
        ("world", ("--samples-per-prompt", "2"), "several samples of a greedy response are one"),
        ("world", ("--model", "missing.gguf"), "model 'missing.gguf' does not exist"),
        ("world", ("--responses", "r.jsonl"), "either models (--model) or a file of their responses"),
        ("world", ("--held-out", "0"), "both sides need at least one"),
        ("world", ("--data", "missing.jsonl"), "data file 'missing.jsonl' does not exist"),
        ("reward", (), "--reward-model HUB/NAME"),
        ("reward", ("--reward-model", "./missing"), "reward model './missing' does not exist"),
        ("reward", ("--reward-model", "a/b", "--reward-model", "c/d"), "several reward models need names"),
        ("reward", ("--reward-model", "wit=a/b", "--reward-label", "tact=0"), "--reward-label names tact"),
        ("reward", ("--reward-model", "a/b", "--reward-label", "0"), "--reward-label '0' has to be NAME=VALUE"),
        ("endpoint", (), "--judge-model gpt-4o"),
        ("endpoint", (*ENDPOINT, "--judge-option", "a=b"), "--judge-option a: b is not JSON"),
        ("endpoint", (*ENDPOINT, "--rubric", "wit=x.txt"), "--rubric wit: no such objective"),
        ("endpoint", (*ENDPOINT, "--rubric", "overall=missing.txt"), "--rubric overall: 'missing.txt' cannot be read"),
        ("endpoint", (*ENDPOINT, "--objectives", "overall,wit"), "an objective is named 'overall'"),
        ("endpoint", (*ENDPOINT, "--api-key-env", "NOT_SET_ANYWHERE"), "environment variable NOT_SET_ANYWHERE"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_a_model_is_loaded(evaluate, monkeypatch, capsys, judge, options, message) -> None:
    monkeypatch.setattr("mogeo.dpo.models.load_model", lambda *_: pytest.fail("loaded"))
    assert evaluate(*options, judge=judge) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_prompts_of_another_world_are_named(tmp_path: Path, evaluate, capsys) -> None:
    write(tmp_path / "d.jsonl", [{"instruction": "Why?", "golden": "So."}])
    assert evaluate("--data", tmp_path / "d.jsonl", "--all-prompts") == 2
    assert "not a prompt of this world: 'Why?'" in capsys.readouterr().err


def test_prompts_that_leave_no_room_are_named(evaluate, capsys) -> None:
    assert evaluate("--max-new-tokens", "60") == 2
    assert "no prompt fits the context of the models; lower --max-new-tokens" in capsys.readouterr().err
