"""What code under torch.compile must call and not look into.

A training loop under `torch.compile` calls an optimizer whose `backward` runs autograd, hooks and decisions of Python.
It has to run as it is: the compiler ends its graph before the call and begins another one after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])


def outside_compiled_code(method: _Method) -> _Method:
    """`method`, run by Python even where the caller is compiled.

    `torch.compiler.disable` does this, but imports the compiler, which takes seconds. So it is applied at the first
    call. (By then an optimizer exists, and torch.optim has imported the compiler itself.)
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(method))  # type: ignore[no-untyped-call]
        return disabled[0](*arguments, **options)

    return cast(_Method, call)
