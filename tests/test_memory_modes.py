"""What benchmarks/memory_modes.py hands to every mode is what the exact run saw, and what it keeps of earlier runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from memory_modes import Seen, keep


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


def test_only_figures_of_other_parts_are_kept() -> None:
    earlier = {
        "results": [{"mode": "exact", "time": 1, "peak_bytes": 2, "error": 3}, {"mode": "gone", "time": 4}],
        "judged": [5],
        "machine": {"torch": "old"},
    }
    document = {"results": [{"mode": "exact"}, {"mode": "new"}], "judged": [], "machine": {"torch": "new"}}
    keep(earlier, document, ["time", "quality"])
    assert document["results"] == [{"mode": "exact", "peak_bytes": 2, "error": 3}, {"mode": "new"}]
    assert document["machine"] == {"torch": "new"}
    assert document["earlier"] == [{"torch": "old"}]
