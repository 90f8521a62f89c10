"""A judge made of reward models: sequence classifiers of transformers, whose logits are taken as rewards.

Knows models and texts; nothing of who generated the texts, of files or of rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mogeo.dpo.models import context_length, pad_token
from mogeo.errors import InputError
from mogeo.judging.judge import OVERALL, Verdict, sign


@dataclass(frozen=True)
class RewardSource:
    """Where the reward for one question (an objective, or "overall") comes from.

    Attributes:
        model: hub name or folder of a sequence classifier.
        label: which of its logits is the reward, as an index or the name of a label; None: it has only one.
    """

    model: str
    label: str | None = None


class RewardJudge:
    """Judges by rewards: the response with the higher reward wins.

    If there is no reward for "overall", the response that wins more objectives wins overall. Rewards are not added up,
    since those of different models have different scales.

    Args:
        sources: question -> where its reward comes from. "overall" may be one of them.
        margin: rewards that differ by at most this much are a tie; in units of the logits.
        batch_size: texts that go through a model at once.
        device: of the models, which are loaded one after the other.
        dtype: of their weights.

    Raises:
        InputError: there is no source, or the margin is negative.
    """

    def __init__(
        self,
        sources: Mapping[str, RewardSource],
        *,
        margin: float = 0.0,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not sources:
            raise InputError("no reward model: name one with --reward-model")
        if not margin >= 0:
            raise InputError(f"the margin of a tie has to be at least 0, got {margin}")
        self.sources, self.margin, self.batch_size = dict(sources), margin, batch_size
        self.device, self.dtype = torch.device(device), dtype
        self.objectives = tuple(name for name in sources if name != OVERALL)

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        """One verdict per prompt, in order. It is None if a text does not fit the model, or a reward is not a number.

        Raises:
            InputError: a model cannot be loaded, or does not have the label.
        """
        pairs = [*zip(prompts, candidates, strict=True), *zip(prompts, references, strict=True)]
        distinct = list(dict.fromkeys(pairs))
        found: dict[str, dict[tuple[str, str], float]] = {}
        for model in dict.fromkeys(source.model for source in self.sources.values()):
            labels = {name: source.label for name, source in self.sources.items() if source.model == model}
            logits, columns = self._logits(model, distinct, labels)
            for name, column in columns.items():
                found[name] = dict(zip(distinct, logits[:, column].tolist(), strict=True))
        return [
            self._verdict({name: (reward[p, c], reward[p, r]) for name, reward in found.items()})
            for p, c, r in zip(prompts, candidates, references, strict=True)
        ]

    def _verdict(self, rewards: Mapping[str, tuple[float, float]]) -> Verdict:
        verdicts = {name: self._winner(*rewards[name]) for name in self.sources}
        objectives = {name: verdicts[name] for name in self.objectives}
        overall = verdicts[OVERALL] if OVERALL in verdicts else _majority(list(objectives.values()))
        details = {
            name: {"candidate": _number(candidate), "reference": _number(reference)}
            for name, (candidate, reference) in rewards.items()
        }
        return Verdict(objectives, overall, details)

    def _winner(self, candidate: float, reference: float) -> int | None:
        difference = candidate - reference
        if math.isnan(difference):
            return None
        return 0 if abs(difference) <= self.margin else sign(difference)

    def _logits(
        self, source: str, texts: Sequence[tuple[str, str]], labels: Mapping[str, str | None]
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """The logits of some texts, fp32 [texts, labels of the model]; and the column that each question is about."""
        model, tokenizer = load_classifier(source, self.dtype)
        columns = {name: label_index(source, model.config, label) for name, label in labels.items()}
        return reward_logits(model.to(self.device), tokenizer, texts, self.batch_size), columns


def load_classifier(source: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a sequence classifier, in evaluation mode, and its tokenizer.

    Args:
        source: hub name or folder.
        dtype: of the weights.

    Raises:
        InputError: it cannot be loaded, or is no classifier.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # the hub, damaged files and unknown architectures raise errors of many types
        reason = " ".join(str(error).split())
        raise InputError(f"reward model '{source}' cannot be loaded ({type(error).__name__}: {reason:.300})") from error
    # A language model can be loaded as a classifier, too. Its head is then random, and its rewards would be noise.
    if told["missing_keys"]:
        some = ", ".join(sorted(told["missing_keys"])[:3])
        raise InputError(f"'{source}' is no reward model: it lacks the weights of a classifier ({some})")
    return model.eval(), tokenizer


def check_classifier_source(source: str) -> None:
    """Check that a model can be at a path. Quick: nothing is loaded, and the hub is not asked.

    Args:
        source: hub name or folder.

    Raises:
        InputError: nothing is at the path, or what is there is no model.
    """
    path = Path(source)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise InputError(f"reward model '{source}' is no folder with a config.json")
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2):
        raise InputError(f"reward model '{source}' does not exist")


def label_index(source: str, config: Any, label: str | None) -> int:
    """The column of a label in a classifier's logits.

    Args:
        source: of the model, for the message.
        config: of the model.
        label: name or index; None: the only one there is.

    Raises:
        InputError: there is no such label, or several and none was named. The message lists them.
    """
    names = {int(i): str(name) for i, name in config.id2label.items()}
    there = ", ".join(f"{i} ({name})" for i, name in sorted(names.items()))
    if label is None:
        if len(names) == 1:
            return 0
        raise InputError(
            f"reward model '{source}' has several labels: {there}; say which with --reward-label NAME=LABEL"
        )
    for i, name in names.items():
        if label == name:
            return i
    if label.isdigit() and int(label) in names:
        return int(label)
    raise InputError(f"reward model '{source}' has no label '{label}'; it has {there}")


@torch.no_grad()
def reward_logits(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], batch_size: int) -> torch.Tensor:
    """The logits of a classifier for pairs of prompt and response.

    With a chat template, a pair is shown as a turn of the user and one of the assistant. Without one, it is the
    tokenizer's pair of two texts, which encoders such as DeBERTa are trained on. A pair that is longer than the model's
    context is not cut, since that would be another response: its logits are NaN.

    Args:
        model: a sequence classifier, in evaluation mode.
        tokenizer: its tokenizer.
        texts: (prompt, response).
        batch_size: pairs that go through the model at once.

    Returns:
        fp32 [len(texts), labels], on the CPU.
    """
    encoded = [_encode(tokenizer, *pair) for pair in texts]
    limit = context_length(model)
    fitting = [i for i, item in enumerate(encoded) if limit is None or len(item["input_ids"]) <= limit]
    fitting.sort(key=lambda i: -len(encoded[i]["input_ids"]))
    logits = torch.full((len(texts), model.config.num_labels), torch.nan)
    # A decoder needs a pad token to find where each text of a batch ends. Without one, it takes one text at a time.
    size = batch_size if model.config.get_text_config().pad_token_id is not None else 1
    for start in range(0, len(fitting), size):
        chosen = fitting[start : start + size]
        batch = _padded([encoded[i] for i in chosen], model, tokenizer)
        logits[chosen] = model(**batch).logits.float().cpu()
    return logits


def _encode(tokenizer: Any, prompt: str, response: str) -> dict[str, list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        return dict(tokenizer(prompt, response))
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return dict(tokenizer(text, add_special_tokens=False))


def _padded(items: Sequence[Mapping[str, list[int]]], model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """One batch, padded on the right: with the model's pad token, and with 0 in masks and token types."""
    width = max(len(item["input_ids"]) for item in items)
    own = model.config.get_text_config().pad_token_id
    fill = {"input_ids": pad_token(tokenizer) if own is None else own}
    return {
        name: torch.tensor([[*item[name], *[fill.get(name, 0)] * (width - len(item[name]))] for item in items]).to(
            model.device
        )
        for name in items[0]
    }


def _majority(verdicts: Sequence[int | None]) -> int | None:
    """Who won more often, or None if one verdict is missing."""
    judged = [v for v in verdicts if v is not None]
    return sign(sum(judged)) if len(judged) == len(verdicts) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
