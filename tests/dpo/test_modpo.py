"""MODPO: margins against a computation by hand, and the run against plain DPO where the two are the same."""

import copy
from dataclasses import replace

import pytest
import torch

from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Pair, Preferences, build_preferences, split_rows
from mogeo.dpo.log_probs import sequence_log_probs
from mogeo.dpo.modpo import align_modpo, implicit_rewards, normalized_weights, with_margins
from mogeo.dpo.tokens import encode_sequence, tokenize_preferences
from mogeo.dpo.train import align
from mogeo.errors import InputError

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


def test_margin_is_the_weighted_sum_of_the_other_objectives_reward_differences():
    rewards = {("p", "x"): {"a": 1.0, "b": 2.0, "c": 5.0}, ("p", "y"): {"a": 0.0, "b": 4.0, "c": -1.0}}
    train = Preferences({"a": [Pair("p", "x", "y")], "b": [Pair("p", "y", "x")], "c": [Pair("p", "x", "y")]}, {})
    found = with_margins(train, lambda prompt, response: rewards[prompt, response], {"a": 0.5, "b": 0.2, "c": 0.3})
    margins = {name: pair.margin for name, (pair,) in found.pairs.items()}
    # a: .2 (2 - 4) + .3 (5 + 1); b, turned around: .5 (0 - 1) + .3 (-1 - 5); c: .5 (1 - 0) + .2 (2 - 4)
    assert margins == pytest.approx({"a": 1.4, "b": -2.3, "c": 0.1})
    assert [replace(pair, margin=0.0) for (pair,) in found.pairs.values()] == [pair for (pair,) in train.pairs.values()]


def test_margins_stay_with_their_pairs_when_long_ones_are_left_out(tokenizer):
    pairs = [
        Pair("what", "red", "blue", 1.0),
        Pair("what", "very very very red", "blue", 2.0),
        Pair("is", "it", "red", 3.0),
    ]
    tokens = tokenize_preferences(Preferences({"a": pairs}, {}), tokenizer, "plain", 4)
    assert tokens.too_long == {"a": 1}
    assert tokens.margins["a"].tolist() == [1.0, 3.0]


def test_weights_are_proportions_one_for_each_objective():
    assert normalized_weights(None, "ab") == {"a": 0.5, "b": 0.5}
    assert normalized_weights({"b": 3.0, "a": 1.0}, "ab") == {"a": 0.25, "b": 0.75}
    for wrong in ({"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0, "c": 1.0}):
        with pytest.raises(InputError, match="one positive number for each of a, b"):
            normalized_weights(wrong, "ab")


def test_one_objective_is_plain_dpo(make_model, tokenizer, preferences):
    train, held_out = (Preferences({"warm": p.pairs["warm"]}, {}) for p in preferences)
    plain, ours = make_model(), make_model()
    align(plain, tokenizer, train, held_out, CONFIG, progress=False)
    align_modpo(ours, tokenizer, train, held_out, CONFIG, progress=False)
    assert torch.equal(weights_of(plain), weights_of(ours))


def test_rewards_that_prefer_nothing_make_it_dpo_at_beta_over_w(make_model, tokenizer, preferences):
    train, held_out = preferences
    plain, ours = make_model(), make_model()
    align(plain, tokenizer, train, held_out, replace(CONFIG, beta=2 * CONFIG.beta), progress=False)
    indifferent = {"warm": 1.0, "size": 1.0}
    align_modpo(ours, tokenizer, train, held_out, CONFIG, rewards=lambda p, r: indifferent, progress=False)
    torch.testing.assert_close(weights_of(ours), weights_of(plain), rtol=0, atol=1e-6)


def test_implicit_rewards_are_those_of_models_trained_on_one_objective_each(make_model, tokenizer, preferences):
    train, held_out = preferences
    start = make_model()
    before = weights_of(start).clone()
    rewards = implicit_rewards(start, tokenizer, train, held_out, CONFIG)
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
    result = align_modpo(ours, tokenizer, train, held_out, CONFIG, weights=weights, progress=False)
    assert set(result.after.accuracy) == {"warm", "size", "third"}
    align_modpo(
        indifferent, tokenizer, train, held_out, CONFIG, weights=weights, progress=False,
        rewards=lambda p, r: dict.fromkeys(weights, 0.0),
    )  # fmt: skip
    assert not torch.allclose(weights_of(ours), weights_of(indifferent), atol=1e-6)
