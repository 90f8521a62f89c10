"""A published solver as a second opinion: quadprog's Goldfarb-Idnani in fp64, for safely positive definite Grams.

Not for Grams whose norms lie decades apart: it was measured to be off by several times the optimum there.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray


def min_norm_weights(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Argmin αᵀMα subject to Σα = 1, α ≥ 0, for M [k, k] positive definite; raises ValueError where it is not."""
    quadprog = pytest.importorskip("quadprog")  # here, so that only tests that ask for it are skipped without it
    k = len(gram)
    constraints = np.concatenate([np.ones((k, 1)), np.eye(k)], axis=1)
    bounds = np.concatenate([[1.0], np.zeros(k)])
    weights: NDArray[np.float64] = quadprog.solve_qp(gram, np.zeros(k), constraints, bounds, meq=1)[0]
    return weights
