"""The matrix of a signed sketch, element by element from its definition, and the variance of its inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Chunk = tuple[int, int, int]  # rotation, first entry of the window, sign


def matrix(size: int, dimension: int, chunks: Sequence[Chunk], signs: Sequence[float]) -> Tensor:
    """S, fp64 [dimension, size], for one flattened tensor: element i goes to one bucket, with one sign."""
    result = torch.zeros(dimension, size, dtype=torch.float64)
    for i in range(size):
        rotation, window, sign = chunks[i // dimension]
        bucket = (i % dimension + rotation) % dimension
        result[bucket, i] = sign * signs[window + bucket]
    return result


def variance(g: Sequence[Tensor], h: Sequence[Tensor], dimension: int) -> float:
    """Var⟨Sg, Sh⟩ over S, for vectors that come as tensors: sums over pairs of different chunks, one by one."""
    pairs = [
        (x.double(), y.double())
        for a, b in zip(g, h, strict=True)
        for x, y in zip(a.flatten().split(dimension), b.flatten().split(dimension), strict=True)
    ]
    total = 0.0
    for i, (x, y) in enumerate(pairs):
        for j, (v, w) in enumerate(pairs):
            if i != j:
                total += float((x @ x) * (w @ w) + (x @ y) * (v @ w))
    return total / dimension
