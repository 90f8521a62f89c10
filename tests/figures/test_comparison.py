"""Bars are means over seeds, and lines running means of weights; names can break neither."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mogeo.figures.comparison import Bars, _draw_bars, _draw_mean_weights, write_comparison
from mogeo.figures.panels import make_panels
from tests.figures.histories import NAMES, history
from tests.figures.pictures import AWKWARD, size


def bars(title: str, labels: tuple[str, ...], seeds: int) -> Bars:
    return Bars(title, "net win rate", NAMES, {label: [[0.1 * s for s in range(seeds)]] * 3 for label in labels}, 0.0)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("labels", [("one",), AWKWARD, tuple(f"method {i}" for i in range(9))])
def test_a_comparison_of_methods(tmp_path: Path, seeds: int, labels: tuple[str, ...]) -> None:
    panels = [bars("greedy", labels, seeds), bars("sampled", labels[:1], seeds)]
    weights = [history(NAMES, steps=10 + seed) for seed in range(seeds)]
    path = write_comparison(tmp_path / "comparison.png", "Methods", panels, NAMES, weights, "weights")
    assert min(size(path)) > 300


def test_bars_are_means_and_dots_are_seeds() -> None:
    values = [[0.1, 0.3], [-0.5, -0.1], [0.0, 0.0]]
    _, (ax,) = make_panels(1, "title")
    _draw_bars(ax, Bars("greedy", "rate", NAMES, {"one": values, "two": values[::-1]}, baseline=0.05), ["one", "two"])
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
    assert tops == pytest.approx([0.2, -0.3, 0.0, 0.0, -0.3, 0.2])
    assert all(bar.get_y() == pytest.approx(0.05) for bar in ax.patches)
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert [list(dot.get_ydata()) for dot in dots] == values + values[::-1]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx(centres)
    assert len(set(centres)) == 6


def test_weights_are_dots_of_every_seed_and_means_over_seeds_whose_names_do_not_overlap() -> None:
    _, (ax,) = make_panels(1, "title")
    weights = dict(zip(NAMES, (0.3, 0.301, 0.6), strict=True))
    histories = [[{"kind": "train", "step": s, "weight": {k: v + shift for k, v in weights.items()}} for s in (1, 2)]
                 for shift in (-0.1, 0.1)]  # fmt: skip
    assert "band: its range over seeds" in _draw_mean_weights(ax, NAMES, histories)
    dots, drawn = (
        [list(line.get_ydata()) for line in ax.lines if (line.get_marker() == ".") == wanted]
        for wanted in (True, False)
    )
    assert drawn == [pytest.approx([w, w]) for w in weights.values()]
    assert dots == [pytest.approx([w + shift] * 2) for w in weights.values() for shift in (-0.1, 0.1)]
    low, high = ax.get_ylim()
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert len(heights) == 3
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.045 * (high - low)
