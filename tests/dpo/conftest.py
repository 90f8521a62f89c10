"""A model, a tokenizer and rated rows small enough to train in a second."""

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    "<user>",
    "<bot>",
    "what",
    "is",
    "it",
    "like",
    "?",
    "red",
    "blue",
    "warm",
    "cold",
    "big",
    "small",
    "very",
    "not",
    "and",
]
TEMPLATE = (
    "{% for m in messages %}{{ ('<user> ' if m.role == 'user' else '<bot> ') + m.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    """Whole words, split at white space; with a chat template."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def make_model():
    """A Llama of 4,000 parameters with dropout, so that a resumed run has a random state to get right."""

    def make(seed=0, **options):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            **{"attention_dropout": 0.1, **options},
        )
        return LlamaForCausalLM(config)

    return make


@pytest.fixture
def rows():
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
