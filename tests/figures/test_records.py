"""What records say: a share is over the steps that can tell, a mean over the values that are known."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogeo.figures.records import (
    column,
    lower_bounds,
    of_mean_gradients,
    of_training,
    running_mean,
    share_hurt,
    share_hurt_so_far,
    window,
)
from tests.figures.histories import NAMES, before_tracking, history
from tests.profiles import examples

UNKNOWN = (None, math.nan, math.inf)
VALUES = st.one_of(st.floats(-1, 1), st.sampled_from(UNKNOWN))


def runs(values: list[Any]) -> list[dict[str, Any]]:
    """Training records whose alignment is this, and a record of another kind among them."""
    steps: list[dict[str, Any]] = [
        {"kind": "train", "step": i, "alignment": {"honesty": value}} for i, value in enumerate(values)
    ]
    return [{"kind": "eval", "step": 0, "accuracy": {"honesty": -0.5}}, *steps]


@given(st.lists(VALUES, max_size=50))
@examples(200)
def test_the_share_that_hurts_is_over_the_steps_that_can_tell(values: list[Any]) -> None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    expected = sum(value < -1e-5 for value in known) / len(known) if known else math.nan
    assert share_hurt(runs(values), "honesty") == pytest.approx(expected, nan_ok=True)
    assert math.isnan(share_hurt(runs(values), "taste"))


@given(st.lists(st.tuples(VALUES, st.one_of(st.floats(0, 1), st.sampled_from(UNKNOWN))), max_size=20), st.floats(0, 3))
@examples(100)
def test_a_step_surely_hurts_if_its_alignment_is_so_many_errors_below_zero(
    pairs: list[tuple[Any, Any]], errors: float
) -> None:
    values = [value for value, _ in pairs]
    records = runs(values)
    for record, (_, error) in zip(records[1:], pairs, strict=True):
        record["alignment_error"] = {"honesty": error}
    known = [(v, e) for v, e in pairs if v is not None and math.isfinite(v)]
    far = [v < 0 and (errors == 0 or (e is not None and math.isfinite(e) and v + errors * e < 0)) for v, e in known]
    expected = sum(far) / len(known) if known else math.nan
    assert share_hurt(records, "honesty", errors) == pytest.approx(expected, nan_ok=True)
    assert not share_hurt(runs(values), "honesty", 2) > 0  # without errors nothing is sure


@given(st.lists(VALUES, min_size=1, max_size=20))
@examples(100)
def test_the_share_so_far_is_that_of_the_run_cut_there(values: list[Any]) -> None:
    records = of_training(runs(values))
    expected = [share_hurt(records[: n + 1], "honesty") for n in range(len(records))]
    assert share_hurt_so_far(records, "honesty").tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("way", ["missing", "null", "of one objective"])
def test_what_a_record_lacks_is_not_known(way: str) -> None:
    record: dict[str, Any] = {"kind": "train", "step": 1}
    if way != "missing":
        record["noise_scale"] = record["noise_scale_interval"] = None if way == "null" else {"helpfulness": None}
    assert np.isnan(column([record], "noise_scale", "honesty")).all()
    assert np.isnan(lower_bounds([record], "honesty")).all()


def test_lower_bounds_are_the_first_of_each_interval_as_written_and_as_read() -> None:
    record = {"kind": "train", "step": 1, "noise_scale_interval": {"honesty": [3.5, math.inf]}}
    read = json.loads(json.dumps({**record, "noise_scale_interval": {"honesty": [3.5, None]}}))
    assert lower_bounds([record, read], "honesty").tolist() == [3.5, 3.5]


def test_alignments_are_of_mean_gradients_only_if_every_step_says_so() -> None:
    tracked, untracked = history(NAMES, tracked=True), history(NAMES)
    assert of_mean_gradients(tracked)
    assert not of_mean_gradients(untracked)
    assert not of_mean_gradients(before_tracking(untracked))
    assert not of_mean_gradients(history(NAMES, geometry=False))
    assert not of_mean_gradients([*tracked, *untracked])


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(math.nan)), max_size=200))
@examples(50)
def test_a_running_mean_is_over_an_odd_number_of_values_the_value_in_the_middle(values: list[float]) -> None:
    width = window(len(values))
    assert width % 2 == 1
    assert width <= max(1, len(values) / 20 + 1)
    means = running_mean(np.array(values, dtype=np.float64))
    for i, mean in enumerate(means):
        near = [v for j, v in enumerate(values) if abs(i - j) <= width // 2 and not math.isnan(v)]
        assert mean == pytest.approx(math.fsum(near) / len(near) if near else math.nan, abs=1e-12, nan_ok=True)
