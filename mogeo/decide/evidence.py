"""Weights that rest on measured gradients as far as these are known, and on the user's preference for the rest.

Knows weightings and what is known of mean gradients; no optimizer, no rows. Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo.geometry.constants import constant_tensor
from mogeo.geometry.tracking import MeanGradients
from mogeo.weightings import Around, Solution, Weighting

_ROUNDING = 1e-9  # of a sum of weights: what a solver of somebody else's may leave below zero


class Evidenced(Around):
    """Another weighting's weights, in proportion to the evidence that there is of each mean gradient.

    With ρ_k, the evidence of objective k (0: its mean gradient cannot be told from zero; 1: it is certain), p_k its
    preferred share, and a_k the share that the weighting gives it,

        share_k = (1 − ρ_k) p_k + ρ_k a_k Σ_j ρ_j p_j / Σ_j ρ_j a_j:

    an objective keeps 1 − ρ_k of what is preferred, and the weighting shares out the rest. Where it gives all to
    objectives without evidence, Σ_j ρ_j a_j = 0, the rest stays where it is preferred. With all ρ_k = 1, weights are
    the weighting's own. Their sum is the weighting's in any case. If a weight is negative by
    more than rounding, or their sum is not positive, the weighting's weights are returned unchanged.

    Shares are those of coefficients: of w_k n_k where a weighting divides its weights by n_k, as `mgda-normalized` by
    ‖g_k‖, lest equal weights on gradients of unequal lengths follow the longest. A floor under them holds: what is
    below is raised to it, at the cost of what is above, in proportion to the excess.

    Args:
        inner: a weighting that reads the Gram matrix.
        tracked: tells the evidence, after it has looked at the step.
        preference: p [K] > 0; None: equal shares.
    """

    def __init__(self, inner: Weighting, tracked: MeanGradients, preference: Sequence[float] | None) -> None:
        super().__init__(inner)
        self.tracked = tracked
        self.preference = preference

    def solve(self, gram: Tensor | None, losses: Tensor) -> Solution:
        """What the inner weighting finds, as far as there is evidence.

        Raises:
            ValueError: there is no Gram matrix.
        """
        found = self.inner.solve(gram, losses)
        evidence = self.tracked.evidence
        if gram is None or evidence is None:
            return found
        live = gram.diagonal() > 0
        units = self.inner.units(gram, losses)
        coefficients = found.weights if units is None else found.weights * units
        preferred = torch.ones_like(losses)
        if self.preference is not None:
            preferred = constant_tensor(tuple(self.preference), torch.float64, losses.device)
        preferred = preferred.masked_fill(~live, 0.0)
        preferred = preferred / preferred.sum().clamp(min=torch.finfo(torch.float64).tiny)
        total = coefficients.sum()
        believed, rest = evidence * coefficients.clamp(min=0) / total, evidence * preferred
        rest = torch.where(believed.sum() > 0, believed * (rest.sum() / believed.sum()), rest)
        shares = (1 - evidence) * preferred + rest
        least = self.inner.least_shares(len(losses))
        if least is not None:
            shares = _raised(shares, constant_tensor(least, torch.float64, losses.device).masked_fill(~live, 0.0))
        weights = total * shares if units is None else total * shares / units
        no_shares = ~(total > 0) | (coefficients < -_ROUNDING * total).any()
        stay = ((evidence == 1) | ~live).all() | no_shares
        return found._replace(weights=torch.where(stay, found.weights, weights))


def _raised(shares: Tensor, least: Tensor) -> Tensor:
    """Shares that are no less than `least`, with the same sum; those that are no less already stay."""
    above = (shares - least).clamp(min=0)
    return least + above * ((shares.sum() - least.sum()) / above.sum())
