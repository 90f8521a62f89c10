"""One picture that compares methods: bars for what was measured of each, and the weights of one of them.

Needs matplotlib (extra `report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mogeo.figures.panels import (
    BARS,
    HATCHES,
    colour,
    dots_and_line,
    draw_dots,
    head,
    legend_below,
    line,
    make_panels,
    plain,
)
from mogeo.figures.records import StepRecord, column, mean, of_training, running_mean


@dataclass(frozen=True)
class Bars:
    """What one panel of grouped bars shows: for each category, one bar per label.

    Attributes:
        title: heading of the panel.
        ylabel: what the bars' heights mean.
        categories: names along the horizontal axis.
        series: label -> for each category, the values of all seeds. The bar is their mean.
        baseline: the height at which bars start.
    """

    title: str
    ylabel: str
    categories: Sequence[str]
    series: Mapping[str, Sequence[Sequence[float]]]
    baseline: float = 0.0


def write_comparison(
    path: Path,
    title: str,
    panels: Sequence[Bars],
    objectives: Sequence[str],
    weights: Sequence[Sequence[StepRecord]],
    weights_title: str,
) -> Path:
    """Write a picture that compares methods: one panel of bars for each of `panels`, and a panel of one method's
    weights.

    Args:
        path: the PNG file to write.
        title: heading of the picture.
        panels: what the bars show. A label has the same colour in all panels.
        objectives: names, in the order of their colours.
        weights: the records of one method's runs, one list per seed.
        weights_title: heading of the panel of weights.

    Returns:
        `path`.

    Raises:
        MissingMatplotlibError: matplotlib is not installed.
    """
    figure, axes = make_panels(len(panels) + 1, title, width=5.6)
    labels = list(dict.fromkeys(label for bars in panels for label in bars.series))
    for ax, bars in zip(axes, panels, strict=False):
        _draw_bars(ax, bars, labels)
    legend_below(figure, axes[0])
    head(axes[-1], weights_title, _draw_mean_weights(axes[-1], objectives, weights))
    figure.savefig(path)
    return path


def _draw_bars(ax: Any, bars: Bars, labels: Sequence[str]) -> None:
    """Draw grouped bars; with several seeds, a black dot for the value of each."""
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        values = [np.asarray(of_category, dtype=np.float64) for of_category in bars.series.get(label, [])]
        at = np.arange(len(values)) + (i - (len(labels) - 1) / 2) * width
        ax.bar(
            at,
            [v.mean() - bars.baseline for v in values],
            0.92 * width,
            bottom=bars.baseline,
            color=BARS[i % len(BARS)],
            hatch=HATCHES[i // len(BARS) % len(HATCHES)],
            label=plain(label),
        )
        for x, v in zip(at, values, strict=True):
            if len(v) > 1:
                ax.plot([x] * len(v), v, ".", color="black", markersize=3)
    ax.axhline(bars.baseline, color="black", linewidth=0.8)
    ax.set_xticks(range(len(bars.categories)), [plain(category) for category in bars.categories], fontsize=8)
    ax.set_ylabel(plain(bars.ylabel))
    head(ax, bars.title)
    ax.xaxis.grid(False)


def _draw_mean_weights(ax: Any, objectives: Sequence[str], histories: Sequence[Sequence[StepRecord]]) -> str:
    """Draw each objective's weight over the steps. Returns a remark that says what is what.

    Dots are the weights of single steps, of every seed. A line is their running mean over the steps and the mean over
    the seeds, a band the range of the seeds' running means, a dashed line the mean over seeds and steps.
    """
    ends, taken = [], 0
    for i, name in enumerate(objectives):
        columns = [column(of_training(records), "weight", name) for records in histories]
        taken = min(map(len, columns))
        raw = np.stack([of_seed[:taken] for of_seed in columns])  # [seeds, steps]
        smooth = np.stack([running_mean(row) for row in raw])
        steps = range(1, taken + 1)
        for row in raw:
            draw_dots(ax, steps, row, colour(i))
        if len(raw) > 1:
            ax.fill_between(steps, smooth.min(0), smooth.max(0), color=colour(i), alpha=0.15, linewidth=0)
        ax.plot(steps, smooth.mean(0), **line(i))
        ax.hlines(mean(raw), steps[0], steps[-1], color=colour(i), linewidth=0.8, linestyle=(0, (4, 3)))
        ends.append((float(smooth.mean(0)[-1]), i))
    # Each line is named at its right end, where no legend is needed. Go from the lowest line up, and lift a name where
    # it would overlap the one below.
    low, high = ax.get_ylim()
    at = low
    for end, i in sorted(ends):
        at = max(at, low if np.isnan(end) else end)
        ax.text(steps[-1], at, f" {plain(objectives[i])}", color=colour(i), va="center", fontsize=8)
        at += 0.05 * (high - low)
    ax.set(xlabel="step", ylabel="weight")
    return dots_and_line(taken) + ("; band: its range over seeds" if len(histories) > 1 else "")
