"""Controls in prompts, and pairs ranked by how well completions obey them, against a computation by hand."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from alignment.cdpo import (
    CONTROLLED,
    control,
    controlled_completions,
    controlled_preferences,
    controlled_prompt,
    with_controls,
)

from mogeo.dpo.data import Pair, Preferences
from mogeo.errors import InputError
from tests.profiles import examples

NAMES = ("help", "truth")


def row_of(*rated, prompt="what ?"):
    """A row with completions "0", "1", ... of these (help, truth) ratings."""
    completions = [
        {"response": str(i), "annotations": {n: {"Rating": str(v)} for n, v in zip(NAMES, values, strict=True)}}
        for i, values in enumerate(rated)
    ]
    return {"instruction": prompt, "completions": completions}


def test_a_prompt_asks_for_whole_ratings():
    assert controlled_prompt("what ?", {"help": 5.0, "truth": 2.5}) == "<help:5> <truth:3> what ?"
    assert control("help", 2.4) == "<help:2>"


def test_supervised_rows_ask_for_what_they_got():
    row = row_of((5, 1), ("N/A", 2), (2.5, 4))
    alone = controlled_completions([row], NAMES)
    assert [r["instruction"] for r in alone] == ["<help:5> <truth:1> what ?", "<help:3> <truth:4> what ?"]
    assert [[c["response"] for c in r["completions"]] for r in alone] == [["0"], ["2"]]


RATING = st.integers(1, 5)


@given(
    rated=st.lists(st.tuples(RATING, RATING), min_size=2, max_size=5, unique=True),
    seed=st.integers(0, 100),
    weight=st.floats(0.5, 2),
    strength=st.floats(0.5, 2),
    controlled=st.sampled_from([0.0, 0.5, 1.0]),
)
@examples(100)
def test_the_chosen_of_each_pair_is_worth_more_under_the_controls_of_its_prompt(
    rated, seed, weight, strength, controlled
):
    weights = {"help": weight, "truth": 1.0}
    try:
        found = controlled_preferences(
            [row_of(*rated)], NAMES, weights=weights, strength=strength, controlled=controlled, seed=seed
        )
    except InputError:  # all completions are worth the same
        return

    def worth(pair, response):
        total = 0.0
        for name, rating in zip(NAMES, rated[int(response)], strict=True):
            asked = [token for token in pair.prompt.split() if token.startswith(f"<{name}:")]
            value = -strength * abs(rating - int(asked[0][len(name) + 2 : -1])) if asked else rating
            total += weights[name] * value
        return total

    assert found.objectives == (CONTROLLED,)
    for pair in found.pairs[CONTROLLED]:
        assert worth(pair, pair.chosen) > worth(pair, pair.rejected)
        assert pair.prompt.count("<") == {0.0: 0, 1.0: 2}.get(controlled, pair.prompt.count("<"))


def test_one_completion_of_the_row_meets_its_controls_in_full():
    rows = [row_of((5, 1), (1, 5), (3, 3), prompt=f"p{i}") for i in range(40)]
    found = controlled_preferences(rows, NAMES, pairing="best-worst")
    asked = {pair.prompt.rsplit(" ", 1)[0]: pair.chosen for pair in found.pairs[CONTROLLED]}
    assert asked == {"<help:5> <truth:1>": "0", "<help:1> <truth:5>": "1", "<help:3> <truth:3>": "2"}


def test_draws_depend_on_the_seed_and_the_prompt_alone():
    rows = [row_of((5, 1), (1, 5), prompt=f"p{i}") for i in range(20)]
    first, second = controlled_preferences(rows, NAMES, seed=1), controlled_preferences(rows[10:], NAMES, seed=1)
    assert first.pairs[CONTROLLED][10:] == second.pairs[CONTROLLED]
    assert first != controlled_preferences(rows, NAMES, seed=2)


def test_held_out_pairs_are_put_under_the_ratings_asked_for():
    pairs = Preferences({"help": [Pair("what ?", "a", "b")]}, {})
    assert with_controls(pairs, {"help": 5}).pairs == {"help": [Pair("<help:5> what ?", "a", "b")]}


def test_rows_without_a_fully_rated_completion_are_refused():
    row = row_of((5, "N/A"))
    with pytest.raises(InputError, match="rated on all of help, truth"):
        controlled_completions([row], NAMES)
    with pytest.raises(InputError, match="rated on all of help, truth"):
        controlled_preferences([row], NAMES)
