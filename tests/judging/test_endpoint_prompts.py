"""What a judge is asked holds both texts, apart; its answer is read to the letter, or not at all."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogeo.judging.endpoint_prompts import ANSWERS, RUBRICS, ask_again, pairwise_messages, read_answer, rubric
from mogeo.judging.judge import OVERALL


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_in_the_form_asked_for_is_read(answer: str) -> None:
    plain = json.dumps({"winner": answer})
    for text in (plain, f"  {plain}\n", f"```json\n{plain}\n```", f"```\n{plain}\n```"):
        assert read_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "", "A", '"A"', "tie", '{"winner": "a"}', '{"winner": "Tie"}', '{"winner": "C"}', '{"winner": null}',
        '{"winner": ["A"]}', '{"winner": "A", "reason": "longer"}', '{"winner": "A", "winner": "B"}', '{"Winner": "A"}',
        '{"winner": "A"} because', 'I say {"winner": "A"}', '{"winner": "A"', "[]", "{}", "null", "1",
        '[["winner", "A"]]', '```json\n{"winner": "A"}\n``` so', '{"winner": "A"}{"winner": "A"}',
        '{"winner": {"winner": "A"}}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_anything_else_is_no_answer(text: str) -> None:
    assert read_answer(text) is None


@given(st.text())
def test_texts_of_any_kind_are_read_without_an_error(text: str) -> None:
    assert read_answer(text) in (None, *ANSWERS)
    assert read_answer(f'{{"winner": "A"}} {text}') == ("A" if not text.strip() else None) or text.isspace()


@given(st.text(), st.text(), st.text())
def test_material_stands_between_tags_that_it_cannot_close(prompt: str, first: str, second: str) -> None:
    system, user = pairwise_messages(rubric("honesty"), prompt, first, second)
    mark = re.search(r"carry the mark (\w{8})\.", system["content"])[1]
    for tag, text in (("prompt", prompt), ("response_A", first), ("response_B", second)):
        assert f"<{tag} {mark}>\n{text}\n</{tag} {mark}>" in user["content"]
        assert mark not in text
    assert RUBRICS["honesty"] in system["content"]


def test_the_mark_depends_on_every_text() -> None:
    texts = [("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b"), ("p", "ab", "")]
    marks = {re.search(r"<prompt (\w+)>", pairwise_messages("r", *t)[1]["content"])[1] for t in texts}
    assert len(marks) == len(texts)
    assert pairwise_messages("r", *texts[0]) == pairwise_messages("r", *texts[0])


def test_every_name_has_a_rubric() -> None:
    assert "clear_style" not in rubric("clear_style")
    assert "clear style" in rubric("clear_style")
    assert rubric(OVERALL) == RUBRICS[OVERALL]
    assert rubric("honesty", {"honesty": "Mine."}) == "Mine."
    assert len(set(RUBRICS.values())) == len(RUBRICS)


def test_asking_again_shows_what_was_said() -> None:
    messages = pairwise_messages("r", "p", "a", "b")
    again = ask_again(messages, "Hm.")
    assert again[:2] == messages
    assert again[2] == {"role": "assistant", "content": "Hm."}
    assert [m["role"] for m in again] == ["system", "user", "assistant", "user"]
