"""What benchmarks/memory_modes.py hands to every mode is what the exact run saw, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from memory_modes import Seen


def test_replayed_losses_have_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(3, 5, requires_grad=True), torch.randn(7, requires_grad=True)]
    losses = [torch.rand(()) + 0.1, torch.rand(()) + 1e3]
    gradients = [tuple(torch.randn_like(parameter) for parameter in parameters) for _ in losses]
    replayed = [loss() for loss in Seen(losses, gradients).replayed(parameters)]
    for one, loss, gradient in zip(replayed, losses, gradients, strict=True):
        assert torch.equal(one, loss)
        found = torch.autograd.grad(one, parameters)
        assert all(torch.equal(a, b) for a, b in zip(found, gradient, strict=True))
