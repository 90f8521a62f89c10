"""Weightings: (Gram matrix, losses) → weights on the raw gradients, the direction being d = Σ_k w_k g_k.

Knows no optimizer and no torch.nn. A weighting is any callable `(gram, losses) -> weights`; the classes here add what
lets an optimizer save work (`needs_gram`, `constant`), check its input (`needs_positive_losses`) and resume
(`state_dict`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mogeo.constants import constant_tensor
from mogeo.min_norm import Status
from mogeo.ops import MinNorm, descent_weights, min_norm_weights, normalized_min_norm


class Weighting:
    """Base class of the weightings of this package; subclass it to get the defaults, or pass any callable."""

    #: Whether `__call__` reads the Gram matrix. If not, it may be passed None.
    needs_gram: bool = True
    #: Whether an objective that still has a gradient must have a loss > 0.
    needs_positive_losses: bool = False

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights on the raw gradients, fp64 [K], from the Gram matrix, fp64 [K, K], and the losses, fp64 [K]."""
        raise NotImplementedError

    def constant(self, n_objectives: int) -> tuple[float, ...] | None:
        """The K weights, where they depend on nothing: the optimizer then needs no gradient rows. Else None."""
        return None

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Weights under a preference p among the objectives, fp64 [K], > 0, of mean 1; by default w·p."""
        return self(gram, losses) * preference

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step: small tensors, numbers, strings, None, lists, and dicts by strings."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class LinearScalarization(Weighting):
    """Fixed weights w = p / Σp; without `preference`, uniform: w = 1/K. Costs what plain training costs.

    Args:
        preference: p [K], ≥ 0 and not all zero.
    """

    needs_gram = False

    def __init__(self, preference: Sequence[float] | None = None) -> None:
        self.preference = None if preference is None else tuple(float(p) for p in preference)
        if self.preference is not None and not (
            all(math.isfinite(p) and p >= 0 for p in self.preference) and sum(self.preference) > 0
        ):
            raise ValueError(f"preference {self.preference}: weights must be finite, ≥ 0, and not all zero")

    def constant(self, n_objectives: int) -> tuple[float, ...]:
        """w = p / Σp."""
        preference = self.preference or (1.0,) * n_objectives
        if len(preference) != n_objectives:
            raise ValueError(f"{self!r} has {len(preference)} weights for {n_objectives} objectives: pass one for each")
        return tuple(p / sum(preference) for p in preference)

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """w = p / Σp."""
        return constant_tensor(self.constant(losses.numel()), torch.float64, losses.device).clone()

    def __repr__(self) -> str:
        return "uniform" if self.preference is None else f"linear({', '.join(f'{p:g}' for p in self.preference)})"


class GroupDRO(Weighting):
    """Exponentiated-gradient weights on the losses: q ← q·exp(η L) / Σ, w = q, from q₀ = 1/K. Needs no Gram matrix.

    Args:
        step_size: η, in units of 1/loss.

    Source: Sagawa et al., *Distributionally robust neural networks for group shifts*, 2020, algorithm 1.
    """

    needs_gram = False

    def __init__(self, step_size: float = 0.01) -> None:
        if not (math.isfinite(step_size) and step_size >= 0):
            raise ValueError(f"step_size {step_size}: pass a finite number ≥ 0")
        self.step_size = step_size
        self._log_weights: Tensor | None = None

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """Advance q by one step and return it."""
        losses = losses.to(torch.float64)
        if self._log_weights is None:
            self._log_weights = torch.zeros_like(losses)
        if self._log_weights.shape != losses.shape:
            raise ValueError(f"{self!r} holds {self._log_weights.numel()} weights, but got {losses.numel()} losses")
        self._log_weights = self._log_weights.to(losses.device)
        # In logarithms nothing overflows; in place, so that a replayed CUDA graph goes on from where it stood.
        self._log_weights.copy_(torch.log_softmax(self._log_weights + self.step_size * losses, 0))
        return self._log_weights.exp()

    def state_dict(self) -> dict[str, Any]:
        """log q, K numbers; none before the first step."""
        return {"log_weights": [] if self._log_weights is None else self._log_weights.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore log q."""
        saved = list(state_dict["log_weights"])
        self._log_weights = torch.tensor(saved, dtype=torch.float64) if saved else None

    def __repr__(self) -> str:
        return f"group-dro({self.step_size:g})"


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

    def preferring(self, preference: Tensor, gram: Tensor | None, losses: Tensor) -> Tensor:
        """The weights of `solve` under a preference."""
        return self.solve(gram, losses, preference).weights

    def solve(
        self, gram: Tensor | None, losses: Tensor, preference: Tensor | None = None, min_weight: float = 0.0
    ) -> MinNorm:
        """Weights on the raw gradients, with gap and status of the solve; nothing waits for a GPU.

        Under a preference p, α solves the problem of g̃_k / p_k, and α_k / p_k, scaled to the sum 1 again, takes the
        place of α_k. So d of `mgda` lies along the min-norm point of the g_k / p_k, and where all weights are positive
        it descends in proportion to p. The scaling keeps the length: without it, a preference would shorten the step.

        Args:
            gram: M [K, K]. An objective with a zero row has weight 0, and no floor.
            losses: L [K], > 0 where they divide; that is the caller's to check.
            preference: p [K], fp64, > 0.
            min_weight: m, a floor under the α_k of this problem: 0 ≤ m < 1/J for the J objectives with a gradient.

        Returns:
            `MinNorm`, with the gap in units of the normalised Gram matrix, over the hull that the floor leaves. With a
            preference or a floor, a loss ≤ 0 that divides gives NaN weights and `Status.NONPOSITIVE_LOSS`.

        Raises:
            ValueError: there is no Gram matrix.
        """
        if gram is None:
            raise ValueError(f"{self!r} needs the Gram matrix of the gradients, got None")
        if preference is None and min_weight == 0:
            return normalized_min_norm(gram, losses, self.normalize, self.power, self.apply_to)
        normalizers = self._normalizers(gram, losses)
        divisors = normalizers if preference is None else normalizers * preference
        normalized = gram / (divisors[:, None] * divisors[None, :])
        alpha, gap, status = _min_norm_above(normalized, min_weight)
        if preference is not None:
            alpha = alpha / preference
            alpha = torch.where(alpha != 0, alpha / alpha.sum(), 0.0)
        weights = alpha if self.apply_to == "raw" else torch.where(alpha != 0, alpha / normalizers, 0.0)
        wrong = normalizers.isnan().any()
        return MinNorm(weights.masked_fill(wrong, torch.nan), gap, status.masked_fill(wrong, Status.NONPOSITIVE_LOSS))

    def _normalizers(self, gram: Tensor, losses: Tensor) -> Tensor:
        """n, fp64 [K]: 1 where the gradient is zero, NaN where a loss ≤ 0 would divide one that is not."""
        norms, losses = gram.diagonal().sqrt(), losses.to(torch.float64)
        base = {"none": torch.ones_like(norms), "l2": norms, "loss": losses, "loss+": losses * norms}[self.normalize]
        n = torch.where(base > 0, base, torch.nan) ** self.power
        return torch.where(norms > 0, n, 1.0)

    def __repr__(self) -> str:
        settings = (self.normalize, self.power, self.apply_to)
        for name, preset in _MGDA_PRESETS.items():
            if settings == preset:
                return name
        if self.normalize == "l2" and self.apply_to == "normalized":
            return f"gapo({self.power:g})"
        return f"MGDA(normalize={self.normalize!r}, power={self.power:g}, apply_to={self.apply_to!r})"


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


def gapo(power: float) -> MGDA:
    """GAPO's gradient rescaling: ĝ = g / ‖g‖^power, w = α / ‖g‖^power. Power 0 is `mgda`, 1 is `mgda-normalized`.

    Source: arXiv 2507.01915, brought to DPO losses.
    """
    return MGDA("l2", power=power, apply_to="normalized")


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


def as_weights(weighting: object, returned: Any, losses: Tensor) -> Tensor:
    """What a weighting returned, as fp64 [K] on the device of `losses`; whether it is finite is not looked at.

    Raises:
        RuntimeError: it is not one number per objective.
    """
    try:
        weights = torch.as_tensor(returned, dtype=torch.float64, device=losses.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise bad_weights(weighting, returned, len(losses)) from None
    if weights.shape != losses.shape:
        raise bad_weights(weighting, returned, len(losses))
    return weights


def bad_weights(weighting: object, returned: object, count: int) -> RuntimeError:
    """The error for a weighting that did not return one finite weight per objective."""
    return RuntimeError(
        f"weighting {weighting!r} returned {returned!r} for {count} objectives: it must return one finite weight per "
        "objective"
    )


def require_positive_losses(gram: Tensor, losses: Tensor, objectives: Sequence[str], weighting: object) -> None:
    """Raise ValueError, naming the objective, where a loss ≤ 0 belongs to a gradient that is not zero."""
    dividing = losses.masked_fill(~(gram.diagonal() > 0), 1.0).tolist()
    for name, loss in zip(objectives, dividing, strict=True):
        if loss <= 0:
            raise ValueError(
                f"objective {name!r} has loss {loss:g}; {weighting!r} divides by the loss and needs it positive: shift "
                "the loss, or use weighting='mgda-normalized'"
            )


# name: (normalize, power, apply_to)
_MGDA_PRESETS: dict[str, tuple[Any, float, Any]] = {
    "mgda": ("none", 1.0, "raw"),
    "mgda-normalized": ("l2", 1.0, "normalized"),
    "mgda-decoupled": ("loss", 1.0, "raw"),
}


def _preset(name: str) -> MGDA:
    normalize, power, apply_to = _MGDA_PRESETS[name]
    return MGDA(normalize, power=power, apply_to=apply_to)


# name: (factory, fewest arguments, most arguments, how to write it)
_REGISTRY: dict[str, tuple[Callable[..., Weighting], int, float, str]] = {
    "uniform": (LinearScalarization, 0, 0, "uniform"),
    "linear": (lambda *preference: LinearScalarization(preference), 1, math.inf, "linear(0.3, 0.7), one per objective"),
    "group-dro": (GroupDRO, 0, 1, "group-dro, or group-dro(0.01) with its step size"),
    **{name: (functools.partial(_preset, name), 0, 0, name) for name in _MGDA_PRESETS},
    "upgrad": (UPGrad, 0, 0, "upgrad"),
    "gapo": (gapo, 1, 1, "gapo(0.5), with the power of the norm"),
}
#: The registered names.
NAMES: tuple[str, ...] = tuple(_REGISTRY)

WeightingLike = str | Callable[[Tensor, Tensor], Tensor]


def resolve(weighting: WeightingLike) -> Callable[[Tensor | None, Tensor], Tensor]:
    """A weighting from its name, such as `"mgda-decoupled"` or `"linear(0.3, 0.7)"`, or from one of TorchJD; any other
    callable is returned as it is.

    Raises:
        ValueError: the name is not registered, or its arguments do not fit.
        TypeError: `weighting` is neither a string nor a callable, or one of TorchJD's that needs more than a Gramian.
    """
    if not isinstance(weighting, str):
        if not callable(weighting):
            raise TypeError(
                f"weighting={weighting!r}: pass a name ({', '.join(NAMES)}) or a callable (gram, losses) -> weights"
            )
        from mogeo.integrations import torchjd

        if torchjd.is_torchjds(weighting):
            return torchjd.adapted(weighting)
        return weighting  # type: ignore[return-value]  # a callable that reads the Gram is passed one
    match = re.fullmatch(r"\s*([a-z0-9+-]+)\s*(?:\((.*)\))?\s*", weighting)
    if match is None or match[1] not in _REGISTRY:
        raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(NAMES)}, or pass a callable")
    name, text = match.groups()
    try:
        arguments = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"weighting {weighting!r}: the arguments in brackets must be numbers") from None
    factory, fewest, most, usage = _REGISTRY[name]
    if not fewest <= len(arguments) <= most:
        raise ValueError(f"weighting {weighting!r}: write {usage}")
    return factory(*arguments)
