"""Preference losses as functions of a pair's margin. Knows no model and no data.

The margin h of a pair says how much more the policy prefers the chosen completion to the rejected one than the
reference model does, in nats:

    h = (log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected))

where log π(y) is the sum of the log-probabilities of the tokens of completion y.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

LossKind = Literal["sigmoid", "ipo", "hinge"]
LOSSES: tuple[str, ...] = get_args(LossKind)


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
