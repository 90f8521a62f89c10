"""The table of what steps did says of which gradients it speaks, and how sure it is. The command: tests/test_cli.py."""

import pytest

from mogeo.dpo.command import alignment_tables
from mogeo.dpo.scoring import Evaluation
from mogeo.dpo.train import AlignResult
from tests.figures.histories import before_tracking, history

NAMES = ("warm", "size")


def table(records):
    """The cells of each objective by the names of their columns, and the note."""
    zero = dict.fromkeys(NAMES, 0.0)
    measured = Evaluation(zero, zero, zero, dict.fromkeys(NAMES, 1))
    (found,) = alignment_tables(AlignResult(None, records, measured, measured))
    return {row[0]: dict(zip(found.header, row, strict=True)) for row in found.rows}, found.note


def step(number, alignment, **more):
    return {"kind": "train", "step": number, "alignment": dict(zip(NAMES, alignment, strict=True)), **more}


@pytest.mark.parametrize("old", [False, True])
def test_an_untracked_run_is_said_to_be_flattered(old):
    records = [step(i + 1, pair, alignment_of="mini-batch") for i, pair in enumerate([(-0.5, 1), (0.1, 1), (None, 1)])]
    cells, note = table(before_tracking(records) if old else records)
    assert cells["warm"] == {"objective": "warm", "mean alignment": "-0.200", "steps that hurt, %": "50.0"}
    assert cells["size"]["steps that hurt, %"] == "0.0"
    assert "flatters" in note
    assert "--track" in note


def test_a_tracked_run_tells_harm_that_is_sure_and_the_noise():
    def tracked(number, error, scale, least):
        return step(
            number, (-0.5, 0.4), alignment_of="mean gradients", alignment_error=dict.fromkeys(NAMES, error),
            noise_scale=dict(zip(NAMES, scale, strict=True)), evidence=dict.fromkeys(NAMES, 0.25 * number),
            noise_scale_interval={name: [bound, None] for name, bound in zip(NAMES, least, strict=True)},
        )  # fmt: skip

    cells, note = table([tracked(1, 0.3, (None, None), (0, 0)), tracked(2, 0.2, (12.345, None), (6, 310.4))])
    assert (cells["warm"]["steps that hurt, %"], cells["warm"]["surely, %"]) == ("100.0", "50.0")
    assert (cells["size"]["steps that hurt, %"], cells["size"]["surely, %"]) == ("0.0", "0.0")
    assert [row["noise scale at the end"] for row in cells.values()] == ["12.3", "over 310"]
    assert cells["size"]["mean evidence"] == "0.38"
    assert "mean gradient" in note
    assert "flatters" not in note
    cells, _ = table([tracked(1, None, (None, None), (0, 0))])
    assert cells["warm"]["noise scale at the end"] == "unknown"


def test_an_objective_that_no_step_can_tell_of_is_unknown():
    steps = [
        step(i, (0.3, None), alignment_of="mean gradients", alignment_error={"warm": 0.1, "size": 2.0},
             noise_scale={"warm": 3.0, "size": None}, noise_scale_interval={"warm": [2.0, 4.0], "size": [9.0, None]},
             evidence={"warm": 1.0, "size": 0.0})
        for i in (1, 2)
    ]  # fmt: skip
    cells, _ = table(steps)
    assert list(cells["size"].values()) == ["size", "unknown", "unknown", "unknown", "over 9", "0.00"]
    assert cells["warm"]["mean alignment"] == "+0.300"


def test_a_run_that_needed_no_gradients_of_single_objectives_has_no_table():
    zero = dict.fromkeys(NAMES, 0.0)
    measured = Evaluation(zero, zero, zero, dict.fromkeys(NAMES, 1))
    assert alignment_tables(AlignResult(None, history(NAMES, geometry=False), measured, measured)) == []
