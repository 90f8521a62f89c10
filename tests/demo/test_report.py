"""What the demo tells follows from the numbers: whichever way they point, the table and the sentence say so."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mogeo.demo.experiment import Outcome, SeedResult
from mogeo.demo.recipe import BASELINE, BEFORE, GUARDED, PAPER, TRACKED
from mogeo.demo.report import answer_table, conclusion, hurt_table, result_table, weight_table, write
from mogeo.demo.world import OBJECTIVES, World
from mogeo.judging.win_rates import NetWinRates

WORLD = World(0)
PROMPTS = [row["instruction"] for row in WORLD.rows(3)]


def outcome(label: str, helpfulness: float, others: float, answers: Sequence[str] = ("a", "b", "c")) -> Outcome:
    """A model whose net win rates are these (sampled: 0.1 lower), and whose accuracies are 0.5 above them."""
    rates = {name: helpfulness if name == "helpfulness" else others for name in OBJECTIVES}
    overall = sum(rates.values()) / 4
    lower = {name: rate - 0.1 for name, rate in rates.items()}
    history: list[dict[str, Any]] = []
    if label != BEFORE:
        weights = dict(zip(OBJECTIVES, (0.4, 0.3, 0.2, 0.1), strict=True))
        for step in (1, 2):
            history.append({"kind": "train", "step": step, "loss": rates, "weight": weights, "cosines": None})
    return Outcome(
        label,
        None if label == BEFORE else label,
        NetWinRates(overall, rates),
        NetWinRates(overall - 0.1, lower),
        {name: rate + 0.5 for name, rate in rates.items()},
        history,
        list(answers),
    )


def seed(number: int, rates: Mapping[str, tuple[float, float]], regime: str = "noisehelp") -> SeedResult:
    models = {BEFORE: (0.0, 0.0), **rates}
    return SeedResult(number, regime, WORLD, PROMPTS, ["- river Esk"] * 3, [outcome(k, *v) for k, v in models.items()])


def two_seeds(uniform: float, guarded: tuple[float, float], others: float = 0.08) -> list[SeedResult]:
    """Helpfulness under each method (GUARDED: in either seed); the other objectives have 0.10, or `others` under
    GUARDED.
    """
    return [
        seed(
            i,
            {
                BASELINE: (uniform, 0.10),
                PAPER: (uniform + 0.01, 0.10),
                TRACKED: (uniform + 0.03, 0.10),
                GUARDED: (guarded[i], others),
            },
        )
        for i in range(2)
    ]


def test_the_sentences_of_a_gain_name_gain_and_price() -> None:
    told = conclusion(two_seeds(-0.20, (-0.12, -0.08)))
    assert told.startswith("In 2 seeds, against uniform, 'uniform, nobody hurt' lifts the worst held-out accuracy")
    assert "(30.0 to 40.0, higher in 2 of 2) and gains 1.0 points of the mean" in told  # accuracy
    assert "(-20.0 to -10.0, higher in 2 of 2)" in told  # greedy
    assert "(-30.0 to -20.0, higher in 2 of 2)" in told  # sampled
    assert "overall it gains 1.0 and gains 1.0" in told
    assert "worst held-out accuracy of mgda-decoupled is 31.0, of 'mgda-decoupled, tracked' 33.0." in told


def test_the_sentences_of_a_loss_say_so() -> None:
    told = conclusion(two_seeds(-0.20, (-0.25, -0.31)))
    assert "does not lift the worst held-out accuracy (30.0 to 22.0, higher in 0 of 2) and loses 3.5 points" in told
    assert (
        "does not lift the worst objective's net win rate in greedy answers (-20.0 to -28.0, higher in 0 of 2)" in told
    )
    assert " lifts " not in told


def test_a_gain_in_some_seeds_only_is_called_that() -> None:
    told = conclusion(two_seeds(-0.20, (-0.25, -0.05)))
    assert "lifts on average the worst held-out accuracy (30.0 to 35.0, higher in 1 of 2)" in told


def test_the_sentences_say_how_often_the_minority_is_hurt() -> None:
    results = [
        SeedResult(i, "base", WORLD, PROMPTS, ["x"] * 3, [
            outcome(BEFORE, 0, 0), harmed(BASELINE, (-0.1, -0.2, -0.1, 0.1)), harmed(PAPER, (None, None)),
            outcome(TRACKED, 0, 0), harmed(GUARDED, (0.1, 0.2, 0.1, -0.1) if i else (None, None)),
        ])
        for i in range(2)
    ]  # fmt: skip
    told = conclusion(results)
    assert "In expectation 75% of the steps of uniform hurt helpfulness, an unknown share of those of mgda-" in told
    assert f"and 25% of those of '{GUARDED}'." in told


def test_one_seed_is_not_called_seeds_and_has_no_spread() -> None:
    single = two_seeds(-0.20, (-0.12, -0.08))[:1]
    assert conclusion(single).startswith("In 1 seed,")
    assert "±" not in result_table(single).text()


def test_the_table_holds_means_and_standard_deviations_of_every_section() -> None:
    table = result_table(two_seeds(-0.20, (-0.12, -0.08)))
    lines = {tuple(row[:2]): row for row in table.rows}
    rows = [row for row in table.rows if row[0].strip() == GUARDED]
    assert len(rows) == 3
    assert len(lines) == len({row[0] for row in table.rows if not row[1]}) + 15
    greedy, sampled, accuracy = (dict(zip(table.header[1:], row[1:], strict=True)) for row in rows)
    assert greedy["worst"] == greedy["helpfulness"] == "-10.0 ± 2.8"
    assert greedy["instructions"] == "+8.0 ± 0.0"
    assert sampled["worst"] == "-20.0 ± 2.8"
    assert accuracy["worst"] == "40.0 ± 2.8"
    assert max(map(len, table.text().splitlines())) <= 120  # fits a terminal


def test_the_table_says_what_was_done_to_the_training_labels() -> None:
    def note(regime: str) -> str:
        return result_table([seed(0, {BASELINE: (0, 0)}, regime)]).note

    assert "training labels: 25% of helpfulness' are flipped." in note("noisehelp")
    assert "training labels: clean." in note("base")


def test_mean_weights_are_shown_for_every_method() -> None:
    table = weight_table(two_seeds(-0.2, (-0.1, -0.1)))
    assert [row[0] for row in table.rows] == [BASELINE, PAPER, TRACKED, GUARDED]
    assert table.rows[0][1:] == ("0.400", "0.300", "0.200", "0.100")


def harmed(label: str, helpfulness: Sequence[float | None]) -> Outcome:
    """A model in whose steps helpfulness had this alignment with its mean gradient, and the others 0.5."""
    steps = [
        {"kind": "train", "step": i + 1, "alignment_of": "mean gradients", "weight": dict.fromkeys(OBJECTIVES, 0.25),
         "alignment": {**dict.fromkeys(OBJECTIVES, 0.5), "helpfulness": value}}
        for i, value in enumerate(helpfulness)
    ]  # fmt: skip
    return replace(outcome(label, 0, 0), history=steps)


def test_the_table_of_harm_counts_the_steps_that_can_tell() -> None:
    both = [(-0.1, -0.2, None, 0.1, 0.2), (-0.1, -0.2, -0.3, -0.4, None)]
    results = [
        SeedResult(i, "base", WORLD, PROMPTS, ["x"] * 3, [
            outcome(BEFORE, 0, 0),
            harmed(BASELINE, both[i]),
            harmed(PAPER, [None] * 5),
        ])
        for i in range(2)
    ]  # fmt: skip
    table = hurt_table(results)
    assert [row[0] for row in table.rows] == [BASELINE, PAPER]
    assert table.rows[0][1:] == ("75.0 ±35.4", *["0.0 ± 0.0"] * 3)
    assert table.rows[1][1:] == ("–", *["0.0 ± 0.0"] * 3)


def test_the_example_is_the_prompt_with_the_most_different_answers() -> None:
    said = {BEFORE: "a b a", BASELINE: "a c a", PAPER: "a d b", GUARDED: "a d a"}
    outcomes = [outcome(label, 0, 0, answers.split()) for label, answers in said.items()]
    table = answer_table(SeedResult(0, "base", WORLD, PROMPTS, ["x", "- river Esk", "y"], outcomes))
    assert table.title.endswith(PROMPTS[1])
    assert [row[-1] for row in table.rows] == ["- river Esk", "b", "c", "d", "d"]


def test_without_matplotlib_the_numbers_are_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = two_seeds(-0.2, (-0.1, -0.1))
    assert write(tmp_path, results, "mogeo demo", 1.0) == [tmp_path / "results.json"]
    assert "pip install 'mogeo[report]'" in caplog.text
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 10


def test_the_page_holds_the_sentence_the_command_and_the_picture(tmp_path: Path) -> None:
    results = two_seeds(-0.2, (-0.1, -0.1))
    write(tmp_path, results, "mogeo demo --seeds 2", 12.3)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "In 2 seeds, against uniform" in page
    assert "Command: mogeo demo --seeds 2; 12 s." in page
    assert page.index('alt="demo"') < page.index('alt="losses"')
