"""Preference losses: from the margins of an objective's pairs to their losses. Knows no engines and no optimizer.

The margin h of a pair says how much more the policy prefers the chosen completion to the rejected one than the
reference model does, in nats:

    h = (log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected))

where log π(y) is the sum of the log-probabilities of the tokens of completion y. `PreferenceLoss` is what `align`
takes, `DPO` the usual one; `mogeo.dpo.modpo` holds another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Preferences

LossKind = Literal["sigmoid", "ipo", "hinge"]
KINDS: tuple[str, ...] = get_args(LossKind)
"""The kinds of `dpo_loss`."""


@dataclass(frozen=True)
class BeforeTraining:
    """What a loss may use before the first step: all that `align` was given, and `align` itself.

    Attributes:
        model: the model to be aligned, which is the reference. A loss must leave it as it is.
        tokenizer: its tokenizer.
        train: the training pairs.
        held_out: the held-out pairs.
        config: the settings of the run.
        align: `mogeo.dpo.train.align`, for a loss that trains models of its own.
    """

    model: Any
    tokenizer: Any
    train: Preferences
    held_out: Preferences
    config: AlignConfig
    align: Callable[..., Any]


class PreferenceLoss(ABC):
    """How the margins of pairs become losses.

    A subclass says in `__call__` what the loss of a pair is. If it has to know something about each pair beforehand, it
    computes that in `prepare`. Its `repr` is written to `run.json`, so it has to name all settings.

    Attributes:
        reaches_zero: whether the loss can be exactly 0, by which some weightings would divide.
        one_process: whether `prepare` works in a single process only.
    """

    reaches_zero: bool = False
    one_process: bool = False

    @classmethod
    def named(cls, name: str, numbers: Sequence[float]) -> PreferenceLoss:
        """The loss that a name with numbers in brackets asks for, as in "sigmoid(0.1)".

        Args:
            name: as in `mogeo.dpo.loss_names.LOSSES`.
            numbers: those in the brackets.

        Raises:
            ValueError: the numbers do not suit the loss.
        """
        return cls(*numbers)

    def for_objectives(self, objectives: Sequence[str]) -> PreferenceLoss:
        """The same loss, once the names of the objectives are known.

        Raises:
            InputError: the loss does not fit these objectives.
        """
        return self

    def prepare(self, before: BeforeTraining) -> Mapping[str, Tensor]:
        """Compute one number for each training pair, before the first step.

        Returns:
            Objective -> fp32 [n], for the n pairs in `before.train.pairs[objective]`; empty if the loss needs none.
        """
        return {}

    @abstractmethod
    def __call__(self, objective: str, margins: Tensor, beta: float, prepared: Tensor | None) -> Tensor:
        """The losses of some pairs of an objective.

        Args:
            objective: its name.
            margins: h, fp32 [n], differentiable.
            beta: strength of the pull towards the reference, > 0.
            prepared: the numbers of these pairs from `prepare`, fp32 [n]; None if it returned none.

        Returns:
            fp32 [n].
        """


class DPO(PreferenceLoss):
    """The losses of `dpo_loss`, which need nothing but the margin.

    Args:
        kind: "sigmoid", "ipo" or "hinge".
        label_smoothing: share of labels taken to be wrong, in [0, 0.5); only for "sigmoid".

    Raises:
        ValueError: there is no such kind, or the share does not suit it.
    """

    def __init__(self, kind: str = "sigmoid", label_smoothing: float = 0.0) -> None:
        self.kind, self.label_smoothing = kind, label_smoothing
        self.reaches_zero = kind == "hinge"
        dpo_loss(torch.zeros(()), 1.0, kind, label_smoothing)  # raises for what does not suit

    @classmethod
    def named(cls, name: str, numbers: Sequence[float]) -> DPO:
        return cls(name, *numbers)

    def __call__(self, objective: str, margins: Tensor, beta: float, prepared: Tensor | None) -> Tensor:
        return dpo_loss(margins, beta, self.kind, self.label_smoothing)

    def __repr__(self) -> str:
        return f"{self.kind}({self.label_smoothing:g})" if self.label_smoothing else self.kind


def dpo_loss(margins: Tensor, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Preference loss of each pair, from its margin h (see the top of this file), with ε = `label_smoothing`:

    - ``sigmoid``: −(1 − ε) log σ(βh) − ε log σ(−βh). DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with ε > 0
      the "conservative" loss of Mitchell 2023: a label is wrong with probability ε.
    - ``ipo``: (h − 1/(2β))². Azar et al. 2023 (arXiv 2310.12036), eq. 17, their τ being β. Sums of log-probabilities
      as in the paper, not means over tokens as in some libraries.
    - ``hinge``: max(0, 1 − βh). SLiC (Zhao et al. 2023, arXiv 2305.10425), eq. 1, in DPO's margin. Reaches exactly 0,
      which weightings that divide by the loss cannot take.

    Args:
        margins: h, floating point of any shape; compute it in fp32, where it is stable for |h| of 1e4 and beyond.
        beta: > 0, strength of the pull towards the reference.
        kind: one of `KINDS`.
        label_smoothing: ε in [0, 0.5); only for ``sigmoid``.

    Returns:
        Loss of each pair, the shape and dtype of `margins`.

    Raises:
        ValueError: an argument outside the ranges above.
    """
    if not beta > 0:
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
    raise ValueError(f"unknown loss {kind!r}: use one of {', '.join(KINDS)}")
