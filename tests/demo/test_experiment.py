"""An experiment gives every method the same start and data, repeats itself bit for bit, and spoils labels as told."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mogeo.demo.experiment import Outcome, SeedResult, fine_tune, mean_weights, run_seed
from mogeo.demo.recipe import BASELINE, BEFORE, METHODS, PAPER
from mogeo.demo.world import OBJECTIVES, World, tiny_model, tokenizer
from mogeo.dpo.data import Preferences
from mogeo.judging.generate import generate
from tests.recipes import SMALL


@pytest.fixture(scope="module")
def result() -> SeedResult:
    return run_seed(0, SMALL, "noisehelp", extra=("group-dro",))


def outcome(result: SeedResult, label: str) -> Outcome:
    return next(o for o in result.outcomes if o.label == label)


def steps(outcome: Outcome, field: str) -> list[dict[str, float]]:
    return [record[field] for record in outcome.history if record["kind"] == "train"]


def test_every_method_is_there_in_order(result: SeedResult) -> None:
    assert [o.label for o in result.outcomes] == [BEFORE, *METHODS, "group-dro"]
    assert all(len(o.answers) == len(result.prompts) == len(result.golden) == 20 for o in result.outcomes)
    assert all(len(steps(o, "loss")) == 4 for o in result.outcomes[1:])


def test_before_alignment_accuracy_is_one_half_as_align_says_too(result: SeedResult) -> None:
    assert outcome(result, BEFORE).accuracy == dict.fromkeys(OBJECTIVES, 0.5)
    assert outcome(result, BASELINE).history[0]["accuracy"] == dict.fromkeys(OBJECTIVES, 0.5)


def test_all_methods_begin_with_the_same_model_and_pairs(result: SeedResult) -> None:
    first = [steps(o, "loss")[0] for o in result.outcomes[1:]]
    assert all(loss == pytest.approx(math.log(2)) for losses in first for loss in losses.values())
    assert all(losses == first[0] for losses in first)  # bit for bit: the same pairs
    last = {o.label: tuple(steps(o, "loss")[-1].values()) for o in result.outcomes[1:]}
    assert len({last[PAPER], last[BASELINE], last["group-dro"]}) == 3  # and yet they do not go the same way


def test_all_methods_tell_whom_they_hurt_in_expectation(result: SeedResult) -> None:
    assert {of for o in result.outcomes[1:] for of in steps(o, "alignment_of")} == {"mean gradients"}


@pytest.mark.slow
def test_to_tell_it_changes_a_method_by_rounding_at_most(result: SeedResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, BASELINE, {"weighting": "uniform"})
    monkeypatch.setitem(METHODS, PAPER, {"weighting": "mgda-decoupled"})
    untracked = run_seed(0, SMALL, "noisehelp")
    for label in (BASELINE, PAPER):
        one, other = (steps(outcome(of, label), "loss") for of in (result, untracked))
        for mine, its in zip(one, other, strict=True):
            assert mine == pytest.approx(its, rel=1e-5)
    assert mean_weights(outcome(result, BASELINE), OBJECTIVES) == [0.25] * 4


def numbers(result: SeedResult) -> list[Any]:
    return [
        (o.label, o.weighting, o.greedy, o.sampled, o.accuracy, o.answers, steps(o, "loss") if o.history else None)
        for o in result.outcomes
    ]


@pytest.mark.slow
def test_a_seed_repeats_itself_whatever_the_global_state(result: SeedResult) -> None:
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    assert numbers(run_seed(0, SMALL, "noisehelp", extra=("group-dro",))) == numbers(result)
    assert torch.get_num_threads() == threads


def test_a_regime_touches_the_training_labels_of_helpfulness_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def given(regime: str) -> tuple[Preferences, Preferences]:
        seen: list[Preferences] = []

        def align(model: Any, tokenizer: Any, train: Preferences, held_out: Preferences, *_: Any, **__: Any) -> None:
            seen.extend((train, held_out))
            raise Stop

        monkeypatch.setattr("mogeo.demo.experiment.align", align)
        with pytest.raises(Stop):
            run_seed(0, replace(SMALL, sft_steps=1), regime)
        return seen[0], seen[1]

    (clean, held_out), (noisy, held_out_of_noisy) = given("base"), given("noisehelp")
    assert held_out_of_noisy == held_out
    assert {name for name in OBJECTIVES if clean.pairs[name] != noisy.pairs[name]} == {"helpfulness"}
    prompts = {pair.prompt for pairs in clean.pairs.values() for pair in pairs}
    assert prompts.isdisjoint(pair.prompt for pairs in held_out.pairs.values() for pair in pairs)


def test_supervised_training_teaches_the_completions() -> None:
    """Memorising a few answers: to reproduce them, prompts, ends and padding must all be where they belong."""
    rows = [{**row, "completions": row["completions"][-1:]} for row in World(0).rows(6)]
    tokens = tokenizer()
    model = tiny_model(tokens, seed=0)
    told: list[str] = []
    recipe = replace(SMALL, sft_steps=150, sft_batch=6, sft_learning_rate=1e-2)
    fine_tune(model, tokens, rows, recipe, seed=0, tell=told.append)
    assert [text.split(":")[0] for text in told] == [f"supervised step {n} of 150" for n in (37, 74, 111, 148)]
    answers = generate(model, tokens, [r["instruction"] for r in rows], max_new_tokens=26, prompt_format="plain")
    assert answers == [row["completions"][0]["response"] for row in rows]
