"""What a weighting is, and the check of what one returns. Knows tensors only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Weighting:
    """Base class of the weightings of this package; subclass it to get the defaults, or pass any callable."""

    #: Whether `__call__` reads the Gram matrix. If not, it may be passed None.
    needs_gram: bool = True
    #: Whether an objective that still has a gradient must have a loss > 0.
    needs_positive_losses: bool = False

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights on the raw gradients, fp64 [K], from the Gram matrix, fp64 [K, K], and the losses, fp64 [K]."""
        raise NotImplementedError

    def constant(self, n_objectives: int) -> tuple[float, ...] | None:
        """The K weights, where they depend on nothing: the optimizer then needs no gradient rows. Else None."""
        return None

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights under a preference p among the objectives, fp64 [K], > 0, of mean 1; by default w·p."""
        return self(gram, losses) * preference

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step: small tensors, numbers, strings, None, lists, and dicts by strings."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def as_weights(weighting: object, returned: Any, losses: Tensor) -> Tensor:
    """What a weighting returned, as fp64 [K] on the device of `losses`; whether it is finite is not looked at.

    Raises:
        RuntimeError: it is not one number per objective.
    """
    try:
        weights = torch.as_tensor(returned, dtype=torch.float64, device=losses.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise bad_weights(weighting, returned, len(losses)) from None
    if weights.shape != losses.shape:
        raise bad_weights(weighting, returned, len(losses))
    return weights


def bad_weights(weighting: object, returned: object, count: int) -> RuntimeError:
    """The error for a weighting that did not return one finite weight per objective."""
    return RuntimeError(
        f"weighting {weighting!r} returned {returned!r} for {count} objectives: it must return one finite weight per "
        "objective"
    )
