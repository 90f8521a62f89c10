"""Settings of the optimizer: what the user may change between steps, checked wherever it is set.

They live in one object that the optimizer and its proxies share, so that an assignment through any of them counts.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar, overload

import torch
import torch.distributed as dist

from mogeo.decide.steering import Steering
from mogeo.geometry.tracking import TOO_SHORT
from mogeo.gradients.memory import Memory, Rows, Sketch
from mogeo.losses.named import in_order

T = TypeVar("T")


class HasSettings(Protocol):
    """An optimizer, or a proxy of one, as its settings see it."""

    memory: Any

    def setting(self, name: str) -> Any:
        """The value."""

    def change_setting(self, name: str, value: Any) -> None:
        """Take a value that was checked."""


class Setting(Generic[T]):
    """An attribute of the optimizer that is checked when it is assigned, and acts from the next step on.

    Args:
        check: (name, value) → the value to keep; raises TypeError or ValueError where it does not fit.
        doc: what it is.
    """

    def __init__(self, check: Callable[[str, Any], T], doc: str) -> None:
        self.check = check
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, optimizer: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, optimizer: HasSettings, owner: type) -> T: ...
    def __get__(self, optimizer: HasSettings | None, owner: type) -> T | Setting[T]:
        if optimizer is None:
            return self
        value: T = optimizer.setting(self.name)
        return value

    def __set__(self, optimizer: HasSettings, value: Any) -> None:
        optimizer.change_setting(self.name, self.check(self.name, value))


def memory_of(
    memory: Memory | None, *, row_dtype: Any = None, host_rows: Any = False, shard_rows: Any = False, sketch: Any = None
) -> Memory:
    """The `memory=` that these keywords stand for.

    Raises:
        TypeError: one of them has another type.
        ValueError: they contradict each other.
    """
    if memory is not None and not isinstance(memory, (Rows, Sketch)):
        raise TypeError(f"memory={memory!r}: pass mogeo.Rows(...) or mogeo.Sketch(d)")
    for name, value in (("host_rows", host_rows), ("shard_rows", shard_rows)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: pass True or False")
    rows = {"row_dtype": row_dtype, "host_rows": host_rows or None, "shard_rows": shard_rows or None}
    given = [name for name, value in (*rows.items(), ("sketch", sketch)) if value is not None]
    if memory is not None and given:
        raise ValueError(f"memory={memory!r} says how gradients are kept: leave out {', '.join(given)}")
    if sketch is not None and len(given) > 1:
        raise ValueError(f"sketch={sketch} with {', '.join(given[:-1])}: there are no rows then, leave out one of them")
    if sketch is not None:
        return Sketch(sketch)
    return memory or Rows(row_dtype, "cpu" if host_rows else None, shard_rows)


class MemoryKeyword:
    """One part of `memory=` under a name of its own: `row_dtype`, `host_rows`, `shard_rows` or `sketch`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: HasSettings | None, owner: type) -> Any:
        return self if optimizer is None else keywords_of(optimizer.memory)[self.name]

    def __set__(self, optimizer: HasSettings, value: Any) -> None:
        optimizer.memory = memory_of(None, **{**keywords_of(optimizer.memory), self.name: value})


def keywords_of(memory: Memory) -> dict[str, Any]:
    """The keywords that stand for this `memory=`."""
    if isinstance(memory, Sketch):
        return {"row_dtype": None, "host_rows": False, "shard_rows": False, "sketch": memory.dimension}
    host = memory.device is not None
    return {"row_dtype": memory.dtype, "host_rows": host, "shard_rows": memory.scatter, "sketch": None}


# checks of single settings


def group_or_none(value: Any) -> Any:
    """A process group of torch.distributed, or None for all processes."""
    if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        raise TypeError(f"process_group={value!r}: pass what torch.distributed.new_group returned, or None")
    return value


def memory(name: str, value: Any) -> Memory:
    """How gradients are kept."""
    return memory_of(value)


def true_or_false(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: pass True or False")
    return value


def reaction(name: str, value: Any) -> str:
    """What to do with an objective that is not finite."""
    if value not in ("skip", "raise", "propagate"):
        raise ValueError(f"{name}={value!r}: choose 'skip', 'raise' or 'propagate'")
    return str(value)


def norm_or_none(name: str, value: Any) -> float | None:
    """A positive norm, or None."""
    if value is None:
        return None
    number = _number(name, value, "a positive norm, or None for no clipping")
    if not number > 0:
        raise ValueError(f"{name}={value}: pass a positive norm, or None for no clipping")
    return number


def whole_number(name: str, value: Any) -> int:
    """Steps, at least 1."""
    number = _number(name, value, "a whole number of steps")
    if not math.isfinite(number) or number < 1 or number != math.floor(number):
        raise ValueError(f"{name}={value}: pass a whole number of steps, 1 for a solve at every step")
    return int(number)


def floor(name: str, value: Any) -> float:
    """A floor under weights."""
    number = _number(name, value, "a number ≥ 0, below 1/K for K objectives")
    return Steering(min_weight=number).min_weight


def share(name: str, value: Any) -> float:
    """The share of the past in each step."""
    number = _number(name, value, "a number s, 0 ≤ s < 1, the share of the past in each step")
    return Steering(smoothing=number).smoothing


def decay_or_none(name: str, value: Any) -> float | Literal["auto"] | None:
    """The decay of averages over steps, "auto", or None for none."""
    wanted = f'a decay β, {TOO_SHORT} < β < 1, such as 0.95; "auto"; or None for no averages over steps'
    if value is None:
        return None
    if isinstance(value, str) and value == "auto":
        return "auto"
    number = _number(name, value, wanted)
    if not TOO_SHORT < number < 1:
        raise ValueError(f"{name}={value}: pass {wanted}")
    return number


def mean_or_mini_batch(name: str, value: Any) -> str:
    """Which gradients decide where averages are kept."""
    if value not in ("mean", "mini-batch"):
        raise ValueError(f"{name}={value!r}: choose 'mean' or 'mini-batch'")
    return str(value)


def preference(name: str, value: Any) -> dict[str, float] | tuple[float, ...] | None:
    """Positive numbers, by name or in order; None for none."""
    if value is None:
        return None
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, (Mapping, Sequence)):
        raise TypeError(f"{name}={value!r}: pass positive numbers, by name or in the order of the objectives")
    values = list(value.values()) if isinstance(value, Mapping) else list(value)
    for each in values:
        _number(name, each, "positive numbers")
    Steering(in_order(value, None))
    if isinstance(value, Mapping):
        return {str(key): float(each) for key, each in value.items()}
    return tuple(float(each) for each in value)


def _number(name: str, value: Any, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r}: pass {wanted}")
    return float(value)


def plain_value(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value
