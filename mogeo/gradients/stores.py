"""Captures: all that a step's gradients are caught in, made for the parameters as they are.

Rows and direction (`mogeo.gradients.rows`), and where asked for, mean gradients of groups that stay outside the Gram
matrix, and sketches (`mogeo.gradients.sketches`). Knows which parameters go where, and when memory has to be made anew;
no losses and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.gradients.ranks import Group, Ranks, ranks_of
from mogeo.gradients.rows import GradientBuffers
from mogeo.gradients.sketches import SketchedRows
from mogeo.gradients.store import Capture, Layout, layout_of
from mogeo.losses.pending import Window

_REQUIRES_GRAD = attrgetter("requires_grad")


class Holding(NamedTuple):
    """How gradients are held: keywords of `mogeo.MultiObjectiveOptimizer`."""

    process_group: Group | None
    shard_rows: bool
    row_dtype: torch.dtype | None
    host_rows: bool
    release_rows: bool
    sketch: int | None


class _Seen:
    """What the parameters of an optimizer looked like when they were sorted out.

    Ids count only while the parameters are alive, so these are kept. Of frozen ones nothing else is asked: they may
    have no strides, or no shape yet.
    """

    def __init__(self, parameters: list[Tensor], of_groups: list[tuple[int, bool]]) -> None:
        self._parameters = parameters
        wanted = list(map(_REQUIRES_GRAD, parameters))
        self._facts = (of_groups, list(map(id, parameters)), wanted, layout_of(list(compress(parameters, wanted))))
        self.found: tuple[list[Tensor], list[Tensor], Layout] | None = None

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]]) -> _Seen:
        """As they are now."""
        parameters = [parameter for group in groups for parameter in group["params"]]
        return cls(parameters, [(len(group["params"]), group.get("multi_objective", True)) for group in groups])

    def same_as(self, other: _Seen) -> bool:
        """Whether nothing has changed that decides where gradients go."""
        return self._facts == other._facts


class Captures:
    """What catches the gradients of a window, and keeps them.

    Attributes:
        buffers: rows and direction, or the direction alone; None before the first `fit`.
        plain: mean gradients of groups with an entry `"multi_objective": False`, if there are such.
        sketches: in place of rows, from the first window on that needs them.
    """

    def __init__(self) -> None:
        self._seen: _Seen | None = None
        self.buffers: GradientBuffers | None = None
        self.plain: GradientBuffers | None = None
        self.sketches: SketchedRows | None = None

    @property
    def _all(self) -> list[Capture]:
        return [part for part in (self.buffers, self.plain, self.sketches) if part is not None]

    def fit(
        self,
        groups: Sequence[Mapping[str, Any]],
        names: tuple[str, ...],
        window: Window,
        holding: Holding,
        is_open: bool,
    ) -> Capture:
        """Make room for a window, for the parameters as they are now; an open one moves over to it.

        Args:
            groups: of the base optimizer.
            names: of the K objectives.
            window: whose gradients are to be caught.
            holding: how.
            is_open: whether some have been.

        Returns:
            What they go to, those of plain groups apart.

        Raises:
            ValueError: no parameter requires grad.
            RuntimeError: parameters changed within a window that cannot move, or ranks disagree on the objectives.
        """
        mine, others, layout = self._parameters(groups, is_open)
        keeps_rows = window.calls is None and (window.weights is None or (window.held and not holding.release_rows))
        n_rows = len(names) if keeps_rows and holding.sketch is None else 1
        fits = (
            self.buffers is not None
            and self.buffers.suits(n_rows, layout)
            and (is_open or not self.buffers.lacks_hooks())  # what was frozen when they were made may be free by now
        )
        plain_fits = self.plain.suits(1, layout_of(others)) if self.plain else not others
        ranks = self.buffers.ranks if fits and self.buffers is not None else ranks_of(holding.process_group)
        if not (fits and plain_fits):
            if ranks is not None:
                ranks.agreed("the names or the order of the objectives", names)
            self._make_buffers(mine, others, n_rows, ranks, holding, is_open)
        assert self.buffers is not None
        if window.calls is None:
            return self.buffers
        assert holding.sketch is not None
        if self.sketches is None or not self.sketches.suits(len(names), layout):
            if is_open:
                raise RuntimeError(
                    "the parameters changed between backward() and step(), and sketches cannot move: change them after "
                    "step() or zero_grad()"
                )
            self.sketches = SketchedRows(mine, len(names), ranks, dimension=holding.sketch)
        return self.sketches

    def _parameters(
        self, groups: Sequence[Mapping[str, Any]], is_open: bool
    ) -> tuple[list[Tensor], list[Tensor], Layout]:
        """Those with a share in the Gram matrix, the others, and the layout of those with a share.

        Where nothing has changed since the last call, and no window is open, the result of that call is returned again.
        """
        now = _Seen.of(groups)
        if not is_open and self._seen is not None and now.same_as(self._seen):
            now = self._seen
        if now.found is None:
            wanted, rest = self._sorted_out(groups, is_open)
            now.found = wanted, rest, layout_of(wanted)
        self._seen = None if is_open else now  # an open window counts frozen parameters in
        return now.found

    def _sorted_out(self, groups: Sequence[Mapping[str, Any]], is_open: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters with a share and others, each once, although torch allows repetition."""
        mine: dict[Tensor, None] = {}
        others: dict[Tensor, None] = {}
        for group in groups:
            (mine if group.get("multi_objective", True) else others).update(dict.fromkeys(group["params"]))
        # Frozen within a window: still part of it.
        captured = {parameter for part in self._all for parameter in part.touched()} if is_open else set()
        wanted, rest = ([p for p in ps if p.requires_grad or p in captured] for ps in (mine, others))
        if not wanted:
            raise ValueError(
                "no parameter of the base optimizer requires grad: nothing to optimize"
                + (" (outside groups with multi_objective=False)" if rest else "")
            )
        return wanted, rest

    def _make_buffers(
        self,
        mine: list[Tensor],
        others: list[Tensor],
        n_rows: int,
        ranks: Ranks | None,
        holding: Holding,
        is_open: bool,
    ) -> None:
        old = (self.buffers, self.plain) if is_open else (None, None)
        self.buffers = self.plain = None  # freed first, unless they hold a window
        self.buffers = GradientBuffers(
            mine, n_rows, ranks,
            shard_rows=holding.shard_rows, row_dtype=holding.row_dtype, host_rows=holding.host_rows,
        )  # fmt: skip
        self.plain = GradientBuffers(others, 1, ranks) if others else None
        for new, before in zip((self.buffers, self.plain), old, strict=True):
            if new is not None and before is not None:
                new.migrate(before)

    @contextmanager
    def capturing(self, rows: Capture, n_objectives: int) -> Iterator[None]:
        """Within this context, gradients that autograd accumulates go to `rows`, those of plain groups to a mean."""
        with rows.capturing():
            if self.plain is None:
                yield
            else:
                self.plain.select(None, 1 / n_objectives)
                with self.plain.capturing():
                    yield

    def collect(self, rows: Capture) -> None:
        """A backward is done: take what no hook has taken."""
        rows.collect()
        if self.plain is not None:
            self.plain.collect()

    def complete(self) -> None:
        """Make the gradients of this window, on all ranks, what the buffers hold."""
        for part in (self.buffers, self.plain):
            if part is not None:
                part.settle()
                part.average_replicas()

    def publish(self) -> None:
        """Hand direction and means out as `p.grad`. A collective."""
        for part in (self.buffers, self.plain):
            if part is not None:
                part.publish()

    def drop(self) -> None:
        """Close the window without handing anything out."""
        for part in self._all:
            part.drop()

    def release_rows(self) -> None:
        """Give the memory of rows back; the published direction stays."""
        if self.buffers is not None and self.buffers.n_rows > 1:
            self.buffers = self.buffers.without_rows()
