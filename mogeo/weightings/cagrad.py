"""CAGrad and RACO: the mean of the gradients, turned so that the objective that gains least gains more."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mogeo.geometry.ops import conflict_averse_weights
from mogeo.weightings.base import Solution, Weighting, floored


class CAGrad(Weighting):
    """Conflict-averse gradient descent: the direction around the mean along which the least gain is largest.

    Of all d with ‖d − g₀‖ ≤ c‖g₀‖, g₀ = Σ_k v_k g_k, it is the one with the largest min_k ⟨d, g_k⟩:

        d = g₀ + s g_p / ‖g_p‖,   p = argmin over the simplex of ⟨g₀, g_p⟩ + s ‖g_p‖,   s = c‖g₀‖,   g_p = Σ_k p_k g_k.

    So w = v + s p / ‖g_p‖, solved exactly from the Gram matrix, on a GPU in one launch. v = 1/K, or the preference of
    the user, scaled to the sum 1 over the objectives that have a gradient. For c < 1, d descends on Σ_k v_k L_k, and
    points where it vanishes are stationary for that sum; from c = 1 on they are Pareto-stationary.

    d is that of the paper's algorithm 1, and of TorchJD: between 1 − c and 1 + c times as long as g₀, the latter where
    all gradients are alike. The authors' code divides it by 1 + c² or by 1 + c, depending on the experiment, which is
    left out here: it is a factor of the learning rate under SGD, and nothing under Adam.

    Where gradients balance out, as at a Pareto-stationary point, g_p vanishes and has no direction. There d = g₀, which
    goes on towards the minimum of Σ_k v_k L_k, and the status is `UNDECIDED`. (TorchJD stops there, with d = 0.) g_p
    counts as zero up to 1e-3 Σ_k p_k ‖g_k‖: the Gram matrix of gradients in fp32 knows no shorter length.

    Args:
        c: the radius of the ball in units of ‖g₀‖, ≥ 0. At 0 this is the mean; the paper's experiments take 0.4 and
            0.5.

    Source: Liu et al., *Conflict-averse gradient descent for multi-task learning*, NeurIPS 2021 (arXiv 2110.14048).
    """

    deterministic = True
    _clipped = False

    def __init__(self, c: float = 0.4) -> None:
        if not 0 <= c < math.inf:
            raise ValueError(
                f"c={c}: pass a finite number ≥ 0, the radius around the mean gradient in units of its norm"
            )
        self.c = float(c)

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights on the raw gradients, fp64 [K]."""
        return self.solve(gram, losses).weights

    def solve(self, gram: Tensor | None, losses: Tensor) -> Solution:
        """Weights on the raw gradients, with gap and status of the solve; nothing waits for a GPU.

        `mogeo.geometry.ops.conflict_averse_weights` tells what each status promises.

        Args:
            gram: M [K, K]. An objective with a zero row has weight 0.
            losses: L [K]; not read.

        Returns:
            `Solution`; the gap, in units of the Gram matrix, is that of CAGrad's problem in p.

        Raises:
            ValueError: there is no Gram matrix.
        """
        return self.steered(None, 0.0, gram, losses)

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """The weights for v in proportion to a preference p, fp64 [K]."""
        return self.steered(preference, 0.0, gram, losses).weights

    def steered(self, preference: Tensor | None, min_weight: float, gram: Tensor | None, losses: Tensor) -> Solution:
        """`solve` with v in proportion to a preference, and a floor under the weights; see `Weighting.steered`."""
        if gram is None:
            raise ValueError(f"{self!r} needs the Gram matrix of the gradients, got None")
        base = torch.ones_like(losses, dtype=torch.float64) if preference is None else preference
        found = conflict_averse_weights(gram, base, self.c, clipped=self._clipped)
        return Solution(floored(found.weights, min_weight, gram), found.gap, found.status)

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}({self.c:g})"


class RACO(CAGrad):
    """CAGrad with a correction clipped by the user's weights: w = v + s p̃ / ‖Σ_k p̃_k g_k‖, p̃ = min(p, v).

    Where p puts more on an objective than v does, the excess is cut off, and what is left is brought to the length s
    again. v, p, s and c are those of `CAGrad`, and so is all the rest; v is meant to be a preference of the user's
    (`preference=` of the optimizer). Gap and certificate are those of p, before the cut.

    Unlike CAGrad's direction, this one depends on p itself: where gradients depend on each other, as duplicates do,
    many p make the same g_p, and p̃ is that of the one that was found.

    Source: RACO, ICML 2026 (arXiv 2602.02495), for a DPO loss per objective, with c = 0.4.
    """

    _clipped = True
