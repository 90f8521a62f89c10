"""Every form of data becomes the same labelled rows, and what has none of the forms is told what it lacks."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("datasets")

from datasets import Dataset

from mogeo.errors import InputError
from mogeo.integrations.trl_data import LABELS, labelled_rows, merged_sets

NAMES = ["warm", "size"]
A, B, C = ({"prompt": "p", "chosen": f"{x}+", "rejected": f"{x}-"} for x in "abc")


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def rows_of(dataset: Any, **options: Any) -> list[dict[str, Any]]:
    return list(labelled_rows(dataset, NAMES, "train", **{"chat": False, "seed": 0, **options}))


def test_label_columns() -> None:
    rows = Dataset.from_list(
        [{**A, "warm": 1, "size": -1}, {**B, "warm": 0, "size": 0}, {**C, "warm": 1.0, "size": 0.0}]
    )
    assert rows_of(rows) == [{**A, LABELS: [1, -1]}, {**C, LABELS: [1, 0]}]
    assert rows_of(rows.to_iterable_dataset()) == rows_of(rows)


def test_what_has_labels_already_stays() -> None:
    rows = labelled_rows(Dataset.from_list([{**A, "warm": 1, "size": 1}]), NAMES, "train", chat=False, seed=0)
    assert labelled_rows(rows, NAMES, "train", chat=False, seed=0) is rows


def test_sets_are_merged_pair_by_pair() -> None:
    rows = merged_sets({"warm": [A, B], "size": Dataset.from_list([swapped(B), C])}, NAMES, "train")
    assert list(rows) == [{**A, LABELS: [1, 0]}, {**B, LABELS: [1, -1]}, {**C, LABELS: [0, 1]}]


def test_a_pair_that_a_set_holds_twice_stays_two_rows() -> None:
    rows = merged_sets({"size": [A], "warm": [A, A, swapped(A)]}, NAMES, "train")
    assert list(rows) == [{**A, LABELS: [1, 1]}, {**A, LABELS: [1, 0]}, {**swapped(A), LABELS: [1, 0]}]


def test_the_same_answers_to_another_prompt_are_another_pair() -> None:
    rows = merged_sets({"warm": [A], "size": [{**A, "prompt": "q"}]}, NAMES, "train")
    assert [row[LABELS] for row in rows] == [[1, 0], [0, 1]]


def test_pairs_of_messages() -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    row = {"prompt": [{"role": "user", "content": "p"}], "chosen": said("a"), "rejected": said("b")}
    assert list(merged_sets({"warm": [row], "size": [swapped(row)]}, NAMES, "train")) == [{**row, LABELS: [1, -1]}]


ULTRAFEEDBACK = [
    {
        "instruction": "p",
        "completions": [
            {"response": "x", "annotations": {"warm": {"Rating": "5"}, "size": {"Rating": "1"}}},
            {"response": "y", "annotations": {"warm": {"Rating": "1"}, "size": {"Rating": "4"}}},
        ],
    },
    {
        "instruction": "q",
        "completions": [
            {"response": "x", "annotations": {"warm": {"Rating": "5"}, "size": {"Rating": "N/A"}}},
            {"response": "y", "annotations": {"warm": {"Rating": "1"}, "size": {"Rating": "4"}}},
        ],
    },
]


def test_ultrafeedback() -> None:
    plain = rows_of(Dataset.from_list(ULTRAFEEDBACK))
    assert plain == [
        {"prompt": "p", "chosen": "x", "rejected": "y", LABELS: [1, -1]},
        {"prompt": "q", "chosen": "x", "rejected": "y", LABELS: [1, 0]},
    ]
    chat = rows_of(Dataset.from_list(ULTRAFEEDBACK), chat=True)
    assert chat[0]["prompt"] == [{"role": "user", "content": "p"}]
    assert chat[0]["chosen"] == [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**A, "warm": 1, "size": 2}], "row 1: column 'size' holds 2. A label is +1"),
        ([{**A, "warm": 1, "size": 1}, {**A, "warm": None, "size": 1}], "row 2: column 'warm' holds None"),
        ([{**A, "warm": 1, "size": 0}], "no pair with a preference for size"),
        ([{**A, "warm": 1}], "no column for size; it has prompt, chosen, rejected, warm"),
        ([{"text": "a"}], "has the columns text: pass pairs (prompt, chosen, rejected) with one column"),
        ([{**A, LABELS: [1, 1, 1]}], "has 3 labels a row"),
        ([], "holds no rows"),
    ],
)
def test_errors_name_the_row_and_the_cure(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        rows_of(Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"warm": [A]}, "missing ['size'], unknown []"),
        ({"warm": [A], "size": [A], "calm": [A]}, "unknown ['calm']"),
        ({"warm": [A], "size": []}, "no pair with a preference for size"),
        ({"warm": [A], "size": [{"prompt": "p", "chosen": "a"}]}, "objective 'size', row 1, has the columns prompt"),
        ({"warm": [A], "size": "a name"}, "objective 'size' is a str: pass a Dataset"),
        ({"warm": [A], "size": Dataset.from_list([A]).to_iterable_dataset()}, "is a IterableDataset"),
    ],
)
def test_errors_of_sets_name_the_objective(sets: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        merged_sets(sets, NAMES, "train")


def test_a_stream_of_ultrafeedback_is_refused() -> None:
    with pytest.raises(InputError, match="streams UltraFeedback's rows: load it whole"):
        rows_of(Dataset.from_list(ULTRAFEEDBACK).to_iterable_dataset())
