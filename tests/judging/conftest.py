"""The fixtures of this folder."""

from tests.tiny import make_model, rows, tokenizer  # noqa: F401
