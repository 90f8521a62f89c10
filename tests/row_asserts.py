"""Judging what is made of gradient rows: a Gram matrix, a combination. Knows nothing of mogeo.

The units are those of the rows themselves, so that every tolerance means the same at any scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import rows as reference

# Error of a Gram entry, relative to ‖g_i‖·‖g_j‖. Products of half-precision numbers are exact in fp32.
GRAM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# The same where every rounding of an fp32 sum has the same sign: equal magnitudes, or one entry that outweighs a block.
WORST_CASE = 4e-6
# Error of an entry of the combination, relative to Σ|w_k||g_k|: K roundings of the accumulator, one to the rows' dtype.
COMBINE_TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def gaussian(k: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian rows [k, n]."""
    return torch.randn(k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_gram(rows: Tensor, gram: Tensor, tolerance: float | None = None) -> None:
    """Right to the tolerance (that of the rows' dtype) in units of ‖g_i‖·‖g_j‖, fp64, symmetric to the bit."""
    tolerance = GRAM_TOLERANCE[rows.dtype] if tolerance is None else tolerance
    expected = reference.gram(rows)
    assert gram.dtype == torch.float64
    assert gram.shape == (len(rows), len(rows))
    assert torch.equal(gram, gram.T)
    norms = expected.diagonal().sqrt()
    assert bool(((gram - expected).abs() <= tolerance * norms[:, None] * norms).all())


def assert_combined(rows: Tensor, weights: Tensor, combined: Tensor, *, roundings: int = 1) -> None:
    """Right to the tolerance of its dtype, in units of Σ|w_k||g_k|, if rounded to that dtype that often."""
    assert combined.dtype == rows.dtype
    assert combined.shape == rows.shape[1:]
    error = (combined.to(torch.float64) - reference.combine(rows, weights)).abs()
    tiny = torch.finfo(rows.dtype).smallest_normal
    bound = roundings * COMBINE_TOLERANCE[rows.dtype] * reference.combine(rows.abs(), weights.abs()) + tiny
    assert bool((error <= bound).all())


def assert_sketched(gradient: Tensor, matrix: Tensor, before: Tensor, after: Tensor, roundings: int) -> None:
    """after = before + S g for the matrix S, to so many roundings of the row's dtype, relative to |before| + |S||g|."""
    flat = gradient.double().flatten()
    reach = before.abs().double() + matrix.abs() @ flat.abs()
    error = (after.double() - (before.double() + matrix @ flat)).abs()
    assert (error <= roundings * torch.finfo(after.dtype).eps * reach).all()
