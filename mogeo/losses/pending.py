"""Window: what `backward` has brought since the last direction, beside gradients.

Knows losses; no buffers and no weighting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mogeo.geometry.constants import constant_tensor
from mogeo.gradients.ranks import value_of
from mogeo.losses.named import Loss

Term = tuple[int, str, Loss]  # index and name of the objective, loss


class Call(NamedTuple):
    """One call of `backward`."""

    terms: list[Term]
    backward: Callable[..., object] | None
    retain_graph: bool


@dataclass
class Window:
    """Gradients between two directions are captured in one way, which is settled when the first comes."""

    #: Weights known beforehand, with which gradients are summed as they come; None: into a row per objective.
    weights: tuple[float, ...] | None
    #: Whether `weights` were found by an earlier step.
    held: bool
    #: Calls to repeat once weights are known; None where gradients themselves are kept.
    calls: list[Call] | None
    loss_sums: dict[int, Tensor] = field(default_factory=dict)
    #: Objectives whose gradients are in the weighted sum.
    contributed: set[int] = field(default_factory=set)

    def add_loss(self, index: int, loss: Tensor) -> Tensor:
        """Add to the sum of an objective's losses; returns the value added, fp64 []."""
        value = value_of(loss.detach()).to(torch.float64).reshape(())
        self.loss_sums[index] = self.loss_sums[index] + value if index in self.loss_sums else value
        return value

    def losses(self, count: int, device: torch.device) -> Tensor:
        """Sums of losses, fp64 [K], NaN where absent."""
        nan = constant_tensor((torch.nan,), torch.float64, device)[0]
        return torch.stack([self.loss_sums.get(k, nan).to(device, non_blocking=True) for k in range(count)])

    def absent(self, count: int) -> tuple[bool, ...]:
        """Which objectives no call brought."""
        return tuple(k not in self.loss_sums for k in range(count))
