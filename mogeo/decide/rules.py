"""What decides a step: the user's rules going in, a decision coming out. Knows weightings; no rows, no optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mogeo.geometry.tracking import Estimate, MeanGradients, Sketches
from mogeo.weightings import Weighting

_NONFINITE = ("skip", "raise", "propagate")


class Rules(NamedTuple):
    """What the user decided about every step."""

    objectives: tuple[str, ...]
    #: With whatever wraps it: steering, a guarantee of descent.
    weighting: Weighting
    #: "skip", "raise" or "propagate".
    nonfinite: str
    max_grad_norm: float | None
    #: Whether the Gram matrix of each parameter is wanted as well.
    gram_by_parameter: bool = False
    #: Averages over steps, if the user wants them.
    tracked: MeanGradients | None = None
    #: Whether the Gram matrix of mean gradients decides, where there are averages, and not this step's.
    by_means: bool = True

    @property
    def follow_means(self) -> bool:
        """Whether weights are solved for from mean gradients."""
        return self.tracked is not None and self.by_means

    def constant(self) -> tuple[float, ...] | None:
        """The weights, if they are known before any gradient is, so that gradients can be summed as they come.

        None where gradients are tracked: for that they are kept apart.
        """
        return None if self.tracked is not None else self.weighting.constant(len(self.objectives))


class Decision(NamedTuple):
    """Weights, and how they came about; fields as in `mogeo.StepReport`."""

    #: Of this step, averaged over ranks, if there are several.
    losses: Tensor
    weights: Tensor
    gram: Tensor | None
    nonfinite: Tensor
    #: False: no objective could take part, and the base optimizer must not step.
    usable: bool
    #: True: what is not finite must reach `p.grad`.
    poisoned: bool = False
    gap: Tensor | None = None
    status: Tensor | None = None
    #: bool []: a weighting of the user's returned weights that are not finite. None where that was checked.
    bad_weights: Tensor | None = None
    correction: Tensor | None = None
    correction_status: Tensor | None = None
    #: What is known of mean gradients, where they are tracked.
    mean: Estimate | None = None
    #: Whether `gram` comes from the sketches of tracked rows, so that it is too inexact for the direction's length.
    gram_is_sketched: bool = False


class Direction(NamedTuple):
    """The direction that lies in the gradient store, and how it came about."""

    decision: Decision
    #: ‖d‖² before clipping, fp64 [].
    squared_norm: Tensor
    #: What d was multiplied by, fp64 [].
    clip_factor: Tensor
    #: fp64 [P, K, K], where it is wanted and rows were kept.
    gram_by_parameter: Tensor | None = None
    #: Whether a device decided, so that the host hears of it later.
    by_device: bool = False


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite, under `nonfinite="raise"`."""


def seen_by_weighting(gram: Tensor | None, losses: Tensor, left_out: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The arguments of a weighting, in which an objective left out has no gradient and the mean loss of the others.

    Args:
        gram: fp64 [K, K], if there is one.
        losses: fp64 [K].
        left_out: bool [K]; None where the host knows that nobody is, which spares some thirty small calls.
    """
    if left_out is None:
        return gram, losses
    others = losses.masked_fill(left_out, 0.0)
    count = (~left_out).sum()
    losses = torch.where(left_out, torch.where(count > 0, others.sum() / count, 1.0), losses)
    if gram is None:
        return None, losses
    return gram.masked_fill(left_out[:, None] | left_out[None, :], 0.0), losses


def finite_rows(sketches: Sketches) -> Tensor:
    """Which gradients are finite, and short enough to be squared in fp64, bool [K].

    Their sketches tell: where an element of a gradient is not finite, some element of its sketch is not either.
    """
    norms: Tensor = torch.linalg.vector_norm(sketches.rows, dim=1, dtype=torch.float64)
    return norms.isfinite()
