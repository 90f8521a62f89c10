"""Load a causal language model and its tokenizer from the hub, a folder or a GGUF file. Knows nothing of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from mogeo.errors import InputError


class LoadedModel(NamedTuple):
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any


def check_model_source(source: str) -> None:
    """Check that a model can be at a path. Quick: nothing is loaded, and the hub is not asked.

    Args:
        source: hub name, folder or GGUF file.

    Raises:
        InputError: nothing is at the path, or what is there is no model.
    """
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
    """Load a model and its tokenizer.

    Args:
        source: hub name, folder, or GGUF file. Transformers dequantises the latter, if it knows the architecture.
        dtype: of the weights. In smaller types than fp32, an update of 5e-7 is rounded away.

    Raises:
        InputError: there is nothing at the path, the hub does not have the model or cannot be reached, or it is not a
            causal language model.
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
        # A missing repository, an unknown architecture, a missing package and a damaged file raise errors of different
        # types, from struct.error to SafetensorError. What the user needs is their text.
        reason = " ".join(str(error).split())
        raise InputError(f"model '{source}' cannot be loaded ({type(error).__name__}: {reason:.300})") from error
    return LoadedModel(model, tokenizer)


def _dequantized(transformers: Any) -> dict[str, Any]:
    """Options that ask for plain weights. Without them, newer transformers take a GGUF model for a quantised one, which
    can neither be trained nor saved.
    """
    config = getattr(transformers, "GgufConfig", None)  # older versions dequantise without being asked
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def prompt_format_for(tokenizer: Any, wanted: str) -> str:
    """The prompt format to use: "plain" in place of "chat" if the tokenizer has no chat template.

    Args:
        tokenizer: of transformers.
        wanted: "chat" or "plain".
    """
    return "plain" if wanted == "chat" and getattr(tokenizer, "chat_template", None) is None else wanted


def context_length(model: Any) -> int | None:
    """How many tokens the model can attend to; None if its config does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def pad_token(tokenizer: Any) -> int:
    """A token id to pad with: the tokenizer's pad token, its end token, or 0. Padding is masked, so any id will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
