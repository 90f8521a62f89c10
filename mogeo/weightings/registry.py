"""Names of weightings, and what they make."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

from torch import Tensor

from mogeo.weightings.base import Weighting
from mogeo.weightings.cagrad import RACO, CAGrad
from mogeo.weightings.group_dro import GroupDRO
from mogeo.weightings.linear import LinearScalarization
from mogeo.weightings.mgda import MGDA, PRESETS, gapo
from mogeo.weightings.upgrad import UPGrad


def _preset(name: str) -> MGDA:
    normalize, power, apply_to = PRESETS[name]
    return MGDA(normalize, power=power, apply_to=apply_to)


# name: (factory, fewest arguments, most arguments, how to write it)
_REGISTRY: dict[str, tuple[Callable[..., Weighting], int, float, str]] = {
    "uniform": (LinearScalarization, 0, 0, "uniform"),
    "linear": (lambda *preference: LinearScalarization(preference), 1, math.inf, "linear(0.3, 0.7), one per objective"),
    "group-dro": (GroupDRO, 0, 1, "group-dro, or group-dro(0.01) with its step size"),
    **{name: (functools.partial(_preset, name), 0, 0, name) for name in PRESETS},
    "upgrad": (UPGrad, 0, 0, "upgrad"),
    "gapo": (gapo, 1, 1, "gapo(0.5), with the power of the norm"),
    "cagrad": (CAGrad, 0, 1, "cagrad, or cagrad(0.4) with the radius around the mean"),
    "raco": (RACO, 0, 1, "raco, or raco(0.4) with the radius around the mean"),
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
        from mogeo.weightings import torchjd

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
