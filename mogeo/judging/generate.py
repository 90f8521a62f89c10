"""Let a model answer prompts: batched, greedy or sampled, decided by a seed. Knows nothing of judging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mogeo.dpo.models import pad_token
from mogeo.dpo.tokens import encode_prompt


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    prompt_format: str = "chat",
    on_batch: Callable[[int], object] | None = None,
) -> list[str]:
    """One response a prompt, without the prompt and without special tokens.

    Args:
        max_new_tokens: where a response that has not ended by itself is cut.
        temperature: 0 takes the likeliest token (greedy); above, tokens are sampled from softmax(logits / temperature),
            without top-k or top-p, so that the model's own distribution is what gets judged.
        seed: of the sampling. Its generator is its own; torch's global random state is neither read nor changed. The
            same seed, prompts and batch size give the same text.
        prompt_format: how the model was trained to see a prompt ("chat" or "plain", as in `AlignConfig`).
        on_batch: called with the number of responses of each batch, for a progress bar.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    responses: list[str] = []
    try:
        for start in range(0, len(prompts), batch_size):
            encoded = [encode_prompt(tokenizer, p, prompt_format) for p in prompts[start : start + batch_size]]
            tokens = _continue(model, tokenizer, encoded, max_new_tokens, temperature, generator)
            responses += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            if on_batch is not None:
                on_batch(len(encoded))
    finally:
        model.train(was_training)
    return responses


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """New tokens [B, T], T <= max_new_tokens; what follows a response's end is padding.

    Our own loop, not `model.generate`: that samples from torch's global generator, and its defaults (top-k, penalties)
    come from whatever generation config a model ships.
    """
    stops = torch.tensor(_stop_ids(model, tokenizer), device=model.device)
    pad = pad_token(tokenizer)
    width = max(map(len, encoded))
    # Padding goes to the left: all prompts end in the same column, and the next token of each comes from the last one.
    tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    done = torch.zeros(len(encoded), dtype=torch.bool, device=model.device)
    new: list[Tensor] = []
    cache = None
    for _ in range(max_new_tokens):
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # else the prompts' logits, [B, T, vocabulary], would be the peak of memory
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature > 0:
            choice = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        else:
            choice = logits.argmax(-1, keepdim=True)
        tokens = choice.masked_fill(done[:, None], pad)
        new.append(tokens)
        done |= torch.isin(tokens[:, 0], stops)
        if bool(done.all()):
            break
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(new, 1)


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and those the model declares besides (Gemma's end of turn is only declared there)."""
    declared: Any = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({int(i) for i in (tokenizer.eos_token_id, *declared) if i is not None})
