"""Golden responses are the best-rated ones, or those that the data names; a prompt is one question."""

from __future__ import annotations

from typing import Any

import pytest

from mogeo.errors import InputError
from mogeo.judging.golden import Question, golden_questions, golden_response

OBJECTIVES = ("wit", "tact")


def row(*completions: tuple[str, object, object]) -> dict[str, Any]:
    return {
        "instruction": "why?",
        "completions": [
            {
                "response": text,
                "annotations": {"wit": {"Rating": wit}, "tact": {"Rating": tact}, "other": {"Rating": "9"}},
            }
            for text, wit, tact in completions
        ],
    }


@pytest.mark.parametrize(
    ("completions", "golden"),
    [
        ([("a", "1", "4"), ("b", "3", "3.5"), ("c", "5", "1")], "b"),
        ([("a", "1", "4"), ("b", "3", "2")], "a"),  # equal sums: the first
        ([("a", "5", "N/A"), ("b", "2", "1")], "b"),  # a sum without one rating does not compare
        ([("a", "5", None), ("b", 2, 1.5)], "b"),
    ],
)
def test_the_golden_response_has_the_largest_sum(completions: list[tuple[str, object, object]], golden: str) -> None:
    assert golden_response(row(*completions), OBJECTIVES) == golden


def test_a_missing_annotation_passes_the_completion_over() -> None:
    incomplete = row(("a", "5", "5"), ("b", "1", "1"))
    del incomplete["completions"][0]["annotations"]["tact"]
    assert golden_response(incomplete, OBJECTIVES) == "b"
    assert golden_response(incomplete, ("wit",)) == "a"


def test_no_fully_rated_completion_is_an_error_that_quotes_the_prompt() -> None:
    with pytest.raises(InputError, match=r"rated on all of \['wit', 'tact'\] for the prompt 'why\?'"):
        golden_response(row(("a", "5", "N/A")), OBJECTIVES)


def test_an_empty_or_absent_response_is_never_golden() -> None:
    for nothing in ("", "  ", None):
        assert golden_response(row((nothing, "5", "5"), ("b", "1", "1")), OBJECTIVES) == "b"


# ---- questions -------------------------------------------------------------------------------------------------------


def test_the_datas_golden_response_comes_before_its_ratings() -> None:
    rows = [{"instruction": "what?", "golden": "that"}, {**row(("a", "1", "1")), "golden": "best"}]
    assert golden_questions(rows, OBJECTIVES) == [Question("what?", "that"), Question("why?", "best")]


def test_copies_of_a_prompt_are_one_question(caplog) -> None:
    incomplete, whole = row(("a", "N/A", "1")), row(("b", "1", "1"))
    whole["instruction"] = " why? "
    assert golden_questions([incomplete, whole, row(("c", "2", "2"))], OBJECTIVES) == [Question(" why? ", "b")]
    assert not caplog.messages


def test_prompts_without_a_rated_completion_are_left_out_and_counted(caplog) -> None:
    whole = {**row(("b", "1", "1")), "instruction": "how?"}
    assert golden_questions([row(("a", "N/A", "1")), whole], OBJECTIVES) == [Question("how?", "b")]
    assert caplog.messages == ["1 prompts left out: no completion is rated on all of wit, tact"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "why?"}], "row 1: column 'instruction' with a text is needed"),
        ([{"instruction": "why?", "answer": "so"}], "row 1: neither a golden response nor rated completions"),
        ([row(("a", "N/A", "1"))], "no prompt has a golden response"),
    ],
)
def test_rows_that_do_not_do_are_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        golden_questions(rows, OBJECTIVES)
