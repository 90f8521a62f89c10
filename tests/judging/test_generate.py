"""Generation is what the model says, batched or not, and sampling what its distribution says."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mogeo.demo.world import World, tiny_model, tokenizer
from mogeo.judging.generate import generate
from tests.profiles import slow_but


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


@pytest.mark.parametrize("temperature", slow_but([0.5, 1.0, 2.0], 0.5))
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


def test_progress_is_told_batch_by_batch(tokens: PreTrainedTokenizerBase) -> None:
    told: list[int] = []
    script = torch.nn.functional.one_hot(torch.tensor([[tokens.eos_token_id] * 2]), len(tokens)).float()
    ours(Scripted(script[:, :1].expand(1, 2, -1)), tokens, ["List"] * 4, batch_size=2, on_batch=told.append)
    assert told == [2, 2]
