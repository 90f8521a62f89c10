"""What a function holds: the modules and parameters that it can reach without being called.

Knows Python's functions and torch's modules; no losses and no gradients. It looks where users put models: closures,
arguments bound by `functools.partial`, methods, defaults, globals that the code names, lists or dicts of these, and
attributes of objects among these, such as a trainer's `self.model`. What a function finds in any other way stays
unseen, and so does what lies deep inside large objects: the search is short, since it is made in every step.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

_DEEPEST = 6
# How many entries of a list, a dict or an object are looked at, and how many things in all: it may be a data set.
_WIDEST, _MOST = 200, 2000
# Types that hold no module, or too much to search, as Python's modules and classes do.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, np.ndarray, type, types.ModuleType)


def held_by(function: Any) -> list[nn.Module | nn.Parameter]:
    """Modules and parameters within reach of a function, each once and the nearest first; of modules, those on top."""
    found: list[nn.Module | nn.Parameter] = []
    seen: set[int] = set()
    pending: deque[tuple[Any, int]] = deque([(function, 0)])
    while pending and len(seen) < _MOST:
        thing, depth = pending.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        with suppress(Exception):  # an object may run any code when it is looked at: one that fails holds nothing
            if isinstance(thing, (nn.Module, nn.Parameter)):
                found.append(thing)
            elif depth < _DEEPEST and not isinstance(thing, _PLAIN):
                pending.extend((inner, depth + 1) for inner in _within(thing))
    return found


def _within(thing: Any) -> list[Any]:
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(islice(thing, _WIDEST))
    if isinstance(thing, dict):
        return list(islice(dict.values(thing), _WIDEST))
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if not isinstance(thing, types.FunctionType):
        return _attributes(thing)
    # torch.compile and functools.wraps keep the original function in these attributes.
    inner = [getattr(thing, name, None) for name in ("_torchdynamo_orig_callable", "__wrapped__")]
    cells = []
    for cell in thing.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            cells.append(cell.cell_contents)
    named = [thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__]
    return [*inner, *cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *named]


def _attributes(thing: Any) -> list[Any]:
    """Values of an object's attributes, without calling its `__getattr__`; and its `__call__`, if its class has one."""
    kind, held = type(thing), []
    if isinstance(kind.__call__, types.FunctionType):  # a class without one has that of `type`, which makes objects
        held.append(kind.__call__)
    with suppress(AttributeError):
        held.extend(islice(object.__getattribute__(thing, "__dict__").values(), _WIDEST))
    for slot in (slot for each in kind.__mro__ if "__slots__" in vars(each) for slot in vars(each).values()):
        if isinstance(slot, types.MemberDescriptorType):
            with suppress(AttributeError):  # nothing in it yet
                held.append(slot.__get__(thing))
    return held
