"""GroupDRO: weights that follow the losses. Knows no Gram matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mogeo.weightings.base import Weighting


class GroupDRO(Weighting):
    """Exponentiated-gradient weights on the losses: q ← q·exp(η L) / Σ, w = q, from q₀ = 1/K. Needs no Gram matrix.

    Args:
        step_size: η, in units of 1/loss.

    Source: Sagawa et al., *Distributionally robust neural networks for group shifts*, 2020, algorithm 1.
    """

    needs_gram = False
    deterministic = True

    def __init__(self, step_size: float = 0.01) -> None:
        if not (math.isfinite(step_size) and step_size >= 0):
            raise ValueError(f"step_size {step_size}: pass a finite number ≥ 0")
        self.step_size = step_size
        self._log_weights: Tensor | None = None

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Advance q by one step and return it."""
        losses = losses.to(torch.float64)
        if self._log_weights is None:
            self._log_weights = torch.zeros_like(losses)
        if self._log_weights.shape != losses.shape:
            raise ValueError(f"{self!r} holds {self._log_weights.numel()} weights, but got {losses.numel()} losses")
        self._log_weights = self._log_weights.to(losses.device)
        # In logarithms nothing overflows; in place, so that a replayed CUDA graph goes on from where it stood.
        self._log_weights.copy_(torch.log_softmax(self._log_weights + self.step_size * losses, 0))
        return self._log_weights.exp()

    def state_dict(self) -> dict[str, Any]:
        """log q, K numbers; none before the first step."""
        return {"log_weights": [] if self._log_weights is None else self._log_weights.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore log q."""
        saved = list(state_dict["log_weights"])
        self._log_weights = torch.tensor(saved, dtype=torch.float64) if saved else None

    def __repr__(self) -> str:
        return f"group-dro({self.step_size:g})"
