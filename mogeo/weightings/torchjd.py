"""TorchJD's weightings as mogeo's: whatever maps a Gramian to weights serves as `weighting=`.

`mogeo.weightings.resolve` comes here with what TorchJD made; nothing here imports it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mogeo.weightings.base import Weighting

# Of the weightings of a matrix, those that read nothing but its number of rows: a Gramian has as many.
_COUNT_ROWS = ("MeanWeighting", "SumWeighting", "ConstantWeighting", "RandomWeighting")


class GramianWeighting(Weighting):
    """A weighting of TorchJD on mogeo's Gram matrix. Make it by passing TorchJD's to `weighting=`.

    It is given the fp64 Gram matrix where the gradients are; an objective left out of a step has a zero row in it. What
    TorchJD's stateful weightings remember is not saved with the optimizer, because they offer no way to.

    Args:
        inner: a `torchjd.aggregation.Weighting` of Gramians, such as `UPGradWeighting()`.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, gram: Tensor | None, losses: Tensor) -> Tensor:
        """What the inner weighting makes of the Gram matrix, fp64 [K]."""
        assert gram is not None
        weights: Tensor = self.inner(gram).detach()
        return weights

    def __repr__(self) -> str:
        return f"torchjd {self.inner!r}"


def is_torchjds(weighting: object) -> bool:
    """Whether TorchJD made this."""
    return isinstance(weighting, nn.Module) and type(weighting).__module__.split(".")[0] == "torchjd"


def adapted(weighting: Any) -> GramianWeighting:
    """TorchJD's weighting, or that inside one of its aggregators, as a weighting of mogeo.

    Raises:
        TypeError: it reads the gradients themselves, which mogeo does not hand to a weighting.
    """
    inner = getattr(weighting, "gramian_weighting", weighting)
    read = inner
    while type(read).__name__ == "CRMOGMWeighting":  # smooths another's weights
        read = read.weighting
    kinds = [kind.__name__ for kind in type(read).__mro__]
    if "_GramianWeighting" in kinds or kinds[0] in _COUNT_ROWS:
        return GramianWeighting(inner)
    raise TypeError(
        f"weighting={weighting!r}: it reads the gradients themselves, and mogeo hands a weighting their Gram matrix. "
        "Pass one of TorchJD's Gramian weightings, such as UPGradWeighting()"
    )
