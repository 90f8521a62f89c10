"""From captured rows and losses to one direction without asking the host: as `mogeo.decide.on_host`, on a GPU.

Knows gradient stores and weightings; no optimizer. Nothing here waits for the device, and nothing reads a
number from it. So who is left out, how far to clip and whether to discard are kernels' decisions; what would raise on
a CPU leaves its objective out, or makes the direction zero, and is told afterwards, through `mogeo.decide.late_news`.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from mogeo.decide.rules import Decision, Direction, Rules, finite_rows, seen_by_weighting
from mogeo.geometry.constants import constant_tensor
from mogeo.geometry.tracking import Estimate, Sketches
from mogeo.gradients.direction import SharedDirection
from mogeo.gradients.rows import RowStore
from mogeo.weightings import Solution


def decide(rows: RowStore, losses: Tensor, absent: tuple[bool, ...], rules: Rules) -> Decision:
    """Weights for complete rows; arguments as for `mogeo.decide.on_host.decide`.

    Args:
        rows: on one device.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: `nonfinite` is "skip" or "propagate".

    Raises:
        RuntimeError: the weighting did not return one number per objective.
    """
    sketches = None if rules.tracked is None else rows.sketches()
    gram = rows.gram() if rules.weighting.needs_gram and not rules.follow_means else None
    problem = rules.weighting.min_norm_problem()
    if problem is not None and gram is not None:
        found, nonfinite = _min_norm(rows, gram, losses, absent, rules, problem)
        mean = _looked(sketches, losses, nonfinite, absent, rules)
        return _decision(found, losses, gram, nonfinite, None)._replace(mean=mean)
    finite = losses.isfinite()
    if gram is not None:
        finite &= gram.diagonal().isfinite()
    elif sketches is not None:
        finite &= finite_rows(sketches)
    present = _present(absent, losses.device)
    nonfinite = present & ~finite
    mean = _looked(sketches, losses, nonfinite, absent, rules)
    seen = (mean.seen, mean.losses) if mean is not None and rules.follow_means else (gram, losses)
    found, bad_weights = _solved(*seen, present, nonfinite, rules)
    sketched = gram is None and mean is not None
    gram = mean.of_step if gram is None and mean is not None else gram
    return _decision(found, losses, gram, nonfinite, bad_weights)._replace(mean=mean, gram_is_sketched=sketched)


def _looked(
    sketches: Sketches | None, losses: Tensor, nonfinite: Tensor, absent: tuple[bool, ...], rules: Rules
) -> Estimate | None:
    """What is known of mean gradients with this step's, where they are tracked."""
    if sketches is None or rules.tracked is None:
        return None
    counts = _present(absent, losses.device) & ~nonfinite & finite_rows(sketches)
    if rules.nonfinite == "propagate":
        counts &= ~nonfinite.any()  # the whole step is lost
    return rules.tracked.look(sketches, losses, counts)


def _solved(
    gram: Tensor | None, losses: Tensor, present: Tensor, nonfinite: Tensor, rules: Rules
) -> tuple[Solution, Tensor]:
    """The weighting's solution, and whether some of its weights are not finite, bool []."""
    left_out = ~present | nonfinite
    seen, known = seen_by_weighting(gram, losses, left_out)
    found = rules.weighting.solve(seen, known)
    weights = found.weights.masked_fill(left_out, 0.0)
    if seen is not None and rules.weighting.needs_positive_losses:
        weights = weights.masked_fill(((known <= 0) & (seen.diagonal() > 0)).any(), torch.nan)
    bad_weights = (~weights.isfinite()).any()
    if rules.nonfinite == "propagate":
        weights = weights.masked_fill(nonfinite.any(), torch.nan)
    return found._replace(weights=weights), bad_weights


def combined(
    rows: RowStore, decided: Decision, absent: tuple[bool, ...], rules: Rules, plain: SharedDirection | None
) -> Direction:
    """Combine rows into the direction, clipped, and zero where it is not finite and is to be skipped.

    Args:
        rows: what `decide` saw.
        decided: what it said.
        absent: K flags.
        rules: of the optimizer.
        plain: None: with such groups, the host decides.
    """
    assert plain is None
    gram, nonfinite = None if decided.gram_is_sketched else decided.gram, decided.nonfinite
    squared_norm, clip = rows.direct(decided.weights, gram, rules.max_grad_norm, discard=rules.nonfinite == "skip")
    if decided.gram is None or any(block.dtype == torch.float16 for block in rows.blocks):
        # A row, or an overflow, that only the direction tells of: that counts for all who are present.
        nonfinite = nonfinite | (_present(absent, decided.losses.device) & _failed(squared_norm, clip))
    return Direction(decided._replace(nonfinite=nonfinite), squared_norm, clip, by_device=True)


def weighed_sum(
    direction: SharedDirection,
    weights: tuple[float, ...],
    losses: Tensor,
    absent: tuple[bool, ...],
    rules: Rules,
    contributed: Set[int],
    plain: SharedDirection | None,
) -> Direction:
    """Clip a sum of weighed gradients; where anything in it is not finite, it is all or nothing.

    Args:
        direction: complete, on one device.
        weights: K of them.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: of the optimizer.
        contributed: indices of the objectives whose gradients are in the sum.
        plain: None: with such groups, the host decides.
    """
    assert plain is None
    present = _present(absent, losses.device)
    used = constant_tensor(weights, torch.float64, losses.device).masked_fill(~present, 0.0)
    nonfinite = present & ~losses.isfinite()
    in_sum = constant_tensor(tuple(k in contributed for k in range(len(losses))), torch.bool, losses.device)
    # Zero, or NaN where a summed loss is not finite: its gradient is not to be trusted either.
    doubt = (losses.masked_fill(~in_sum, 0.0) * 0.0).sum()
    squared_norm = direction.squared_norm().reshape(1) + doubt
    squared_norm, clip = direction.finish(squared_norm, rules.max_grad_norm, discard=rules.nonfinite == "skip")
    nonfinite = nonfinite | (present & _failed(squared_norm, clip))
    return Direction(Decision(losses, used, None, nonfinite, True), squared_norm, clip, by_device=True)


def _min_norm(
    rows: RowStore,
    gram: Tensor,
    losses: Tensor,
    absent: tuple[bool, ...],
    rules: Rules,
    problem: tuple[str, float, str],
) -> tuple[Solution, Tensor]:
    """The solution, and which objectives are not finite, in one launch; another if the weighting does more."""
    code = rows.device_code
    assert code is not None
    nonfinite = torch.empty(len(losses), dtype=torch.bool, device=losses.device)
    flags = constant_tensor(absent, torch.bool, losses.device) if any(absent) else None
    weights, gap, status = code.min_norm(
        gram, losses, *problem, absent=flags, propagate=rules.nonfinite == "propagate", nonfinite=nonfinite
    )
    found = Solution(weights, gap, status)
    if rules.weighting.completes:
        seen, _ = seen_by_weighting(gram, losses, nonfinite | ~_present(absent, losses.device))
        found = rules.weighting.completed(seen, found)
    return found, nonfinite


def _decision(
    found: Solution, losses: Tensor, gram: Tensor | None, nonfinite: Tensor, bad_weights: Tensor | None
) -> Decision:
    return Decision(
        losses, found.weights, gram, nonfinite, True,
        gap=found.gap, status=found.status, bad_weights=bad_weights,
        correction=found.correction, correction_status=found.correction_status,
    )  # fmt: skip


def _failed(squared_norm: Tensor, clip: Tensor) -> Tensor:
    """Whether the direction was not finite; a clip factor of 0 says that it was discarded for that."""
    return ~squared_norm.isfinite() | (clip == 0)


def _present(absent: tuple[bool, ...], device: torch.device) -> Tensor:
    return constant_tensor(tuple(not flag for flag in absent), torch.bool, device)
