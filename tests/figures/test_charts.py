"""A chart shows single steps beside their mean, says what an alignment is of, and marks what cannot be told."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mogeo.figures.charts import (
    draw_alignment,
    draw_cosines,
    draw_hurt,
    draw_noise,
    draw_over_steps,
)
from tests.figures.histories import NAMES, Records, before_tracking, history


class Drawn:
    """The pictures that a test had drawn."""

    def __init__(self, folder: Path) -> None:
        self.figures: list[Figure] = []
        self.folder = folder

    @property
    def path(self) -> Path:
        return self.folder / "chart.png"

    @property
    def axes(self) -> list[Any]:
        """The panels of the last picture."""
        return [ax for ax in self.figures[-1].axes if ax.get_visible()]

    @property
    def heads(self) -> list[str]:
        return [ax.get_title(loc="left") for ax in self.axes]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    pictures, save = Drawn(tmp_path), Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        pictures.figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return pictures


def lines(ax: Any, marker: str = "None") -> list[np.ndarray[Any, Any]]:
    """The heights of the lines with this marker, those across the panel left out."""
    found = [line for line in ax.lines if line.get_marker() == marker and len(line.get_xdata()) > 2]
    return [np.asarray(line.get_ydata(), dtype=np.float64) for line in found]


def two_objectives(cosines: list[float]) -> Records:
    """A run whose two gradients have these cosines."""
    return [
        {"kind": "train", "step": i + 1, "cosines": [[1.0, cosine], [cosine, 1.0]]} for i, cosine in enumerate(cosines)
    ]


# ---- single steps and their mean -------------------------------------------------------------------------------------


def test_conflicts_that_a_mean_over_steps_hides_are_in_the_picture(drawn: Drawn) -> None:
    values = np.random.default_rng(0).permutation(np.linspace(-0.998, 0.806, 400)).tolist()
    draw_cosines(drawn.path, ("informativeness", "naturalness"), {"run": two_objectives(values)})
    (ax,) = drawn.axes
    assert lines(ax, ".")[0].tolist() == values
    (mean,) = lines(ax)
    assert np.abs(mean).max() < 0.5  # the line alone would hide them
    low, high = ax.get_ylim()
    assert low <= -0.998
    assert high >= 0.806
    assert "line: mean over 21 of them" in drawn.heads[0]


@pytest.mark.parametrize("field", ["loss", "weight"])
def test_losses_and_weights_are_drawn_step_by_step_too(drawn: Drawn, field: str) -> None:
    records = history(NAMES, steps=60)
    draw_over_steps(drawn.path, "It", NAMES, {"run": records}, field)
    expected = [[record[field][name] for record in records if record["kind"] == "train"] for name in NAMES]
    assert [values.tolist() for values in lines(drawn.axes[0], ".")] == expected
    assert "mean over 3 of them" in drawn.heads[0]


def test_of_many_pairs_the_range_is_that_of_single_steps(drawn: Drawn) -> None:
    names = tuple(f"objective {i}" for i in range(6))
    records = history(names, steps=80)
    draw_cosines(drawn.path, names, {"run": records})
    (band,) = drawn.axes[0].collections
    raw = [[r["cosines"][i][j] for i, j in itertools.combinations(range(6), 2)] for r in records if r.get("cosines")]
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == np.min(raw)
    assert heights.max() == np.max(raw)


# ---- of what ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [draw_alignment, draw_hurt])
def test_an_alignment_says_whether_noise_flatters_it(drawn: Drawn, draw: Any) -> None:
    old = before_tracking(history(NAMES))
    draw(drawn.path, NAMES, {"old": old, "new": history(NAMES), "tracked": history(NAMES, tracked=True)})
    for head in drawn.heads[:2]:
        assert "mini-batch: flattered by its noise" in head
    assert "of mean gradients (tracked)" in drawn.heads[2]
    assert "flattered" not in drawn.heads[2]


def test_an_estimate_beyond_what_a_cosine_can_be_is_drawn_at_its_edge(drawn: Drawn) -> None:
    beyond = history(NAMES, tracked=True, mean_cosines=[[40.0] * 3] * 3)
    draw_cosines(drawn.path, NAMES, {"run": beyond})
    assert set(lines(drawn.axes[1], ".")[0]) == {1}


def test_the_share_of_steps_that_hurt_is_that_of_all_steps_so_far(drawn: Drawn) -> None:
    alignments = [-0.5, 0.2, None, -0.1, 0.3, None]
    records: Records = [
        {"kind": "train", "step": i + 1, "alignment": {"honesty": value}} for i, value in enumerate(alignments)
    ]
    draw_hurt(drawn.path, ("honesty",), {"run": records})
    assert lines(drawn.axes[0])[0].tolist() == pytest.approx([1, 1 / 2, 1 / 2, 2 / 3, 1 / 2, 1 / 2])
    assert "line: all steps up to there" in drawn.heads[0]
    assert "standard errors" not in drawn.heads[0]


def test_a_thin_line_counts_what_hurts_by_two_standard_errors(drawn: Drawn) -> None:
    records: Records = [
        {"kind": "train", "step": i + 1, "alignment": {"honesty": -0.5}, "alignment_error": {"honesty": error}}
        for i, error in enumerate([None, 0.2, 0.3, 0.24])
    ]
    draw_hurt(drawn.path, ("honesty",), {"run": records})
    thick, thin = lines(drawn.axes[0])
    assert thick.tolist() == [1, 1, 1, 1]
    assert thin.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert "thin: by 2 standard errors" in drawn.heads[0]


def test_cosines_of_mean_gradients_are_beside_those_of_mini_batches(drawn: Drawn) -> None:
    records = history(NAMES, tracked=True)
    draw_cosines(drawn.path, NAMES, {"run": records})
    assert ["mini-batch" in head for head in drawn.heads] == [True, False]
    assert "of mean gradients (tracked)" in drawn.heads[1]
    for ax, field in zip(drawn.axes, ("cosines", "mean_cosines"), strict=True):
        of_steps = np.array([record[field] for record in records if field in record], dtype=np.float64)
        np.testing.assert_equal(lines(ax, ".")[0], of_steps[:, 0, 1])
    draw_cosines(drawn.path, NAMES, {"run": history(NAMES)})
    assert len(drawn.axes) == 1
    draw_cosines(drawn.path, NAMES, {"no": history(NAMES, geometry=False), "one": history(NAMES), "two": records})
    assert [head.splitlines()[0] for head in drawn.heads] == ["one", "two", "two"]
    one, two, beside = (ax.get_position() for ax in drawn.axes)
    assert (two.x0, two.y0) == pytest.approx((one.x0, beside.y0))
    assert beside.x0 > two.x1
    assert one.y0 > two.y1


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_where_noise_cannot_be_told_the_line_has_a_gap_and_triangles_show_the_lower_bound(drawn: Drawn) -> None:
    records = history(NAMES, steps=6, tracked=True)
    records[4]["noise_scale"] = {**records[4]["noise_scale"], "honesty": None}
    records[4]["noise_scale_interval"] = {**records[4]["noise_scale_interval"], "honesty": [40.0, None]}
    draw_noise(drawn.path, NAMES, {"run": records, "untracked": history(NAMES)})
    (ax,) = drawn.axes  # none for the run that was not tracked
    assert ax.get_yscale() == "log"
    estimates, bounds = lines(ax)[1], lines(ax, "^")[1]
    nan = np.nan
    np.testing.assert_equal(bounds, [5, 5, nan, 40, nan, nan])
    assert np.isnan(estimates).tolist() == [True, True, False, True, False, False]
    assert "triangles: at least this" in drawn.heads[0]
    labels = [text.get_text() for text in ax.get_yticklabels(which="both")]
    assert not [label for label in labels if re.search(r"\^|e", label)]  # 20, and not 2 · 10¹


def test_without_anything_told_of_noise_there_is_no_picture(drawn: Drawn) -> None:
    untold = history(NAMES, steps=2, tracked=True, noise_scale_interval={key: [0.0, None] for key in NAMES})
    assert draw_noise(drawn.path, NAMES, {"run": untold, "untracked": history(NAMES)}) is None
    assert draw_noise(drawn.path, NAMES, {"run": history(NAMES, steps=2, tracked=True)}) == drawn.path
