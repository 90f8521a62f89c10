"""Log-probabilities of completions under a causal language model. Knows no data sets, losses or optimizers.

`sequence_log_probs` is written to save memory. The logits of a vocabulary of 50,000 to 256,000 tokens are by far the
largest tensor of a DPO step, so they are computed for one chunk of completion tokens at a time, forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25
"""How many logits are in memory at once by default: 128 MiB in fp32, or 682 tokens of a vocabulary of 49,152."""


def sequence_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum of the log-probabilities of each sequence's completion tokens, given all tokens before them.

    The decoder runs once over the batch; the language-model head then runs on the completion's positions only, a chunk
    at a time, and each chunk is recomputed in backward. The log-softmax is in fp32 whatever the model or autocast use.
    What some model families do to their logits (Gemma-2 caps them, Cohere and Granite scale them) is left to the
    model's own code, see `split_head`. If decoder and head cannot be separated, the model's own forward is used, with
    all logits in memory.

    Args:
        model: a causal language model of transformers (`AutoModelForCausalLM`).
        input_ids: int64 [B, T], padded on the right.
        attention_mask: [B, T], 1 or True for real tokens.
        completion_mask: bool [B, T], True for the tokens to score. The first token of a sequence cannot be scored.
        chunk_tokens: tokens whose logits are held at once; None: as many as make `CHUNK_LOGITS` logits.

    Returns:
        fp32 [B], in nats; differentiable with respect to the model's parameters.
    """
    scored = completion_mask[:, 1:].bool()  # position t predicts token t + 1
    targets = input_ids[:, 1:][scored]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    split = split_head(model)
    if split is None:
        head: Callable[[Tensor], Tensor] = _identity
        states = model(**inputs).logits[:, :-1][scored]
        vocabulary = states.shape[-1]
    else:
        decoder, head = split
        states = decoder(**inputs)[0][:, :-1][scored]
        vocabulary = _vocabulary(model)

    chunk = chunk_tokens or max(1, CHUNK_LOGITS // vocabulary)
    chunks = list(zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True))
    # With a single chunk, computing its logits again in backward would save nothing.
    recompute = len(chunks) > 1 and torch.is_grad_enabled()
    scores = [
        checkpoint(_token_log_probs, head, s, t, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else _token_log_probs(head, s, t)
        for s, t in chunks
    ]
    # Scatter to distinct places and then sum: unlike index_add, this is deterministic on every device.
    per_token = torch.zeros(scored.shape, dtype=torch.float32, device=states.device)
    return per_token.masked_scatter(scored, torch.cat(scores)).sum(dim=1)


def _token_log_probs(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    """fp32 [n]: log-probability of each target token from its hidden state [n, H]."""
    return -F.cross_entropy(head(states).float(), targets, reduction="none")


def _identity(logits: Tensor) -> Tensor:
    return logits


# ---- telling the decoder from the head -------------------------------------------------------------------------------


class _HiddenStates(tuple[Any, ...]):
    """Stands for a decoder's output: holds the hidden states, and returns None for every other field."""

    @property
    def last_hidden_state(self) -> Tensor:
        states: Tensor = self[0]
        return states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _HandOver(nn.Module):
    """Takes the decoder's place in a model, and returns the hidden states that it is given as `inputs_embeds`."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _HiddenStates:
        return _HiddenStates((inputs_embeds,))


_separable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def split_head(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
    """Separate a causal language model into its decoder and its head.

    The head is the model's own `forward`, run on a shallow copy (which shares every parameter) whose decoder is
    replaced by `_HandOver`. Calling `lm_head` and reading the known config fields for scaling instead would be silently
    wrong for the next family that scales its logits under another name. Whether decoder and head together give the
    model's own logits is checked on a few tokens, once per model.

    Args:
        model: a causal language model of transformers.

    Returns:
        The decoder, and a function from hidden states [n, H] to logits [n, V]; or None if the model cannot be
        separated.
    """
    decoder = getattr(model, "base_model", None)
    place = [name for name, module in model._modules.items() if module is decoder]
    if not isinstance(decoder, nn.Module) or not place or _output_embeddings(model) is None:
        return None
    twin = copy.copy(model)
    twin._modules = {**model._modules, place[0]: _HandOver()}

    def head(states: Tensor) -> Tensor:
        logits: Tensor = twin(inputs_embeds=states.unsqueeze(0)).logits
        return logits.squeeze(0)

    if model not in _separable:
        _separable[model] = _seam_holds(model, decoder, head)
    return (decoder, head) if _separable[model] else None


@torch.no_grad()
def _seam_holds(model: nn.Module, decoder: nn.Module, head: Callable[[Tensor], Tensor]) -> bool:
    """Whether the head gives the model's own logits, from the decoder's hidden states of single positions."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()  # dropout would make two runs differ
    try:
        with torch.autocast(device.type, enabled=False):
            probe = torch.arange(5, device=device).unsqueeze(0) % _vocabulary(model)
            expected = model(input_ids=probe, use_cache=False).logits[0]
            states = decoder(input_ids=probe, use_cache=False)[0][0]
            picked = torch.tensor([3, 1], device=device)  # out of order: no position may depend on its neighbours
            difference = (head(states[picked]) - expected[picked]).abs().max()
            eps = max(torch.finfo(expected.dtype).eps, torch.finfo(states.dtype).eps)
            return bool(difference <= 100 * eps * expected.abs().max())
    except Exception:
        # An unknown model's forward can fail on the stand-in with any exception. Its full forward always works.
        return False
    finally:
        for module, training in modes.items():
            module.training = training


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _vocabulary(model: nn.Module) -> int:
    """Number of rows of the head's matrix: the tokens of the vocabulary, and rows that only pad it."""
    embeddings = _output_embeddings(model)
    assert embeddings is not None
    return int(cast(Tensor, embeddings.weight).shape[0])
