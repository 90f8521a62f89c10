"""Captures: all that a step's gradients are caught in, made for the parameters as they are.

Which parameters go where, when memory has to be made anew, and which store stands for which option of `memory=` is
decided here. Knows no losses and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from torch import Tensor

from mogeo.gradients.catching import Catcher
from mogeo.gradients.direction import SharedDirection
from mogeo.gradients.flat import Facts, FlatMemory, facts_of
from mogeo.gradients.memory import Memory, Rows, Sketch
from mogeo.gradients.ranks import Group, Ranks, ranks_of
from mogeo.gradients.rows import RowStore
from mogeo.gradients.sketches import SketchedRows
from mogeo.gradients.store import GradientStore

_REQUIRES_GRAD = attrgetter("requires_grad")

# What a step keeps of gradients: their weighted sum alone; that, with room for rows; or that, and sketches.
Keep = Literal["direction", "rows", "sketches"]


class Wanted(NamedTuple):
    """What an optimizer wants its gradients caught in."""

    #: Those of the base optimizer, as they are when it is called.
    groups: Callable[[], Sequence[Mapping[str, Any]]]
    #: Of the K objectives.
    names: tuple[str, ...]
    memory: Memory
    process_group: Group | None


class _Seen:
    """What the parameters of an optimizer looked like when they were sorted out.

    Ids count only while the parameters are alive, so these are kept. Of frozen ones nothing else is asked: they may
    have no strides, or no shape yet.
    """

    def __init__(self, parameters: list[Tensor], of_groups: list[tuple[int, bool]]) -> None:
        self._parameters = parameters
        wanted = list(map(_REQUIRES_GRAD, parameters))
        self._facts = (of_groups, list(map(id, parameters)), wanted, facts_of(list(compress(parameters, wanted))))
        self.found: tuple[list[Tensor], list[Tensor], Facts] | None = None

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
        rows: a row per objective, and the direction; None where no step needed rows so far.
        plain: mean gradients of groups with an entry `"multi_objective": False`, if there are such.
        sketches: in place of rows, from the first window on that needs them.
    """

    def __init__(self) -> None:
        self._seen: _Seen | None = None
        self._memory: Memory | None = None
        self._catcher: Catcher | None = None
        self._ids: frozenset[int] = frozenset()
        self._is_clean = True  # whether no store holds anything of a window
        self.rows: RowStore | None = None
        self._alone: SharedDirection | None = None
        self.plain: SharedDirection | None = None
        self.sketches: SketchedRows | None = None

    @property
    def buffers(self) -> RowStore | SharedDirection | None:
        """The rows with their direction, or the direction alone; None before the first `fit`."""
        return self._alone if self.rows is None else self.rows

    @property
    def direction(self) -> SharedDirection:
        """The direction, which becomes `p.grad`."""
        direction = self._alone if self.rows is None else self.rows.direction
        assert direction is not None
        return direction

    @property
    def _directions(self) -> list[SharedDirection]:
        return [self.direction] if self.plain is None else [self.direction, self.plain]

    def fit(self, wanted: Wanted, keep: Keep, is_open: bool) -> None:
        """Make room for a window, for the parameters as they are now; an open one moves over to it.

        Args:
            wanted: what the optimizer says.
            keep: what the window's step keeps. With an option of `memory=` that has no rows, "rows" is "direction".
            is_open: whether gradients have been caught in this window.

        Raises:
            ValueError: no parameter requires grad.
            RuntimeError: parameters changed within a window that cannot move, or ranks disagree on the objectives.
        """
        if not is_open and not self._is_clean:  # an interrupt cut `drop` short
            self.drop()
        mine, others, facts = self._parameters(wanted.groups(), is_open)
        n_rows = len(wanted.names) if keep == "rows" and isinstance(wanted.memory, Rows) else 0
        if not self._suits(n_rows, facts, others, wanted.memory, is_open):
            ranks = ranks_of(wanted.process_group)
            if ranks is not None:
                ranks.agreed("the names or the order of the objectives", wanted.names)
            places = _places(mine, wanted.groups())
            self._make(mine, places, others, n_rows, ranks, wanted.memory, is_open)
        if keep == "direction" or not isinstance(wanted.memory, Sketch):
            self.sketches = None
        if keep == "sketches" and not self._has_sketches(len(wanted.names), facts, wanted.memory):
            if is_open:
                raise RuntimeError(
                    "the parameters changed between backward() and step(), and sketches cannot move: change them after "
                    "step() or zero_grad()"
                )
            assert isinstance(wanted.memory, Sketch)
            self.sketches = None  # freed first
            self.sketches = SketchedRows(
                mine, len(wanted.names), self.direction.ranks, dimension=wanted.memory.dimension,
                catcher=self._catcher, places=_places(mine, wanted.groups()),
            )  # fmt: skip

    def _suits(self, n_rows: int, facts: Facts, others: list[Tensor], memory: Memory, is_open: bool) -> bool:
        """Whether the stores that there are will do."""
        buffers = self.buffers
        if buffers is None or buffers.facts != facts or memory != self._memory:
            return False
        if n_rows != (buffers.n_rows if isinstance(buffers, RowStore) else 0):
            return False
        if not is_open and buffers.catcher.lacks_hooks():  # what was frozen when they were made may be free by now
            return False
        return self.plain.facts == facts_of(others) if self.plain else not others

    def _has_sketches(self, n_rows: int, facts: Facts, memory: Memory) -> bool:
        sketches = self.sketches
        return (
            sketches is not None
            and isinstance(memory, Sketch)
            and (sketches.n_rows, sketches.dimension) == (n_rows, memory.dimension)
            and sketches.facts == facts
            and sketches.catcher is self._catcher
        )

    def _make(
        self,
        mine: list[Tensor],
        places: list[int],
        others: list[Tensor],
        n_rows: int,
        ranks: Ranks | None,
        memory: Memory,
        is_open: bool,
    ) -> None:
        old = (self.rows, self._alone, self.plain) if is_open else (None, None, None)
        self.rows = self._alone = self.plain = None  # freed first, unless they hold a window
        if not is_open:
            self.sketches = None  # their hooks go with them
        catcher = self._catcher = Catcher(mine, hooks=ranks is None)
        rows = memory if isinstance(memory, Rows) else Rows()
        if n_rows:
            self.rows = RowStore(mine, n_rows, ranks, rows, catcher, places)
        else:
            self._alone = SharedDirection(mine, ranks, catcher, FlatMemory(mine, 1, ranks, rows))
        self.plain = SharedDirection(others, ranks) if others else None
        self._memory = memory
        self._ids = frozenset(map(id, [*mine, *others]))
        for new, before in zip((self.rows, self._alone, self.plain), old, strict=True):
            if new is not None and before is not None:
                new.migrate(before)  # type: ignore[arg-type]  # of the same class

    def _parameters(
        self, groups: Sequence[Mapping[str, Any]], is_open: bool
    ) -> tuple[list[Tensor], list[Tensor], Facts]:
        """Those with a share in the Gram matrix, the others, and the facts of those with a share.

        Where nothing has changed since the last call, and no window is open, the result of that call is returned again.
        """
        now = _Seen.of(groups)
        if not is_open and self._seen is not None and now.same_as(self._seen):
            now = self._seen
        if now.found is None:
            wanted, rest = self._sorted_out(groups, is_open)
            now.found = wanted, rest, facts_of(wanted)
        self._seen = None if is_open else now  # an open window counts frozen parameters in
        return now.found

    def _sorted_out(self, groups: Sequence[Mapping[str, Any]], is_open: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters with a share and others. Torch lets a group list one twice: it is taken once."""
        mine: dict[Tensor, None] = {}
        others: dict[Tensor, None] = {}
        for group in groups:
            (mine if group.get("multi_objective", True) else others).update(dict.fromkeys(group["params"]))
        # Frozen within a window: still part of it.
        captured = {parameter for part in self._stores for parameter in part.touched()} if is_open else set()
        wanted, rest = ([p for p in ps if p.requires_grad or p in captured] for ps in (mine, others))
        if not wanted:
            raise ValueError(
                "no parameter of the base optimizer requires grad: nothing to optimize"
                + (" (outside groups with multi_objective=False)" if rest else "")
            )
        return wanted, rest

    def changed(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether parameters were added, removed, frozen or unfrozen since the last `fit`."""
        try:
            mine, others = self._sorted_out(groups, is_open=False)
        except ValueError:
            return True
        known = [self.direction.parameters, [] if self.plain is None else self.plain.parameters]
        return [list(map(id, each)) for each in (mine, others)] != [list(map(id, each)) for each in known]

    @property
    def _stores(self) -> list[GradientStore]:
        stores = [self.rows, self._alone, self.plain, self.sketches]
        return [store for store in stores if store is not None]

    @contextmanager
    def capturing(self, store: GradientStore, n_objectives: int) -> Iterator[None]:
        """Within this context, gradients that autograd accumulates go to `store`, those of plain groups to a mean."""
        self._is_clean = False
        with store.capturing():
            if self.plain is None:
                yield
            else:
                self.plain.weigh(1 / n_objectives)
                with self.plain.capturing():
                    yield

    def collect(self, store: GradientStore) -> None:
        """A backward is done: take what no hook has taken."""
        store.collect()
        if self.plain is not None:
            self.plain.collect()

    def touched(self, store: GradientStore) -> bool:
        """Whether any parameter had a gradient in this window."""
        return any(store.flags()) or (self.plain is not None and any(self.plain.flags()))

    def belongs(self, parameter: Tensor) -> bool:
        """Whether gradients of this parameter come here."""
        return id(parameter) in self._ids

    def publish(self) -> None:
        """Hand direction and means out as `p.grad`. A collective. If it is interrupted, every `p.grad` stays."""
        before: list[tuple[Tensor, Tensor | None]] = []
        try:
            for direction in self._directions:
                direction.publish(before)
        except BaseException:
            for parameter, grad in before:
                parameter.grad = grad
            raise

    def drop(self) -> None:
        """Close the window without handing anything out."""
        for store in self._stores:
            store.catcher.abort()
            store.drop()
        self._is_clean = True


def _places(parameters: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where parameters stand among those of all groups."""
    order = {id(parameter): place for place, parameter in enumerate(p for group in groups for p in group["params"])}
    return [order[id(parameter)] for parameter in parameters]
