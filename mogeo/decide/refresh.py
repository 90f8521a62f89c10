"""HeldWeights: the weights of the last solve, for the steps that do without one.

Knows weights; no gradients and no optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeldWeights:
    """Weights that are solved every `refresh_every`-th step, and hold in between.

    An objective that took no part in a solve keeps the weight it had; one that never did has the mean of the others.

    Args:
        refresh_every: T ≥ 1, steps from one solve to the next.

    Attributes:
        age: steps since the last solve, counted from 0 at the step that solved.

    Source: as in Navon et al., *Multi-task learning as a bargaining game* (Nash-MTL), 2022, section 5, and PSMGD.
    """

    def __init__(self, refresh_every: int) -> None:
        if refresh_every < 1 or int(refresh_every) != refresh_every:
            raise ValueError(
                f"refresh_every={refresh_every}: pass a whole number of steps, 1 for a solve at every step"
            )
        self.refresh_every = int(refresh_every)
        self.forget()

    def forget(self) -> None:
        """Let the next step solve."""
        self.age = 0
        self._weights: Tensor | None = None  # fp64 [K], NaN where never solved
        self._read: tuple[float, ...] | None = None

    def known(self) -> tuple[float, ...] | None:
        """The weights of the coming step, or None if it has to solve. Reads them from the device once per solve."""
        if self._weights is None or self.age + 1 >= self.refresh_every:
            return None
        if self._read is None:
            weights = self._weights.tolist()
            solved = [weight for weight in weights if weight == weight]
            mean = sum(solved) / max(1, len(solved))
            self._read = tuple(weight if weight == weight else mean for weight in weights)
        # Nothing to hold on to: every objective was solved, or left out.
        return self._read if any(self._read) else None

    def solved(self, weights: Tensor, took_part: Tensor) -> None:
        """Hold new weights, fp64 [K], of the objectives that took part, bool [K]."""
        if self.refresh_every == 1:
            self.forget()  # or weights from before could be held once T is raised again
            return
        before = torch.full_like(weights, torch.nan) if self._weights is None else self._weights.to(weights.device)
        self._weights = torch.where(took_part & weights.isfinite(), weights, before)
        self._read, self.age = None, 0

    def used(self) -> None:
        """A step went by without a solve."""
        self.age += 1

    def state_dict(self) -> dict[str, Any]:
        """Weights and age."""
        return {"age": self.age, "weights": None if self._weights is None else self._weights.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.forget()
        self.age = int(state_dict["age"])
        if state_dict["weights"] is not None:
            self._weights = torch.tensor(state_dict["weights"], dtype=torch.float64)
