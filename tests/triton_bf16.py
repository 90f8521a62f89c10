"""bf16 in Triton's interpreter as GPUs have it. Triton keeps it as uint16 there, and calculates with those integers.

`install()` mends what kernels do with bf16: casts (to the nearest, ties to even, where Triton truncates), operators of
two operands, and `tl.dot`. Reductions of bf16 stay wrong: kernels cast before them, as precision wants anyway.
Knows nothing of mogeo; `tests/kernels/test_triton_bf16.py` holds it against torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Method = Callable[..., Any]


def install() -> None:
    """Patch the interpreter of this process. A second call does nothing."""
    if hasattr(InterpreterBuilder, "get_bf16"):
        return
    InterpreterBuilder.get_bf16 = lambda self, value: _narrowed(np.array([value]))
    for name, mend in (("cast_impl", _cast), ("create_fp_to_fp", _cast), ("binary_op", _binary), ("create_dot", _dot)):
        setattr(InterpreterBuilder, name, mend(getattr(InterpreterBuilder, name)))


def _is_bf16(dtype: Any) -> bool:
    return bool(dtype.scalar == tl.bfloat16)


def _widened(handle: Any) -> Any:
    """bf16 as fp32, of which it is the upper half; anything else as it is."""
    if not _is_bf16(handle.dtype):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrowed(values: NDArray[Any]) -> Any:
    """Numbers as bf16, by way of fp32, to the nearest."""
    with np.errstate(all="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # a carry belongs in the exponent, and makes infinity at its end
    quiet = bits >> 16 | 0x40  # a NaN may have all its mantissa in the lower half
    return TensorHandle(np.where(np.isnan(single), quiet, rounded).astype(np.uint16), tl.bfloat16)


def _cast(original: Method) -> Method:
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        if _is_bf16(source.dtype) == _is_bf16(target):
            return original(self, source, target, *rounding)
        if _is_bf16(target):
            return _narrowed(source.data)
        return TensorHandle(_widened(source).data.astype(interpreter._get_np_dtype(target)), target.scalar)

    return cast


def _binary(original: Method) -> Method:
    def binary_op(self: Any, left: Any, right: Any, operator: Method) -> Any:
        if not _is_bf16(left.dtype):
            return original(self, left, right, operator)
        # To 24 bits, then to 8: for +, −, ·, / that is the same as at once.
        with np.errstate(all="ignore"):
            result = operator(_widened(left).data, _widened(right).data)
        return TensorHandle(result, tl.int1) if result.dtype == bool else _narrowed(result)

    return binary_op


def _dot(original: Method) -> Method:
    def create_dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return original(self, _widened(left), _widened(right), *others)

    return create_dot
