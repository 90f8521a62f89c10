"""Responses are those of the model, kept in a file, and generated again only where something changed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mogeo.errors import InputError
from mogeo.judging.generate import generate
from mogeo.judging.responses import Generation, Responder, ResponseFile, read_responses, respond

PROMPTS = ["what is red like ?", "what is very very blue like ? and", "what ?"]


@pytest.fixture
def folder(tmp_path: Path, make_model, tokenizer) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_each_prompt_gets_its_own_responses(folder: Path, make_model, tokenizer) -> None:
    responder = Responder("m", str(folder), "chat")
    greedy = Generation(max_new_tokens=6, batch_size=2)
    assert respond(responder, PROMPTS, greedy, "cpu") == [
        generate(make_model(), tokenizer, [prompt], max_new_tokens=6) for prompt in PROMPTS
    ]
    sampled = respond(responder, PROMPTS, replace(greedy, temperature=1.0, samples_per_prompt=3), "cpu")
    assert [len(said) for said in sampled] == [3, 3, 3]
    assert len({text for said in sampled for text in said}) > 3


def test_a_prompt_that_does_not_fit_has_no_response(folder: Path) -> None:
    said = respond(Responder("m", str(folder), "chat"), ["what ?", "and " * 60], Generation(max_new_tokens=6), "cpu")
    assert [s is None for s in said] == [False, True]


def test_the_key_is_that_of_what_matters(folder: Path) -> None:
    responder, greedy = Responder("m", str(folder), "chat"), Generation()
    key = responder.key(PROMPTS, greedy)
    assert key == replace(responder, label="other").key(PROMPTS, greedy)
    assert key == responder.key(PROMPTS, replace(greedy, seed=1, batch_size=2))
    sampled = replace(greedy, temperature=1.0)
    others = [
        replace(responder, prompt_format="plain").key(PROMPTS, greedy),
        responder.key(PROMPTS[::-1], greedy),
        responder.key(PROMPTS, replace(greedy, max_new_tokens=9)),
        responder.key(PROMPTS, sampled),
        responder.key(PROMPTS, replace(sampled, seed=1)),
    ]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert len({key, responder.key(PROMPTS, greedy), *others}) == 7


def test_the_file_gives_back_what_it_holds_under_a_key(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    file = ResponseFile(path)
    file.put("a", "key a", PROMPTS, [["x"], None, ["y"]])
    file.put("b", "key b", PROMPTS, [["z"]] * 3)
    assert ResponseFile(path).get("key a", PROMPTS) == [["x"], None, ["y"]]
    assert ResponseFile(path).get("key c", PROMPTS) is None
    assert ResponseFile(path).get("key a", [*PROMPTS, "new"]) is None
    file.put("a", "key c", PROMPTS, [["n"]] * 3)
    assert ResponseFile(path).get("key a", PROMPTS) is None
    assert read_responses(path, PROMPTS[:1]) == {"b": [["z"]], "a": [["n"]]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"model": "a", "prompt": "p", "responses": []}, "line 1: .* is needed"),
        ({"model": "a", "prompt": "p", "responses": "text"}, "line 1: .* is needed"),
        ({"model": "a", "responses": ["x"]}, "line 1: .* is needed"),
        ({"model": "a", "prompt": "other", "responses": ["x"]}, "'a' has no responses to 1 prompts, such as 'p'"),
    ],
)
def test_foreign_files_are_checked(tmp_path: Path, line: dict, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=message):
        read_responses(path, ["p"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens has to be at least 1"),
        ({"temperature": -1.0}, "--temperature has to be at least 0"),
        ({"temperature": float("nan")}, "--temperature has to be at least 0"),
        ({"samples_per_prompt": 2}, "several samples of a greedy response are one"),
    ],
)
def test_settings_that_cannot_be_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Generation(), **change).check()
