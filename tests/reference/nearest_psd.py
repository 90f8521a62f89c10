"""The positive semi-definite matrix nearest to a symmetric one, from an eigendecomposition at 40 digits.

Higham 1988, theorem 2.1: negative eigenvalues become zero. Knows nothing of mogeo.
"""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

DIGITS = 40


def psd_part(symmetric: Tensor) -> Tensor:
    """Fp64 [k, k] -> fp64 [k, k]."""
    with mpmath.workdps(DIGITS):
        values, vectors = mpmath.eigsy(mpmath.matrix(symmetric.tolist()))
        kept = mpmath.diag([max(value, 0) for value in values])
        return torch.tensor((vectors * kept * vectors.T).tolist(), dtype=torch.float64)
