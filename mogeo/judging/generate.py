"""Let a model respond to prompts, in batches, greedily or by sampling. Knows nothing of judging."""

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
    """Generate one response to each prompt.

    Args:
        model: a causal language model of transformers. It is in training mode afterwards if it was before.
        tokenizer: its tokenizer.
        prompts: the texts to respond to.
        max_new_tokens: a response that has not ended after so many tokens is cut.
        temperature: 0 takes the likeliest token each time (greedy). Above 0, tokens are sampled from
            softmax(logits / temperature), without top-k or top-p: the distribution is the model's own.
        seed: of the sampling. The same seed, prompts and batch size give the same text. torch's global random state is
            neither read nor changed.
        batch_size: responses that are generated at once.
        prompt_format: how prompts are shown to the model, "chat" or "plain", as in `AlignConfig`.
        on_batch: called with the number of responses of each batch, for a progress bar.

    Returns:
        The responses, without prompts and special tokens.
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
    """Generate the tokens that follow B encoded prompts.

    This does not use `model.generate`, which samples from torch's global generator, and takes settings such as top-k
    and penalties from the generation config that comes with a model.

    Returns:
        int64 [B, T] with T <= max_new_tokens; padding after the end of a response.
    """
    stops = torch.tensor(_stop_ids(model, tokenizer), device=model.device)
    pad = pad_token(tokenizer)
    width = max(map(len, encoded))
    # Pad on the left, so that all prompts end in the last column, whose logits give the next token.
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
            logits_to_keep=1,  # all logits of the prompts, [B, T, vocabulary], would take the most memory of all
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
    """The tokenizer's end token, and those in the model's generation config, which alone has Gemma's end of turn."""
    declared: Any = getattr(model.generation_config, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({int(i) for i in (tokenizer.eos_token_id, *declared) if i is not None})
