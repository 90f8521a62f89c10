"""Objectives whose gradients have means of one's choosing, and noise: for tests of `track`.

Gradients are what a test says, wherever the parameters are. Knows nothing of what is tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mogeo
from mogeo import MultiObjectiveOptimizer


class _Given(torch.autograd.Function):
    """A loss with a value and a gradient of one's choosing."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, row: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(row)
        return flat.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (row,) = ctx.saved_tensors
        return grad * row, None, None


class Chosen(nn.Module):
    """N parameters in a matrix and a vector."""

    def __init__(self, columns: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(2, columns // 4, dtype=dtype))
        self.vector = nn.Parameter(torch.zeros(columns - 2 * (columns // 4), dtype=dtype))

    def losses(self, rows: Tensor, values: Sequence[float | None] | None = None) -> dict[str, Tensor | None]:
        """Losses "0", "1", … on one graph, with the gradients `rows` [K, N] and these values, 1 by default."""
        values = [1.0] * len(rows) if values is None else values
        flat = torch.cat([self.matrix.flatten(), self.vector])
        return {
            str(k): None if value is None else _Given.apply(flat, row.to(flat.dtype), value)
            for k, (row, value) in enumerate(zip(rows, values, strict=True))
        }

    def grad(self) -> Tensor:
        """`p.grad` of all, [N]."""
        assert self.matrix.grad is not None
        assert self.vector.grad is not None
        return torch.cat([self.matrix.grad.flatten(), self.vector.grad])


def independent(lengths: Sequence[float], columns: int = 600, seed: int = 0) -> Tensor:
    """Means [K, N] of these lengths, orthogonal to each other."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(columns, len(lengths), dtype=torch.float64, generator=generator)
    return torch.linalg.qr(random)[0].T * torch.tensor(lengths, dtype=torch.float64)[:, None]


def with_a_victim(count: int, conflict: float, columns: int = 600, seed: int = 0) -> Tensor:
    """Means [K, N], the first of length 1: its products with the others sum to −conflict, so that the sum of all has a
    product of 1 − conflict with it.
    """
    means = independent([1.0] * count, columns, seed)
    means[1:] -= conflict / (count - 1) * means[0]
    return means


def draws(means: Tensor, noise: float | Sequence[float], seed: int, steps: int) -> Iterator[Tensor]:
    """Gradients [K, N] of some steps. `noise`, for all or for each: E‖ε_k‖² in units of ‖ḡ_k‖²."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.as_tensor(noise, dtype=torch.float64).expand(len(means))[:, None]
    deviation = means.norm(dim=1, keepdim=True) * (times / means.shape[1]).sqrt()
    for _ in range(steps):
        yield means + deviation * torch.randn(means.shape, dtype=torch.float64, generator=generator)


def optimizer_of(net: Chosen, weighting: object = "uniform", **options: object) -> MultiObjectiveOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    return MultiObjectiveOptimizer(base, weighting, **{"track": 0.95, **options})  # type: ignore[arg-type]


def reports(
    optimizer: MultiObjectiveOptimizer,
    net: Chosen,
    steps: Iterable[Tensor],
    values: Sequence[float | None] | None = None,
) -> list[mogeo.StepReport]:
    """Train on these gradients; a report of each step."""
    found = []
    for rows in steps:
        optimizer.zero_grad()
        optimizer.backward(net.losses(rows, values))
        found.append(optimizer.combine())
        optimizer.step()
    return found


def cosines(direction: Tensor, means: Tensor) -> Tensor:
    """Of a direction [N] with each row of means [K, N]."""
    return torch.nn.functional.cosine_similarity(direction[None], means)
