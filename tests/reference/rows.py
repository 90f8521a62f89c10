"""Gram and combination of gradient rows, in fp64 and in three lines."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(rows: Tensor) -> Tensor:
    """Rows [k, n] of any float dtype -> fp64 [k, k]."""
    wide = rows.to(torch.float64)
    return wide @ wide.T


def combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows [k, n], weights [k] -> fp64 [n]; a row of weight zero does not count, whatever it holds."""
    used = weights != 0
    return weights[used].to(torch.float64) @ rows[used].to(torch.float64)
