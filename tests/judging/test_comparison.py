"""What is made of verdicts: counts and rates that agree with them, in tables, JSON and records."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from mogeo.errors import InputError
from mogeo.judging.comparison import Comparisons, Judged, judge_models
from mogeo.judging.golden import Question
from mogeo.judging.judge import OVERALL, Verdict

QUESTIONS = [Question(f"p{i}", "golden") for i in range(4)]


class ByName:
    """A response says what it is: "w3" wins overall; on tact it is the other way round; "?" cannot be judged."""

    objectives = ("wit", "tact")

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        self.asked += zip(prompts, candidates, references, strict=True)
        values = [{"w": 1, "l": -1, "t": 0, "?": None}[text[0]] for text in candidates]
        return [Verdict({"wit": v, "tact": None if v is None else -v}, v, {"of": "it"}) for v in values]


RESPONSES = {"first": [["w"], ["w"], ["l"], ["golden"]], "second": [["w"], ["t"], ["?"], ["w2"]]}


@pytest.fixture
def judged() -> Judged:
    return judge_models(ByName(), QUESTIONS, RESPONSES, resamples=50)


def test_each_distinct_comparison_is_asked_once() -> None:
    judge = ByName()
    judge_models(judge, QUESTIONS, RESPONSES, resamples=1)
    assert judge.asked == [
        ("p0", "w", "golden"), ("p1", "w", "golden"), ("p2", "l", "golden"), ("p1", "t", "golden"),
        ("p2", "?", "golden"), ("p3", "w2", "golden"),
    ]  # fmt: skip


def test_counts_and_rates_are_those_of_the_verdicts(judged: Judged) -> None:
    assert judged.counts("first", OVERALL) == {"wins": 2, "ties": 1, "losses": 1, "not_judged": 0}
    assert judged.counts("second", "tact") == {"wins": 0, "ties": 1, "losses": 2, "not_judged": 1}
    record = json.loads(json.dumps(judged.to_dict(), allow_nan=False))
    first, second = (record["models"][label] for label in ("first", "second"))
    assert first["net_win_rate"]["overall"]["value"] == pytest.approx(1 / 4)
    assert second["net_win_rate"]["wit"]["value"] == pytest.approx(2 / 3)  # of three: one was not judged
    assert (second["worst"]["objective"], second["worst"]["value"]) == ("tact", pytest.approx(-2 / 3))
    difference = record["minus_first"]["models"]["second"]
    assert difference["overall"]["value"] == pytest.approx(2 / 3 - 1 / 4)
    assert difference["worst"]["value"] == pytest.approx(-2 / 3 + 1 / 4)
    assert (record["prompts"], record["samples_per_prompt"]) == (4, 1)


def test_tables_tell_the_same(judged: Judged) -> None:
    rates, differences, counts = (table.text() for table in judged.tables())
    assert "+25.0 [" in next(line for line in rates.splitlines() if line.startswith("overall"))
    assert next(line for line in rates.splitlines() if line.startswith("  which is")).split()[2:] == ["tact", "tact"]
    assert "+41.7 [" in next(line for line in differences.splitlines() if line.startswith("overall"))
    assert next(line for line in counts.splitlines() if line.startswith("tact")).split() == [
        "tact",
        "1/1/2/0",
        "0/1/2/1",
    ]
    assert len(judge_models(ByName(), QUESTIONS, {"one": RESPONSES["first"]}, resamples=1).tables()) == 2


def test_records_hold_texts_and_verdicts(judged: Judged) -> None:
    records = judged.records()
    assert len(records) == 8
    assert records[3] == {
        "model": "first", "prompt": "p3", "sample": 0, "response": "golden", "golden": "golden",
        "verdict": {"overall": 0, "wit": 0, "tact": 0}, "details": {"identical": True},
    }  # fmt: skip
    assert records[6]["verdict"] == {"overall": None, "wit": None, "tact": None}


def test_nothing_judged_is_no_number() -> None:
    judged = judge_models(ByName(), QUESTIONS[:1], {"one": [["?"]]}, resamples=5)
    assert math.isnan(judged.estimates.rates[0][0].value)
    assert judged.to_dict()["models"]["one"]["worst"] == {"objective": None, "value": None, "low": None, "high": None}
    assert next(line for line in judged.tables()[0].text().splitlines() if line.startswith("wit")).split() == [
        "wit",
        "-",
    ]


def test_several_samples_a_prompt() -> None:
    judged = judge_models(ByName(), QUESTIONS[:2], {"one": [["w", "l"], ["w", "w3"]]}, resamples=5)
    assert judged.counts("one", OVERALL) == {"wins": 3, "ties": 0, "losses": 1, "not_judged": 0}
    assert "2 prompts, 2 samples each." in judged.tables()[0].note


@pytest.mark.parametrize(
    "responses", [{"a": [["x"]]}, {"a": [["x"], ["y", "z"]]}, {"a": [["x"]] * 2, "b": [["x"] * 2] * 2}]
)
def test_models_that_said_unequally_much_cannot_be_compared(responses: dict[str, list[list[str]]]) -> None:
    with pytest.raises(InputError, match="equally many responses"):
        Comparisons.of(QUESTIONS[:2], responses)


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(InputError, match="no prompts"):
        judge_models(ByName(), [], {"a": []})
