"""StepReport: what one combine decided, and what follows from it.

Tensors stay where they were computed, and what follows from them is computed when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """One shared direction d = Σ_k w_k g_k over K objectives: how it came about and how it sits to each gradient."""

    #: Names, in the order of every [K] below.
    objectives: tuple[str, ...]
    #: Sum of the losses handed over since the last step, fp64 [K]: the scalars whose gradients are the g_k, up to what
    #: `backward=` multiplied them by. NaN where absent.
    losses: Tensor
    #: w, weights on the raw gradients before clipping, fp64 [K]. 0 for an objective left out.
    weights: Tensor
    #: ⟨g_i, g_j⟩, fp64 [K, K]; with `sketch`, an unbiased estimate. None where this step needed none.
    gram: Tensor | None
    #: ‖d‖², before clipping, fp64 [].
    squared_norm: Tensor
    #: min(1, max_grad_norm / ‖d‖), fp64 []: what d was multiplied by. ‖d‖ counts the gradients of groups with
    #: `multi_objective=False` here.
    clip_factor: Tensor
    #: Objectives left out because a loss or gradient was not finite, bool [K].
    nonfinite: Tensor
    #: Objectives that no `backward` brought since the last step, bool [K].
    absent: Tensor
    #: How often each objective was left out as not finite so far, int64 [K].
    nonfinite_counts: Tensor
    #: In how many steps so far no `backward` brought each objective, int64 [K].
    absent_counts: Tensor
    #: Duality gap of the weighting's problem, fp64 [], in units of the (normalised) Gram matrix; None where there is
    #: none.
    optimality_gap: Tensor | None = field(default=None)
    #: `mogeo.Status` of the weighting's own problem, int64 []: of a min-norm problem, CAGrad's or RACO's, or the worst
    #: of UPGrad's K. None where there is none.
    status: Tensor | None = field(default=None)
    #: μ, what `guarantee_descent` added to the weighting's weights, fp64 [K], within `weights`; None without it.
    correction: Tensor | None = field(default=None)
    #: `mogeo.Status` of the correction, int64 []. `OPTIMAL`: d hurts no objective, and is the nearest such direction.
    #: `UNDECIDED`: some gradients balance out, and rounding hides which direction is nearest; d hurts nobody by more
    #: than rounding. `STALLED`: d hurts nobody by more than the Gram matrix lacks of being positive semi-definite.
    correction_status: Tensor | None = field(default=None)
    #: Names of the P parameters that the Gram matrix counts, where `gram_by_parameter` was asked for: those that the
    #: base optimizer was given (`model.named_parameters()`), or "group.position" without.
    parameters: tuple[str, ...] = ()
    #: ⟨g_i, g_j⟩ of each parameter alone, fp64 [P, K, K]; they sum to `gram`. None where it was not asked for, or the
    #: step kept no rows.
    gram_by_parameter: Tensor | None = field(default=None)
    #: Steps since these weights were solved for: 0 but in between the solves of `refresh_every`.
    age: int = 0

    @property
    def grad_norms(self) -> Tensor | None:
        """‖g_k‖, fp64 [K]."""
        return None if self.gram is None else self.gram.diagonal().sqrt()

    @property
    def cosines(self) -> Tensor | None:
        """cos(g_i, g_j), fp64 [K, K]; NaN beside a zero gradient."""
        norms = self.grad_norms
        return None if self.gram is None or norms is None else self.gram / torch.outer(norms, norms)

    @property
    def cosines_by_parameter(self) -> dict[str, Tensor]:
        """cos(g_i, g_j) of each parameter alone, fp64 [K, K], by its name: where objectives conflict. NaN beside a zero
        gradient; {} where `gram_by_parameter` is None.
        """
        if self.gram_by_parameter is None:
            return {}
        norms = self.gram_by_parameter.diagonal(dim1=1, dim2=2).sqrt()
        cosines = self.gram_by_parameter / (norms[:, :, None] * norms[:, None, :])
        return dict(zip(self.parameters, cosines, strict=True))

    @property
    def direction_norm(self) -> Tensor:
        """‖d‖ before clipping, fp64 []."""
        return self.squared_norm.clamp(min=0).sqrt()

    @property
    def alignment(self) -> Tensor | None:
        """cos(d, g_k), fp64 [K]. Negative: to first order, this step's direction hurts objective k.

        NaN beside a zero gradient, and where the gradients cancel so far (‖d‖ < 1e-4 Σ w_k ‖g_k‖) that the Gram cannot
        tell.
        """
        if self.gram is None or self.grad_norms is None:
            return None
        # A gradient that was left out may be NaN, and 0 · NaN would spread.
        products = self.gram.masked_fill(self.weights == 0, 0.0) @ self.weights
        reach = self.weights.abs() @ self.grad_norms.masked_fill(self.weights == 0, 0.0)
        norm = torch.where(self.direction_norm < 1e-4 * reach, torch.nan, self.direction_norm)
        return products / (norm * self.grad_norms)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the objectives left out because a loss or gradient was not finite. Reading this synchronises."""
        return tuple(name for name, bad in zip(self.objectives, self.nonfinite.tolist(), strict=True) if bad)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, lists and strings, ready for a logger or JSON. Reading this synchronises.

        Per-objective values are dicts keyed by objective; `gram` and `cosines` are nested lists in the order of
        `objectives`.
        """

        def by_name(values: Tensor | None) -> dict[str, Any] | None:
            return None if values is None else dict(zip(self.objectives, values.tolist(), strict=True))

        def plain(values: Tensor | None) -> Any:
            return None if values is None else values.tolist()

        return {
            "objectives": list(self.objectives),
            "losses": by_name(self.losses),
            "weights": by_name(self.weights),
            "grad_norms": by_name(self.grad_norms),
            "alignment": by_name(self.alignment),
            "gram": plain(self.gram),
            "cosines": plain(self.cosines),
            "direction_norm": plain(self.direction_norm),
            "clip_factor": plain(self.clip_factor),
            "optimality_gap": plain(self.optimality_gap),
            "status": plain(self.status),
            "correction": by_name(self.correction),
            "correction_status": plain(self.correction_status),
            "age": self.age,
            "skipped": list(self.skipped),
            "nonfinite_counts": by_name(self.nonfinite_counts),
            "absent": [name for name, away in zip(self.objectives, self.absent.tolist(), strict=True) if away],
            "absent_counts": by_name(self.absent_counts),
        }
