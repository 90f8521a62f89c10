"""StepReport: what one combine decided, and what follows from it.

Tensors stay where they were computed, and what follows from them is computed when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mogeo.geometry.tracking import Estimate, nearest_gram, noise_scale, noise_scale_interval


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
    #: ⟨g_i, g_j⟩ of this step's mini-batch, fp64 [K, K]; an unbiased estimate from sketches with `sketch`, and with
    #: `track` where weights need no exact one. None where this step needed none.
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
    #: With `track`: what is known of mean gradients, as of the last solve. None without, and where a step was lost to
    #: what is not finite.
    mean: Estimate | None = field(default=None, repr=False)

    # mean gradients

    @property
    def mean_gram(self) -> Tensor | None:
        """⟨ḡ_i, ḡ_j⟩ of the mean gradients of a mini-batch, fp64 [K, K]: unbiased (but for spikes, which are cut), so
        that it may not be positive semi-definite. NaN where no two steps can be compared yet. None without `track`.
        """
        return None if self.mean is None else self.mean.gram

    @property
    def mean_gram_error(self) -> Tensor | None:
        """Standard errors of `mean_gram`, fp64 [K, K]; inf in the first steps, where they are not known."""
        return None if self.mean is None else self.mean.error

    @property
    def mean_cosines(self) -> Tensor | None:
        """cos(ḡ_i, ḡ_j), fp64 [K, K]: as products and lengths are estimated, so that it may lie beyond ±1.

        NaN beside a gradient whose `evidence` is 0: one that cannot be told from zero has no direction to speak of. NaN
        beside one that is zero, too.
        """
        if self.mean is None:
            return None
        lengths = self.mean.gram.diagonal().masked_fill(self.mean.evidence <= 0, torch.nan).sqrt()
        return self.mean.gram / torch.outer(lengths, lengths)

    @property
    def evidence(self) -> Tensor | None:
        """How far each mean gradient can be told from zero, fp64 [K]: not at two standard errors (0), surely at three
        (1). 1 also for one that is zero in every step.

        Where mean gradients decide (`weigh_by="mean"`), weights that depend on gradients follow the preference where
        this is 0, and the geometry where it is 1, and a guarantee of descent acts on no conflict with an objective
        where this is 0.
        """
        return None if self.mean is None else self.mean.evidence

    @property
    def noise_scale(self) -> Tensor | None:
        """How many such mini-batches it takes until signal equals noise, E‖ε_k‖² / ‖ḡ_k‖², fp64 [K].

        NaN: that cannot be told yet, and `noise_scale_interval` has what can.
        Source: McCandlish et al., *An empirical model of large-batch training*, 2018, in mini-batches.
        """
        return None if self.mean is None else noise_scale(self.mean)

    @property
    def noise_scale_interval(self) -> Tensor | None:
        """Lower and upper end of `noise_scale`, at two standard errors of ‖ḡ_k‖², fp64 [K, 2].

        An upper end of inf: ‖ḡ_k‖² may be zero. A lower end of inf: its estimate is below zero by over two errors.
        """
        return None if self.mean is None else noise_scale_interval(self.mean)

    # this step

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
        """cos(d, g_k), fp64 [K]. Negative: to first order, the direction hurts objective k.

        With `track`, of mean gradients: cos(Σ_j w_j ḡ_j, ḡ_k), whether such directions hurt objective k in expectation.
        NaN where `evidence` is 0: a gradient that cannot be told from zero has no direction to speak of.
        `alignment_error` says how certain the others are. With `weigh_by="mean"` weights and alignment come from one
        estimate, so that a guarantee of descent is not checked by it: where there was full evidence, nobody can look
        hurt. With `weigh_by="mini-batch"` weights w_k that follow this step's noise add Cov(w_k, ε_k) to the mean of d,
        which is not in here.

        Without `track`, of this mini-batch, which flatters: the direction holds w_k g_k, and with it the noise of g_k,
        so that ⟨d, g_k⟩ is too large by w_k E‖ε_k‖² on average. An objective that every step hurts can look served.
        NaN where gradients cancel so far (‖d‖ < 1e-4 Σ w_k ‖g_k‖) that the Gram cannot tell.

        NaN beside a zero gradient.
        """
        if self.mean is not None:
            gram = nearest_gram(self.mean.gram)
            return self._told(self._products(gram, self.weights) / self._reach(gram))
        if self.gram is None or self.grad_norms is None:
            return None
        # A gradient that was left out may be NaN, and 0 · NaN would spread.
        products = self._products(self.gram, self.weights)
        reach = self.weights.abs() @ self.grad_norms.masked_fill(self.weights == 0, 0.0)
        norm = torch.where(self.direction_norm < 1e-4 * reach, torch.nan, self.direction_norm)
        return products / (norm * self.grad_norms)

    @property
    def alignment_of(self) -> str:
        """What `alignment` is about: "mean gradients" or "mini-batch"."""
        return "mini-batch" if self.mean is None else "mean gradients"

    @property
    def alignment_error(self) -> Tensor | None:
        """Standard error of `alignment`, fp64 [K]: that of ⟨d, ḡ_k⟩ alone. None without `track`.

        NaN where `alignment` is. Errors of the K products in it are added up as if they were independent.
        """
        if self.mean is None:
            return None
        variance = self._products(self.mean.error.square(), self.weights.square())
        return self._told(variance.sqrt() / self._reach(nearest_gram(self.mean.gram)))

    @property
    def hurt(self) -> Tensor | None:
        """Whose `alignment` is below −1e-5, and so negative by more than rounding: bool [K]; None where that is None.

        False also where `alignment` is NaN, as it is with `track` in the first steps and wherever `evidence` is 0. It
        does not look at `alignment_error`: where that is larger than the alignment, as it can be if an objective with
        much weight has no evidence, this is a guess. Surely hurt are those with `alignment + 2 * alignment_error < 0`.
        """
        alignment = self.alignment
        return None if alignment is None else alignment < -1e-5

    def _told(self, of_alignment: Tensor) -> Tensor:
        """What is said of alignments with mean gradients; NaN where these cannot be told from zero."""
        assert self.mean is not None
        return of_alignment.masked_fill(self.mean.evidence <= 0, torch.nan)

    def _products(self, matrix: Tensor, weights: Tensor) -> Tensor:
        """Matrix times weights, where what has no weight is not read: it may be NaN."""
        return matrix.masked_fill(self.weights == 0, 0.0) @ weights

    def _reach(self, gram: Tensor) -> Tensor:
        """‖Σ_j w_j ḡ_j‖ ‖ḡ_k‖ by the Gram matrix of mean gradients, fp64 [K]."""
        return _root(self.weights @ self._products(gram, self.weights)) * _root(gram.diagonal())

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the objectives left out because a loss or gradient was not finite. Reading this synchronises."""
        return tuple(name for name, bad in zip(self.objectives, self.nonfinite.tolist(), strict=True) if bad)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, lists and strings, ready for a logger or JSON. Reading this synchronises.

        Per-objective values are dicts keyed by objective; Gram matrices, their errors and cosines are nested lists in
        the order of `objectives`. What `track` brings is None without it.
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
            "alignment_of": self.alignment_of,
            "alignment_error": by_name(self.alignment_error),
            "noise_scale": by_name(self.noise_scale),
            "noise_scale_interval": by_name(self.noise_scale_interval),
            "evidence": by_name(self.evidence),
            "gram": plain(self.gram),
            "cosines": plain(self.cosines),
            "mean_gram": plain(self.mean_gram),
            "mean_gram_error": plain(self.mean_gram_error),
            "mean_cosines": plain(self.mean_cosines),
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


def _root(squares: Tensor) -> Tensor:
    """Square roots; NaN of 0 and of less."""
    return torch.where(squares > 0, squares, torch.nan).sqrt()
