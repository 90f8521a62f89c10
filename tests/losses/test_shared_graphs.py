"""mogeo.losses.shared_graphs: which graphs are shared with a later loss."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from mogeo.losses.shared_graphs import shared_with_later


def test_separate_forwards_share_leaves_only() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert shared_with_later([(weight * k).sum() for k in range(3)]) == [False, False, False]


def test_one_forward_is_shared_until_its_last_loss() -> None:
    hidden = nn.Parameter(torch.ones(3)).exp()
    assert shared_with_later([hidden.sum(), hidden.square().sum(), hidden.mean()]) == [True, True, False]


def test_partners_need_not_be_neighbours() -> None:
    weight = nn.Parameter(torch.ones(3))
    a, b = weight.exp(), weight.sin()
    assert shared_with_later([a.sum(), b.sum(), a.mean(), b.mean(), weight.sum()]) == [True, True, False, False, False]


def test_a_node_deep_inside_another_graph_counts() -> None:
    weight = nn.Parameter(torch.ones(3))
    inner = weight.exp()
    assert shared_with_later([inner.sum().log(), (inner + weight.sin()).square().mean()]) == [True, False]


def test_the_same_loss_twice() -> None:
    loss = nn.Parameter(torch.ones(3)).exp().sum()
    assert shared_with_later([loss, loss]) == [True, False]


def test_leaves_as_losses() -> None:
    leaf = nn.Parameter(torch.ones(()))
    assert shared_with_later([leaf, leaf]) == [False, False]
    assert shared_with_later([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("context", ["torch.no_grad()", "torch.inference_mode()", "torch.device('meta')"])
def test_imported_within_any_context(context: str) -> None:
    code = f"import torch, mogeo\nwith {context}: mogeo.MultiObjectiveOptimizer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
