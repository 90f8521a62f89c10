"""Generation is what the model says, batched or not; net win rates and golden responses are what they promise to be."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mogeo.dpo.errors import InputError
from mogeo.dpo.judge import RatingJudge, generate, golden_response, net_win_rates
from mogeo.dpo.world import World, tiny_model, tokenizer

OBJECTIVES = ("wit", "tact")


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> PreTrainedTokenizerBase:
    return tokenizer()


@pytest.fixture(scope="module")
def model(tokens: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Untrained, but with an end-of-text about as likely as in a trained one: responses end at different lengths."""
    model = tiny_model(tokens, seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight[tokens.eos_token_id] *= 3
    return model.train()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [row["instruction"] for row in World(0).rows(24)]


def ours(model: Any, tokens: PreTrainedTokenizerBase, prompts: Sequence[str], **options: Any) -> list[str]:
    return generate(model, tokens, prompts, **{"max_new_tokens": 20, "prompt_format": "plain", **options})


def test_greedy_is_what_the_model_says_without_padding_or_cache(
    model: PreTrainedModel, tokens: PreTrainedTokenizerBase, prompts: list[str]
) -> None:
    def slowly(prompt: str) -> str:
        ids = tokens(prompt)["input_ids"]
        start = len(ids)
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokens.eos_token_id:
                break
        return tokens.decode(ids[start:], skip_special_tokens=True)

    expected = [slowly(prompt) for prompt in prompts]
    assert len({len(tokens(prompt)["input_ids"]) for prompt in prompts}) > 1  # so that there is padding at all
    assert len({len(text.split()) for text in expected}) > 2  # and responses that end before others
    assert ours(model, tokens, prompts) == expected
    assert ours(model, tokens, prompts, batch_size=5) == expected


def test_sampling_is_decided_by_its_seed_alone(
    model: PreTrainedModel, tokens: PreTrainedTokenizerBase, prompts: list[str]
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ours(model, tokens, prompts, temperature=1.0, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert ours(model, tokens, prompts, temperature=1.0, seed=4) == first
    assert ours(model, tokens, prompts, temperature=1.0, seed=5) != first


def test_the_models_mode_is_kept(model: PreTrainedModel, tokens: PreTrainedTokenizerBase) -> None:
    for mode in (True, False):
        model.train(mode)
        ours(model, tokens, ["List river and crop of Oakham in 9 words."])
        assert model.training is mode
    model.train()


class Scripted:
    """Stands in for a causal model: row i of the batch gets the logits `script[step][i]`."""

    device = torch.device("cpu")
    training = False

    def __init__(self, script: torch.Tensor, eos_token_id: int | list[int] | None = None) -> None:
        self.script, self.calls = script, 0
        self.generation_config = SimpleNamespace(eos_token_id=eos_token_id)

    def train(self, mode: bool = True) -> Scripted:
        return self

    def eval(self) -> Scripted:
        return self

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        return SimpleNamespace(logits=logits[:, None].expand(-1, input_ids.shape[1], -1), past_key_values=None)


def saying(tokens: PreTrainedTokenizerBase, *lines: str, eos_token_id: int | list[int] | None = None) -> Scripted:
    ids = [[tokens.convert_tokens_to_ids(word) for word in line.split()] for line in lines]
    return Scripted(torch.nn.functional.one_hot(torch.tensor(ids).T, len(tokens)).float(), eos_token_id)


def test_a_response_ends_at_its_end_token_and_generation_with_the_last(tokens: PreTrainedTokenizerBase) -> None:
    model = saying(tokens, "the river <eos> is is is", "the crop is rye <eos> maybe")
    assert ours(model, tokens, ["List", "List"]) == ["the river", "the crop is rye"]
    assert model.calls == 5


def test_end_tokens_that_only_the_model_declares_count_too(tokens: PreTrainedTokenizerBase) -> None:
    stop = tokens.convert_tokens_to_ids(".")
    model = saying(tokens, "the river . is", "the crop <eos> is", eos_token_id=[tokens.eos_token_id, stop])
    assert ours(model, tokens, ["List", "List"]) == ["the river .", "the crop"]


def test_a_response_without_end_is_cut(tokens: PreTrainedTokenizerBase) -> None:
    assert ours(saying(tokens, "the the the the"), tokens, ["List"], max_new_tokens=3) == ["the the the"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax_of_the_logits_over_the_temperature(
    tokens: PreTrainedTokenizerBase, temperature: float
) -> None:
    n, words = 20_000, ("river", "crop", "rye", "Esk")
    logits = torch.full((len(tokens),), -torch.inf)
    logits[tokens.convert_tokens_to_ids(list(words))] = torch.tensor([0.0, 0.5, 1.0, 2.0])
    model = Scripted(logits.expand(1, n, -1))
    said = ours(model, tokens, ["List"] * n, max_new_tokens=1, temperature=temperature, batch_size=n)
    shares = torch.tensor([said.count(word) / n for word in words])
    expected = torch.softmax(torch.tensor([0.0, 0.5, 1.0, 2.0]) / temperature, -1)
    assert (shares - expected).abs().max() < 0.015  # four standard errors at most


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge(ratings: dict[str, tuple[float, float]]) -> RatingJudge:
    return RatingJudge(lambda _, response: dict(zip(OBJECTIVES, ratings[response], strict=True)), OBJECTIVES)


def test_net_win_rates_are_wins_minus_losses_over_all() -> None:
    rater = judge({"a": (5, 1), "b": (3, 2), "c": (3, 3.5), "d": (3, 2)})
    #                        wit: win  loss  tie   tie;   tact: loss  win   win   tie;   sum: a 6 > b 5, 5 < 6, 6.5 > 5
    candidates, references = ["a", "b", "c", "d"], ["b", "a", "d", "b"]
    rates = net_win_rates(rater, ["?"] * 4, candidates, references)
    assert rates.objectives == {"wit": 0.0, "tact": 0.25}
    assert rates.overall == 0.25
    assert (rates.worst, rates.worst_objective) == (0.0, "wit")


RATED = st.tuples(st.integers(2, 10), st.integers(2, 10)).map(lambda pair: (pair[0] / 2, pair[1] / 2))


@given(st.lists(st.tuples(RATED, RATED), min_size=1, max_size=30))
def test_exchanging_candidate_and_reference_changes_the_sign(pairs: list[tuple[tuple[float, float], ...]]) -> None:
    rater = judge({f"{i}{side}": pair[side] for i, pair in enumerate(pairs) for side in (0, 1)})
    prompts, left, right = ["?"] * len(pairs), *([f"{i}{side}" for i in range(len(pairs))] for side in (0, 1))
    there, back = net_win_rates(rater, prompts, left, right), net_win_rates(rater, prompts, right, left)
    assert there.overall == -back.overall
    assert there.objectives == {name: -rate for name, rate in back.objectives.items()}
    assert -1 <= there.worst <= min(1, *there.objectives.values())
    assert net_win_rates(rater, prompts, left, left).overall == 0


def test_nothing_to_judge_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        net_win_rates(judge({}), [], [], [])


def test_texts_that_do_not_pair_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        net_win_rates(judge({"a": (1, 1)}), ["?", "?"], ["a", "a"], ["a"])


# ---- golden responses ------------------------------------------------------------------------------------------------


def row(*completions: tuple[str, object, object]) -> dict[str, Any]:
    return {
        "instruction": "why?",
        "completions": [
            {
                "response": text,
                "annotations": {"wit": {"Rating": wit}, "tact": {"Rating": tact}, "other": {"Rating": "9"}},
            }
            for text, wit, tact in completions
        ],
    }


@pytest.mark.parametrize(
    ("completions", "golden"),
    [
        ([("a", "1", "4"), ("b", "3", "3.5"), ("c", "5", "1")], "b"),
        ([("a", "1", "4"), ("b", "3", "2")], "a"),  # equal sums: the first
        ([("a", "5", "N/A"), ("b", "2", "1")], "b"),  # a sum without one rating does not compare
        ([("a", "5", None), ("b", 2, 1.5)], "b"),
    ],
)
def test_the_golden_response_has_the_largest_sum(completions: list[tuple[str, object, object]], golden: str) -> None:
    assert golden_response(row(*completions), OBJECTIVES) == golden


def test_a_missing_annotation_passes_the_completion_over() -> None:
    incomplete = row(("a", "5", "5"), ("b", "1", "1"))
    del incomplete["completions"][0]["annotations"]["tact"]
    assert golden_response(incomplete, OBJECTIVES) == "b"
    assert golden_response(incomplete, ("wit",)) == "a"


def test_no_fully_rated_completion_is_an_error_that_quotes_the_prompt() -> None:
    with pytest.raises(InputError, match=r"rated on all of \['wit', 'tact'\] for the prompt 'why\?'"):
        golden_response(row(("a", "5", "N/A")), OBJECTIVES)


def test_the_worlds_golden_response_beats_or_equals_its_completions() -> None:
    world = World(1)
    rater = RatingJudge(world.rate, ("helpfulness", "honesty", "truthfulness", "instruction_following"))
    rows = world.rows(40)
    asked, golden = [r["instruction"] for r in rows], [golden_response(r, rater.objectives) for r in rows]
    for policy in range(4):
        said = [r["completions"][policy]["response"] for r in rows]
        assert all(verdict.overall <= 0 for verdict in rater.compare(asked, said, golden))
