"""The language models and tokenizers of the tests: a few thousand parameters, a few words, and rated rows in them.

Each test makes its own, which takes 10 ms, so that no test can change another's. transformers is imported when first
used: a test file that needs no model starts without it. `rows`, `tokenizer` and `make_model` are fixtures, of the
folders whose conftest.py imports them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    "<user>",
    "<bot>",
    *["what", "is", "it", "like", "?", "red", "blue", "warm", "cold", "big", "small", "very", "not", "and"],
]
TEMPLATE = (
    "{% for m in messages %}{{ ('<user> ' if m.role == 'user' else '<bot> ') + m.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def tiny_tokenizer(words: Sequence[str] = WORDS, template: str | None = TEMPLATE) -> Any:
    """Whole words, split at white space. The first three words are the padding, the end and the unknown one."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    pad, eos, unk = words[:3]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token=eos, unk_token=unk)
    made.chat_template = template
    return made


def shape(words: int = len(WORDS), **options: Any) -> dict[str, Any]:
    """What a tiny model's config says, for Llama and its like."""
    return {
        "vocab_size": words,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **options,
    }


def tiny_llama(words: int = len(WORDS), seed: int = 0, **options: Any) -> Any:
    """A Llama of 4,000 parameters; `options` are its config's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape(words, **options)))


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write both as `from_pretrained` reads them; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> Any:
    """Whole words, split at white space; with a chat template."""
    return tiny_tokenizer()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A Llama with dropout, so that a resumed run has a random state to get right."""

    def make(seed: int = 0, **options: Any) -> Any:
        return tiny_llama(seed=seed, **{"attention_dropout": 0.1, **options})

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """24 prompts; "warm" wants warm answers, "size" big ones."""
    words = ["red", "blue", "very red", "very blue", "not red", "not blue"]
    answers = [("warm big", "5", "5"), ("warm small", "5", "1"), ("cold big", "1", "5"), ("cold small", "1", "1")]
    return [
        {
            "instruction": f"what is {word} like ?" + " and" * extra,
            "completions": [
                {"response": text, "annotations": {"warm": {"Rating": warm}, "size": {"Rating": size}}}
                for text, warm, size in answers
            ],
        }
        for word in words
        for extra in range(4)
    ]
