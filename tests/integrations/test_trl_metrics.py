"""What is logged is summed without a look at any number, and its means are over what existed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogeo.geometry.tracking import Estimate
from mogeo.integrations.trl_metrics import Tally
from mogeo.report import StepReport
from tests.profiles import examples

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
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return StepReport(tuple(NAMES), **moved)


def estimate(gram: list[list[float]], error: float, square: float = 100.0) -> Estimate:
    """What is known of mean gradients: their Gram matrix, the same error of each entry, and E‖g‖² of each."""
    matrix = torch.tensor(gram, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    evidence = torch.tensor([0.5, 1.0], dtype=torch.float64)
    return Estimate(matrix, torch.full_like(matrix, error), square * ones, ones, matrix, evidence, matrix)


def scalars(*values: float, device: str = "cpu") -> list[torch.Tensor]:
    return [torch.tensor(value, device=device) for value in values]


def test_adding_reads_no_number() -> None:
    """Tensors on the meta device have none: whatever asks for one raises."""
    tally = Tally(NAMES, torch.device("meta"))
    for _ in range(2):
        tally.add_pairs(0, 3, scalars(0.5, 1.0, 0.1, device="meta"))
        tally.add_report(report("meta"), torch.ones((), device="meta"))
        mean = Estimate(*(values.to("meta") for values in estimate([[1.0, 0.0], [0.0, 1.0]], error=0.1)))
        tally.add_report(report("meta", mean=mean))
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
    assert expected["alignment"]["size"] > 0
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
            "hurt/warm": 0.0,
            "hurt/size": 0.0,
            "cosine/warm/size": 0.5,
        }
    )


def test_without_a_gram_matrix_there_are_losses_and_weights() -> None:
    tally = Tally(NAMES, torch.device("cpu"))
    tally.add_report(report(gram=None))
    assert {name.partition("/")[0] for name in tally.values()} == {"loss", "weights"}


# ---- tracked ---------------------------------------------------------------------------------------------------------


def test_of_tracked_steps_what_is_known_of_mean_gradients_is_logged() -> None:
    tally = Tally(NAMES, torch.device("cpu"))
    told = report(mean=estimate([[4.0, -1.0], [-1.0, 1.0]], error=0.1))
    tally.add_report(told)
    tally.add_report(report(mean=estimate([[math.nan] * 2] * 2, error=math.inf)))  # a first step tells nothing
    values, expected = tally.values(), told.to_dict()
    for name in NAMES:
        assert values[f"alignment/{name}"] == expected["alignment"][name]
        assert values[f"noise_scale/{name}"] == expected["noise_scale"][name]
        assert values[f"noise_scale_at_least/{name}"] <= expected["noise_scale_interval"][name][0]
        assert values[f"evidence/{name}"] == expected["evidence"][name]
    assert values["mean_cosine/warm/size"] == -0.5
    assert values["cosine/warm/size"] == 0.5  # of the mini-batch, as ever
    assert values["grad_norm/warm"] == 2.0


def test_a_step_that_keeps_weights_is_logged_as_far_as_it_is_known() -> None:
    """Between two solves there is no Gram matrix of the mini-batch; mean gradients are as known as before."""
    tally = Tally(NAMES, torch.device("cpu"))
    tally.add_report(report(gram=None, mean=estimate([[4.0, -1.0], [-1.0, 1.0]], error=0.1)))
    assert {"alignment/warm", "hurt/warm", "mean_cosine/warm/size"} <= tally.values().keys()
    assert not {"cosine/warm/size", "grad_norm/warm"} & tally.values().keys()


@given(st.lists(st.tuples(*[st.one_of(st.floats(-1, 1), st.just(math.nan))] * 2), max_size=20))
@examples(100)
def test_hurt_is_the_share_of_steps_with_a_negative_alignment(alignments: list[tuple[float, float]]) -> None:
    class Step(StepReport):
        """A step whose alignment is given."""

        alignment = None  # type: ignore[assignment]

    tally = Tally(NAMES, torch.device("cpu"))
    for pair in alignments:
        step = Step(**vars(report()))
        object.__setattr__(step, "alignment", torch.tensor(pair, dtype=torch.float64))
        tally.add_report(step)
    values = tally.values()
    for name, column in zip(NAMES, zip(*alignments, strict=True) if alignments else ((), ()), strict=True):
        known = [value for value in column if not math.isnan(value)]
        if known:
            assert values[f"hurt/{name}"] == pytest.approx(sum(value < -1e-5 for value in known) / len(known))
            assert values[f"alignment/{name}"] == pytest.approx(math.fsum(known) / len(known), abs=1e-12)
        else:
            assert f"hurt/{name}" not in values
