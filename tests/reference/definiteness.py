"""How far rounding has pushed a Gram out of the positive semidefinite cone, in units of its own diagonal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def deficiency(gram: NDArray[np.float64]) -> float:
    """δ ≥ 0 such that M + δ·diag(M) is positive semidefinite, for M [k, k] with a positive diagonal.

    Minus the smallest eigenvalue of the Gram scaled to unit diagonal, plus k roundings for the eigenvalue's own error.
    """
    norms = np.sqrt(np.diagonal(gram))
    smallest = np.linalg.eigvalsh((gram + gram.T) / 2 / norms[:, None] / norms)[0]
    return max(-float(smallest), 0.0) + len(gram) * 2.0**-52
