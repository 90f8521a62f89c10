"""Fixed weights. Knows no Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo.geometry.constants import constant_tensor
from mogeo.weightings.base import Weighting


class LinearScalarization(Weighting):
    """Fixed weights w = p / Σp; without `preference`, uniform: w = 1/K. Costs what plain training costs.

    Args:
        preference: p [K], ≥ 0 and not all zero.
    """

    needs_gram = False
    deterministic = True

    def __init__(self, preference: Sequence[float] | None = None) -> None:
        self.preference = None if preference is None else tuple(float(p) for p in preference)
        if self.preference is not None and not (
            all(math.isfinite(p) and p >= 0 for p in self.preference) and sum(self.preference) > 0
        ):
            raise ValueError(f"preference {self.preference}: weights must be finite, ≥ 0, and not all zero")

    def constant(self, n_objectives: int) -> tuple[float, ...]:
        """w = p / Σp."""
        preference = self.preference or (1.0,) * n_objectives
        if len(preference) != n_objectives:
            raise ValueError(f"{self!r} has {len(preference)} weights for {n_objectives} objectives: pass one for each")
        return tuple(p / sum(preference) for p in preference)

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """w = p / Σp."""
        return constant_tensor(self.constant(losses.numel()), torch.float64, losses.device).clone()

    def __repr__(self) -> str:
        return "uniform" if self.preference is None else f"linear({', '.join(f'{p:g}' for p in self.preference)})"
