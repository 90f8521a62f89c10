"""The Gram matrix of mean gradients from all pairs of different steps, one by one. Must not import mogeo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def over_pairs(steps: Sequence[Tensor], present: Sequence[Sequence[bool]], decay: float) -> Tensor:
    """Σ_{t ≠ t'} u_it u_jt' ⟨g_it, g_jt'⟩ / Σ_{t ≠ t'} u_it u_jt', fp64 [K, K]; NaN where there is no such pair.

    Args:
        steps: gradients [K, N] of each step.
        present: K flags of each step.
        decay: u falls by this factor with each later step that the objective takes part in.
    """
    count = len(steps[0])
    weights = [[0.0] * count for _ in steps]
    for k in range(count):
        u = 1.0
        for t in reversed(range(len(steps))):
            if present[t][k]:
                weights[t][k], u = u, u * decay
    total = torch.zeros(count, count, dtype=torch.float64)
    pairs = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            for t, at in enumerate(steps):
                for s, other in enumerate(steps):
                    weight = weights[t][i] * weights[s][j]
                    if t != s and weight:
                        total[i, j] += weight * (at[i].double() @ other[j].double())
                        pairs[i, j] += weight
    return torch.where(pairs > 0, total / pairs, torch.nan)


def without_spikes(
    steps: Sequence[Tensor], present: Sequence[Sequence[bool]], decay: float, most: float
) -> list[Tensor]:
    """Gradients as they count: none longer than `most` times the root mean square of those before it, as they came.

    Args:
        steps: gradients [K, N] of each step, fp64.
        present: K flags of each step.
        decay: the weight of a gradient in that mean falls by this factor with each later one.
        most: in units of the root mean square; where that is zero, or there is none, every length counts.
    """
    capped = [rows.clone() for rows in steps]
    for k in range(len(steps[0])):
        before: list[float] = []  # squared lengths
        for rows, flags in zip(capped, present, strict=True):
            if not flags[k]:
                continue
            weights = [decay**age for age in reversed(range(len(before)))]
            mean = sum(w * x for w, x in zip(weights, before, strict=True)) / (sum(weights) or 1.0)
            length = float(rows[k].norm())
            if mean > 0 and length > most * mean**0.5:
                rows[k] *= most * mean**0.5 / length
            before.append(length**2)
    return capped
