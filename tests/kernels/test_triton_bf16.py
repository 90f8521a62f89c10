"""bf16 under Triton's interpreter against torch: every pattern, every operation that `tests.triton_bf16` mends."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.backends import INTERPRETED

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter, which does not run here")

PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@triton.jit
def _cast(source, target, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(target + lane, tl.load(source + lane).to(target.dtype.element_ty))


@triton.jit
def _calculate(x, y, sums, products, quotients, equal, less, N: tl.constexpr):
    lane = tl.arange(0, N)
    a, b = tl.load(x + lane), tl.load(y + lane)
    tl.store(sums + lane, a + b)
    tl.store(products + lane, a * b)
    tl.store(quotients + lane, a / b)
    tl.store(equal + lane, (a == b).to(tl.int32))
    tl.store(less + lane, (a < b).to(tl.int32))


@triton.jit
def _compare_with_constants(x, zero, above, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(zero + lane, (tl.load(x + lane) == 0.0).to(tl.int32))
    tl.store(above + lane, (tl.load(x + lane) > 1.5).to(tl.int32))


@triton.jit
def _multiply(x, y, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    square = lane[:, None] * N + lane[None, :]
    tl.store(out + square, tl.dot(tl.load(x + square), tl.trans(tl.load(y + square)), input_precision="ieee"))


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [2^n] in another dtype, by a kernel."""
    target = torch.empty(len(values), dtype=dtype)
    _cast[(1,)](values, target, N=len(values))
    return target


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit, the sign of zero included; NaN is NaN."""
    assert torch.equal(actual.isnan(), expected.isnan())
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers].view(integers), expected[numbers].view(integers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_pattern_widens_and_returns(dtype: torch.dtype) -> None:
    wide = cast(PATTERNS, dtype)
    assert_same_bits(wide, PATTERNS.to(dtype))
    assert_same_bits(cast(wide, torch.bfloat16), PATTERNS)


def hard_to_round() -> Tensor:
    """fp32 [2^17]: any bits, halfway between two bf16, next to that, infinities, the largest, subnormals, NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**17,), generator=generator)
    upper = bits & ~0xFFFF
    bits[::4], bits[1::4], bits[2::8] = (upper | 0x8000)[::4], (upper | 0x7FFF)[1::4], (upper | 0x8001)[2::8]
    values = bits.to(torch.int32).view(torch.float32)
    ends = torch.finfo(torch.float32)
    values[3:9] = torch.tensor([math.inf, -math.inf, ends.max, ends.min, ends.tiny / 3, -0.0])
    values[11] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # cut off after 16 bits: infinity
    values[15] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounded up: minus zero
    return values


def test_narrowing_rounds_to_the_nearest() -> None:
    values = hard_to_round()
    assert int(values.isnan().sum()) > 2
    assert_same_bits(cast(values, torch.bfloat16), values.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int8])
def test_narrowing_from_other_dtypes(dtype: torch.dtype) -> None:
    values = torch.randn(2**12, generator=torch.Generator().manual_seed(1)).mul(100).to(dtype)
    assert_same_bits(cast(values, torch.bfloat16), values.to(torch.bfloat16))


def test_widening_to_other_dtypes() -> None:
    values = PATTERNS[(PATTERNS.abs() < 100)][: 2**14]
    for dtype in (torch.float16, torch.int32):
        assert torch.equal(cast(values, dtype), values.to(dtype))


OPERATORS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    operator.add,
    operator.mul,
    operator.truediv,
    operator.eq,
    operator.lt,
)


def test_arithmetic_and_comparison() -> None:
    x, y = PATTERNS, PATTERNS[torch.randperm(2**16, generator=torch.Generator().manual_seed(2))]
    y[::16] = x[::16]
    results = [torch.empty_like(x) for _ in range(3)] + [torch.empty(2**16, dtype=torch.int32) for _ in range(2)]
    _calculate[(1,)](x, y, *results, N=2**16)
    for calculate, result in zip(OPERATORS, results, strict=True):
        expected = calculate(x, y)
        if expected.dtype == torch.bool:
            assert torch.equal(result.bool(), expected)
        else:
            assert_same_bits(result, expected)


def test_comparison_with_constants() -> None:
    zero, above = (torch.empty(2**16, dtype=torch.int32) for _ in range(2))
    _compare_with_constants[(1,)](PATTERNS, zero, above, N=2**16)
    assert torch.equal(zero.bool(), PATTERNS == 0)
    assert int(zero.sum()) == 2  # of either sign
    assert torch.equal(above.bool(), PATTERNS > 1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_adds_in_fp32(dtype: torch.dtype) -> None:
    """Small integers, so that every sum is exact in fp32, and few of them in bf16."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randint(-64, 65, (32, 32), generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _multiply[(1,)](x, y, out, N=32)
    assert torch.equal(out, x.float() @ y.float().T)
