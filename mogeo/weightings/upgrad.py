"""UPGrad: the mean of gradients, each first made to hurt nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from mogeo.geometry.exact_min_norm import Status
from mogeo.geometry.ops import Descent, descent_weights
from mogeo.weightings.base import Solution, Weighting, floored


class UPGrad(Weighting):
    """The mean of all gradients, each first made to hurt nobody: w = (1/K) Σ_k (e_k + μ_k).

    e_k + μ_k are the weights of the direction nearest to g_k in the dual cone {v : ⟨v, g_j⟩ ≥ 0 for all j}: K quadratic
    programs of K variables, solved exactly from the Gram matrix (`mogeo.descent_weights`), on a GPU in one launch. The
    direction hurts no objective, and grows with every gradient alone.

    Source: Quinton & Rey, *Jacobian descent for multi-objective optimization*, 2024 (arXiv 2406.16232), section 3.
    """

    deterministic = True

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights on the raw gradients, fp64 [K]."""
        return self.solve(gram, losses).weights

    def solve(self, gram: Tensor | None, losses: Tensor) -> Solution:
        """Weights on the raw gradients, with the worst status of the K problems; nothing waits for a GPU.

        `OPTIMAL` is said where all K are: the direction is then that of UPGrad to 1e-3 of the mean of the |g_k|, and
        normally to rounding. `STALLED` is worse than `UNDECIDED`, and both are worse than that;
        `mogeo.descent_weights` tells what each promises. `ZERO` and `NONFINITE` are said of all problems at once.

        Args:
            gram: M [K, K].
            losses: L [K]; not read.

        Returns:
            `Solution`, without a gap: these problems have none.

        Raises:
            ValueError: there is no Gram matrix.
        """
        return self.steered(None, 0.0, gram, losses)

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """w = (1/K) Σ_k p_k (e_k + μ_k): the mean of p_k g_k, each first made to hurt nobody."""
        return self.steered(preference, 0.0, gram, losses).weights

    def steered(self, preference: Tensor | None, min_weight: float, gram: Tensor | None, losses: Tensor) -> Solution:
        """`solve` with each p_k g_k in place of g_k, and a floor under the weights; see `Weighting.steered`."""
        harmless = self._harmless(gram)
        each = harmless.weights if preference is None else preference[:, None] * harmless.weights
        weights = floored(each.mean(0), min_weight, gram)
        stalled = (harmless.status == Status.STALLED).any()
        return Solution(weights, status=harmless.status.amax().masked_fill(stalled, Status.STALLED))

    def _harmless(self, gram: Tensor | None) -> Descent:
        """e_k + μ_k, fp64 [K, K], a row for each k; with its μ_k and status, [K, K] and [K]."""
        if gram is None:
            raise ValueError(f"{self!r} needs the Gram matrix of the gradients, got None")
        count = len(gram)
        alone = torch.eye(count, dtype=torch.float64, device=gram.device)
        return descent_weights(gram.expand(count, count, count), alone)

    def __repr__(self) -> str:
        return "upgrad"
