"""How gradients are kept until the weights of a step are known: the values of the optimizer's `memory=`.

Knows no parameters and no stores: which store an option stands for is said in `mogeo.gradients.stores`.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch

from mogeo.geometry.ops import ROW_DTYPES
from mogeo.geometry.projection import MOST_BUCKETS


@dataclass(frozen=True)
class Rows:
    """Keep each objective's whole gradient in a row of its own: K·N elements.

    Args:
        dtype: keep rows in this dtype where gradients are wider, such as torch.bfloat16 for fp32: fp64, fp32, bf16 or
            fp16. Every element is rounded once, or once per micro-batch. The direction keeps the gradients' dtype, in N
            elements of its own. None: the gradients' own dtype.
        device: "cpu" keeps rows in the host's memory, pinned where gradients come from a GPU, and moved there while
            autograd goes on; the host multiplies and combines them, and the direction takes N elements of the GPU's
            memory. None: where the gradients are.
        scatter: with several processes and plain (replicated) parameters, average each gradient over ranks as soon as
            it is complete, and keep a piece of it per rank: N + K·N/ranks elements instead of K·N. For use inside DDP's
            `no_sync()`, or without DDP. With one process it changes nothing.

    Raises:
        TypeError: an argument has another type.
        ValueError: there is no such choice.
    """

    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    scatter: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"{_called('dtype', 'row_dtype', self.dtype)}: pass a torch.dtype, such as torch.bfloat16")
        if self.dtype is not None and self.dtype not in ROW_DTYPES:
            raise ValueError(
                f"{_called('dtype', 'row_dtype', self.dtype)}: choose a floating dtype that rows can be multiplied in: "
                "torch.float64, torch.float32, torch.bfloat16 or torch.float16"
            )
        if self.device is not None:
            try:
                kind = torch.device(self.device).type if not isinstance(self.device, bool) else ""
            except (RuntimeError, TypeError):
                kind = ""
            if kind != "cpu":
                raise ValueError(
                    f"Rows(device={self.device!r}): choose 'cpu' for the host's memory, or None for where the "
                    "gradients are"
                )
            object.__setattr__(self, "device", "cpu")  # one way to say it, so that equal ones compare equal
        if not isinstance(self.scatter, bool):
            raise TypeError(f"{_called('scatter', 'shard_rows', self.scatter)}: pass True or False")


def _called(name: str, keyword: str, value: object) -> str:
    """An argument of `Rows` under both of the names that it may have been given by."""
    return f"Rows({name}={value!r}), or {keyword}={value!r}"


@dataclass(frozen=True)
class Sketch:
    """Keep d numbers per objective in place of N: a random projection of each gradient, made as autograd brings it.

    From the projections, the Gram matrix is estimated to ‖g_i‖‖g_j‖·√(2/d). Once weights are known, one more weighted
    backward gives the direction, of exact gradients: losses that are tensors keep their graphs until then; callables
    are evaluated once more, with the same random numbers and the same buffers. Where d ≥ N nothing is lost: the d
    numbers hold the gradient itself, and nothing is evaluated twice.

    Args:
        dimension: d, from 1 to 2³⁰. A GPU likes multiples of 1,024.

    Raises:
        TypeError: d is not a whole number.
        ValueError: d is out of range.
    """

    dimension: int

    def __post_init__(self) -> None:
        called = f"Sketch({self.dimension!r}), or sketch={self.dimension!r}"
        if isinstance(self.dimension, bool) or not isinstance(self.dimension, numbers.Integral):
            raise TypeError(f"{called}: pass how many numbers to keep per objective, such as 262144")
        if not 1 <= self.dimension <= MOST_BUCKETS:
            raise ValueError(
                f"{called}: pass how many numbers to keep per objective, such as 262144, {MOST_BUCKETS} at most"
            )
        object.__setattr__(self, "dimension", int(self.dimension))


Memory = Rows | Sketch
