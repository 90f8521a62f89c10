"""MODPO: margins against a computation by hand, and the run against plain DPO where the two are the same."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Pair, Preferences, build_preferences, split_rows
from mogeo.dpo.log_probs import sequence_log_probs
from mogeo.dpo.losses import BeforeTraining, dpo_loss
from mogeo.dpo.modpo import MODPO, implicit_rewards, modpo_loss, normalized_weights
from mogeo.dpo.tokens import encode_sequence, tokenize_preferences
from mogeo.dpo.train import Interrupted, align, check_settings
from mogeo.errors import InputError
from tests.interruptions import stop_after
from tests.profiles import examples

CONFIG = AlignConfig(
    weighting="uniform", learning_rate=1e-2, max_steps=3, warmup_steps=1, pairs_per_objective=4, beta=0.3,
    autocast="none", eval_every=0, save_every=0,
)  # fmt: skip


@pytest.fixture
def preferences(rows):
    train, held_out = split_rows(rows, 4, 0)
    return build_preferences(train, pairing="all"), build_preferences(held_out, pairing="all")


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def align_modpo(model, tokenizer, train, held_out, config, **options):
    loss = MODPO(**options)
    return align(model, tokenizer, train, held_out, replace(config, loss=loss), progress=False)


# ---- the formula -----------------------------------------------------------------------------------------------------


@given(
    margins=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8),
    shift=st.floats(-50, 50),
    beta=st.sampled_from([0.1, 0.5]),
    weight=st.sampled_from([0.1, 0.25, 1.0]),
)
@examples(50)
def test_modpo_equals_its_formula_and_is_dpo_on_a_shifted_margin(margins, shift, beta, weight):
    h = torch.tensor(margins, dtype=torch.float64)
    others = torch.full_like(h, shift)
    ours = modpo_loss(h, others, beta, weight)
    by_hand = np.logaddexp(0, -(beta * h.numpy() - shift) / weight)
    np.testing.assert_allclose(ours.numpy(), by_hand, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(ours, dpo_loss(h - shift / beta, beta / weight), rtol=1e-9, atol=1e-12)
    assert torch.equal(modpo_loss(h, torch.zeros_like(h), beta, 1.0), dpo_loss(h, beta))


def test_modpo_refuses_what_is_no_share():
    for weight in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="weight must be in"):
            modpo_loss(torch.zeros(1), torch.zeros(1), 0.1, weight)
    with pytest.raises(ValueError, match="beta must be positive"):
        modpo_loss(torch.zeros(1), torch.zeros(1), 0.0, 0.5)


def test_what_is_known_of_a_pair_is_the_weighted_sum_of_the_other_objectives_reward_differences():
    rewards = {("p", "x"): {"a": 1.0, "b": 2.0, "c": 5.0}, ("p", "y"): {"a": 0.0, "b": 4.0, "c": -1.0}}
    train = Preferences({"a": [Pair("p", "x", "y")], "b": [Pair("p", "y", "x")], "c": [Pair("p", "x", "y")]}, {})
    loss = MODPO([5, 2, 3], rewards=lambda prompt, response: rewards[prompt, response])
    found = loss.for_objectives("abc").prepare(BeforeTraining(None, None, train, train, CONFIG, align))
    # a: .2 (2 - 4) + .3 (5 + 1); b, turned around: .5 (0 - 1) + .3 (-1 - 5); c: .5 (1 - 0) + .2 (2 - 4)
    expected = {"a": 1.4, "b": -2.3, "c": 0.1}
    assert {name: values.tolist() for name, values in found.items()} == {
        name: [pytest.approx(value)] for name, value in expected.items()
    }
    h = torch.tensor([0.3])
    ours = loss.for_objectives("abc")("b", h, 0.1, found["b"])
    assert torch.equal(ours, modpo_loss(h, found["b"], 0.1, 0.2))


# ---- weights and pairs -----------------------------------------------------------------------------------------------


def test_places_of_pairs_are_kept_when_long_ones_are_left_out(tokenizer):
    pairs = [Pair("what", "red", "blue"), Pair("what", "very very very red", "blue"), Pair("is", "it", "red")]
    tokens = tokenize_preferences(Preferences({"a": pairs}, {}), tokenizer, "plain", 4)
    assert tokens.too_long == {"a": 1}
    assert tokens.kept["a"].tolist() == [0, 2]


def test_weights_are_proportions_one_for_each_objective():
    assert normalized_weights(None, "ab") == {"a": 0.5, "b": 0.5}
    assert normalized_weights({"b": 3.0, "a": 1.0}, "ab") == {"a": 0.25, "b": 0.75}
    assert normalized_weights([1.0, 3.0], "ab") == {"a": 0.25, "b": 0.75}
    for wrong in ({"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, [1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(InputError, match="one positive number for each of a, b"):
            normalized_weights(wrong, "ab")


def test_one_objective_is_plain_dpo(make_model, tokenizer, preferences):
    train, held_out = (Preferences({"warm": p.pairs["warm"]}, {}) for p in preferences)
    plain, ours = make_model(), make_model()
    align(plain, tokenizer, train, held_out, CONFIG, progress=False)
    align_modpo(ours, tokenizer, train, held_out, CONFIG)
    assert torch.equal(weights_of(plain), weights_of(ours))


def test_rewards_that_prefer_nothing_make_it_dpo_at_beta_over_w(make_model, tokenizer, preferences):
    train, held_out = preferences
    plain, ours = make_model(), make_model()
    align(plain, tokenizer, train, held_out, replace(CONFIG, beta=2 * CONFIG.beta), progress=False)
    indifferent = {"warm": 1.0, "size": 1.0}
    align_modpo(ours, tokenizer, train, held_out, CONFIG, rewards=lambda p, r: indifferent)
    torch.testing.assert_close(weights_of(ours), weights_of(plain), rtol=0, atol=1e-6)


def test_implicit_rewards_are_those_of_models_trained_on_one_objective_each(make_model, tokenizer, preferences):
    train, held_out = preferences
    start = make_model()
    before = weights_of(start).clone()
    rewards = implicit_rewards(BeforeTraining(start, tokenizer, train, held_out, CONFIG, align))
    assert torch.equal(weights_of(start), before)
    policy = copy.deepcopy(start)
    alone = Preferences({"size": train.pairs["size"]}, {})
    align(policy, tokenizer, alone, Preferences({"size": held_out.pairs["size"]}, {}), CONFIG, progress=False)
    for pair in (train.pairs["size"][0], train.pairs["warm"][-1]):
        sequence = encode_sequence(tokenizer, pair.prompt, pair.chosen, "chat")
        ids = torch.tensor([sequence.ids])
        completion = torch.arange(ids.shape[1]).unsqueeze(0) >= sequence.start
        with torch.no_grad():
            scores = [sequence_log_probs(m.eval(), ids, torch.ones_like(ids), completion) for m in (policy, start)]
        expected = CONFIG.beta * (scores[0] - scores[1]).item()
        assert rewards(pair.prompt, pair.chosen)["size"] == pytest.approx(expected, abs=1e-5)


def test_three_objectives_run_to_their_end_and_the_margins_matter(make_model, tokenizer, rows):
    for row in rows:
        for number, completion in enumerate(row["completions"]):
            completion["annotations"]["third"] = {"Rating": str(number)}
    train, held_out = (build_preferences(part, pairing="all") for part in split_rows(rows, 4, 0))
    weights = {"warm": 2.0, "size": 1.0, "third": 1.0}
    ours, indifferent = make_model(), make_model()
    result = align_modpo(ours, tokenizer, train, held_out, CONFIG, weights=weights)
    assert set(result.after.accuracy) == {"warm", "size", "third"}
    align_modpo(
        indifferent, tokenizer, train, held_out, CONFIG, weights=weights,
        rewards=lambda p, r: dict.fromkeys(weights, 0.0),
    )  # fmt: skip
    assert not torch.allclose(weights_of(ours), weights_of(indifferent), atol=1e-6)


def test_models_for_the_margins_are_trained_in_one_process_and_given_rewards_need_none():
    with pytest.raises(InputError, match=r"modpo\(\) runs in a single process, and there are 2"):
        check_settings(replace(CONFIG, loss="modpo"), ranks=2)
    check_settings(replace(CONFIG, loss=MODPO(rewards=lambda p, r: {})), ["a", "b"], ranks=2)


def test_a_resumed_run_has_the_same_margins_or_is_refused(make_model, tokenizer, preferences, tmp_path, monkeypatch):
    train, held_out = preferences
    config = replace(CONFIG, loss=MODPO(rewards=lambda p, r: {"warm": float(len(r)), "size": 1.0}))
    whole = align(make_model(), tokenizer, train, held_out, config, progress=False)
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        align(make_model(), tokenizer, train, held_out, config, output=tmp_path, progress=False)
    other = replace(CONFIG, loss=MODPO(rewards=lambda p, r: {"warm": 2.0 * len(r), "size": 1.0}))
    with pytest.raises(InputError, match=r"other settings \(data was"):
        align(make_model(), tokenizer, train, held_out, other, output=tmp_path, resume=True, progress=False)
    resumed = align(make_model(), tokenizer, train, held_out, config, output=tmp_path, resume=True, progress=False)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
