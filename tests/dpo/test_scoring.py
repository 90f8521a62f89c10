"""Accuracy and margins from scores, and scores from a model."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogeo.dpo.scoring import evaluate_preferences, score_sequences
from mogeo.dpo.tokens import TokenizedPreferences, TokenSequence
from tests.profiles import examples

scores = st.lists(st.sampled_from([-3.0, -1.5, 0.0, 2.0]), min_size=6, max_size=6)


@given(scores, scores, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
@examples(80)
def test_accuracy_counts_ties_one_half_and_margin_is_the_mean_reward_difference(policy, reference, pairs):
    tokens = TokenizedPreferences([], {"a": torch.tensor(pairs)}, {}, {})
    measured = evaluate_preferences(torch.tensor(policy), torch.tensor(reference), tokens, beta=0.25)
    rewards = 0.25 * (np.array(policy) - np.array(reference))
    h = np.array([rewards[c] - rewards[r] for c, r in pairs])
    plain = np.array([policy[c] - policy[r] for c, r in pairs])
    assert measured.accuracy["a"] == pytest.approx(np.mean((h > 0) + 0.5 * (h == 0)))
    assert measured.likelihood_accuracy["a"] == pytest.approx(np.mean((plain > 0) + 0.5 * (plain == 0)))
    assert measured.margin["a"] == pytest.approx(h.mean())
    assert measured.pairs == {"a": len(pairs)}


def test_the_reference_itself_scores_one_half_and_no_margin():
    tokens = TokenizedPreferences([], {"a": torch.tensor([[0, 1], [1, 2]])}, {}, {})
    reference = torch.tensor([-1.0, -2.0, -3.0])
    measured = evaluate_preferences(reference, reference, tokens, beta=0.5)
    assert (measured.accuracy, measured.margin) == ({"a": 0.5}, {"a": 0.0})
    assert measured.likelihood_accuracy == {"a": 1.0}


def test_scores_are_those_of_single_sequences_in_evaluation_mode(make_model):
    model = make_model(attention_dropout=0.5).train()
    sequences = [TokenSequence(tuple(range(3, 3 + n)), start) for n, start in [(5, 2), (9, 4), (2, 1), (7, 6), (9, 1)]]
    counted = []
    got = score_sequences(
        model, sequences, batch_size=2, pad=0, precision=contextlib.nullcontext(), on_batch=counted.append
    )
    assert model.training
    assert counted == [2, 2, 1]
    model.eval()
    for sequence, value in zip(sequences, got, strict=True):
        ids = torch.tensor([sequence.ids])
        log_probs = model(ids).logits.double().log_softmax(-1)[0]
        expected = sum(log_probs[t - 1, ids[0, t]] for t in range(sequence.start, len(sequence.ids)))
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
