"""From captured gradients and losses to one direction: who takes part, with which weights, and how long it may be.

Knows gradient stores and weightings; no optimizer. `decide` finds weights from what rows, or sketches of them, tell;
`combined`, `weighed_sum` and `summed` leave the direction where it belongs. Here the host decides, which on a CPU costs
nothing; `mogeo.decide.on_device` does the same where a GPU decides.
"""

from __future__ import annotations

import math
from collections.abc import Set

import torch
from torch import Tensor

from mogeo.decide.rules import Decision, Direction, NonFiniteError, Rules, finite_rows, seen_by_weighting
from mogeo.geometry.constants import constant_tensor
from mogeo.gradients.direction import SharedDirection
from mogeo.gradients.ranks import Ranks, packed
from mogeo.gradients.rows import RowStore
from mogeo.gradients.store import ComparableStore
from mogeo.weightings import Solution, bad_weights, require_positive_losses

# Below this share of (Σ w_k ‖g_k‖)², ‖d‖² = wᵀMw has cancelled down to the rounding of an fp32 Gram: measure it
# instead.
_CANCELLED = 1e-4


def decide(rows: ComparableStore, losses: Tensor, absent: tuple[bool, ...], rules: Rules) -> Decision:
    """Weights for gradients of which the Gram matrix, or the losses, tell.

    Args:
        rows: complete gradients, or sketches of them.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: of the optimizer.

    Raises:
        NonFiniteError: a loss or gradient is not finite, and the rules say raise.
        ValueError: a loss ≤ 0 under a weighting that divides by it.
        RuntimeError: the weighting did not return one finite weight per objective.
    """
    flags = constant_tensor(absent, torch.bool, losses.device)
    sketches = None if rules.tracked is None else rows.sketches()
    gram = rows.gram() if rules.weighting.needs_gram and not rules.follow_means else None
    gram, losses = _over_ranks(rows.ranks, gram, losses, flags, rules)
    nonfinite = ~flags & ~losses.isfinite()
    if gram is not None:
        nonfinite |= ~flags & ~gram.diagonal().isfinite()
    elif sketches is not None:
        nonfinite |= ~flags & ~finite_rows(sketches)
    # Where gradients are tracked, a lost step has no Gram matrix: its report would speak of the mini-batch's alignment.
    of_lost = gram if sketches is None else None
    if rules.nonfinite != "skip" and bool(nonfinite.any()):
        return _poisoned(losses, of_lost, nonfinite, rules)
    away = (flags | nonfinite).tolist()
    if all(away):
        return _unusable(losses, of_lost, nonfinite)
    left_out = flags | nonfinite if any(away) else None
    mean, seen = None, (gram, losses)
    if sketches is not None and rules.tracked is not None:
        mean = rules.tracked.look(sketches, losses, ~(flags | nonfinite) & finite_rows(sketches))
        if rules.follow_means:
            seen = (mean.seen, mean.losses)
    found = _solved(rows.ranks, *seen, left_out, rules)
    sketched = mean is not None and gram is None
    return Decision(
        losses, found.weights, mean.of_step if mean is not None and sketched else gram, nonfinite, True,
        gap=found.gap, status=found.status,
        correction=found.correction, correction_status=found.correction_status, mean=mean, gram_is_sketched=sketched,
    )  # fmt: skip


def combined(
    rows: RowStore, decided: Decision, absent: tuple[bool, ...], rules: Rules, plain: SharedDirection | None
) -> Direction:
    """Combine rows into the direction and clip it; see that it is finite.

    Args:
        rows: complete.
        decided: what `decide` said of them.
        absent: K flags.
        rules: of the optimizer.
        plain: complete mean gradients of parameters that no weights apply to: clipped with the direction, in length
            too.

    Raises:
        NonFiniteError: the direction is not finite, and the rules say raise.
    """
    if decided.poisoned:
        rows.poison()
        return _nothing_to_measure(decided)
    if not decided.usable:
        return _nothing_to_measure(decided)
    squared_norm = _norm_from_gram(decided)
    if squared_norm is None:
        rows.combine(decided.weights)
        return _measured(rows.direction, decided, absent, rules, plain)
    beside = 0.0 if plain is None else plain.squared_norm()
    clip = _clip_factor(squared_norm + beside, rules)
    rows.combine(decided.weights * clip)
    if rules.nonfinite != "propagate" and (not math.isfinite(beside) or rows.direction.overflowed()):
        return _failed(decided, absent, rules)
    if plain is not None and clip < 1:
        plain.scale(clip)
    return Direction(decided, squared_norm, clip)


def weighed_sum(
    direction: SharedDirection,
    weights: tuple[float, ...],
    losses: Tensor,
    absent: tuple[bool, ...],
    rules: Rules,
    contributed: Set[int],
    plain: SharedDirection | None,
) -> Direction:
    """Clip a direction whose gradients were weighed and summed as they came; see that it is finite.

    Args:
        direction: complete.
        weights: K of them.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: of the optimizer.
        contributed: indices of the objectives whose gradients are in the sum.
        plain: as for `combined`.

    Raises:
        NonFiniteError: a loss or the direction is not finite, and the rules say raise.
    """
    flags = constant_tensor(absent, torch.bool, losses.device)
    _, losses = _over_ranks(direction.ranks, None, losses, flags, rules)
    nonfinite = ~flags & ~losses.isfinite()
    if bool(nonfinite.any()) and rules.nonfinite != "skip":
        return summed(direction, _poisoned(losses, None, nonfinite, rules), absent, rules, plain)
    left_out = flags | nonfinite
    if bool(left_out.all()):
        return _nothing_to_measure(_unusable(losses, None, nonfinite))
    used = constant_tensor(weights, torch.float64, losses.device).masked_fill(left_out, 0.0)
    decided = Decision(losses, used, None, nonfinite, True)
    # An objective whose loss became not finite after some of its gradients were summed: they cannot be taken out again.
    if any(bool(nonfinite[k]) for k in contributed):
        return _failed(decided, absent, rules)
    return _measured(direction, decided, absent, rules, plain)


def summed(
    direction: SharedDirection, decided: Decision, absent: tuple[bool, ...], rules: Rules, plain: SharedDirection | None
) -> Direction:
    """Clip a direction that was summed after the decision; see that it is finite.

    Args:
        direction: complete.
        decided: how its weights came about.
        absent: K flags.
        rules: of the optimizer.
        plain: as for `combined`.

    Raises:
        NonFiniteError: it is not finite, and the rules say raise.
    """
    if decided.poisoned:
        direction.poison()
    if decided.poisoned or not decided.usable:
        return _nothing_to_measure(decided)
    return _measured(direction, decided, absent, rules, plain)


def _nothing_to_measure(decided: Decision) -> Direction:
    """The result for a direction that is NaN, or that nobody will use."""
    return Direction(decided, decided.weights.sum(), torch.ones_like(decided.losses).mean())


def _measured(
    direction: SharedDirection, decided: Decision, absent: tuple[bool, ...], rules: Rules, plain: SharedDirection | None
) -> Direction:
    """Measure and clip what lies in the direction."""
    squared_norm = direction.squared_norm()
    whole = squared_norm if plain is None else squared_norm + plain.squared_norm()
    if not bool(whole.isfinite()):
        if rules.nonfinite != "propagate":
            return _failed(decided, absent, rules)
        decided = decided._replace(nonfinite=~constant_tensor(absent, torch.bool, whole.device))
    clip = _clip_factor(whole, rules)
    if clip < 1:
        for part in [direction] if plain is None else [direction, plain]:
            part.scale(clip)
    return Direction(decided, squared_norm, clip)


def _failed(decided: Decision, absent: tuple[bool, ...], rules: Rules) -> Direction:
    """A step left out as a whole: gradients are summed by now, and none can be taken out again.

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
    unusable = _unusable(decided.losses, None if decided.mean is not None else decided.gram, nonfinite)
    return Direction(unusable, unusable.weights.sum(), torch.ones_like(unusable.losses).mean())


def _norm_from_gram(decided: Decision) -> Tensor | None:
    """‖d‖² = wᵀMw; None where there is no exact Gram matrix of this step, or not enough digits are left of it."""
    if decided.gram is None or decided.gram_is_sketched:
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


def _solved(
    ranks: Ranks | None, gram: Tensor | None, losses: Tensor, left_out: Tensor | None, rules: Rules
) -> Solution:
    """The weighting's solution, the same on all ranks, 0 for an objective left out."""
    weighting = rules.weighting
    seen, known = seen_by_weighting(gram, losses, left_out)
    if seen is not None and weighting.needs_positive_losses:
        require_positive_losses(seen, known, rules.objectives, weighting)
    found = weighting.solve(seen, known)
    weights = found.weights if left_out is None else found.weights.masked_fill(left_out, 0.0)
    correction = found.correction
    if ranks is not None and not weighting.deterministic:
        # A weighting of the user's may draw at random, or hold a state of its own.
        weights = ranks.first_(weights.contiguous())
        correction = None if correction is None else ranks.first_(correction.contiguous())
    if not bool(weights.isfinite().all()):
        raise bad_weights(weighting, weights, len(losses))
    return found._replace(weights=weights, correction=correction)


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
