"""What a weighting is, what it returns, and how a plain function becomes one. Knows tensors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """The weights of a step, and what is known of them."""

    #: Weights on the raw gradients, fp64 [K].
    weights: Tensor
    #: Duality gap of the problem that was solved, fp64 []; None where none was solved.
    gap: Tensor | None = None
    #: `mogeo.Status` of that problem, int64 []; None where none was solved.
    status: Tensor | None = None
    #: μ, what a guarantee of descent added to the weights, fp64 [K]; None without one.
    correction: Tensor | None = None
    #: `mogeo.Status` of the correction, int64 []; None without one.
    correction_status: Tensor | None = None


class Weighting:
    """Base class of weightings: subclass it and write `__call__`, or pass any callable (gram, losses) -> weights.

    An optimizer asks `constant`, then `solve`. What wraps another weighting (`mogeo.decide.steering.Steered`,
    `mogeo.decide.harmless.Harmless`) answers both from the answers of the weighting inside.
    """

    #: Whether `__call__` reads the Gram matrix. If not, it may be passed None.
    needs_gram: bool = True
    #: Whether an objective that still has a gradient must have a loss > 0.
    needs_positive_losses: bool = False
    #: Whether `completed` does anything.
    completes: bool = False
    #: Whether `steered` divides by the preference after it has applied the floor.
    prefers_after_floor: bool = False
    #: Whether equal arguments give equal weights, so that ranks agree without asking each other.
    deterministic: bool = False

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights on the raw gradients, fp64 [K], from the Gram matrix, fp64 [K, K], and the losses, fp64 [K]."""
        raise NotImplementedError

    def constant(self, n_objectives: int) -> tuple[float, ...] | None:
        """The K weights, where they depend on nothing: the optimizer then needs no gradient rows. Else None."""
        return None

    def solve(self, gram: Tensor | None, losses: Tensor) -> Solution:
        """The weights, and how well they solve the weighting's own problem, if it has one.

        `__call__` gets copies here and in `steered`, so that it may write to its arguments.

        Raises:
            RuntimeError: `__call__` did not return one number per objective.
        """
        return Solution(as_weights(self, self(*_copies(gram, losses)), losses))

    def steered(self, preference: Tensor | None, min_weight: float, gram: Tensor | None, losses: Tensor) -> Solution:
        """`solve` under a preference and a floor; by default the weights are multiplied by p, then mixed with their
        mean.

        Args:
            preference: p, fp64 [K], > 0, of mean 1; None for none.
            min_weight: m ≥ 0. See `mogeo.decide.steering.Steering`.
            gram: as for `__call__`.
            losses: as for `__call__`.
        """
        mine = _copies(gram, losses)
        weights = self(*mine) if preference is None else self.preferring(preference, *mine)
        weights = as_weights(self, weights, losses)
        return Solution(floored(weights, min_weight, gram if self.needs_gram else None))

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights under a preference p among the objectives, fp64 [K], > 0, of mean 1; by default w·p."""
        return as_weights(self, self(gram, losses), losses) * preference

    def units(self, gram: Tensor, losses: Tensor) -> Tensor | None:
        """n, fp64 [K] > 0, where the weights are coefficients divided by n, as those of g_k / n_k are.

        Then w n are the shares of objectives. None: the weights are shares themselves.
        """
        return None

    def least_shares(self, n_objectives: int) -> tuple[float, ...] | None:
        """The least part of Σ_k w_k n_k that `solve` gives to each objective, K numbers, if it has a gradient.

        n is that of `units`, or 1. None: `solve` promises nothing.
        """
        return None

    def min_norm_problem(self) -> tuple[str, float, str] | None:
        """(normalize, power, apply_to) of the one min-norm problem that `solve` solves first (`mogeo.weightings.MGDA`).

        A GPU solves that problem in one launch, together with leaving out what is not finite; `completed` then does the
        rest. None: there is no such problem.
        """
        return None

    def completed(self, gram: Tensor | None, solution: Solution) -> Solution:
        """What `solve` makes of the solution of its first problem; by default nothing is left to do."""
        return solution

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step: small tensors, numbers, strings, None, lists, and dicts by strings."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Around(Weighting):
    """A weighting that changes what another one finds; subclasses write `solve`. All else is that of the inner one.

    Args:
        inner: the other weighting.
    """

    def __init__(self, inner: Weighting) -> None:
        self.inner = inner
        self.needs_positive_losses = inner.needs_positive_losses
        self.deterministic = inner.deterministic

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """The weights that `solve` returns, fp64 [K]."""
        return self.solve(gram, losses).weights

    def state_dict(self) -> dict[str, Any]:
        """That of the inner weighting."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the inner weighting."""
        self.inner.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return repr(self.inner)


class FromCallable(Weighting):
    """A user's function (gram, losses) -> weights as a weighting. Its own attributes count, where it has them.

    Args:
        function: what to call. `needs_gram`, `constant`, `state_dict` and `load_state_dict` are optional attributes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.needs_gram = getattr(function, "needs_gram", True)
        self.needs_positive_losses = getattr(function, "needs_positive_losses", False)

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """What the function returns, as fp64 [K]."""
        return as_weights(self.function, self.function(gram, losses), losses)

    def state_dict(self) -> dict[str, Any]:
        """That of the function, if it has one."""
        state: dict[str, Any] = getattr(self.function, "state_dict", dict)()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the function, if it takes one."""
        getattr(self.function, "load_state_dict", lambda state: None)(state_dict)

    def __repr__(self) -> str:
        return repr(self.function)


def as_weighting(weighting: Callable[..., Any]) -> Weighting:
    """The weighting itself, or the callable as one."""
    return weighting if isinstance(weighting, Weighting) else FromCallable(weighting)


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


def _copies(gram: Tensor | None, losses: Tensor) -> tuple[Tensor | None, Tensor]:
    return None if gram is None else gram.clone(), losses.clone()


def floored(weights: Tensor, min_weight: float, gram: Tensor | None) -> Tensor:
    """w ← (1 − Km) w + m Σw over the objectives that have a gradient; without a Gram matrix, over all of them."""
    if min_weight == 0:
        return weights
    if gram is None:
        return (1 - len(weights) * min_weight) * weights + min_weight * weights.sum()
    live = gram.diagonal() > 0
    count = live.sum(dtype=torch.float64)
    total = torch.where(live, weights, 0.0).sum()
    return torch.where(live, (1 - count * min_weight) * weights + min_weight * total, weights)
