"""Where the functional core runs: a table of backends, so that one runner holds each of them to the same properties.

- cpu: mogeo on CPU tensors.
- triton: the kernels on CPU tensors, by Triton's interpreter.
- cuda: mogeo on CUDA tensors, hence the kernels on the GPU. Inputs move there with their strides and offsets, outputs
  and what changed in place move back: tests know CPU tensors only.

An interpreted kernel takes a thousand times as long as a compiled one, so each backend says how much it can afford.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import mogeo
from mogeo.geometry import ops
from mogeo.geometry.ops import ConflictAverse, conflict_averse_weights
from tests import profiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@dataclasses.dataclass(frozen=True)
class Backend:
    """The functional core in one place, on CPU tensors as seen from outside. Signatures are those of `ops`."""

    gram: Callable[[Tensor], Tensor]
    gram_by_segment: Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]
    combine: Callable[..., Tensor]
    min_norm_weights: Callable[[Tensor], mogeo.MinNorm]
    descent_weights: Callable[..., mogeo.Descent]
    psd_part: Callable[[Tensor], Tensor]
    conflict_averse_weights: Callable[..., ConflictAverse]
    thrift: int  #: one example is tried where others try this many
    max_k: int  #: rows of a random example

    def some(self, n: int) -> int:
        """How many to try of n examples, or seeds."""
        return profiles.share(-(-n // self.thrift))

    def check(self, examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
        """Decorates a property, and holds it against the strategies' examples at once."""

        def run(property_: Callable[..., None]) -> None:
            profiles.examples(-(-examples // self.thrift))(given(*strategies)(property_))()

        return run


# --------------------------------------------------------------------------------------------------------------------
# Interpreted kernels: what `mogeo.geometry.ops` does around `mogeo.geometry.triton_backend`


def _gram(rows: Tensor) -> Tensor:
    from mogeo.geometry import triton_backend

    return triton_backend.gram(rows.detach())


def _gram_by_segment(rows: Tensor, boundaries: Sequence[int]) -> tuple[Tensor, Tensor]:
    from mogeo.geometry import triton_backend

    grams = triton_backend.gram_by_segment(rows.detach(), boundaries)
    return grams[-1], grams[:-1]


def _combine(rows: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    from mogeo.geometry import triton_backend

    rows, weights = rows.detach(), weights.detach().to(torch.float64)
    return triton_backend.combine(rows, weights, rows.new_empty(rows.shape[1]) if out is None else out)


def _min_norm_weights(gram: Tensor) -> mogeo.MinNorm:
    from mogeo.geometry import triton_backend

    return mogeo.MinNorm(*triton_backend.min_norm(gram.detach().to(torch.float64), None, "none", 1.0, "raw"))


def _descent_weights(gram: Tensor, weights: Tensor, *, rounding: float | None = None) -> mogeo.Descent:
    from mogeo.geometry import triton_backend

    rounding = 4 * torch.finfo(gram.dtype).eps if rounding is None else rounding
    return mogeo.Descent(
        *triton_backend.descent(gram.detach().to(torch.float64), weights.detach().to(torch.float64), rounding)
    )


def _psd_part(matrix: Tensor) -> Tensor:
    from mogeo.geometry import triton_backend

    return triton_backend.psd_part(matrix.detach().to(torch.float64))


def _conflict_averse_weights(gram: Tensor, weights: Tensor, c: float, *, clipped: bool = False) -> ConflictAverse:
    from mogeo.geometry import triton_backend

    gram, weights = gram.detach().to(torch.float64), weights.detach().to(torch.float64)
    return ConflictAverse(*triton_backend.cagrad(gram, weights, c, clipped))


# --------------------------------------------------------------------------------------------------------------------
# CUDA


def elsewhere(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` for CPU tensors, and lists of them, by way of another device; itself, if that is the CPU."""
    if device == "cpu":
        return function

    def call(*arguments: Any, **options: Any) -> Any:
        storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # by address: here, there

        def sent(value: Any) -> Any:
            if isinstance(value, list):
                return [sent(part) for part in value]
            if not isinstance(value, Tensor):
                return value
            here = value.untyped_storage()
            if here.data_ptr() not in storages:
                there = torch.UntypedStorage(here.nbytes(), device=device)  # type: ignore[no-untyped-call]
                storages[here.data_ptr()] = here, there.copy_(here)
            _, there = storages[here.data_ptr()]
            moved = torch.empty(0, dtype=value.dtype, device=device)
            moved.set_(there, value.storage_offset(), value.shape, value.stride())
            return moved.requires_grad_(value.requires_grad)

        def returned(value: Any) -> Any:
            if isinstance(value, tuple):
                parts = map(returned, value)
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            for here, there in storages.values():  # written in place: the caller gets a view of its own tensor
                if value.numel() and value.untyped_storage().data_ptr() == there.data_ptr():
                    back = torch.empty(0, dtype=value.dtype)
                    return back.set_(here, value.storage_offset(), value.shape, value.stride())
            return value.cpu()

        result = function(*map(sent, arguments), **{name: sent(value) for name, value in options.items()})
        for here, there in storages.values():
            here.copy_(there)
        return returned(result)

    return call


# --------------------------------------------------------------------------------------------------------------------
# The table

_FUNCTIONS = (
    ops.gram, ops.gram_by_segment, ops.combine, ops.min_norm_weights, ops.descent_weights, ops.psd_part,
    conflict_averse_weights,
)  # fmt: skip

CPU = Backend(*_FUNCTIONS, thrift=1, max_k=32)
TRITON = Backend(
    _gram, _gram_by_segment, _combine, _min_norm_weights, _descent_weights, _psd_part, _conflict_averse_weights,
    thrift=10, max_k=8,
)  # fmt: skip
CUDA = Backend(*(elsewhere(function, "cuda") for function in _FUNCTIONS), thrift=1, max_k=32)  # type: ignore[misc, arg-type]

_CPU = pytest.param(CPU, id="cpu")
_TRITON = pytest.param(
    TRITON,
    id="triton",
    marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1, which a machine with a GPU has not"),
)
_CUDA = pytest.param(
    CUDA,
    id="cuda",
    marks=pytest.mark.gpu,
)

BACKENDS = (_CPU, _TRITON, _CUDA)
#: Those that take millions of columns in a test's time.
FAST_BACKENDS = (_CPU, _CUDA)

everywhere = pytest.mark.parametrize("backend", BACKENDS)

#: Where tests of the kernels themselves put their tensors.
KERNEL_DEVICE = "cpu" if INTERPRETED else "cuda"
#: A test that launches kernels. Where nothing interprets them it is one for `pytest -m gpu`, like all that need one.
needs_kernels = pytest.mark.skipif(False, reason="interpreted") if INTERPRETED else pytest.mark.gpu
