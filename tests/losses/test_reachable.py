"""What a function holds: found wherever users put a model, in bounded time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mogeo.losses import reachable
from mogeo.losses.reachable import held_by

GLOBAL = nn.Linear(1, 1)
IN_A_TABLE: dict[str, Any] = {"here": {"or": [GLOBAL]}}


class Trainer:
    """A loop of somebody's own, which keeps its model as an attribute."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def loss(self) -> Tensor:
        return self.net(torch.ones(1, 1)).sum()


class Loss(Trainer):
    def __call__(self) -> Tensor:
        return self.loss()


@dataclass(slots=True)
class Slotted:
    net: nn.Module

    def __call__(self) -> Tensor:
        return self.net(torch.ones(1, 1)).sum()


class CallsAGlobal:
    """Holds nothing itself: its `__call__` names a global."""

    def __call__(self) -> Tensor:
        return GLOBAL(torch.ones(1, 1)).sum()


class Loud:
    """Fails where an attribute is asked for that it does not have."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"nobody should ask for {name}")


def with_default(net: nn.Module) -> Callable[[], Tensor]:
    def loss(net: nn.Module = net, *, more: nn.Module = net) -> Tensor:
        return net(torch.ones(1, 1)).sum()

    return loss


def decorated(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    @functools.wraps(function)
    def call() -> Tensor:
        return function()

    return call


def within(levels: int, thing: Any) -> Any:
    return thing if levels == 0 else [within(levels - 1, thing)]


PLACES: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "closure": lambda net: lambda: net(1),
    "closure of a closure": lambda net: (lambda inner: lambda: inner())(lambda: net(1)),
    "partial": lambda net: functools.partial(lambda a, *, b: a, 1, b=net),
    "method": lambda net: net.forward,
    "the module itself": lambda net: net,
    "default": with_default,
    "wrapped": lambda net: decorated(lambda: net(1)),
    "compiled function": lambda net: torch.compile(lambda: net(1), backend="eager"),
    "list in a dict": lambda net: (lambda table: lambda: table["a"][0](1))({"a": [net]}),
    "method of a trainer": lambda net: Trainer(net).loss,
    "trainer in a closure": lambda net: (lambda trainer: lambda: trainer.net(1))(Trainer(net)),
    "object that is called": Loss,
    "object with slots": Slotted,
    "object with its own __getattr__": lambda net: (lambda loud: lambda: loud.net(1))(Loud(net)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_module_is_found_where_users_put_it(place: str) -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    assert held_by(PLACES[place](net)) == [net]  # once, and the one on top only


@pytest.mark.parametrize(
    "function", [lambda: GLOBAL(1), lambda: IN_A_TABLE["here"], CallsAGlobal(), CallsAGlobal().__call__]
)
def test_globals_that_the_code_names_count(function: Callable[[], Any]) -> None:
    assert held_by(function) == [GLOBAL]


def test_objects_without_attributes_hold_nothing() -> None:
    empty = Slotted.__new__(Slotted)  # its slot is not filled
    assert held_by(functools.partial(print, empty, object(), range(3), torch.float32, torch)) == []


class Refuses(type):
    def __getattribute__(cls, name: str) -> Any:
        if name == "__call__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class OfAnOddType(metaclass=Refuses):
    pass


class WithoutAClass:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("not yet")


class WithoutADict:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not yet")


@pytest.mark.parametrize("kind", [OfAnOddType, WithoutAClass, WithoutADict])
def test_objects_that_do_not_like_to_be_looked_at_hold_nothing(kind: Callable[[], Any]) -> None:
    net, odd = nn.Linear(1, 1), kind()
    assert held_by(lambda: (odd, net)) == [net]


def test_parameters_count_and_tensors_do_not() -> None:
    parameter, tensor = nn.Parameter(torch.ones(1)), torch.ones(1, requires_grad=True)
    assert held_by(lambda: parameter * tensor) == [parameter]


def test_a_function_may_hold_itself_or_nothing_yet() -> None:
    def loss() -> Any:
        return loss() if later else None

    assert held_by(loss) == []  # `later` is a cell that nobody has filled
    later = [loss]
    assert held_by(loss) == []
    assert later


def test_the_nearest_come_first() -> None:
    near, far = nn.Linear(1, 1), nn.Linear(1, 1)
    table = [[[far]], near]
    assert held_by(lambda: table) == [near, far]


@pytest.mark.parametrize("data", [list, dict.fromkeys, set], ids=["list", "dict", "set"])
def test_a_large_data_set_is_not_walked(data: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hide a model beside it."""
    net, rows = nn.Linear(1, 1), data((index, str(index)) for index in range(100_000))
    looked_into: list[int] = []
    within = reachable._within
    monkeypatch.setattr(reachable, "_within", lambda thing: looked_into.append(1) or within(thing))  # type: ignore[func-returns-value]
    assert held_by(lambda: net(rows)) == [net]
    assert len(looked_into) < 1000


def test_what_lies_deep_is_left() -> None:
    net = nn.Linear(1, 1)
    assert held_by(functools.partial(print, within(3, net))) == [net]
    assert held_by(functools.partial(print, within(30, net))) == []
