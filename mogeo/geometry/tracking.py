"""MeanGradients: the Gram matrix of mean gradients from averages of sketches over steps, and how far to trust it.

Knows tensors only; no optimizer, no weighting, no ranks. Nothing here waits for a GPU. Derivation: docs/geometry.md.

A mini-batch's gradient is g = ḡ + ε, and most of ‖g‖² is ‖ε‖². With sketches s_kt of the gradients of steps t and
weights u_kt that fall by β from step to step, products of *different* steps have no such noise in their mean:

    Ĝ_ij = Σ_{t ≠ t'} u_it u_jt' ⟨s_it, s_jt'⟩ / Σ_{t ≠ t'} u_it u_jt'.

The sum over all pairs of steps is that of two averages, so that K averages of d numbers, the products within each
step, and a dozen sums [K] and [K, K] for losses, lengths and errors are all that is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mogeo.geometry import ops

#: Standard errors below which an estimate counts for nothing, and from which on it counts in full.
DOUBTFUL, CERTAIN = 2.0, 3.0
#: At this decay and below, averages hold the weight of three steps or less, from which no standard error can be told:
#: their effective number is (1 + β)/(1 − β), two thirds of it are degrees of freedom, and it takes more than two.
TOO_SHORT = 0.5
#: A gradient counts as no longer than this many times the root mean square of those before, with the averages' own
#: weights: one spike would hide the mean for as long as it is in the average.
SPIKE = 5.0
#: Steps that `decay="auto"` averages over, at least and at most, and in multiples of the noise scale.
SHORTEST, LONGEST, PER_NOISE_SCALE = 10.0, 200.0, 2.0

Decay = float | Literal["auto"]


class Sketches(NamedTuple):
    """Sketches of the gradients of one step, the same on all ranks."""

    #: [K, D], fp32 or fp64. A row that is not finite belongs to a gradient that is not.
    rows: Tensor
    #: d, in how many numbers any part of a gradient was sketched; None where rows hold the gradients themselves.
    dimension: int | None
    #: What else decides the map from gradients to sketches: only sketches by the same map can be averaged.
    layout: Hashable


class Estimate(NamedTuple):
    """What is known of K mean gradients, per mean mini-batch. fp64, on the device of the sketches."""

    #: ⟨ḡ_i, ḡ_j⟩, unbiased but for spikes that are cut, [K, K]. Not positive semi-definite; NaN where no two steps can
    #: be compared yet.
    gram: Tensor
    #: Standard errors of `gram`, [K, K]; inf where it is not known yet.
    error: Tensor
    #: E‖g_k‖² of a mini-batch, [K]: ‖ḡ_k‖² and noise.
    mean_square: Tensor
    #: Mean losses, [K].
    losses: Tensor
    #: `gram` as far as there is evidence, positive semi-definite, [K, K]: what weightings are shown.
    seen: Tensor
    #: How far each mean gradient can be told from zero, [K]: 0 up to two standard errors, 1 from three on.
    evidence: Tensor
    #: ⟨g_i, g_j⟩ of this step's mini-batch, as sketches tell it, [K, K]; 0 where an objective took no part. NaN where
    #: the step was one before the state was loaded.
    of_step: Tensor

    def to(self, device: torch.device) -> Estimate:
        """The same on another device."""
        return Estimate(*(part.to(device) for part in self))


class MeanGradients:
    """Exponential averages of the sketches of K gradients, and what they tell.

    Each objective has a clock of its own, that goes on in the steps it takes part in.

    Args:
        decay: β, 0 < β < 1, or "auto": each objective's window 1/(1 − β) follows its noise scale, from 10 to 200 steps,
            by one at a time. Up to `TOO_SHORT`, no error is ever known, and so there is no evidence.

    Attributes:
        decay: as given. It may be changed at any time.
        estimate: after the last step that was taken over, here or before the state was loaded; None before the first.
    """

    def __init__(self, decay: Decay) -> None:
        self.decay = decay
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.estimate: Estimate | None = None
        self._layout = ""
        self._dimension: int | None = None
        self._kept: _Kept | None = None
        self._proposed: _Proposed | None = None

    def look(self, sketches: Sketches, losses: Tensor, present: Tensor) -> Estimate:
        """What is known with one more step. Nothing changes before `take_over`: a step may be looked at again.

        Args:
            sketches: of the step's gradients, K rows. Where those before do not suit, averages begin anew.
            losses: fp64 [K].
            present: bool [K], which objectives take part. The rows of others are not read.
        """
        suits = self._suits(sketches)
        kept = self._kept.to(sketches.rows.device) if suits and self._kept is not None else _Kept.new(sketches.rows)
        after, of_step = kept.with_step(sketches.rows, losses, present, self._decays(kept))
        estimate = _estimated(after, of_step, sketches.dimension)
        after = after._replace(window=torch.where(present, _next_windows(after.window, estimate), after.window))
        self._proposed = _Proposed(after, estimate, repr(sketches.layout), sketches.dimension, suits)
        return estimate

    def _suits(self, sketches: Sketches) -> bool:
        """Whether these sketches can be averaged with those before, if there are any."""
        return self._kept is None or (self._layout == repr(sketches.layout) and self._kept.fits(sketches.rows))

    def take_over(self) -> bool:
        """The step that was last looked at counts.

        Returns:
            Whether the steps before count as well. If not, their sketches did not suit those of this one.
        """
        proposed, self._proposed = self._proposed, None
        if proposed is None:
            return True
        self.estimate, self._layout, self._dimension = proposed.estimate, proposed.layout, proposed.dimension
        if self._kept is not None and proposed.suits and self._kept.lies_with(proposed.kept):
            for mine, new in zip(self._kept, proposed.kept, strict=True):
                mine.copy_(new)  # in place, so that a replayed CUDA graph goes on from where it stood
        else:
            self._kept = proposed.kept
        return proposed.suits

    def with_decay(self, decay: Decay) -> MeanGradients:
        """The same averages, going on with another decay."""
        other = copy.copy(self)
        other.decay = decay
        return other

    @property
    def evidence(self) -> Tensor | None:
        """Of the step that was looked at last, fp64 [K]."""
        estimate = self.estimate if self._proposed is None else self._proposed.estimate
        return None if estimate is None else estimate.evidence

    def _decays(self, kept: _Kept) -> Tensor:
        if self.decay == "auto":
            return 1 - 1 / kept.window
        return torch.full_like(kept.window, self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Averages, [K, D], and some [K, K] beside them; {} before the first step."""
        if self._kept is None:
            return {}
        return {"layout": self._layout, "dimension": self._dimension, **self._kept._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Its tensors move to the device of the next sketches."""
        self.forget()
        if state_dict:
            self._layout, self._dimension = state_dict["layout"], state_dict["dimension"]
            self._kept = _Kept(**{name: state_dict[name] for name in _Kept._fields})
            self.estimate = _estimated(self._kept, torch.full_like(self._kept.both, torch.nan), self._dimension)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_proposed": None}


class _Kept(NamedTuple):
    """What is kept from step to step. Sums run over the steps of each objective's clock, with weights u or products."""

    average: Tensor  # Σ u s, [K, D]
    weight: Tensor  # Σ u, [K]
    both: Tensor  # Σ u_i u_j over the steps of both, [K, K]
    within: Tensor  # Σ u_i u_j ⟨s_i, s_j⟩ over the steps of both, [K, K]
    square: Tensor  # Σ u ‖s‖², [K]
    uncut: Tensor  # the same, of gradients before spikes are cut, [K]
    loss: Tensor  # Σ u L, [K]
    window: Tensor  # steps that "auto" averages over, [K]
    product: Tensor  # ⟨average_i before, s_j⟩ of the last step of j, [K, K], NaN before
    spread: Tensor  # Σ u ½ (difference of successive products)², [K, K]
    spread_weight: Tensor  # Σ u of that, [K, K]
    spread_square: Tensor  # Σ u² of that, [K, K]
    joint: Tensor  # Σ u ½ difference_ij difference_ji over the steps of both, [K, K]
    joint_weight: Tensor  # Σ u of that, [K, K]

    @classmethod
    def new(cls, rows: Tensor) -> _Kept:
        count, device = len(rows), rows.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        k, kk = (count,), (count, count)
        return cls(
            torch.zeros_like(rows), zeros(*k), zeros(*kk), zeros(*kk), zeros(*k), zeros(*k), zeros(*k),
            zeros(*k) + SHORTEST, zeros(*kk) + torch.nan, zeros(*kk), zeros(*kk), zeros(*kk), zeros(*kk), zeros(*kk),
        )  # fmt: skip

    def to(self, device: torch.device) -> _Kept:
        """The same on a device."""
        return _Kept(*(part.to(device) for part in self))

    def fits(self, rows: Tensor) -> bool:
        """Whether these are averages of such rows."""
        return self.average.shape == rows.shape and self.average.dtype == rows.dtype

    def lies_with(self, other: _Kept) -> bool:
        """Whether both are on the same device."""
        return self.average.device == other.average.device

    def with_step(self, rows: Tensor, losses: Tensor, present: Tensor, decays: Tensor) -> tuple[_Kept, Tensor]:
        """After one more step; and its Gram matrix, [K, K], 0 where an objective takes no part."""
        count = len(rows)
        rows = torch.where(present[:, None], rows, 0.0)
        losses = torch.where(present, losses, 0.0)
        grams = ops.gram(torch.cat([self.average, rows]))
        across, of_step = grams[:count, count:], grams[count:, count:]
        cut = self._cuts(of_step.diagonal())
        rows, across, losses = cut[:, None].to(rows.dtype) * rows, across * cut, losses * cut
        own = of_step * torch.outer(cut, cut)
        here = present.to(torch.float64)
        factor = torch.where(present, decays, 1.0)
        factors = torch.outer(factor, factor)

        # Products of the averages before with this step: where both are there, and where there was one before.
        known = (self.weight > 0)[:, None] & present[None, :]
        product = torch.where(known, across / self.weight[:, None], self.product)
        again = known & self.product.isfinite()
        difference = torch.where(again, product - self.product, 0.0)
        decay = torch.where(again, factor[None, :], 1.0)
        mutual = again & again.T
        decay_joint = torch.where(mutual, factors.sqrt(), 1.0)
        new = again.to(torch.float64)
        after = _Kept(
            average=(factor[:, None].to(rows.dtype) * self.average).add_(rows),
            weight=factor * self.weight + here,
            both=factors * self.both + torch.outer(here, here),
            within=factors * self.within + own,
            square=factor * self.square + own.diagonal(),
            uncut=factor * self.uncut + of_step.diagonal(),
            loss=factor * self.loss + losses,
            window=self.window,
            product=product,
            spread=decay * self.spread + difference.square() / 2,
            spread_weight=decay * self.spread_weight + new,
            spread_square=decay.square() * self.spread_square + new,
            joint=decay_joint * self.joint + torch.where(mutual, difference * difference.T / 2, 0.0),
            joint_weight=decay_joint * self.joint_weight + mutual.to(torch.float64),
        )
        return after, of_step

    def _cuts(self, squares: Tensor) -> Tensor:
        """What gradients of these squared lengths, and their losses, are multiplied by to count: 1 but for spikes."""
        most = SPIKE**2 * self.uncut / self.weight
        return torch.where((most > 0) & (squares > most), (most / squares).sqrt(), 1.0)


class _Proposed(NamedTuple):
    """A step that was looked at, and is not taken over yet."""

    kept: _Kept
    estimate: Estimate
    layout: str
    dimension: int | None
    suits: bool


def _estimated(kept: _Kept, of_step: Tensor, dimension: int | None) -> Estimate:
    """What the sums tell: the formulas of docs/geometry.md, B, C, c, V and Cov, in the order of that page."""
    share = torch.where(kept.weight > 0, kept.weight, 1.0)  # who never came has sums of 0
    total = torch.outer(share, share)
    of_averages = ops.gram(kept.average) / total  # B
    same_step = kept.both / total  # c
    pairs = 1 - same_step
    comparable = (kept.weight[:, None] > 0) & (kept.weight[None, :] > 0) & (pairs > 1e-12)
    gram = torch.where(comparable, (of_averages - kept.within / total) / pairs, torch.nan)

    variance = kept.spread / kept.spread_weight
    jointly = torch.where(kept.joint_weight > 0, kept.joint / kept.joint_weight, 0.0)
    own = same_step.diagonal()
    error = own[None, :] * variance + own[:, None] * variance.T + 2 * same_step * jointly
    freedom = kept.spread_weight.square() / kept.spread_square * (2 / 3)
    freedom = torch.minimum(freedom, freedom.T)
    # From few differences, a variance may come out far too small: that of Student's t takes account of it.
    error = torch.where(freedom > 2, error.clamp(min=0) * (freedom / (freedom - 2)), torch.inf)
    squares = of_averages.diagonal()
    if dimension is not None:
        error = error + (torch.outer(squares, squares) + of_averages.square()) / dimension
    error = error.sqrt()

    lengths = gram.diagonal().nan_to_num(-torch.inf)
    evidence = _evidence(lengths.clamp(min=0), error.diagonal())
    floor = torch.minimum(error.diagonal(), squares)
    seen = gram.nan_to_num(0.0) * torch.minimum(evidence[:, None], evidence[None, :])
    seen = nearest_gram(seen.fill_diagonal_(0.0) + torch.diag(torch.maximum(lengths, floor)))
    return Estimate(gram, error, kept.square / share, kept.loss / share, seen, evidence, of_step)


def nearest_gram(matrix: Tensor) -> Tensor:
    """The positive semi-definite matrix nearest to a symmetric one, each objective measured by its own length.

    That is the nearest in Frobenius' norm to M_ij / √(M_ii M_jj), multiplied back, so that it does not matter how long
    gradients are beside each other. A matrix that is positive semi-definite comes back to the last bit.

    Args:
        matrix: M, fp64 [K, K]. Rows whose diagonal is not above 0 become 0.
    """
    lengths = matrix.diagonal()
    known = lengths > 0
    matrix = torch.where(known[:, None] & known[None, :], matrix, 0.0)
    scale = torch.where(known, lengths, 1.0).sqrt()
    scales = torch.outer(scale, scale)
    cosines = matrix / scales
    nearest = ops.psd_part(cosines)
    return torch.where((nearest == cosines).all(), matrix, nearest * scales)


def _evidence(size: Tensor, error: Tensor) -> Tensor:
    """How far a size can be told from zero: 0 … 1."""
    ratio = torch.where(error > 0, size / error, torch.inf)
    return ((ratio - DOUBTFUL) / (CERTAIN - DOUBTFUL)).clamp(0.0, 1.0)


def _next_windows(window: Tensor, estimate: Estimate) -> Tensor:
    """Windows of "auto" for the next step: towards a multiple of the noise scale."""
    wanted = (PER_NOISE_SCALE * noise_scale(estimate)).nan_to_num(LONGEST)
    return window + (wanted.clamp(SHORTEST, LONGEST) - window).clamp(-1.0, 1.0)


def noise_scale(estimate: Estimate) -> Tensor:
    """How many mini-batches it takes until signal equals noise, E‖ε_k‖² / ‖ḡ_k‖², fp64 [K]; NaN where ‖ḡ_k‖² cannot be
    told from zero.

    Source: McCandlish et al., *An empirical model of large-batch training*, 2018.
    """
    length, doubt = estimate.gram.diagonal(), DOUBTFUL * estimate.error.diagonal()
    return torch.where(length > doubt, (estimate.mean_square - length).clamp(min=0) / length, torch.nan)


def noise_scale_interval(estimate: Estimate) -> Tensor:
    """`noise_scale` at two standard errors of ‖ḡ_k‖², above and below: fp64 [K, 2], from 0 to inf."""
    length, doubt = estimate.gram.diagonal().nan_to_num(0.0), DOUBTFUL * estimate.error.diagonal()

    def scale(squared_length: Tensor) -> Tensor:
        noise = (estimate.mean_square - squared_length).clamp(min=0)
        return torch.where(squared_length > 0, noise / squared_length, torch.inf)

    return torch.stack([scale(length + doubt).nan_to_num(0.0), scale(length - doubt)], dim=1)
