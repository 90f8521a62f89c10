"""From captured rows and losses to one direction: who takes part, with which weights, and how long it may be.

Knows rows (`GradientBuffers`) and weightings; no optimizer. `decide` finds weights from what rows, or sketches of them,
tell; `find_direction` leaves the direction in the buffers. Here the host decides, which on a CPU costs nothing;
`mogeo.decide.on_device` does the same where a GPU decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.decide.steering import Steering
from mogeo.geometry.constants import constant_tensor
from mogeo.gradients.ranks import Ranks, packed
from mogeo.gradients.rows import GradientBuffers
from mogeo.gradients.store import Capture
from mogeo.weightings import MGDA, Weighting, as_weights, bad_weights, require_positive_losses

# Below this share of (Σ w_k ‖g_k‖)², ‖d‖² = wᵀMw has cancelled down to the rounding of an fp32 Gram: measure it
# instead.
_CANCELLED = 1e-4


class Rules(NamedTuple):
    """What the user decided about every step, and what the step before left."""

    objectives: tuple[str, ...]
    weighting: Callable[..., Any]
    nonfinite: str  # "skip", "raise" or "propagate"
    max_grad_norm: float | None
    guarantee_descent: bool = False
    steering: Steering | None = None
    held: tuple[float, ...] | None = None  # weights that an earlier step found, and this one takes

    def constant(self) -> tuple[float, ...] | None:
        """The weights, if they are known beforehand, so that they can be applied during backward; else None."""
        if self.held is not None:
            return self.held
        if self.guarantee_descent:
            return None
        if self.steering is not None:
            return self.steering.constant(self.weighting, len(self.objectives))
        return self.weighting.constant(len(self.objectives)) if isinstance(self.weighting, Weighting) else None

    def needs_gram(self) -> bool:
        """Whether anything here reads the Gram matrix."""
        return self.guarantee_descent or getattr(self.weighting, "needs_gram", True)


class Decision(NamedTuple):
    """Weights, and how they came about; fields as in `StepReport`."""

    losses: Tensor  # averaged over ranks, if there are several
    weights: Tensor
    gram: Tensor | None
    nonfinite: Tensor
    usable: bool  # False: no objective could take part
    poisoned: bool = False  # what is not finite must reach `p.grad`
    gap: Tensor | None = None
    status: Tensor | None = None
    bad_weights: Tensor | None = None  # bool []: a weighting of the user's returned weights that are not finite
    correction: Tensor | None = None
    correction_status: Tensor | None = None


class Direction(NamedTuple):
    """The direction that lies in the buffers, and how it came about."""

    decision: Decision
    squared_norm: Tensor
    clip_factor: Tensor


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite, under `nonfinite="raise"`."""


def decide(rows: Capture, losses: Tensor, absent: tuple[bool, ...], rules: Rules) -> Decision:
    """Weights for gradients of which the Gram matrix, or the losses, tell.

    Args:
        rows: settled gradients, or sketches of them.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: of the optimizer.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and the rules say raise.
        ValueError: a loss ≤ 0 under a weighting that divides by it.
        RuntimeError: the weighting did not return one finite weight per objective.
    """
    flags = constant_tensor(absent, torch.bool, losses.device)
    gram = rows.gram() if rules.needs_gram() else None
    gram, losses = _over_ranks(rows.ranks, gram, losses, flags, rules)
    nonfinite = ~flags & ~losses.isfinite()
    if gram is not None:
        nonfinite |= ~flags & ~gram.diagonal().isfinite()
    if rules.nonfinite != "skip" and bool(nonfinite.any()):
        return _poisoned(losses, gram, nonfinite, rules)
    away = (flags | nonfinite).tolist()
    if all(away):
        return _unusable(losses, gram, nonfinite)
    left_out = flags | nonfinite if any(away) else None
    weights, gap, status = _weigh(rows.ranks, gram, losses, left_out, rules)
    correction = correction_status = None
    if rules.guarantee_descent:
        assert gram is not None
        seen = gram if left_out is None else without(gram, left_out)
        weights, correction, correction_status = torch.ops.mogeo.descent(seen, weights)
    return Decision(
        losses, weights, gram, nonfinite, True, False, gap, status, None, correction, correction_status
    )  # fmt: skip


def find_direction(
    buffers: GradientBuffers,
    losses: Tensor,
    absent: tuple[bool, ...],
    rules: Rules,
    contributed: set[int],
    plain: GradientBuffers | None = None,
) -> Direction:
    """Weigh the rows, or take what was weighed during backward, and leave the clipped direction in the buffers.

    Args:
        buffers: settled rows; the sum of weighted gradients, where weights are known beforehand.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: of the optimizer.
        contributed: where weights are known beforehand, indices of the objectives whose gradients were summed.
        plain: settled mean gradients of parameters that no weights apply to: clipped with the direction, in length too.

    Raises:
        NonFiniteError, ValueError, RuntimeError: as `decide` does.
    """
    if rules.constant() is not None:
        decided, spoilt = _known_beforehand(buffers.ranks, losses, absent, rules, contributed)
        return summed(buffers, decided, absent, rules, plain, spoilt=spoilt)
    decided = decide(buffers, losses, absent, rules)
    if decided.poisoned or not decided.usable:
        return summed(buffers, decided, absent, rules)
    squared_norm = _norm_from_gram(decided)
    if squared_norm is None:
        buffers.combine(decided.weights)
        return summed(buffers, decided, absent, rules, plain)
    beside = 0.0 if plain is None else plain.squared_norm()
    clip = _clip_factor(squared_norm + beside, rules)
    buffers.combine(decided.weights * clip)
    if rules.nonfinite != "propagate" and (not math.isfinite(beside) or buffers.direction_overflowed()):
        return _failed(decided, absent, rules)
    if plain is not None and clip < 1:
        plain.scale(clip)
    return Direction(decided, squared_norm, clip)


def summed(
    buffers: GradientBuffers,
    decided: Decision,
    absent: tuple[bool, ...],
    rules: Rules,
    plain: GradientBuffers | None = None,
    *,
    spoilt: bool = False,
) -> Direction:
    """Measure and clip a direction that lies in the buffers already; see that it is finite.

    Args:
        decided: how its weights came about.
        spoilt: it holds gradients that must not count. Like one that is not finite, it is all or nothing.

    Raises:
        NonFiniteError: it is not finite, and the rules say raise.
    """
    if decided.poisoned:
        buffers.poison()
    if decided.poisoned or not decided.usable:
        return Direction(decided, decided.weights.sum(), torch.ones_like(decided.losses).mean())
    squared_norm = buffers.squared_norm()
    whole = squared_norm if plain is None else squared_norm + plain.squared_norm()
    if spoilt or not bool(whole.isfinite()):
        if rules.nonfinite != "propagate":
            return _failed(decided, absent, rules)
        decided = decided._replace(nonfinite=~constant_tensor(absent, torch.bool, whole.device))
    clip = _clip_factor(whole, rules)
    if clip < 1:
        for part in [buffers] if plain is None else [buffers, plain]:
            part.scale(clip)
    return Direction(decided, squared_norm, clip)


def _failed(decided: Decision, absent: tuple[bool, ...], rules: Rules) -> Direction:
    """Gradients are summed by now, so where one is not finite, it is all or nothing.

    Raises:
        NonFiniteError: the rules say raise.
    """
    nonfinite = ~constant_tensor(absent, torch.bool, decided.losses.device)
    if rules.nonfinite == "raise":
        if decided.gram is not None:
            raise NonFiniteError(
                f"the direction of {_quoted(rules, nonfinite)} is not finite, although their gradients are: it "
                "overflows fp16, or a group with multi_objective=False has a gradient that does. Scale the losses down"
            )
        raise NonFiniteError(
            f"the summed gradient of {_quoted(rules, nonfinite)} is not finite; {rules.weighting!r} keeps no "
            "gradients apart to tell whose it is"
        )
    unusable = _unusable(decided.losses, decided.gram, nonfinite)
    return Direction(unusable, unusable.weights.sum(), torch.ones_like(unusable.losses).mean())


def _norm_from_gram(decided: Decision) -> Tensor | None:
    """‖d‖² = wᵀMw; None where there is no Gram matrix, or not enough digits are left of it."""
    if decided.gram is None:
        return None
    weights, gram = decided.weights, decided.gram
    used = weights != 0
    if not bool(used.all()):  # rows left out may hold NaN
        weights, gram = weights[used], gram[used][:, used]
    squared_norm = weights @ gram @ weights
    reach = weights.abs() @ gram.diagonal().sqrt()
    return None if squared_norm < _CANCELLED * reach**2 else squared_norm


def _over_ranks(
    ranks: Ranks | None, gram: Tensor | None, losses: Tensor, absent: Tensor, rules: Rules
) -> tuple[Tensor | None, Tensor]:
    """The Gram matrix, if any, summed and the losses averaged over ranks, in one all-reduce: all decide from the same.

    Raises:
        RuntimeError: some ranks have a loss of an objective in this step, and some have not.
    """
    if ranks is None:
        return gram, losses
    part = losses.new_zeros(0) if gram is None else gram
    pack = ranks.sum_(packed([part, losses.masked_fill(absent, 0.0) / ranks.size, absent.to(torch.float64)]))
    summed, mean, missing = torch.split(pack, [part.numel(), len(losses), len(losses)])
    partly = (missing > 0) & (missing < ranks.size)
    if bool(partly.any()):
        raise RuntimeError(
            f"objective {_quoted(rules, partly)} has a loss on some ranks of this step and none on others: every rank "
            "must hand over the same objectives"
        )
    return None if gram is None else summed.reshape(gram.shape), mean.masked_fill(absent, torch.nan)


def _known_beforehand(
    ranks: Ranks | None, losses: Tensor, absent: tuple[bool, ...], rules: Rules, contributed: set[int]
) -> tuple[Decision, bool]:
    """What is left to decide where weights were applied during backward; and whether what was summed is spoilt."""
    flags = constant_tensor(absent, torch.bool, losses.device)
    _, losses = _over_ranks(ranks, None, losses, flags, rules)
    nonfinite = ~flags & ~losses.isfinite()
    if bool(nonfinite.any()) and rules.nonfinite != "skip":
        return _poisoned(losses, None, nonfinite, rules), False
    left_out = flags | nonfinite
    if bool(left_out.all()):
        return _unusable(losses, None, nonfinite), False
    constant = rules.constant()
    assert constant is not None
    weights = constant_tensor(constant, torch.float64, losses.device).masked_fill(left_out, 0.0)
    # An objective whose loss became not finite later in the window: its first gradients are in the sum.
    spoilt = any(bool(nonfinite[k]) for k in contributed)
    return Decision(losses, weights, None, nonfinite, True), spoilt


def _weigh(
    ranks: Ranks | None, gram: Tensor | None, losses: Tensor, left_out: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights, gap and status."""
    weighting = rules.weighting
    if gram is not None and isinstance(weighting, MGDA) and weighting.needs_positive_losses:
        seen, known = _without(gram, losses, left_out)
        require_positive_losses(gram if seen is None else seen, known, rules.objectives, weighting)
    weights, gap, status = weigh(gram, losses, left_out, rules)
    if not isinstance(weighting, MGDA):
        if ranks is not None:  # a weighting of the user's may draw at random, or hold a state of its own
            weights = ranks.first_(weights.contiguous())
        if not bool(weights.isfinite().all()):
            raise bad_weights(weighting, weights, len(losses))
    return weights, gap, status


def weigh(
    gram: Tensor | None, losses: Tensor, left_out: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights, fp64 [K], 0 for an objective left out; gap and status, if any. They need not be finite.

    `left_out` is bool [K]; None where the host knows that nobody is left out, which spares some thirty small calls.
    """
    weighting = rules.weighting
    gram, losses = _without(gram, losses, left_out)
    gap = status = None
    if isinstance(weighting, MGDA) and rules.steering is None:
        weights, gap, status = weighting.solve(gram, losses)
    else:
        # Clones: what a weighting of the user's does to its arguments stays there.
        mine = None if gram is None else gram.clone(), losses.clone()
        if rules.steering is None:
            weights = as_weights(weighting, weighting(*mine), losses)
        else:
            weights, gap, status = rules.steering.weigh(weighting, *mine)
    return weights if left_out is None else weights.masked_fill(left_out, 0.0), gap, status


def _without(gram: Tensor | None, losses: Tensor, left_out: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """As a weighting sees it, an objective left out is solved: no gradient, the average loss of the others."""
    if left_out is None:
        return gram, losses
    others = losses.masked_fill(left_out, 0.0)
    count = (~left_out).sum()
    losses = torch.where(left_out, torch.where(count > 0, others.sum() / count, 1.0), losses)
    return None if gram is None else without(gram, left_out), losses


def without(gram: Tensor, left_out: Tensor) -> Tensor:
    """A Gram matrix in which the objectives left out have no gradient."""
    return gram.masked_fill(left_out[:, None] | left_out[None, :], 0.0)


def _poisoned(losses: Tensor, gram: Tensor | None, nonfinite: Tensor, rules: Rules) -> Decision:
    """What is not finite is to reach `p.grad`, as IEEE arithmetic has it; or it raises."""
    if rules.nonfinite == "raise":
        names = _quoted(rules, nonfinite)
        raise NonFiniteError(f"objective {names}: loss or gradient not finite; nonfinite='skip' would leave it out")
    return Decision(losses, torch.full_like(losses, torch.nan), gram, nonfinite, True, poisoned=True)


def _unusable(losses: Tensor, gram: Tensor | None, nonfinite: Tensor) -> Decision:
    return Decision(losses, torch.zeros_like(losses), gram, nonfinite, False)


def _clip_factor(squared_norm: Tensor, rules: Rules) -> Tensor:
    if rules.max_grad_norm is None:
        return torch.ones_like(squared_norm)
    factor = (rules.max_grad_norm / squared_norm.clamp(min=0).sqrt()).clamp(max=1.0)
    return torch.where(squared_norm.isfinite(), factor, 1.0)  # clipping must not hide an overflow


def _quoted(rules: Rules, which: Tensor) -> str:
    return ", ".join(repr(name) for name, bad in zip(rules.objectives, which.tolist(), strict=True) if bad)
