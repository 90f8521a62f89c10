"""Rewards are the classifier's logits for prompt and response, whatever the batch; verdicts follow them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from mogeo.errors import InputError
from mogeo.judging.judge import OVERALL
from mogeo.judging.reward_judge import RewardJudge, RewardSource, load_classifier, reward_logits
from tests.tiny import shape

TEXTS = [("what is red like ?", "warm"), ("what is blue like ?", "cold and very big"), ("what ?", "not small")]


@pytest.fixture
def save(tmp_path: Path, tokenizer: Any) -> Any:
    """Save a random classifier; returns its folder."""

    def make(kind: str = "llama", labels: int = 1, seed: int = 0, chat: bool = True, pad: int | None = 0) -> str:
        if not chat:
            tokenizer.chat_template = None
        torch.manual_seed(seed)
        size = shape(len(tokenizer), num_labels=labels, initializer_range=0.5, pad_token_id=pad)
        if kind == "llama":
            model = LlamaForSequenceClassification(LlamaConfig(**size))
        else:
            model = BertForSequenceClassification(BertConfig(**size))
        folder = tmp_path / f"{kind}{labels}{seed}{chat}{pad}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def independently(folder: str, tokenizer: Any, prompt: str, response: str) -> torch.Tensor:
    """One text at a time, without padding, with the format spelled out."""
    model, _ = load_classifier(folder)
    if tokenizer.chat_template is None:
        ids = tokenizer.convert_tokens_to_ids([*prompt.split(), *response.split()])
    else:
        words = ["<user>", *prompt.split(), "<eos>", "<bot>", *response.split(), "<eos>"]
        ids = tokenizer.convert_tokens_to_ids(words)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("pad", [0, None])
def test_rewards_are_the_models_logits_whatever_the_batch(
    save, tokenizer, kind: str, chat: bool, pad: int | None
) -> None:
    folder = save(kind, labels=3, chat=chat, pad=pad)
    model, loaded = load_classifier(folder)
    expected = torch.stack([independently(folder, tokenizer, *text) for text in TEXTS])
    for batch_size in (1, 2, 16):
        assert torch.allclose(reward_logits(model, loaded, TEXTS, batch_size), expected, atol=1e-5)


def test_verdicts_follow_the_rewards(save, tokenizer) -> None:
    several, single = save(labels=2, seed=1), save(labels=1, seed=2)
    sources = {
        "wit": RewardSource(several, "1"),
        "tact": RewardSource(several, "LABEL_0"),
        OVERALL: RewardSource(single),
    }
    judge = RewardJudge(sources, batch_size=2)
    assert judge.objectives == ("wit", "tact")
    prompts, candidates, references = ["what ?"] * 3, ["warm", "cold", "big"], ["cold", "big", "big"]
    for verdict, c, r in zip(judge.compare(prompts, candidates, references), candidates, references, strict=True):
        many = independently(several, tokenizer, "what ?", c) - independently(several, tokenizer, "what ?", r)
        one = independently(single, tokenizer, "what ?", c) - independently(single, tokenizer, "what ?", r)
        assert verdict.objectives == {"wit": int(many[1].sign()), "tact": int(many[0].sign())}
        assert verdict.overall == int(one.sign())
        reward = independently(single, tokenizer, "what ?", c).item()
        assert verdict.details[OVERALL]["candidate"] == pytest.approx(reward, abs=1e-5)


def test_differences_within_the_margin_are_ties(save, tokenizer) -> None:
    folder = save()
    rewards = [independently(folder, tokenizer, "what ?", text).item() for text in ("warm", "cold")]
    gap = abs(rewards[0] - rewards[1])
    for margin, verdict in ((gap * 1.01, 0), (gap * 0.99, int(math.copysign(1, rewards[0] - rewards[1])))):
        judge = RewardJudge({OVERALL: RewardSource(folder)}, margin=margin)
        assert judge.compare(["what ?"], ["warm"], ["cold"])[0].overall == verdict


def test_overall_without_a_reward_of_its_own_is_what_most_objectives_say(save) -> None:
    judge = RewardJudge({name: RewardSource(save()) for name in "abc"})
    verdict = judge._verdict({"a": (1e6, 0.0), "b": (0.0, 1e-6), "c": (0.0, 1e-6)})
    assert (verdict.objectives, verdict.overall) == ({"a": 1, "b": -1, "c": -1}, -1)
    undecided = judge._verdict({"a": (1.0, 0.0), "b": (math.nan, 0.0), "c": (1.0, 0.0)})
    assert (undecided.objectives["b"], undecided.overall) == (None, None)


def test_a_text_that_does_not_fit_is_not_judged(save) -> None:
    judge = RewardJudge({OVERALL: RewardSource(save())})
    verdicts = judge.compare(["what ?", "what ?"], ["very " * 70, "warm"], ["cold", "cold"])
    assert verdicts[0].overall is None
    assert verdicts[0].details[OVERALL]["candidate"] is None
    assert verdicts[1].overall is not None


def test_mistakes_name_culprit_and_cure(save, tmp_path: Path, make_model, tokenizer) -> None:
    several = save(labels=2)
    with pytest.raises(InputError, match=r"several labels: 0 \(LABEL_0\), 1 \(LABEL_1\); say which"):
        RewardJudge({OVERALL: RewardSource(several)}).compare(["p"], ["a"], ["b"])
    with pytest.raises(InputError, match=r"no label 'wit'; it has 0 \(LABEL_0\)"):
        RewardJudge({OVERALL: RewardSource(several, "wit")}).compare(["p"], ["a"], ["b"])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_classifier(str(tmp_path))
    make_model().save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    with pytest.raises(InputError, match="is no reward model: it lacks the weights of a classifier"):
        load_classifier(str(tmp_path / "language"))
    with pytest.raises(InputError, match="at least 0"):
        RewardJudge({OVERALL: RewardSource(several)}, margin=-1)
