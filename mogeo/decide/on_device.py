"""From captured rows and losses to one direction without asking the host: as `mogeo.decide.on_host`, on a GPU.

Knows rows (`GradientBuffers`) and weightings; no optimizer. Nothing here waits for the device, and nothing reads a
number from it. So who is left out, how far to clip and whether to discard are kernels' decisions; what would raise on
a CPU leaves its objective out, or makes the direction zero, and is told afterwards, through `mogeo.decide.late_news`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mogeo.decide.on_host import Decision, Direction, Rules, weigh, without
from mogeo.geometry.constants import constant_tensor
from mogeo.gradients.rows import GradientBuffers
from mogeo.weightings import MGDA


def find_direction(
    buffers: GradientBuffers, losses: Tensor, absent: tuple[bool, ...], rules: Rules, contributed: set[int]
) -> Direction:
    """Weigh the rows, or take what was weighed during backward, and leave the clipped direction in the buffers.

    Args:
        buffers: settled rows on one device; the sum of weighted gradients, where weights are known beforehand.
        losses: fp64 [K], NaN where absent.
        absent: K flags.
        rules: of the optimizer; `nonfinite` is "skip" or "propagate".
        contributed: where weights are known beforehand, indices of the objectives whose gradients were summed.
    """
    if rules.constant() is not None:
        return _summed(buffers, losses, absent, rules, contributed)
    gram = buffers.gram() if rules.needs_gram() else None
    gap = status = bad_weights = correction = correction_status = None
    if type(rules.weighting) is MGDA and rules.steering is None:
        assert gram is not None
        weights, gap, status, nonfinite = _min_norm(buffers, gram, losses, absent, rules)
    else:
        weights, gap, status, bad_weights, nonfinite = _weigh(gram, losses, absent, rules)
    if gram is not None and rules.guarantee_descent:
        assert buffers.device_code is not None
        left_out = nonfinite | ~_present(absent, losses.device)
        weights, correction, correction_status = buffers.device_code.descent(without(gram, left_out), weights)
    squared_norm, clip = buffers.direct(weights, gram, rules.max_grad_norm, discard=rules.nonfinite == "skip")
    if gram is None or any(block.dtype == torch.float16 for block in buffers.blocks):
        # A row, or an overflow, that only the direction tells of: that counts for all who are present.
        nonfinite = nonfinite | (_present(absent, losses.device) & _failed(squared_norm, clip))
    decided = Decision(
        losses, weights, gram, nonfinite, True, False, gap, status, bad_weights, correction, correction_status
    )
    return Direction(decided, squared_norm, clip)


def _min_norm(
    buffers: GradientBuffers, gram: Tensor, losses: Tensor, absent: tuple[bool, ...], rules: Rules
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, gap, status, and which objectives are not finite, in one launch."""
    weighting, code = rules.weighting, buffers.device_code
    assert isinstance(weighting, MGDA)
    assert code is not None
    nonfinite = torch.empty(len(losses), dtype=torch.bool, device=losses.device)
    flags = constant_tensor(absent, torch.bool, losses.device) if any(absent) else None
    weights, gap, status = code.min_norm(
        gram,
        losses,
        weighting.normalize,
        weighting.power,
        weighting.apply_to,
        absent=flags,
        propagate=rules.nonfinite == "propagate",
        nonfinite=nonfinite,
    )
    return weights, gap, status, nonfinite


def _weigh(
    gram: Tensor | None, losses: Tensor, absent: tuple[bool, ...], rules: Rules
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Weights of any other weighting, gap, status, whether weights are not finite, and which objectives are not."""
    finite = losses.isfinite() if gram is None else losses.isfinite() & gram.diagonal().isfinite()
    nonfinite = _present(absent, losses.device) & ~finite
    left_out = ~_present(absent, losses.device) | nonfinite
    weights, gap, status = weigh(gram, losses, left_out, rules)
    bad_weights = (~weights.isfinite()).any()
    if rules.nonfinite == "propagate":
        weights = weights.masked_fill(nonfinite.any(), torch.nan)
    return weights, gap, status, bad_weights, nonfinite


def _summed(
    buffers: GradientBuffers, losses: Tensor, absent: tuple[bool, ...], rules: Rules, contributed: set[int]
) -> Direction:
    """Constant weights: gradients are summed by now, so where one is not finite it is all or nothing."""
    constant = rules.constant()
    assert constant is not None
    present = _present(absent, losses.device)
    weights = constant_tensor(constant, torch.float64, losses.device).masked_fill(~present, 0.0)
    nonfinite = present & ~losses.isfinite()
    summed = constant_tensor(tuple(k in contributed for k in range(len(losses))), torch.bool, losses.device)
    # Zero, or NaN where a summed loss is not finite: its gradient is not to be trusted either.
    squared_norm = buffers.squared_norm().reshape(1) + (losses.masked_fill(~summed, 0.0) * 0.0).sum()
    squared_norm, clip = buffers.finish(squared_norm, rules.max_grad_norm, discard=rules.nonfinite == "skip")
    nonfinite = nonfinite | (present & _failed(squared_norm, clip))
    return Direction(Decision(losses, weights, None, nonfinite, True), squared_norm, clip)


def _failed(squared_norm: Tensor, clip: Tensor) -> Tensor:
    """Whether the direction was not finite; a clip factor of 0 says that it was discarded for that."""
    return ~squared_norm.isfinite() | (clip == 0)


def _present(absent: tuple[bool, ...], device: torch.device) -> Tensor:
    return constant_tensor(tuple(not flag for flag in absent), torch.bool, device)
