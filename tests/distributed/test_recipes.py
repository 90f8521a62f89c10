"""Every recipe of docs/distributed.md runs on two processes, trains, and leaves the same parameters on both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer
from tests.distributed.engines import full
from tests.distributed.runner import run

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
RECIPES = re.findall(r"\n### ([^\n]+)\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_there_are_recipes() -> None:
    assert len(RECIPES) == len(re.findall("```python", PAGE.read_text())) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("title", "code"), RECIPES, ids=[title for title, _ in RECIPES])
def test_a_recipe_trains_alike_on_both_ranks(title: str, code: str) -> None:
    first, second = run(2, follow, code)
    for before, after, other in zip(first[0], first[1], second[1], strict=True):
        assert not torch.equal(before, after)
        assert torch.equal(after, other)


def follow(code: str) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    before = [p.detach().clone() for p in model.parameters()]
    batches = [torch.randn(8, 4) for _ in range(4)]

    def loss_of(model: nn.Module, batch: Tensor, name: str) -> Tensor:
        target = {"helpfulness": 1.0, "honesty": -1.0}[name]
        return (model(batch) - target).square().mean()

    names: dict[str, Any] = {
        "torch": torch,
        "MultiObjectiveOptimizer": MultiObjectiveOptimizer,
        "model": model,
        "loss_of": loss_of,
        "loader": [batch.chunk(2)[dist.get_rank()] for batch in batches],
        "every_batch": batches,
    }
    exec(compile(code, "docs/distributed.md", "exec"), names)
    return before, [full(p) for p in names["model"].parameters()]
