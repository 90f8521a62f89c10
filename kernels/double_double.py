"""Double-double arithmetic for kernels: a number is a pair (high, low) of fp64 whose sum carries 106 bits.

With `FINE` false, the same functions compute in plain fp64 and leave `low` alone, so that one algorithm serves both.
|low| is at most half a unit in the last place of high.
The error terms are exact only if the compiler fuses no product with a sum: compile with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_sum(a, b):
    """a + b without error (Knuth)."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


@triton.jit
def renormalized(high, low):
    """The same sum as a double-double, for |high| ≥ |low| (Dekker)."""
    total = high + low
    return total, low - (total - high)


@triton.jit
def two_product(a, b):
    """a · b without error: each factor split into halves of 26 bits, whose products are exact (Dekker)."""
    product = a * b
    a_high = (a.to(tl.int64, bitcast=True) & -134217728).to(tl.float64, bitcast=True)
    b_high = (b.to(tl.int64, bitcast=True) & -134217728).to(tl.float64, bitcast=True)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def add(a, a_low, b, b_low, FINE: tl.constexpr):
    """a + b."""
    if FINE:
        high, low = two_sum(a, b)
        high_of_low, low_of_low = two_sum(a_low, b_low)
        high, low = renormalized(high, low + high_of_low)
        high, low = renormalized(high, low + low_of_low)
    else:
        high, low = a + b, a_low
    return high, low


@triton.jit
def multiply(a, a_low, b, b_low, FINE: tl.constexpr):
    """a · b."""
    if FINE:
        high, low = two_product(a, b)
        high, low = renormalized(high, low + (a * b_low + a_low * b))
    else:
        high, low = a * b, a_low
    return high, low


@triton.jit
def divide(a, a_low, b, b_low, FINE: tl.constexpr):
    """a / b."""
    if FINE:
        first = a / b
        p, p_low = multiply(first, first * 0.0, b, b_low, True)
        r, r_low = add(a, a_low, -p, -p_low, True)
        second = r / b
        p, p_low = multiply(second, second * 0.0, b, b_low, True)
        r, r_low = add(r, r_low, -p, -p_low, True)
        high, low = renormalized(first, second)
        high, low = add(high, low, r / b, r * 0.0, True)
    else:
        high, low = a / b, a_low
    return high, low


@triton.jit
def subtract_product(a, a_low, b, b_low, c, c_low, FINE: tl.constexpr):
    """a − b · c."""
    if FINE:
        p, p_low = multiply(b, b_low, c, c_low, True)
        high, low = add(a, a_low, -p, -p_low, True)
    else:
        high, low = tl.fma(-b, c, a), a_low
    return high, low


@triton.jit
def less(a, a_low, b, b_low):
    return (a < b) | ((a == b) & (a_low < b_low))


@triton.jit
def _fine_add(a, a_low, b, b_low):
    return add(a, a_low, b, b_low, True)


@triton.jit
def fine_total(x, x_low, AXIS: tl.constexpr):
    """Sum along an axis in double-double: rounded to fp64, it does not depend on where zeros stand in between."""
    return tl.reduce((x, x_low), AXIS, _fine_add)


@triton.jit
def total(x, x_low, AXIS: tl.constexpr, FINE: tl.constexpr):
    """Sum along an axis."""
    if FINE:
        high, low = fine_total(x, x_low, AXIS)
    else:
        high = tl.sum(x, axis=AXIS)
        low = high * 0.0
    return high, low


@triton.jit
def times_vector(A, x, x_low, FINE: tl.constexpr):
    """A x, for a matrix A of fp64."""
    p, p_low = multiply(A, A * 0.0, x[None, :] + A * 0.0, x_low[None, :] + A * 0.0, FINE)
    return total(p, p_low, 1, FINE)
