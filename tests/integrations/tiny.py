"""A model, a tokenizer and labelled pairs small enough for a trainer to run in a second, and that trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from tests.tiny import TEMPLATE, WORDS, tiny_llama, tiny_tokenizer

NAMES = ["warm", "size", "brief", "calm"]


def make_tokenizer(chat: bool = False) -> Any:
    return tiny_tokenizer(template=TEMPLATE if chat else None)


def make_model(seed: int = 0, **options: Any) -> Any:
    wide_apart = {"intermediate_size": 24, "num_hidden_layers": 2, "initializer_range": 0.3}
    return tiny_llama(seed=seed, **{**wide_apart, **options})


def make_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct pairs, chosen and rejected of different lengths."""
    draw = random.Random(seed)

    def answer() -> str:
        return " " + " ".join(draw.choices(WORDS[10:], k=draw.randint(1, 5)))

    return [
        {"prompt": f"what is it like ?{' and' * i}", "chosen": answer(), "rejected": answer()} for i in range(count)
    ]


def with_labels(pairs: list[dict[str, Any]], labels: dict[str, list[int]]) -> Dataset:
    return Dataset.from_list(
        [{**pair, **{name: column[i] for name, column in labels.items()}} for i, pair in enumerate(pairs)]
    )


def agreeing(count: int, names: list[str]) -> Dataset:
    """Pairs on which all objectives agree with "chosen"."""
    return with_labels(make_pairs(count), {name: [1] * count for name in names})


def config(folder: Path | str, **options: Any) -> DPOConfig:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "beta": 0.5,
    }
    return DPOConfig(str(folder), **{**settings, **options})


def make_trainer(
    kind: type[DPOTrainer],
    folder: Path | str,
    dataset: Any,
    *,
    options: dict[str, Any] | None = None,
    chat: bool = False,
    reference: bool = True,
    seed: int = 0,
    **named: Any,
) -> Any:
    """A trainer of a fresh tiny model against the same model as reference."""
    return kind(
        model=named.pop("model", None) or make_model(seed),
        ref_model=make_model(seed) if reference else None,
        args=config(folder, **(options or {})),
        train_dataset=dataset,
        processing_class=make_tokenizer(chat),
        **named,
    )


def parameters(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
