"""What is logged is summed without a look at any number, and its means are over what existed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mogeo.integrations.trl_metrics import Tally
from mogeo.report import StepReport

NAMES = ["warm", "size"]


def report(device: str = "cpu", **values: Any) -> StepReport:
    given: dict[str, Any] = {
        "losses": torch.tensor([0.7, 0.2], dtype=torch.float64),
        "weights": torch.tensor([0.25, 0.75], dtype=torch.float64),
        "gram": torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64),
        "squared_norm": torch.tensor(1.1875, dtype=torch.float64),
        "clip_factor": torch.ones((), dtype=torch.float64),
        "nonfinite": torch.zeros(2, dtype=torch.bool),
        "absent": torch.zeros(2, dtype=torch.bool),
        "nonfinite_counts": torch.zeros(2, dtype=torch.int64),
        "absent_counts": torch.zeros(2, dtype=torch.int64),
        **values,
    }
    return StepReport(tuple(NAMES), **{k: None if v is None else v.to(device) for k, v in given.items()})


def scalars(*values: float, device: str = "cpu") -> list[torch.Tensor]:
    return [torch.tensor(value, device=device) for value in values]


def test_adding_reads_no_number() -> None:
    """Tensors on the meta device have none: whatever asks for one raises."""
    tally = Tally(NAMES, torch.device("meta"))
    for _ in range(2):
        tally.add_pairs(0, 3, scalars(0.5, 1.0, 0.1, device="meta"))
        tally.add_report(report("meta"), torch.ones((), device="meta"))
        tally.share(lambda values: values * 2)


def test_pairs_count_alike_once_they_are_shared() -> None:
    tally = Tally(NAMES, torch.device("cpu"))
    tally.add_pairs(0, 3, scalars(1.0, 1.0, 2.0))
    tally.add_pairs(0, 1, scalars(5.0, 0.0, -2.0))
    assert tally.values() == {}
    tally.share(lambda values: values * 2)
    tally.share(lambda values: values * 2)  # nothing is shared twice
    assert tally.values() == {"loss/warm": 2.0, "rewards/accuracies/warm": 0.75, "rewards/margins/warm": 1.0}
    tally.reset()
    assert tally.values() == {}


def test_steps_count_where_the_objective_was_there() -> None:
    tally = Tally(NAMES, torch.device("cpu"))
    tally.add_report(report())
    without = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    tally.add_report(
        report(
            losses=torch.tensor([0.5, torch.nan]),
            weights=torch.tensor([1.0, 0.0], dtype=torch.float64),
            gram=without,
            squared_norm=torch.tensor(4.0, dtype=torch.float64),
            absent=torch.tensor([False, True]),
        )
    )
    expected = report().to_dict()
    assert tally.values() == pytest.approx(
        {
            "loss/warm": 0.6,
            "loss/size": 0.2,
            "weights/warm": 0.625,
            "weights/size": 0.375,
            "grad_norm/warm": 2.0,
            "grad_norm/size": 1.0,
            "alignment/warm": (expected["alignment"]["warm"] + 1) / 2,
            "alignment/size": expected["alignment"]["size"],
            "cosine/warm/size": 0.5,
        }
    )


def test_without_a_gram_matrix_there_are_losses_and_weights() -> None:
    tally = Tally(NAMES, torch.device("cpu"))
    tally.add_report(report(gram=None))
    assert {name.partition("/")[0] for name in tally.values()} == {"loss", "weights"}
