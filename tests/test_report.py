"""StepReport: derived quantities against their definitions, and plain values for loggers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from mogeo import MultiObjectiveOptimizer, StepReport


def make_report(weighting: str = "mgda-decoupled") -> tuple[StepReport, torch.Tensor]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, dtype=torch.float64))
    goals = torch.randn(3, 6, dtype=torch.float64)
    losses = {name: (weight - goal).square().sum() for name, goal in zip("abc", goals, strict=True)}
    rows = 2 * (weight.detach() - goals)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([weight], lr=0.1), weighting)
    optimizer.backward(losses)
    return optimizer.combine(), rows


def test_derived_quantities() -> None:
    report, rows = make_report()
    direction = report.weights @ rows
    torch.testing.assert_close(report.grad_norms, rows.norm(dim=1))
    torch.testing.assert_close(report.direction_norm, direction.norm())
    for i in range(3):
        expected = torch.nn.functional.cosine_similarity(direction, rows[i], dim=0)
        assert report.alignment is not None
        torch.testing.assert_close(report.alignment[i], expected)
        for j in range(3):
            assert report.cosines is not None
            torch.testing.assert_close(
                report.cosines[i, j], torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0)
            )


def test_without_a_gram_only_what_is_known() -> None:
    report, rows = make_report("uniform")
    assert report.gram is None
    assert report.grad_norms is None
    assert report.cosines is None
    assert report.alignment is None
    torch.testing.assert_close(report.direction_norm, rows.mean(0).norm())


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform", "group-dro"])
def test_to_dict_is_plain_and_keyed_by_objective(weighting: str) -> None:
    report, _ = make_report(weighting)
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["objectives"] == ["a", "b", "c"]
    assert plain["weights"] == dict(zip("abc", report.weights.tolist(), strict=True))
    assert math.isfinite(plain["direction_norm"])
    assert plain["skipped"] == []
