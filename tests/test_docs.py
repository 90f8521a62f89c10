"""The Python in README.md and docs/guide.md runs, in order, on a small model; links between pages lead somewhere."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def names_the_pages_use() -> dict[str, Any]:
    """What the pages take as given: a model, its losses, and batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def losses_of(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        out = model(batch)
        return {"helpfulness": (out[:, 0] - 1).square().mean() + 0.1, "honesty": (out[:, 1] + 1).square().mean() + 0.1}

    return {"model": model, "losses_of": losses_of, "loader": [torch.randn(8, 4) for _ in range(4)]}


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_code_runs_and_trains(page: str) -> None:
    blocks = python_blocks(page)
    assert len(blocks) >= 2
    names = names_the_pages_use()
    before = [p.detach().clone() for p in names["model"].parameters()]
    for block in blocks:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="accelerate")
            warnings.filterwarnings("ignore", module="lightning")  # advice about loaders and loggers
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec")  # Lightning's call of torch
            exec(compile(block, page, "exec"), names)
    assert all(not torch.equal(p, b) for p, b in zip(names["model"].parameters(), before, strict=True))


@pytest.mark.parametrize(
    "page", sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
)
def test_links_and_pictures_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
