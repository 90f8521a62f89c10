"""GradientStore: where the gradients of a window are kept. A window is what lies between two directions.

Knows parameters; no weighting and no optimizer. Subclasses say what is kept: `mogeo.gradients.direction` one weighted
sum, `mogeo.gradients.rows` every gradient whole, `mogeo.gradients.sketches` a sketch of each.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from mogeo.geometry.tracking import Sketches
from mogeo.gradients.catching import Catcher
from mogeo.gradients.flat import facts_of
from mogeo.gradients.ranks import Ranks, is_sharded


class GradientStore(ABC):
    """Keeps gradients of a fixed list of parameters.

    Args:
        parameters: leaves in the order of the optimizer's groups, that require grad or did when a window began.
        ranks: the processes that hold the parameters between them, if there are several.
        catcher: takes gradients out of `p.grad`; by default one of its own. Stores of the same parameters share one.

    Attributes:
        device: where the Gram matrix and everything that follows from it lives: that of the first parameter.
    """

    device: torch.device

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks | None, catcher: Catcher | None) -> None:
        self.parameters = list(parameters)
        self.ranks = ranks
        self.facts = facts_of(self.parameters)
        self.catcher = Catcher(self.parameters, hooks=ranks is None) if catcher is None else catcher

    @property
    def sharded(self) -> bool:
        """Whether some parameters are held in shards by several ranks."""
        return any(map(is_sharded, self.parameters))

    @property
    def device_code(self) -> ModuleType | None:
        """`mogeo.geometry.triton_backend` where a whole step is decided on the device, else None: the host decides."""
        return None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within this context, gradients that autograd accumulates come here. Call `collect` after each backward."""
        with self.catcher.catching(self):
            yield

    def collect(self) -> None:
        """A backward is done: store what is left of its gradients."""
        self.catcher.collect(self)

    @abstractmethod
    def store(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Take over gradients of the parameters at `indices`, in ascending order: this rank's parts, dense."""

    def withheld(self, grad: Tensor) -> Tensor:
        """What to put back as `p.grad` after capturing; a copy, if that memory is about to be overwritten."""
        return grad

    @abstractmethod
    def flags(self) -> bytes:
        """A byte per parameter: 1 where it had a gradient in this window."""

    def touched(self) -> list[Tensor]:
        """Parameters that had a gradient in this window."""
        return [parameter for parameter, flag in zip(self.parameters, self.flags(), strict=True) if flag]

    @abstractmethod
    def complete(self) -> None:
        """Make what is kept the gradients of this window, and no others, averaged over ranks. A collective."""

    @abstractmethod
    def drop(self) -> None:
        """Close the window without handing anything out."""

    def ranks_hint(self) -> str:
        """What else may be why sharded parameters have no gradient."""
        if not self.sharded:
            return ""
        return (
            " Or was set_requires_gradient_sync(False) called? FSDP2 then keeps gradients to itself, and adds them to "
            "those of the next objective: leave it on, and call backward() several times before step() to accumulate"
        )


class ComparableStore(GradientStore):
    """Keeps gradients apart by objective, so that their Gram matrix can be told.

    Args:
        parameters: as for `GradientStore`.
        n_rows: K.
        ranks: as for `GradientStore`.
        catcher: as for `GradientStore`.
        places: of the parameters among all that the optimizer has, frozen ones included; by default in their order.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        n_rows: int,
        ranks: Ranks | None,
        catcher: Catcher | None,
        places: Sequence[int] | None = None,
    ) -> None:
        super().__init__(parameters, ranks, catcher)
        self.n_rows = n_rows
        self._places = tuple(range(len(self.parameters)) if places is None else places)
        self._layout: str | None = None  # gathered when it is asked for

    @abstractmethod
    def select(self, row: int) -> None:
        """Send gradients to the row of objective `row` from now on."""

    @abstractmethod
    def gram(self) -> Tensor:
        """This rank's part of the Gram matrix G Gᵀ, fp64 [K, K], on `device`: the sum over ranks is the whole."""

    def sketches(self) -> Sketches:
        """Sketches of complete gradients, on `device`, the same on all ranks. A collective.

        Their layout is a digest of which parts of which parameters each rank sketches: a checkpoint that one rank wrote
        suits all of them or none, and gradients of other parameters, or cut in another way, are not averaged with
        these, though they may have as many elements.
        """
        found = self._local_sketches()
        if self._layout is None:
            pairs = zip(self._places, self.parameters, strict=True)
            mine = ([(place, tuple(p.shape), str(getattr(p, "placements", ""))) for place, p in pairs], found.layout)
            of_all = [mine] if self.ranks is None else self.ranks.gathered(mine)
            self._layout = hashlib.sha256(repr(of_all).encode()).hexdigest()
        return found._replace(layout=self._layout)

    @abstractmethod
    def _local_sketches(self) -> Sketches:
        """`sketches`, with a layout that tells of this rank's part alone."""
