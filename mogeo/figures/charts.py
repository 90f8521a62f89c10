"""Charts of one or several runs over their steps, drawn from the records of their `metrics.jsonl`, as PNG files.

Every chart takes the file to write, the objectives (names, in the order of their colours) and the runs (label -> its
records). It returns the file, or None if no run recorded what it shows: then nothing is written. Needs matplotlib
(extra `report`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mogeo.figures.panels import (
    BARS,
    LINES,
    dots_and_line,
    draw_noisy,
    head,
    legend_below,
    line,
    make_panels,
    plain,
)
from mogeo.figures.records import (
    StepRecord,
    column,
    cosines,
    lower_bounds,
    of_mean_gradients,
    of_training,
    quantile,
    share_hurt_so_far,
)

Runs = Mapping[str, Sequence[StepRecord]]

_MAX_PAIRS = 10  # with more pairs of objectives, draw the range of their cosines instead of one line each


def draw_over_steps(path: Path, what: str, objectives: Sequence[str], runs: Runs, field: str) -> Path | None:
    """Draw `record[field]` of every training step: one panel per run, one line per objective.

    Args:
        path: the PNG file to write.
        what: heading of the picture, to which "of each objective" is added.
        objectives: names, in the order of their colours.
        runs: label -> its records.
        field: which entry of the records to draw.
    """

    def draw(ax: Any, label: str, records: Sequence[StepRecord]) -> None:
        for i, name in enumerate(objectives):
            draw_noisy(ax, _steps(records), column(records, field, name), name, line(i))
        head(ax, label, dots_and_line(len(records)))

    return _draw_runs(path, f"{what} of each objective", runs, field, draw)


def draw_alignment(path: Path, objectives: Sequence[str], runs: Runs) -> Path | None:
    """Draw the cosine between each step's direction and each objective's gradient: one panel per run."""

    def draw(ax: Any, label: str, records: Sequence[StepRecord]) -> None:
        for i, name in enumerate(objectives):
            draw_noisy(ax, _steps(records), column(records, "alignment", name), name, line(i))
        ax.axhline(0, color="black", linewidth=0.8)
        head(ax, label, f"{_whose_gradients(records)}\n{dots_and_line(len(records))}")

    title = "Cosine between direction and gradient (below zero: the step hurts the objective)"
    return _draw_runs(path, title, runs, "alignment", draw)


def draw_hurt(path: Path, objectives: Sequence[str], runs: Runs) -> Path | None:
    """Draw the share of the steps so far that hurt each objective: one panel per run.

    Where alignments have standard errors, another line counts only the steps that hurt it by two of them.
    """

    def draw(ax: Any, label: str, records: Sequence[StepRecord]) -> None:
        from matplotlib.ticker import PercentFormatter

        remark = "line: all steps up to there in which it is known"
        for i, name in enumerate(objectives):
            ax.plot(_steps(records), share_hurt_so_far(records, name), label=plain(name), **line(i))
        if of_training(records, "alignment_error"):
            remark += "; thin: by 2 standard errors"
            for i, name in enumerate(objectives):
                ax.plot(_steps(records), share_hurt_so_far(records, name, 2), **{**line(i), "linewidth": 0.6})
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        head(ax, label, f"{_whose_gradients(records)}\n{remark}")

    title = "Share of the steps so far that hurt each objective (alignment below zero)"
    return _draw_runs(path, title, runs, "alignment", draw)


def draw_cosines(path: Path, objectives: Sequence[str], runs: Runs) -> Path | None:
    """Draw the cosines between the gradients of each pair of objectives: of each step's mini-batch, and, beside them,
    of mean gradients where a run was tracked.
    """
    kinds = {
        "cosines": "of each step's mini-batch: noise draws them to zero",
        "mean_cosines": "of mean gradients (tracked)",
    }
    known = {field: {label: of_training(records, field) for label, records in runs.items()} for field in kinds}
    shown = [label for label in runs if any(of_field[label] for of_field in known.values())]
    if not shown or len(objectives) < 2:
        return None
    fields = [field for field in kinds if any(known[field].values())]
    places = [(label, field) for label in shown for field in fields]  # a row for each run, if there are both kinds
    title = "Cosine between two objectives' gradients (below zero: conflict)"
    columns = len(fields) if len(fields) > 1 else None
    figure, axes = make_panels(len(places), title, xlabel="step", share_y=True, columns=columns)
    drawn = []
    for ax, (label, field) in zip(axes, places, strict=True):
        records = known[field][label]
        ax.set_visible(bool(records))
        if records:
            _draw_pairs(ax, objectives, records, field)
            ax.axhline(0, color="black", linewidth=0.8)
            head(ax, label, f"{kinds[field]}\n{dots_and_line(len(records))}")
            drawn.append(ax)
    legend_below(figure, drawn[0])
    figure.savefig(path)
    return path


def draw_noise(path: Path, objectives: Sequence[str], runs: Runs) -> Path | None:
    """Draw the noise scale of each objective, on a logarithmic axis: one panel per tracked run.

    Where it cannot be told, the line has a gap, and triangles show what it is at least.
    """

    def draw(ax: Any, label: str, records: Sequence[StepRecord]) -> None:
        from matplotlib.ticker import LogFormatter

        ax.set_yscale("log", nonpositive="mask")
        for of in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            of(LogFormatter(minor_thresholds=(2, 0.4)))  # 20, and not 2 · 10¹
        for i, name in enumerate(objectives):
            estimate, least = column(records, "noise_scale", name), lower_bounds(records, name)
            ax.plot(_steps(records), np.where(estimate > 0, estimate, np.nan), label=plain(name), **line(i))
            bound = np.where(np.isnan(estimate) & (least > 0), least, np.nan)
            ax.plot(_steps(records), bound, "^", color=line(i)["color"], alpha=0.4, markersize=4, markeredgewidth=0)
        head(ax, label, "line: estimate; triangles: at least this, more cannot be told")

    title = "Noise scale: mini-batches to average until signal equals noise"
    tracked = {label: records for label, records in runs.items() if _tells_of_noise(records, objectives)}
    return _draw_runs(path, title, tracked, "noise_scale", draw)


def draw_accuracy(path: Path, objectives: Sequence[str], runs: Runs) -> Path | None:
    """Draw the preference accuracy on held-out pairs: one panel per objective, one line per run."""
    evaluations = {label: [r for r in records if r["kind"] == "eval"] for label, records in runs.items()}
    evaluations = {label: records for label, records in evaluations.items() if records}
    if not evaluations:
        return None
    figure, axes = make_panels(len(objectives), "Held-out preference accuracy", xlabel="step", share_y=True)
    for ax, name in zip(axes, objectives, strict=True):
        for i, (label, records) in enumerate(evaluations.items()):
            # A run is a method, so its line has the colour of the method's bars. The first of those colours stands for
            # the model before alignment, which is the horizontal line at one half here.
            style = {**line(i), "color": BARS[1 + i % (len(BARS) - 1)]}
            values = column(records, "accuracy", name)
            ax.plot(_steps(records), values, label=plain(label), marker="o", markersize=3, **style)
        ax.axhline(0.5, color="black", linewidth=0.8)
        head(ax, name)
    legend_below(figure, axes[0])
    figure.savefig(path)
    return path


def _draw_runs(
    path: Path, title: str, runs: Runs, field: str, draw: Callable[[Any, str, Sequence[StepRecord]], None]
) -> Path | None:
    """Write a picture with one panel per run, for those that recorded `field`.

    Args:
        path: the PNG file to write.
        title: heading of the picture.
        runs: label -> its records.
        field: which entry of the records is needed.
        draw: draws a run's training records that have it into a panel.
    """
    panels = {label: of_training(records, field) for label, records in runs.items()}
    panels = {label: records for label, records in panels.items() if records}
    if not panels:
        return None
    figure, axes = make_panels(len(panels), title, xlabel="step", share_y=True)
    for ax, (label, records) in zip(axes, panels.items(), strict=True):
        draw(ax, label, records)
    legend_below(figure, axes[0])
    figure.savefig(path)
    return path


def _draw_pairs(ax: Any, objectives: Sequence[str], records: Sequence[StepRecord], field: str) -> None:
    """Draw the cosines of each pair of objectives; of many pairs, their range and the middle one."""
    of_steps = cosines(records, field)
    pairs = {(i, j): of_steps[:, i, j] for i, j in combinations(range(len(objectives)), 2)}
    if len(pairs) <= _MAX_PAIRS:
        for n, ((i, j), values) in enumerate(pairs.items()):
            draw_noisy(ax, _steps(records), values, f"{objectives[i]} · {objectives[j]}", line(n))
        return
    of_pairs = np.stack([*pairs.values()])  # [pairs, steps]
    low, middle, high = (quantile(of_pairs, q) for q in (0.0, 0.5, 1.0))
    ax.fill_between(_steps(records), low, high, color=LINES[0], alpha=0.2, label="range of all pairs, step by step")
    draw_noisy(ax, _steps(records), middle, "median pair", line(0))


def _whose_gradients(records: Sequence[StepRecord]) -> str:
    """What a run's alignments are of, in words."""
    if of_mean_gradients(records):
        return "of mean gradients (tracked)"
    return "of each step's mini-batch: flattered by its noise"


def _tells_of_noise(records: Sequence[StepRecord], objectives: Sequence[str]) -> bool:
    """Whether a noise scale, or a bound on it, can be drawn."""
    known = of_training(records, "noise_scale")
    return any((f > 0).any() for n in objectives for f in (column(known, "noise_scale", n), lower_bounds(known, n)))


def _steps(records: Sequence[StepRecord]) -> list[int]:
    return [record["step"] for record in records]
