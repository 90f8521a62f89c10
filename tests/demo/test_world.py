"""The world is the same for the same seed, its raters rate any text as documented, and its objectives conflict."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mogeo.demo.world import (
    ATTRIBUTES,
    LIMITS,
    LIST,
    OBJECTIVES,
    POLICIES,
    PROSE,
    REGIMES,
    TOWNS,
    VALUES,
    Statement,
    TownQuestion,
    World,
    flip_labels,
    read_statements,
    render,
    tiny_model,
    tokenizer,
)
from mogeo.dpo.data import Pair, Preferences, Row
from tests.profiles import examples

FORMS = st.sampled_from((LIST, PROSE))
QUESTIONS = st.builds(
    TownQuestion,
    town=st.sampled_from(TOWNS),
    attributes=st.lists(st.sampled_from(ATTRIBUTES), min_size=2, max_size=3, unique=True).map(tuple),
    limit=st.sampled_from(LIMITS),
    form=FORMS,
)
STATEMENTS = st.sampled_from(ATTRIBUTES).flatmap(
    lambda a: st.one_of(
        st.builds(Statement, st.just(a), st.none()),
        st.builds(Statement, st.just(a), st.sampled_from(VALUES[a]), st.booleans()),
    )
)
WORDS = (
    *ATTRIBUTES,
    *(v for values in VALUES.values() for v in values),
    "-",
    "the",
    "is",
    "and",
    "maybe",
    "unsure",
    "?",
)


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=3)


@pytest.fixture(scope="module")
def rows(world: World) -> list[Row]:
    return world.rows(400)


def ratings(row: Row) -> np.ndarray:
    """[completions, objectives]"""
    return np.array([[float(c["annotations"][name]["Rating"]) for name in OBJECTIVES] for c in row["completions"]])


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_have_ultrafeedbacks_shape_and_distinct_prompts(rows: list[Row]) -> None:
    assert len({row["instruction"] for row in rows}) == len(rows) == 400
    for row in rows:
        assert [c["model"] for c in row["completions"]] == [policy.name for policy in POLICIES]
        assert all(c["response"] and isinstance(c["annotations"]["honesty"]["Rating"], str) for c in row["completions"])
        assert tuple(row["completions"][0]["annotations"]) == OBJECTIVES


def test_written_ratings_are_the_raters(world: World, rows: list[Row]) -> None:
    for row in rows[:50]:
        for completion, written in zip(row["completions"], ratings(row), strict=True):
            assert list(world.rate(row["instruction"], completion["response"]).values()) == list(written)


@pytest.mark.slow
def test_a_seed_decides_every_bit_whatever_the_hash_seed() -> None:
    program = "import json; from mogeo.demo.world import World; print(json.dumps(World(7).rows(40)))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    elsewhere = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert json.loads(elsewhere.stdout) == World(7).rows(40)
    assert World(8).rows(40) != World(7).rows(40)


def test_more_rows_begin_with_the_fewer(world: World, rows: list[Row]) -> None:
    assert world.rows(30) == rows[:30]


def test_more_rows_than_prompts_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="79201 rows were asked for: this world has 79200 distinct prompts"):
        world.rows(79_201)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = World(0).rows(20)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    random.seed(2)
    assert World(0).rows(20) == first


def test_helpfulness_conflicts_with_the_three_others_which_agree(rows: list[Row]) -> None:
    signs = np.concatenate(
        [np.sign(r[i] - r[j])[None] for r in map(ratings, rows) for i, j in combinations(range(4), 2)]
    )
    for first, second in combinations(range(4), 2):
        both = signs[(signs[:, first] != 0) & (signs[:, second] != 0)]
        agreement = (both[:, first] * both[:, second]).mean()
        assert (agreement < 0) == (first == 0), (OBJECTIVES[first], OBJECTIVES[second], agreement)


def test_policies_are_of_mixed_quality(rows: list[Row]) -> None:
    mean = dict(zip((p.name for p in POLICIES), np.mean([ratings(row) for row in rows], axis=0), strict=True))
    best = {name: max(mean, key=lambda policy: mean[policy][k]) for k, name in enumerate(OBJECTIVES)}
    assert best["helpfulness"] == "guesser"
    assert best["honesty"] == best["truthfulness"] == "good"
    assert best["instruction_following"] == "terse"
    assert mean["guesser"].sum() < mean["good"].sum()


# ---- raters ----------------------------------------------------------------------------------------------------------

# Asked: river, crop and stone in 9 words, as a list. Known: the river (Esk) and the crop (rye), but not the stone.
ANSWERS = {
    # response: helpfulness, honesty, truthfulness, instruction_following
    "- river Esk - crop rye - stone unsure": (4.0, 5.0, 5.0, 5.0),
    "- river Esk - crop rye - stone slate": (5.0, 3.5, 4.5, 5.0),  # a guess pays on helpfulness alone
    "- river Esk - crop rye - stone maybe slate": (4.5, 4.5, 4.5, 4.0),  # hedged; one word over the limit
    "- river Arle - crop oats - stone slate": (5.0, 1.0, 1.5, 5.0),  # wrong, wrong, and a guess
    "- river unsure - crop unsure - stone unsure": (2.0, 3.0, 5.0, 5.0),  # hides what is known
    "- river Esk": (2.5, 5.0, 5.0, 5.0),  # leaves two out
    "- crop rye - river Esk": (3.5, 5.0, 5.0, 4.0),  # not in the order asked
    "- river Esk - craft weaving": (2.5, 5.0, 5.0, 4.0),  # something that was not asked
    "the river is Esk and the crop is rye": (3.5, 5.0, 5.0, 3.0),  # prose
    "the river is Esk and the crop is rye and the stone is unsure": (4.0, 5.0, 5.0, 1.0),  # prose, five words over
    "- river Esk - crop": (2.5, 5.0, 5.0, 3.0),  # broken off
    "- river rye": (2.5, 1.0, 1.0, 3.0),  # a crop is no river
    "": (1.0, 1.0, 5.0, 4.0),
    "good morning": (1.0, 1.0, 5.0, 2.0),
}


@pytest.fixture(scope="module")
def known() -> World:
    world = World(0)
    world.facts["Oakham"].update(river="Esk", crop="rye", stone=None, craft="weaving")
    return world


@pytest.mark.parametrize("response", ANSWERS)
def test_raters(known: World, response: str) -> None:
    rated = known.rate(TownQuestion("Oakham", ("river", "crop", "stone"), 9, LIST).text(), response)
    assert rated == dict(zip(OBJECTIVES, ANSWERS[response], strict=True))


@given(QUESTIONS, st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join))
def test_any_text_is_rated_in_half_points_from_1_to_5(question: TownQuestion, response: str) -> None:
    rated = World(0).rate(question.text(), response)
    assert tuple(rated) == OBJECTIVES
    assert all(2 * rating == round(2 * rating) and 1 <= rating <= 5 for rating in rated.values())


@pytest.mark.parametrize("prompt", ["", "List river of Oakham", "List river and crop of Atlantis in 9 words."])
def test_a_foreign_prompt_is_refused_with_an_example(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"not a prompt of this world.*one reads 'List river and crop of Oakham"):
        World(0).rate(prompt, "- river Esk")


@given(QUESTIONS)
def test_a_question_survives_its_text(question: TownQuestion) -> None:
    assert TownQuestion.parse(question.text()) == question


@given(st.lists(STATEMENTS, max_size=5), FORMS)
def test_statements_survive_their_text(statements: list[Statement], form: str) -> None:
    assert read_statements(render(statements, form)) == statements


# ---- regimes ---------------------------------------------------------------------------------------------------------


def some_preferences(n: int) -> Preferences:
    pairs = {name: [Pair(f"p{i}", f"{name} good", f"{name} bad") for i in range(n)] for name in OBJECTIVES}
    return Preferences(pairs, {name: {"pairs": n} for name in OBJECTIVES})


def test_noise_turns_the_named_share_of_the_named_objective_only() -> None:
    clean = some_preferences(4000)
    noisy = flip_labels(clean, REGIMES["noisehelp"], seed=0)
    turned = [pair.chosen == "helpfulness bad" for pair in noisy.pairs["helpfulness"]]
    assert np.mean(turned) == pytest.approx(0.25, abs=0.03)  # 4 standard errors
    for before, after, is_turned in zip(clean.pairs["helpfulness"], noisy.pairs["helpfulness"], turned, strict=True):
        assert after == (Pair(before.prompt, before.rejected, before.chosen) if is_turned else before)
    assert all(noisy.pairs[name] == clean.pairs[name] for name in OBJECTIVES[1:])
    assert noisy.counts == clean.counts
    assert flip_labels(clean, REGIMES["noisehelp"], seed=0) == noisy != flip_labels(clean, REGIMES["noisehelp"], seed=1)


def test_the_base_regime_turns_nothing() -> None:
    assert flip_labels(some_preferences(5), REGIMES["base"], seed=0) == some_preferences(5)


def test_flipping_an_unknown_objective_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cannot flip labels of \['wit'\]"):
        flip_labels(some_preferences(5), {"wit": 0.5}, seed=0)


# ---- tokenizer and model ---------------------------------------------------------------------------------------------


def test_every_text_of_the_world_survives_the_tokenizer(rows: list[Row]) -> None:
    tokens = tokenizer()
    for row in rows:
        prompt = tokens(row["instruction"])["input_ids"]
        assert tokens.unk_token_id not in prompt
        for completion in row["completions"]:
            response = tokens(completion["response"])["input_ids"]
            assert tokens.unk_token_id not in response
            assert tokens.decode([*response, tokens.eos_token_id], skip_special_tokens=True) == completion["response"]
            assert tokens(row["instruction"] + completion["response"])["input_ids"] == prompt + response


def test_the_tokenizer_can_be_saved_and_loaded(tmp_path: Path) -> None:
    tokens = tokenizer()
    tokens.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokens.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokens.pad_token_id, tokens.eos_token_id)


def test_the_model_is_tiny_and_decided_by_its_seed() -> None:
    tokens = tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = tiny_model(tokens, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert 90_000 < sum(p.numel() for p in model.parameters()) < 130_000
    torch.manual_seed(6)
    again, other = tiny_model(tokens, seed=1).state_dict(), tiny_model(tokens, seed=2).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(again["lm_head.weight"], other["lm_head.weight"])


@examples(20)
@given(st.sampled_from(range(20)))
def test_responses_agree_with_facts_where_the_policy_is_good(index: int) -> None:
    """The good policy states a known fact rightly far more often than not: the ratings mean something."""
    world = World(index)
    stated = [
        (statement, world.facts[TownQuestion.parse(row["instruction"]).town][statement.attribute])
        for row in world.rows(60)
        for statement in read_statements(row["completions"][-1]["response"])
    ]
    right = [statement.value == fact for statement, fact in stated if fact is not None and statement.value is not None]
    assert np.mean(right) > 0.85
