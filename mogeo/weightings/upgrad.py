"""UPGrad: the mean of gradients, each first made to hurt nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from mogeo.geometry.ops import descent_weights
from mogeo.weightings.base import Weighting


class UPGrad(Weighting):
    """The mean of all gradients, each first made to hurt nobody: w = (1/K) Σ_k (e_k + μ_k).

    e_k + μ_k are the weights of the direction nearest to g_k in the dual cone {v : ⟨v, g_j⟩ ≥ 0 for all j}: K quadratic
    programs of K variables, solved exactly from the Gram matrix (`mogeo.descent_weights`), on a GPU in one launch. The
    direction hurts no objective, and grows with every gradient alone.

    Source: Quinton & Rey, *Jacobian descent for multi-objective optimization*, 2024 (arXiv 2406.16232), section 3.
    """

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights on the raw gradients, fp64 [K]."""
        return self._harmless(gram).mean(0)

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """w = (1/K) Σ_k p_k (e_k + μ_k): the mean of p_k g_k, each first made to hurt nobody."""
        return (preference[:, None] * self._harmless(gram)).mean(0)

    def _harmless(self, gram: Tensor | None) -> Tensor:
        """e_k + μ_k, fp64 [K, K], a row for each k."""
        if gram is None:
            raise ValueError(f"{self!r} needs the Gram matrix of the gradients, got None")
        count = len(gram)
        alone = torch.eye(count, dtype=torch.float64, device=gram.device)
        return descent_weights(gram.expand(count, count, count), alone).weights

    def __repr__(self) -> str:
        return "upgrad"
