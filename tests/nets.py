"""A small net with three objectives, their losses in every form, and their gradients one by one: for tests of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mogeo
from mogeo import MultiObjectiveOptimizer

NAMES = ("help", "honesty", "truth")
WEIGHTINGS = ["uniform", "linear(1, 2, 3)", "group-dro", "mgda", "mgda-normalized", "mgda-decoupled", "gapo(0.5)"]


class Net(nn.Module):
    """A trunk and three heads, some parameters shared by all losses and some by one."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 5, dtype=dtype)
        self.heads = nn.ModuleList([nn.Linear(5, 2, dtype=dtype) for _ in NAMES])
        self.unused = nn.Linear(2, 2, dtype=dtype)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trunk(x))


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def head_loss(net: Net, features: Tensor, k: int) -> Tensor:
    return (net.heads[k](features) - k).square().mean() * (k + 1)


def shared_losses(net: Net, x: Tensor) -> dict[str, Tensor]:
    """One forward, three losses."""
    features = net.features(x)
    return {name: head_loss(net, features, k) for k, name in enumerate(NAMES)}


def separate_losses(net: Net, x: Tensor) -> dict[str, Tensor]:
    """A forward each."""
    return {name: head_loss(net, net.features(x), k) for k, name in enumerate(NAMES)}


def callables(net: Net, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {name: (lambda k=k: head_loss(net, net.features(x), k)) for k, name in enumerate(NAMES)}


def gradient_rows(net: Net, *batches: Tensor) -> Tensor:
    """[3, N]: the gradient of each objective's loss summed over batches, by autograd.grad; zeros where untouched."""
    parameters = list(net.parameters())
    rows = []
    for name in NAMES:
        total = sum(shared_losses(net, x)[name] for x in batches)
        grads = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def flat_grad(net: nn.Module) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()])


def wrapped(net: nn.Module, weighting: object = "mgda-decoupled", **options: object) -> MultiObjectiveOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    return MultiObjectiveOptimizer(base, weighting, **options)  # type: ignore[arg-type]


def assert_direction(net: Net, report: mogeo.StepReport, rows: Tensor) -> None:
    """`p.grad` is wᵀ rows, the report's Gram is theirs, and what no objective touched has no gradient."""
    torch.testing.assert_close(flat_grad(net), report.weights @ rows, rtol=1e-10, atol=1e-12)
    if report.gram is not None:
        torch.testing.assert_close(report.gram, rows @ rows.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(report.direction_norm, (report.weights @ rows).norm(), rtol=1e-6, atol=1e-9)
    assert net.unused.weight.grad is None


def assert_left_out(net: Net, x: Tensor, report: mogeo.StepReport) -> None:
    """Honesty, the second objective, took no part, and the others went on without it."""
    torch.testing.assert_close(flat_grad(net), report.weights[[0, 2]] @ gradient_rows(net, x)[[0, 2]])
    assert report.skipped == ("honesty",)
    assert report.weights[1] == 0
    assert report.direction_norm.isfinite()
    assert report.alignment[[0, 2]].isfinite().all()  # type: ignore[index]


def poisoned(net: Net, x: Tensor, name: str, how: str) -> dict[str, Tensor]:
    losses = shared_losses(net, x)
    if how == "loss":
        losses[name] = losses[name] * math.nan
    else:  # a finite loss whose gradient is infinite
        zero = (net.trunk.weight[0, 0] - net.trunk.weight[0, 0].detach()).abs()
        losses[name] = losses[name] + zero.sqrt()
    return losses
