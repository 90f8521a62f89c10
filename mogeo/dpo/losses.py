"""From a causal language model and token ids to DPO losses. Must not know about data sets, optimizers or objectives.

Memory is the point of `sequence_log_probs`: the logits of a vocabulary of 50,000 to 256,000 tokens are by far the
largest tensor of a DPO step, so they exist for one chunk of completion tokens at a time, forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, cast, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LossKind = Literal["sigmoid", "ipo", "hinge"]
LOSSES: tuple[str, ...] = get_args(LossKind)

CHUNK_LOGITS = 2**25
"""Logits alive at once by default: 128 MiB in fp32 (682 tokens of a vocabulary of 49,152)."""


def dpo_loss(margins: Tensor, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Preference loss of each pair, from its margin h.

    With log π(y) the sum over the completion's tokens, h = (log π(chosen) − log π_ref(chosen)) − (log π(rejected) −
    log π_ref(rejected)), and ε = `label_smoothing`:

    - ``sigmoid``: −(1 − ε) log σ(βh) − ε log σ(−βh). DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with ε > 0
      the "conservative" loss of Mitchell 2023: a label is wrong with probability ε.
    - ``ipo``: (h − 1/(2β))². Azar et al. 2023 (arXiv 2310.12036), eq. 17, their τ being β. Sums of log-probabilities
      as in the paper, not means over tokens as in some libraries.
    - ``hinge``: max(0, 1 − βh). SLiC (Zhao et al. 2023, arXiv 2305.10425), eq. 1, in DPO's margin. Reaches exactly 0,
      which weightings that divide by the loss cannot take.

    Args:
        margins: h, floating point of any shape; compute it in fp32, where it is stable for |h| of 1e4 and beyond.
        beta: > 0, strength of the pull towards the reference.
        kind: one of `LOSSES`.
        label_smoothing: ε in [0, 0.5); only for ``sigmoid``.

    Returns:
        Loss of each pair, the shape and dtype of `margins`.

    Raises:
        ValueError: an argument outside the ranges above.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing > 0 and kind != "sigmoid":
        raise ValueError(f"label_smoothing is defined for the sigmoid loss only, not for {kind!r}")
    if kind == "sigmoid":
        # logsigmoid, and never log(sigmoid): the latter is −inf from βh = −104 in fp32.
        loss = -(1 - label_smoothing) * F.logsigmoid(beta * margins)
        return loss - label_smoothing * F.logsigmoid(-beta * margins) if label_smoothing > 0 else loss
    if kind == "ipo":
        return (margins - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return F.relu(1 - beta * margins)
    raise ValueError(f"unknown loss {kind!r}: use one of {', '.join(LOSSES)}")


def modpo_loss(margins: Tensor, reward_margins: Tensor, beta: float, weight: float) -> Tensor:
    """MODPO's loss of each pair of objective k: DPO with a margin that the other objectives' rewards claim.

    −log σ( (βh − m) / w_k ) with m = Σ_{i≠k} w_i (r_i(chosen) − r_i(rejected)): where the others prefer the chosen
    completion already, less is asked of h; where they prefer the rejected one, more. With m = 0 and w_k = 1, DPO's.

    Args:
        margins: h, as in `dpo_loss`, of any shape.
        reward_margins: m, of the same shape, in the unit of the rewards; that of βh for the implicit rewards of DPO
            models, r_i = β (log π_i − log π_ref).
        beta: > 0.
        weight: w_k in (0, 1], the objective's share of the weights, which sum to 1.

    Returns:
        Loss of each pair, the shape and dtype of `margins`.

    Raises:
        ValueError: an argument outside the ranges above.

    Source: Zhou et al. 2024, *Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization*
    (arXiv 2310.03708).
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 < weight <= 1:
        raise ValueError(f"weight must be in (0, 1], got {weight}: the weights of all objectives sum to 1")
    return -F.logsigmoid((beta * margins - reward_margins) / weight)


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
    What a family does behind its decoder (Gemma-2's soft-capping, Cohere's and Granite's scaling) is done by its own
    code: see `_split_head`. Where decoder and head cannot be told apart, the model's own full forward is used.

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
    split = _split_head(model)
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
    # One chunk needs no recomputation: its logits are all there is to hold.
    recompute = len(chunks) > 1 and torch.is_grad_enabled()
    scores = [
        checkpoint(_token_log_probs, head, s, t, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else _token_log_probs(head, s, t)
        for s, t in chunks
    ]
    # A scatter to unique places, then a sum: deterministic on every device, which index_add is not.
    per_token = torch.zeros(scored.shape, dtype=torch.float32, device=states.device)
    return per_token.masked_scatter(scored, torch.cat(scores)).sum(dim=1)


def _token_log_probs(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    """fp32 [n]: log-probability of each target token from its hidden state [n, H]."""
    return -F.cross_entropy(head(states).float(), targets, reduction="none")


def _identity(logits: Tensor) -> Tensor:
    return logits


# ---- telling the decoder from the head -------------------------------------------------------------------------------


class _HiddenStates(tuple[Any, ...]):
    """A decoder's output that holds hidden states and nothing else: every other field reads as None."""

    @property
    def last_hidden_state(self) -> Tensor:
        states: Tensor = self[0]
        return states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _HandOver(nn.Module):
    """Stands in the decoder's place and hands over the hidden states that it is given as `inputs_embeds`."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _HiddenStates:
        return _HiddenStates((inputs_embeds,))


_separable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _split_head(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
    """(decoder, hidden states [n, H] → logits [n, V]) of a causal language model, or None where it has no such seam.

    The head is the model's own `forward` with its decoder replaced by `_HandOver`: a shallow copy that shares every
    parameter. Reading `lm_head` and a list of known config fields instead would be silently wrong for the next family
    that scales its logits by another name. The seam is checked once a model, on real numbers.
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
    """Whether head(decoder(x)) is the model's own output on a few tokens, position by position."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()  # dropout would make two runs differ
    try:
        with torch.autocast(device.type, enabled=False):
            probe = torch.arange(5, device=device).unsqueeze(0) % _vocabulary(model)
            expected = model(input_ids=probe, use_cache=False).logits[0]
            states = decoder(input_ids=probe, use_cache=False)[0][0]
            picked = torch.tensor([3, 1], device=device)  # out of order: each position must stand for itself
            difference = (head(states[picked]) - expected[picked]).abs().max()
            eps = max(torch.finfo(expected.dtype).eps, torch.finfo(states.dtype).eps)
            return bool(difference <= 100 * eps * expected.abs().max())
    except Exception:
        # A foreign forward can fail on the stand-in in any way; the full forward is always right, so it is the answer.
        return False
    finally:
        for module, training in modes.items():
            module.training = training


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _vocabulary(model: nn.Module) -> int:
    """Rows of the head's matrix: tokens of the vocabulary, padding included."""
    embeddings = _output_embeddings(model)
    assert embeddings is not None
    return int(cast(Tensor, embeddings.weight).shape[0])
