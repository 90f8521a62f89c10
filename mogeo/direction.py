"""From captured rows and losses to one direction: who takes part, with which weights, and how long it may be.

Knows rows (`GradientBuffers`) and weightings; no optimizer. What it finds, it leaves in row 0. Here the host decides,
which on a CPU costs nothing; `mogeo.deferred` does the same where a GPU decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.buffers import GradientBuffers
from mogeo.constants import constant_tensor
from mogeo.distributed import packed
from mogeo.weightings import MGDA, Weighting, require_positive_losses

# Below this share of (Σ w_k ‖g_k‖)², ‖d‖² = wᵀMw has cancelled down to the rounding of an fp32 Gram: measure it
# instead.
_CANCELLED = 1e-4


class Rules(NamedTuple):
    """What the user decided about every step."""

    objectives: tuple[str, ...]
    weighting: Callable[..., Any]
    nonfinite: str  # "skip", "raise" or "propagate"
    max_grad_norm: float | None
    guarantee_descent: bool = False

    def constant(self) -> tuple[float, ...] | None:
        """The weights, if they depend on nothing, so that they can be applied during backward; else None."""
        if self.guarantee_descent or not isinstance(self.weighting, Weighting):
            return None
        return self.weighting.constant(len(self.objectives))

    def needs_gram(self) -> bool:
        """Whether anything here reads the Gram matrix."""
        return self.guarantee_descent or getattr(self.weighting, "needs_gram", True)


class Direction(NamedTuple):
    """The direction in row 0, and how it came about; fields as in `StepReport`."""

    losses: Tensor  # averaged over ranks, if there are several
    weights: Tensor
    gram: Tensor | None
    squared_norm: Tensor
    clip_factor: Tensor
    nonfinite: Tensor
    usable: bool  # False: no objective could take part, and row 0 means nothing
    gap: Tensor | None = None
    status: Tensor | None = None
    bad_weights: Tensor | None = None  # bool []: a weighting of the user's returned weights that are not finite
    correction: Tensor | None = None
    correction_status: Tensor | None = None


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite, under `nonfinite="raise"`."""


def find_direction(
    buffers: GradientBuffers, losses: Tensor, absent: tuple[bool, ...], rules: Rules, contributed: set[int]
) -> Direction:
    """Weigh the rows, or what constant weights summed during backward, and put the clipped direction into row 0.

    Args:
        buffers: settled rows; one row of weighted gradients where weights are constant.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: of the optimizer.
        contributed: under constant weights, indices of the objectives that row 0 holds gradients of.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and the rules say raise.
        ValueError: a loss ≤ 0 under a weighting that divides by it.
        RuntimeError: the weighting did not return one finite weight per objective.
    """
    flags = constant_tensor(absent, torch.bool, losses.device)
    if rules.needs_gram() and rules.constant() is None:
        return _from_gram(buffers, losses, flags, rules)
    return _from_losses(buffers, losses, flags, rules, contributed)


def _from_gram(buffers: GradientBuffers, losses: Tensor, absent: Tensor, rules: Rules) -> Direction:
    gram, losses = _over_ranks(buffers, buffers.gram(), losses, absent, rules)
    nonfinite = ~absent & ~(losses.isfinite() & gram.diagonal().isfinite())
    if bool(nonfinite.any()) and rules.nonfinite != "skip":
        return _poisoned(buffers, losses, gram, nonfinite, rules)
    left_out = absent | nonfinite
    if bool(left_out.all()):
        return _unusable(losses, gram, nonfinite)
    weights, gap, status = _weigh(buffers, gram, losses, left_out, rules)
    correction = correction_status = None
    if rules.guarantee_descent:
        weights, correction, correction_status = torch.ops.mogeo.descent(without(gram, left_out), weights)

    used = weights != 0  # rows left out may hold NaN
    squared_norm = weights[used] @ gram[used][:, used] @ weights[used]
    reach = weights[used].abs() @ gram.diagonal()[used].sqrt()
    if squared_norm < _CANCELLED * reach**2:
        buffers.combine(weights)
        squared_norm = buffers.squared_norm()
        clip = _clip(buffers, squared_norm, rules)
    else:
        clip = _clip_factor(squared_norm, rules)
        buffers.combine(weights * clip)
    if rules.nonfinite != "propagate" and buffers.direction_overflowed():
        nonfinite = ~absent
        if rules.nonfinite == "raise":
            raise NonFiniteError(f"the direction of {_quoted(rules, nonfinite)} overflows fp16: scale the losses down")
        return _unusable(losses, gram, nonfinite)
    return Direction(
        losses, weights, gram, squared_norm, clip, nonfinite, True, gap, status, None, correction, correction_status
    )


def _over_ranks(
    buffers: GradientBuffers, gram: Tensor, losses: Tensor, absent: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    """The Gram matrix summed and the losses averaged over ranks, in one all-reduce, from which all decide alike.

    Raises:
        RuntimeError: some ranks have a loss of an objective in this step, and some have not.
    """
    ranks = buffers.ranks
    if ranks is None:
        return gram, losses
    pack = ranks.sum_(packed([gram, losses.masked_fill(absent, 0.0) / ranks.size, absent.to(torch.float64)]))
    summed, mean, missing = torch.split(pack, [gram.numel(), len(losses), len(losses)])
    partly = (missing > 0) & (missing < ranks.size)
    if bool(partly.any()):
        raise RuntimeError(
            f"objective {_quoted(rules, partly)} has a loss on some ranks of this step and none on others: every rank "
            "must hand over the same objectives"
        )
    return summed.reshape(gram.shape), mean.masked_fill(absent, torch.nan)


def _from_losses(
    buffers: GradientBuffers, losses: Tensor, absent: Tensor, rules: Rules, contributed: set[int]
) -> Direction:
    _, losses = _over_ranks(buffers, losses.new_zeros(0), losses, absent, rules)
    nonfinite = ~absent & ~losses.isfinite()
    if bool(nonfinite.any()) and rules.nonfinite != "skip":
        return _poisoned(buffers, losses, None, nonfinite, rules)
    left_out = absent | nonfinite
    if bool(left_out.all()):
        return _unusable(losses, None, nonfinite)
    constant = rules.constant()
    if constant is None:
        weights, _, _ = _weigh(buffers, None, losses, left_out, rules)
        buffers.combine(weights)
    else:
        weights = constant_tensor(constant, torch.float64, losses.device).masked_fill(left_out, 0.0)
    squared_norm = buffers.squared_norm()
    # Gradients are summed by now: where one is not finite, or belongs to an objective that became so later in the
    # window, it is all or nothing.
    mixed = constant is not None and any(nonfinite[k] for k in contributed)
    if mixed or not bool(squared_norm.isfinite()):
        nonfinite = ~absent
        if rules.nonfinite == "raise":
            raise NonFiniteError(
                f"the summed gradient of {_quoted(rules, nonfinite)} is not finite; {rules.weighting!r} keeps no "
                "gradients apart to tell whose it is"
            )
        if rules.nonfinite == "skip":
            return _unusable(losses, None, nonfinite)
    clip = _clip(buffers, squared_norm, rules)
    return Direction(losses, weights, None, squared_norm, clip, nonfinite, True)


def _weigh(
    buffers: GradientBuffers, gram: Tensor | None, losses: Tensor, left_out: Tensor, rules: Rules
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights, gap and status."""
    weighting = rules.weighting
    if isinstance(weighting, MGDA):
        gram, losses = _without(gram, losses, left_out)
        if gram is not None and weighting.needs_positive_losses:
            require_positive_losses(gram, losses, rules.objectives, weighting)
        weights, gap, status = weighting.solve(gram, losses)
        return weights.masked_fill(left_out, 0.0), gap, status
    weights = weights_of(gram, losses, left_out, rules)
    if buffers.ranks is not None:  # a weighting of the user's may draw at random, or hold a state of its own
        weights = buffers.ranks.first_(weights.contiguous())
    if not bool(weights.isfinite().all()):
        raise bad_weights(weighting, weights, len(losses))
    return weights, None, None


def weights_of(gram: Tensor | None, losses: Tensor, left_out: Tensor, rules: Rules) -> Tensor:
    """What a weighting returns, fp64 [K]; 0 for an objective left out. Whether they are finite is not looked at."""
    gram, losses = _without(gram, losses, left_out)
    # Clones: what a weighting of the user's does to its arguments stays there.
    returned = rules.weighting(None if gram is None else gram.clone(), losses.clone())
    try:
        weights = torch.as_tensor(returned, dtype=torch.float64, device=losses.device)
    except (TypeError, ValueError, RuntimeError):
        raise bad_weights(rules.weighting, returned, len(losses)) from None
    if weights.shape != losses.shape:
        raise bad_weights(rules.weighting, returned, len(losses))
    return weights.detach().masked_fill(left_out, 0.0)


def bad_weights(weighting: object, returned: object, count: int) -> RuntimeError:
    """The error for a weighting that did not return one finite weight per objective."""
    return RuntimeError(
        f"weighting {weighting!r} returned {returned!r} for {count} objectives: it must return one finite weight per "
        "objective"
    )


def _without(gram: Tensor | None, losses: Tensor, left_out: Tensor) -> tuple[Tensor | None, Tensor]:
    """As a weighting sees it, an objective left out is solved: no gradient, the average loss of the others."""
    others = losses.masked_fill(left_out, 0.0)
    count = (~left_out).sum()
    losses = torch.where(left_out, torch.where(count > 0, others.sum() / count, 1.0), losses)
    return None if gram is None else without(gram, left_out), losses


def without(gram: Tensor, left_out: Tensor) -> Tensor:
    """A Gram matrix in which the objectives left out have no gradient."""
    return gram.masked_fill(left_out[:, None] | left_out[None, :], 0.0)


def _poisoned(
    buffers: GradientBuffers, losses: Tensor, gram: Tensor | None, nonfinite: Tensor, rules: Rules
) -> Direction:
    """What is not finite reaches `p.grad`, as IEEE arithmetic has it; or it raises."""
    if rules.nonfinite == "raise":
        names = _quoted(rules, nonfinite)
        raise NonFiniteError(f"objective {names}: loss or gradient not finite; nonfinite='skip' would leave it out")
    buffers.poison()
    weights = torch.full_like(losses, torch.nan)
    return Direction(losses, weights, gram, weights.sum(), torch.ones_like(losses).mean(), nonfinite, True)


def _unusable(losses: Tensor, gram: Tensor | None, nonfinite: Tensor) -> Direction:
    weights = torch.zeros_like(losses)
    return Direction(losses, weights, gram, weights.sum(), torch.ones_like(losses).mean(), nonfinite, False)


def _clip(buffers: GradientBuffers, squared_norm: Tensor, rules: Rules) -> Tensor:
    """Clip the direction in row 0; returns the factor."""
    clip = _clip_factor(squared_norm, rules)
    if clip < 1:
        buffers.combine(clip[None])
    return clip


def _clip_factor(squared_norm: Tensor, rules: Rules) -> Tensor:
    if rules.max_grad_norm is None:
        return torch.ones_like(squared_norm)
    factor = (rules.max_grad_norm / squared_norm.clamp(min=0).sqrt()).clamp(max=1.0)
    return torch.where(squared_norm.isfinite(), factor, 1.0)  # clipping must not hide an overflow


def _quoted(rules: Rules, which: Tensor) -> str:
    return ", ".join(repr(name) for name, bad in zip(rules.objectives, which.tolist(), strict=True) if bad)
