"""What stands between a weighting and the weights of a step: a preference, a floor and a memory.

Knows Gram matrices and weightings; no optimizer, no rows. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mogeo.geometry.constants import constant_tensor
from mogeo.weightings import Around, Solution, Weighting, as_weighting

AnyWeighting = Callable[[Tensor | None, Tensor], Any]


class Steering:
    """A preference, a floor and a memory between a weighting and its weights, applied in this order.

    Preference. For the MGDA family the hull is that of g̃_k / p_k, g̃ being the family's own normalised gradients; its
    coefficients are divided by p once more, and scaled to the sum 1 again. Where every weight is positive,

    | weighting | in proportion to p |
    | --- | --- |
    | `mgda` | ⟨d, g_k⟩ |
    | `mgda-normalized` | ⟨d, g_k⟩ / ‖g_k‖ |
    | `gapo(q)` | ⟨d, g_k⟩ / ‖g_k‖^q |
    | `mgda-decoupled` | ⟨v, g_k⟩ / L_k, with v = Σ_k (w_k / L_k) g_k: its coefficients come from v, and go to d |

    and none but `mgda-decoupled` hurts an objective, as without a preference. With any of the first three, raising p_k
    never lowers cos(d, g_k). `upgrad` projects p_k g_k in place of g_k. `cagrad` and `raco` turn the direction of
    `linear(p)` in place of that of `uniform`. All other weights are multiplied by p: `uniform` becomes `linear(p)`.

    Floor. In the MGDA family, the min-norm point is taken over α_k ≥ m, Σα = 1 instead of the whole simplex, exactly;
    what becomes of α_k under a preference is then at least m min(p) / p_k. The promise to hurt nobody ends where a
    floor is reached. All other weights are mixed with their own mean, w ← (1 − Km) w + m Σw, which keeps their sum; of
    weights ≥ 0 none then has a smaller share than m. Of a user's that are negative it may have, for they are mixed
    alike. An objective whose row of the Gram matrix is zero (solved, or left out) takes no part, and K counts the
    others; where the weighting reads no Gram matrix, all take part.

    Memory. λ ← sλ + (1 − s)w, beginning with the first w of each objective, and λ is what is returned. While its row
    of the Gram matrix is zero, an objective's λ rests, and its w is returned as it is. Weights that are not finite are
    returned and forgotten. Source: Zhou et al., *On the convergence of stochastic multi-objective gradient
    manipulation and beyond*, NeurIPS 2022 (CR-MOGM).

    Args:
        preference: p [K] > 0 in the order of the objectives, relative to each other: it is scaled to the mean 1, and a
            uniform one changes no bit.
        min_weight: m, 0 ≤ m < 1/K.
        smoothing: s, 0 ≤ s < 1.
        remembered: λ, fp64 [K], to go on from; NaN for an objective without one.

    Attributes:
        preference: of mean 1, or None where it is uniform.
        min_weight: m.
        smoothing: s.
        remembered: λ, fp64 [K], NaN before an objective's first step; None before the first step of all.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        preference: Sequence[float] | None = None,
        min_weight: float = 0.0,
        smoothing: float = 0.0,
        remembered: Tensor | None = None,
    ) -> None:
        self._count: int | None = None
        self.preference: tuple[float, ...] | None = None
        if preference is not None:
            given = tuple(float(p) for p in preference)
            if not given or not all(0 < p < math.inf for p in given):
                raise ValueError(f"preference {given}: pass one finite number > 0 for each objective")
            self._count = len(given)
            if min(given) < max(given):
                relative = [p / max(given) for p in given]
                self.preference = tuple(p * len(given) / math.fsum(relative) for p in relative)
        if not 0 <= min_weight < math.inf:
            raise ValueError(f"min_weight={min_weight}: pass a number ≥ 0, below 1/K for K objectives")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: pass a number s, 0 ≤ s < 1, the share of the past in each step")
        self.min_weight = float(min_weight)
        self.smoothing = float(smoothing)
        self.remembered = remembered
        if self._count is not None:
            self._check_count(self._count)

    def constant(self, weighting: AnyWeighting, count: int) -> tuple[float, ...] | None:
        """The K steered weights, where they are known beforehand (uniform, linear); else None.

        Raises:
            ValueError: the preference or the floor does not fit K = `count` objectives.
        """
        self._check_count(count)
        weights = as_weighting(weighting).constant(count)
        if weights is None:
            return None
        if self.preference is not None:
            weights = tuple(w * p for w, p in zip(weights, self.preference, strict=True))
        if self.min_weight > 0:
            total = math.fsum(weights)
            weights = tuple((1 - count * self.min_weight) * w + self.min_weight * total for w in weights)
        return weights

    def least_shares(self, weighting: Weighting, count: int) -> tuple[float, ...] | None:
        """The floor under the coefficients of K = `count` objectives that have a gradient, None for none."""
        if self.min_weight == 0:
            return None
        if self.preference is None or not weighting.prefers_after_floor:
            return (self.min_weight,) * count
        return tuple(self.min_weight * min(self.preference) / p for p in self.preference)

    def weigh(self, weighting: AnyWeighting, gram: Tensor | None, losses: Tensor) -> Solution:
        """One step: the steered weights on the raw gradients, and what the solver says of them.

        Args:
            weighting: a weighting, or any callable (gram, losses) → weights [K].
            gram: M, fp64 [K, K], with a zero row for an objective that is absent, left out or solved. None where the
                weighting reads none.
            losses: L, fp64 [K].

        Returns:
            The weights, fp64 [K], with gap and status where the weighting solves a problem. Where a loss ≤ 0 would
            divide, the weights are NaN: check before.

        Raises:
            ValueError: the preference or the floor does not fit K objectives, or there is no Gram matrix but a need.
            RuntimeError: the weighting did not return one number per objective.
        """
        weighting = as_weighting(weighting)
        known = self.constant(weighting, losses.numel())
        if known is not None:
            return Solution(constant_tensor(known, torch.float64, losses.device).clone())
        live = gram.diagonal() > 0 if gram is not None and weighting.needs_gram else None
        preference = None
        if self.preference is not None:
            preference = constant_tensor(self.preference, torch.float64, losses.device)
        found = weighting.steered(preference, self.min_weight, gram, losses)
        return found if self.smoothing == 0 else found._replace(weights=self._smoothed(found.weights, live))

    def _smoothed(self, weights: Tensor, live: Tensor | None) -> Tensor:
        if self.remembered is None:
            self.remembered = torch.full_like(weights, torch.nan)
        if self.remembered.shape != weights.shape:
            raise ValueError(f"{len(self.remembered)} weights are remembered, but {len(weights)} came: load the state "
                             "of an optimizer with as many objectives")  # fmt: skip
        self.remembered = self.remembered.to(weights.device)
        fresh = weights.isfinite() if live is None else weights.isfinite() & live
        average = torch.lerp(weights, self.remembered, self.smoothing)
        average = torch.where(self.remembered.isnan(), weights, average)
        # In place, so that a replayed CUDA graph goes on from where it stood.
        self.remembered.copy_(torch.where(fresh, average, self.remembered))
        return torch.where(fresh, self.remembered, weights)

    def state_dict(self) -> dict[str, Any]:
        """λ, K numbers, None for an objective without a step so far; nothing before the first step."""
        remembered = [] if self.remembered is None else self.remembered.tolist()
        return {"weights": [None if math.isnan(weight) else weight for weight in remembered]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore λ."""
        saved = [math.nan if weight is None else float(weight) for weight in state_dict["weights"]]
        self.remembered = torch.tensor(saved, dtype=torch.float64) if saved else None

    def _check_count(self, count: int) -> None:
        if self._count is not None and count != self._count:
            raise ValueError(f"preference has {self._count} values for {count} objectives: pass one for each")
        if self.min_weight * count >= 1:
            raise ValueError(
                f"min_weight={self.min_weight:g} for K = {count} objectives: the weights would exceed their sum, 1; "
                f"pass less than 1/K = {1 / count:g}"
            )


class Steered(Around):
    """Another weighting under a preference, a floor and a memory.

    Args:
        inner: the weighting.
        steering: what stands between it and the weights of a step.
    """

    def __init__(self, inner: Weighting, steering: Steering) -> None:
        super().__init__(inner)
        self.steering = steering
        self.needs_gram = inner.needs_gram

    def constant(self, n_objectives: int) -> tuple[float, ...] | None:
        """The steered weights, where they depend on nothing."""
        return self.steering.constant(self.inner, n_objectives)

    def solve(self, gram: Tensor | None, losses: Tensor) -> Solution:
        """What `Steering.weigh` returns."""
        return self.steering.weigh(self.inner, gram, losses)

    def units(self, gram: Tensor, losses: Tensor) -> Tensor | None:
        """Those of the inner weighting."""
        return self.inner.units(gram, losses)

    def least_shares(self, n_objectives: int) -> tuple[float, ...] | None:
        """What `Steering.least_shares` returns."""
        return self.steering.least_shares(self.inner, n_objectives)
