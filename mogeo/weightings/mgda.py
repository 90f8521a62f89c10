"""The multiple-gradient descent family: min-norm points of the hull of normalised gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mogeo.geometry.exact_min_norm import Status
from mogeo.geometry.ops import MinNorm, min_norm_weights, normalized_min_norm
from mogeo.weightings.base import Solution, Weighting

# name: (normalize, power, apply_to)
PRESETS: dict[str, tuple[Any, float, Any]] = {
    "mgda": ("none", 1.0, "raw"),
    "mgda-normalized": ("l2", 1.0, "normalized"),
    "mgda-decoupled": ("loss", 1.0, "raw"),
}


class MGDA(Weighting):
    """The multiple-gradient descent family: the min-norm point of the hull of normalised gradients g̃_k = g_k / n_k.

    α = argmin over the simplex of ‖Σ α_k g̃_k‖², solved exactly from the Gram matrix, M_ij / (n_i n_j).

    | `normalize` | n_k |
    | --- | --- |
    | `"none"` | 1 |
    | `"l2"` | ‖g_k‖^power |
    | `"loss"` | L_k^power |
    | `"loss+"` | (L_k ‖g_k‖)^power |

    Args:
        normalize: the row of the table above.
        power: exponent of the normaliser.
        apply_to: `"raw"` applies α to the raw gradients, w = α; `"normalized"` to the normalised ones, w = α / n.

    With `apply_to="normalized"` the length of d does not follow the scale of the gradients: under fp16 loss scaling,
    `GradScaler.unscale_` then shrinks a direction that was never enlarged. Use bf16 there, or `apply_to="raw"`.

    Sources: Désidéri 2012 (none); Sener & Koltun, *Multi-task learning as multi-objective optimization*, 2018 (none,
    and in their code l2, loss, loss+ with α applied to the raw gradients, as in Navon et al.'s nash-mtl code);
    MGDA-Decoupled, arXiv 2604.20685 (loss, raw); GAPO, arXiv 2507.01915 (l2 with a power, normalized).
    """

    deterministic = True
    prefers_after_floor = True

    def __init__(
        self,
        normalize: Literal["none", "l2", "loss", "loss+"] = "none",
        *,
        power: float = 1.0,
        apply_to: Literal["raw", "normalized"] = "raw",
    ) -> None:
        if normalize not in ("none", "l2", "loss", "loss+"):
            raise ValueError(f"normalize={normalize!r}: choose 'none', 'l2', 'loss' or 'loss+'")
        if apply_to not in ("raw", "normalized"):
            raise ValueError(f"apply_to={apply_to!r}: choose 'raw' or 'normalized'")
        if not math.isfinite(power):
            raise ValueError(f"power={power}: pass a finite number")
        self.normalize = normalize
        self.power = power
        self.apply_to = apply_to
        self.needs_positive_losses = normalize in ("loss", "loss+")

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights on the raw gradients, fp64 [K].

        Raises:
            ValueError: there is no Gram matrix, or a loss that divides is not positive.
        """
        if gram is not None and self.needs_positive_losses:
            require_positive_losses(gram, losses, [str(k) for k in range(losses.numel())], self)
        return self.solve(gram, losses).weights

    def solve(self, gram: Tensor | None, losses: Tensor) -> Solution:
        """Weights on the raw gradients, with gap and status of the solve; nothing waits for a GPU.

        Args:
            gram: M [K, K]. An objective with a zero row has weight 0.
            losses: L [K], > 0 where they divide; that is the caller's to check.

        Returns:
            `Solution`, with the gap in units of the normalised Gram matrix.

        Raises:
            ValueError: there is no Gram matrix.
        """
        return Solution(*normalized_min_norm(self._required(gram), losses, self.normalize, self.power, self.apply_to))

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """The weights of `steered`, without a floor."""
        return self.steered(preference, 0.0, gram, losses).weights

    def min_norm_problem(self) -> tuple[str, float, str]:
        """What `solve` solves."""
        return self.normalize, self.power, self.apply_to

    def steered(self, preference: Tensor | None, min_weight: float, gram: Tensor | None, losses: Tensor) -> Solution:
        """`solve` with a preference and a floor inside the min-norm problem; nothing waits for a GPU.

        Under a preference p, α solves the problem of g̃_k / p_k, and α_k / p_k, scaled to the sum 1 again, takes the
        place of α_k. So d of `mgda` lies along the min-norm point of the g_k / p_k, and where all weights are positive
        it descends in proportion to p. The scaling keeps the length: without it, a preference would shorten the step.

        Args:
            preference: p [K], fp64, > 0; None for none.
            min_weight: m, a floor under the α_k of this problem: 0 ≤ m < 1/J for the J objectives with a gradient.
            gram: M [K, K]. An objective with a zero row has weight 0, and no floor.
            losses: L [K].

        Returns:
            `Solution`, with the gap in units of the normalised Gram matrix, over the hull that the floor leaves. A loss
            ≤ 0 that divides gives NaN weights and `Status.NONPOSITIVE_LOSS`.

        Raises:
            ValueError: there is no Gram matrix.
        """
        gram = self._required(gram)
        if preference is None and min_weight == 0:
            found = self.solve(gram, losses)
            assert found.status is not None
            # A kernel leaves the objective out, with weight 0, which must not be taken for a weight that was found.
            return found._replace(weights=found.weights.masked_fill(found.status == Status.NONPOSITIVE_LOSS, torch.nan))
        normalizers = self._normalizers(gram, losses)
        divisors = normalizers if preference is None else normalizers * preference
        normalized = gram / (divisors[:, None] * divisors[None, :])
        alpha, gap, status = _min_norm_above(normalized, min_weight)
        if preference is not None:
            alpha = alpha / preference
            alpha = torch.where(alpha != 0, alpha / alpha.sum(), 0.0)
        weights = alpha if self.apply_to == "raw" else torch.where(alpha != 0, alpha / normalizers, 0.0)
        wrong = normalizers.isnan().any()
        return Solution(weights.masked_fill(wrong, torch.nan), gap, status.masked_fill(wrong, Status.NONPOSITIVE_LOSS))

    def units(self, gram: Tensor, losses: Tensor) -> Tensor | None:
        """The normalisers, where coefficients are divided by them to be weights."""
        return self._normalizers(gram, losses) if self.apply_to == "normalized" else None

    def _required(self, gram: Tensor | None) -> Tensor:
        if gram is None:
            raise ValueError(f"{self!r} needs the Gram matrix of the gradients, got None")
        return gram

    def _normalizers(self, gram: Tensor, losses: Tensor) -> Tensor:
        """n, fp64 [K]: 1 where the gradient is zero, NaN where a loss ≤ 0 would divide one that is not."""
        norms, losses = gram.diagonal().sqrt(), losses.to(torch.float64)
        base = {"none": torch.ones_like(norms), "l2": norms, "loss": losses, "loss+": losses * norms}[self.normalize]
        n = torch.where(base > 0, base, torch.nan) ** self.power
        return torch.where(norms > 0, n, 1.0)

    def __repr__(self) -> str:
        settings = (self.normalize, self.power, self.apply_to)
        for name, preset in PRESETS.items():
            if settings == preset:
                return name
        if self.normalize == "l2" and self.apply_to == "normalized":
            return f"gapo({self.power:g})"
        return f"MGDA(normalize={self.normalize!r}, power={self.power:g}, apply_to={self.apply_to!r})"


def gapo(power: float) -> MGDA:
    """GAPO's gradient rescaling: ĝ = g / ‖g‖^power, w = α / ‖g‖^power. Power 0 is `mgda`, 1 is `mgda-normalized`.

    Source: arXiv 2507.01915, brought to DPO losses.
    """
    return MGDA("l2", power=power, apply_to="normalized")


def require_positive_losses(gram: Tensor, losses: Tensor, objectives: Sequence[str], weighting: object) -> None:
    """Raise ValueError, naming the objective, where a loss ≤ 0 belongs to a gradient that is not zero."""
    dividing = losses.masked_fill(~(gram.diagonal() > 0), 1.0).tolist()
    for name, loss in zip(objectives, dividing, strict=True):
        if loss <= 0:
            raise ValueError(
                f"objective {name!r} has loss {loss:g}; {weighting!r} divides by the loss and needs it positive: shift "
                "the loss, or use weighting='mgda-normalized'"
            )


def _min_norm_above(gram: Tensor, floor: float) -> MinNorm:
    """argmin αᵀAα over the part of the simplex where α_k ≥ m for every k with a gradient, J of them; the others get 0.

    α = m + (1 − Jm)β, with β on the whole simplex: vertex k stands for v_k = (1 − Jm) g_k + m Σ_j g_j, so that β is the
    min-norm point of a Gram matrix again.
    """
    if floor == 0:
        return min_norm_weights(gram)
    live = gram.diagonal() > 0
    scale = 1 - floor * live.sum(dtype=torch.float64)
    shared = floor * gram.sum(1)
    # ⟨v_i, v_j⟩, but for the same constant in all entries, which changes nothing on the simplex: J m² Σ‖g‖² in place of
    # m² ‖Σg‖², which is no more. A vertex may be zero, and would else pass for a solved objective.
    constant = floor**2 * live.sum(dtype=torch.float64) * gram.diagonal().sum()
    vertices = scale**2 * gram + scale * (shared[:, None] + shared[None, :]) + constant
    beta, gap, status = min_norm_weights(vertices.masked_fill(~(live[:, None] & live[None, :]), 0.0))
    return MinNorm(scale * beta + floor * live.to(torch.float64), gap, status)
