"""Tokens of preferences: where the completion starts, what is left out, and which pairs come in which step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogeo.dpo.data import Pair, Preferences
from mogeo.dpo.tokens import (
    ShuffledEpochs,
    TokenSequence,
    by_length,
    collate,
    encode_completion,
    encode_prompt,
    tokenize_preferences,
)
from mogeo.errors import InputError
from tests.profiles import examples


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_chat_format_is_the_template_cut_where_the_answer_starts(tokenizer):
    assert words(tokenizer, encode_prompt(tokenizer, "what is red", "chat")) == "<user> what is red <eos> <bot>"
    assert words(tokenizer, encode_completion(tokenizer, "what is red", "very warm", "chat")) == "very warm <eos>"


def test_layout_behind_the_end_of_turn_is_not_part_of_the_answer(tokenizer):
    tokenizer.chat_template += "{{ '\n' }}"
    tokenizer.backend_tokenizer.pre_tokenizer = None  # keep white space: it would become a token
    completion = encode_completion(tokenizer, "what", "warm", "chat")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what"}, {"role": "assistant", "content": "warm"}], tokenize=False
    )
    assert whole.endswith("\n")
    assert "\n" not in "".join(tokenizer.convert_ids_to_tokens(completion))


def test_a_template_that_rewrites_its_prompt_gets_response_and_end_token(tokenizer):
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    assert words(tokenizer, encode_completion(tokenizer, "what", "warm", "chat")) == "warm <eos>"


def test_plain_format_is_prompt_response_and_end_token(tokenizer):
    assert words(tokenizer, encode_prompt(tokenizer, "what is red", "plain")) == "what is red"
    assert words(tokenizer, encode_completion(tokenizer, "what is red", "warm", "plain")) == "warm <eos>"


def test_a_prompt_does_not_end_the_text_even_if_the_tokenizer_closes_every_text(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert words(tokenizer, encode_prompt(tokenizer, "what is", "plain")) == "what is"
    assert words(tokenizer, encode_completion(tokenizer, "what is", "warm", "plain")) == "warm <eos>"


def preferences(**pairs):
    return Preferences({name: [Pair(*p) for p in listed] for name, listed in pairs.items()}, {})


def test_a_completion_is_one_sequence_however_many_pairs_hold_it(tokenizer):
    tokens = tokenize_preferences(
        preferences(
            a=[("what", "warm", "cold"), ("what", "big", "cold")], b=[("what", "cold", "warm"), ("is", "warm", "cold")]
        ),
        tokenizer,
        "plain",
        None,
    )
    assert len(tokens.sequences) == 5
    assert tokens.pairs["a"].tolist() == [[0, 1], [2, 1]]
    assert tokens.pairs["b"].tolist() == [[1, 0], [3, 4]]
    assert all(s.start == 1 for s in tokens.sequences)


def test_pairs_with_a_sequence_too_long_are_left_out_counted_and_not_scored(tokenizer):
    data = preferences(a=[("what is", "warm", "cold"), ("what is", "very very warm", "cold")])
    tokens = tokenize_preferences(data, tokenizer, "plain", 4)
    assert tokens.too_long == {"a": 1}
    assert [len(s.ids) for s in tokens.sequences] == [4, 4]
    with pytest.raises(
        InputError, match=r"objective 'a': all 2 pairs are longer than 3 tokens \(the shortest needs 4\)"
    ):
        tokenize_preferences(data, tokenizer, "plain", 3)


def test_collate_pads_on_the_right_and_marks_completions():
    batch = collate([TokenSequence((5, 6, 7), 1), TokenSequence((8, 9, 10, 11), 3), TokenSequence((4,), 1)], pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11], [4, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.completion_mask.int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 6))
@examples(50)
def test_by_length_visits_every_sequence_once_longest_first(lengths, size):
    groups = list(by_length([TokenSequence((0,) * n, 0) for n in lengths], size))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == size for group in groups[:-1])
    seen = [lengths[i] for group in groups for i in group]
    assert seen == sorted(lengths, reverse=True)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 3))
@examples(60)
def test_every_epoch_holds_every_pair_once_and_depends_on_the_step_alone(n, per_step, seed):
    order = ShuffledEpochs(n, per_step, seed, "a")
    steps = [order(step) for step in range(1, 1 + -(-3 * n // per_step))]
    stream = torch.cat(steps)
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    backwards = ShuffledEpochs(n, per_step, seed, "a")
    for step in reversed(range(len(steps))):
        assert torch.equal(backwards(step + 1), steps[step])


def test_epochs_seeds_and_objectives_have_orders_of_their_own():
    whole = [ShuffledEpochs(50, 50, seed, name)(step).tolist() for seed in (0, 1) for name in "ab" for step in (1, 2)]
    assert len({tuple(order) for order in whole}) == 8
