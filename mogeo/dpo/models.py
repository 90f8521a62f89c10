"""Load a causal language model and its tokenizer from a hub name, a folder or a GGUF file; nothing of training here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from mogeo.errors import InputError


class LoadedModel(NamedTuple):
    """A model in the precision asked for, and its tokenizer."""

    model: Any
    tokenizer: Any


def check_model_source(source: str) -> None:
    """Raise InputError for a path at which nothing lies or that is not a model. Cheap: loads nothing, asks no hub."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model '{source}' is a file; name its folder, or a .gguf file")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            cure = f"name the file in it: {path / found[0]}" if found else "a model saved by save_pretrained has one"
            raise InputError(f"model folder '{source}' has no config.json; {cure}")
    elif path.suffix == ".gguf" or path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2:
        raise InputError(f"model '{source}' does not exist")


def load_model(source: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Model and tokenizer, the weights in `dtype`: by default fp32, in which an update of 5e-7 is not rounded away.

    A GGUF file is dequantised by transformers, whose list of supported architectures holds.

    Raises:
        InputError: nothing lies at the path, the hub lacks the model or cannot be reached, or it is no language model.
    """
    check_model_source(source)
    place, options = source, {}
    if Path(source).suffix == ".gguf":
        place, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, **options, **(_dequantized(transformers) if options else {})
        )
    except Exception as error:
        # A missing repository, an unknown architecture, a missing package, a damaged file: each raises a type of its
        # own, from struct.error to SafetensorError, and none tells the user more than its text.
        reason = " ".join(str(error).split())
        raise InputError(f"model '{source}' cannot be loaded ({type(error).__name__}: {reason:.300})") from error
    return LoadedModel(model, tokenizer)


def _dequantized(transformers: Any) -> dict[str, Any]:
    """Ask for plain weights: without, newer transformers keep a mark of quantisation that bars training and saving."""
    config = getattr(transformers, "GgufConfig", None)  # older versions dequantise without being asked
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def prompt_format_for(tokenizer: Any, wanted: str) -> str:
    """The format to use: `chat` needs a chat template; a tokenizer without one gets `plain`."""
    return "plain" if wanted == "chat" and getattr(tokenizer, "chat_template", None) is None else wanted


def context_length(model: Any) -> int | None:
    """Tokens that the model can attend to, or None where its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def pad_token(tokenizer: Any) -> int:
    """A token id to pad with. Padding is masked, so any one does; 0 where a tokenizer names neither pad nor end."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
