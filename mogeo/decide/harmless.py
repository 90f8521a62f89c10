"""A guarantee of descent around a weighting. Knows Gram matrices and weightings; no optimizer, no rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mogeo.weightings import Around, Solution


class Harmless(Around):
    """The weights of the direction nearest to another weighting's that hurts no objective, to first order.

    v = Σ_k (w_k + μ_k) g_k with ⟨v, g_k⟩ ≥ 0 for all k, exact, from the Gram matrix (`mogeo.descent_weights`). Where
    the direction hurts nobody, w comes back as it is, to the last bit.

    Args:
        inner: the weighting that gives w.
    """

    completes = True

    def solve(self, gram: Tensor | None, losses: Tensor) -> Solution:
        """w + μ, what the inner solver says of w, and μ with its status.

        Raises:
            ValueError: there is no Gram matrix.
        """
        return self.completed(gram, self.inner.solve(gram if self.inner.needs_gram else None, losses))

    def min_norm_problem(self) -> tuple[str, float, str] | None:
        """That of the inner weighting."""
        return self.inner.min_norm_problem()

    def completed(self, gram: Tensor | None, solution: Solution) -> Solution:
        """w + μ for a solution w of the inner weighting."""
        if gram is None:
            raise ValueError("a guarantee of descent needs the Gram matrix of the gradients, got None")
        weights, correction, status = torch.ops.mogeo.descent(gram, solution.weights)
        return solution._replace(weights=weights, correction=correction, correction_status=status)
