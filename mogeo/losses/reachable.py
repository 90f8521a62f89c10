"""What a function holds: the modules and parameters that it can reach without being called.

Knows Python's functions and torch's modules; no losses and no gradients. It looks where users put models: closures,
arguments bound by `functools.partial`, methods, defaults, globals that the code names, and lists or dicts of these.
What a function finds in any other way stays unseen.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_DEEPEST = 6


def held_by(function: Any) -> Iterator[nn.Module | nn.Parameter]:
    """Modules and parameters within reach of a function, each once; of modules, those on top."""
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = [(function, 0)]
    while pending:
        thing, depth = pending.pop()
        if id(thing) in seen or depth > _DEEPEST:
            continue
        seen.add(id(thing))
        if isinstance(thing, (nn.Module, nn.Parameter)):
            yield thing
        else:
            pending.extend((inner, depth + 1) for inner in _within(thing))


def _within(thing: Any) -> list[Any]:
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if not isinstance(thing, types.FunctionType):
        return []
    # A compiled function, or one that wraps another, says which.
    inner = [getattr(thing, name, None) for name in ("_torchdynamo_orig_callable", "__wrapped__")]
    cells = []
    for cell in thing.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    named = [thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__]
    held = [each for each in named if isinstance(each, (nn.Module, nn.Parameter, types.FunctionType))]
    return [*inner, *cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *held]
