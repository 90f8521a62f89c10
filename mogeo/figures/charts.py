"""Charts of one or several runs, drawn from the records of their `metrics.jsonl` and written as PNG files.

Needs matplotlib (extra `report`). Uses matplotlib's `Figure` class and never `pyplot`, so that the caller's own
matplotlib settings, backend and open figures stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mogeo.errors import InputError

StepRecord = Mapping[str, Any]
"""One line of metrics.jsonl; its entry `kind` is "train" or "eval"."""

Floats = NDArray[np.float64]

# The palette of Okabe and Ito, which people with any colour vision can tell apart, without its yellow, which is hard to
# see on white. Lines stand for objectives or runs and bars for methods, so the two lists begin with different colours.
# When the colours are used up, lines start over with another dash pattern and bars with another hatch pattern.
LINES = ("#D55E00", "#009E73", "#CC79A7", "#000000", "#0072B2", "#E69F00", "#56B4E9")
BARS = ("#999999", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "//", "..", "xx")
_MAX_PAIRS = 10  # with more pairs of objectives, draw the range of their cosines instead of one line each


class MissingMatplotlibError(InputError, ImportError):
    """A chart was asked for, and matplotlib is not installed."""


def require_matplotlib() -> None:
    """Check that charts can be drawn. Call this before a long computation whose result is to be drawn.

    Raises:
        MissingMatplotlibError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlibError("pictures and reports need matplotlib: pip install 'mogeo[report]'") from error


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
        weights: the records of one method's runs, one list per seed. Lines show the mean over the seeds, bands the
            range.
        weights_title: heading of the panel of weights.

    Returns:
        `path`.

    Raises:
        MissingMatplotlibError: matplotlib is not installed.
    """
    figure, axes = _panels(len(panels) + 1, title, width=5.6)
    labels = list(dict.fromkeys(label for bars in panels for label in bars.series))
    for ax, bars in zip(axes, panels, strict=False):
        _draw_bars(ax, bars, labels)
    _legend_below(figure, axes[0])
    _draw_mean_weights(axes[-1], objectives, weights)
    axes[-1].set_title(_plain(weights_title), fontsize=10, loc="left")
    figure.savefig(path)
    return path


# --- what is drawn ----------------------------------------------------------------------------------------------------


def draw_over_steps(
    path: Path, what: str, objectives: Sequence[str], runs: Mapping[str, Sequence[StepRecord]], field: str
) -> Path | None:
    """Draw `record[field]` of every training step: one panel per run, one line per objective.

    The values themselves are drawn pale, and their running mean in full colour.

    Args:
        path: the PNG file to write.
        what: heading of the picture, to which "of each objective" is added.
        objectives: names, in the order of their colours.
        runs: label -> its records.
        field: which entry of the records to draw.

    Returns:
        `path`, or None if no run has a training record: then nothing is written.
    """
    panels = {label: _train(records) for label, records in runs.items()}
    panels = {label: records for label, records in panels.items() if records}
    if not panels:
        return None
    figure, axes = _panels(len(panels), f"{what} of each objective", xlabel="step", share_y=True)
    for ax, (label, records) in zip(axes, panels.items(), strict=True):
        steps = [record["step"] for record in records]
        for i, name in enumerate(objectives):
            values = _column(records, field, name)
            ax.plot(steps, values, color=_colour(i), alpha=0.25, linewidth=0.8)
            ax.plot(steps, _smooth(values), label=_plain(name), **_line(i))
        ax.set_title(_plain(label), fontsize=10, loc="left")
    _legend_below(figure, axes[0])
    figure.savefig(path)
    return path


def draw_cosines(path: Path, objectives: Sequence[str], runs: Mapping[str, Sequence[StepRecord]]) -> Path | None:
    """Draw the cosines between the gradients of each pair of objectives, one panel per run that recorded them.

    Arguments are as in `draw_over_steps`.

    Returns:
        `path`, or None if no run recorded cosines, or there is only one objective: then nothing is written.
    """
    panels = {label: [r for r in _train(records) if r.get("cosines")] for label, records in runs.items()}
    panels = {label: records for label, records in panels.items() if records}
    pairs = list(combinations(range(len(objectives)), 2))
    if not panels or not pairs:
        return None
    title = "Cosine between two objectives' gradients (below zero: conflict)"
    figure, axes = _panels(len(panels), title, xlabel="step", share_y=True)
    for ax, (label, records) in zip(axes, panels.items(), strict=True):
        steps = [record["step"] for record in records]
        # metrics.jsonl holds null for a cosine that is not a number (of a zero or a skipped gradient): NaN here.
        matrices = np.array([record["cosines"] for record in records], dtype=np.float64)  # [steps, K, K]
        cosines = np.stack([_smooth(matrices[:, i, j]) for i, j in pairs])  # [pairs, steps]
        if len(pairs) <= _MAX_PAIRS:
            for n, (i, j) in enumerate(pairs):
                ax.plot(steps, cosines[n], label=_plain(f"{objectives[i]} · {objectives[j]}"), **_line(n))
        else:
            ax.fill_between(
                steps, _quantile(cosines, 0.0), _quantile(cosines, 1.0), color=LINES[0], alpha=0.2, label="range"
            )
            ax.plot(steps, _quantile(cosines, 0.5), label="median pair", **_line(0))
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(_plain(label), fontsize=10, loc="left")
    _legend_below(figure, axes[0])
    figure.savefig(path)
    return path


def draw_accuracy(path: Path, objectives: Sequence[str], runs: Mapping[str, Sequence[StepRecord]]) -> Path | None:
    """Draw the preference accuracy on held-out pairs: one panel per objective, one line per run.

    Arguments are as in `draw_over_steps`.

    Returns:
        `path`, or None if no run was evaluated: then nothing is written.
    """
    evaluations = {label: [r for r in records if r["kind"] == "eval"] for label, records in runs.items()}
    evaluations = {label: records for label, records in evaluations.items() if records}
    if not evaluations:
        return None
    figure, axes = _panels(len(objectives), "Held-out preference accuracy", xlabel="step", share_y=True)
    for ax, name in zip(axes, objectives, strict=True):
        for i, (label, records) in enumerate(evaluations.items()):
            steps = [record["step"] for record in records]
            # A run is a method, so its line has the colour of the method's bars. The first of those colours stands for
            # the model before alignment, which is the horizontal line at one half here.
            style = {**_line(i), "color": BARS[1 + i % (len(BARS) - 1)]}
            ax.plot(steps, _column(records, "accuracy", name), label=_plain(label), marker="o", markersize=3, **style)
        ax.axhline(0.5, color="black", linewidth=0.8)
        ax.set_title(_plain(name), fontsize=10, loc="left")
    _legend_below(figure, axes[0])
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
            hatch=_HATCHES[i // len(BARS) % len(_HATCHES)],
            label=_plain(label),
        )
        for x, v in zip(at, values, strict=True):
            if len(v) > 1:
                ax.plot([x] * len(v), v, ".", color="black", markersize=3)
    ax.axhline(bars.baseline, color="black", linewidth=0.8)
    ax.set_xticks(range(len(bars.categories)), [_plain(category) for category in bars.categories], fontsize=8)
    ax.set_ylabel(_plain(bars.ylabel))
    ax.set_title(_plain(bars.title), fontsize=10, loc="left")
    ax.xaxis.grid(False)


def _draw_mean_weights(ax: Any, objectives: Sequence[str], histories: Sequence[Sequence[StepRecord]]) -> None:
    """Draw each objective's weight over the steps, smoothed.

    A line is the mean over the seeds, a band their range, a dashed line the mean over seeds and steps.
    """
    ends = []
    for i, name in enumerate(objectives):
        columns = [_column(_train(records), "weight", name) for records in histories]
        raw = np.stack([column[: min(map(len, columns))] for column in columns])  # [seeds, steps]
        smooth = np.stack([_smooth(row) for row in raw])
        steps = np.arange(1, raw.shape[1] + 1)
        if len(raw) > 1:
            ax.fill_between(steps, smooth.min(0), smooth.max(0), color=_colour(i), alpha=0.15, linewidth=0)
        ax.plot(steps, smooth.mean(0), **_line(i))
        ax.hlines(_mean(raw), steps[0], steps[-1], color=_colour(i), linewidth=0.8, linestyle=(0, (4, 3)))
        ends.append((float(smooth.mean(0)[-1]), i))
    # Each line is named at its right end, where no legend is needed. Go from the lowest line up, and lift a name where
    # it would overlap the one below.
    low, high = ax.get_ylim()
    at = low
    for end, i in sorted(ends):
        at = max(at, low if np.isnan(end) else end)
        ax.text(steps[-1], at, f" {_plain(objectives[i])}", color=_colour(i), va="center", fontsize=8)
        at += 0.05 * (high - low)
    ax.set(xlabel="step", ylabel="weight")


# --- how it is drawn --------------------------------------------------------------------------------------------------


def _panels(
    n: int, title: str, *, width: float = 4.2, xlabel: str = "", share_y: bool = False
) -> tuple[Any, list[Any]]:
    """A figure with `n` panels, each `width` inches wide; returns the figure and the axes of the panels."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {1: 1, 2: 2, 4: 2}.get(n, 3)
    rows = -(-n // columns)
    figure = Figure(figsize=(max(7.0, width * columns), 0.8 + 3.0 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, sharey=share_y, squeeze=False).ravel())
    for ax in grid[n:]:
        ax.set_visible(False)
    for ax in grid[:n]:
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel(xlabel)
    figure.suptitle(_plain(title), fontsize=12)
    return figure, grid[:n]


def _legend_below(figure: Any, ax: Any) -> None:
    """Put one legend for all panels below them, with as many columns as the figure is wide enough for."""
    handles, names = ax.get_legend_handles_labels()
    letters = 12 * figure.get_figwidth()  # how many letters fit side by side at this font size
    columns = max(1, min(len(names), int(letters / (max(map(len, names)) + 6))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _plain(name: str) -> str:
    """Escape a name: matplotlib would read $...$ as a formula, and leave names that begin with "_" out of legends."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _colour(i: int) -> str:
    return LINES[i % len(LINES)]


def _line(i: int) -> dict[str, Any]:
    return {"color": _colour(i), "linestyle": _DASHES[i // len(LINES) % len(_DASHES)], "linewidth": 1.6}


def _train(records: Sequence[StepRecord]) -> list[StepRecord]:
    return [record for record in records if record["kind"] == "train"]


def _column(records: Sequence[StepRecord], field: str, name: str) -> Floats:
    """`record[field][name]` of each record; NaN where the record has no number there."""
    values = [(record.get(field) or {}).get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _smooth(values: Floats) -> Floats:
    """Running mean over a window of a twentieth of the steps around each step. NaNs are left out of it."""
    half = len(values) // 40
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([_mean(window) for window in windows])


def _mean(values: Floats) -> float:
    """Mean of the values that are not NaN. NaN if there is none (np.nanmean would also warn)."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def _quantile(rows: Floats, q: float) -> Floats:
    """Quantile of each column, NaNs left out. NaN for a column of NaNs (np.nanquantile would also warn)."""
    return np.array([np.nan if np.isnan(c).all() else np.nanquantile(c, q) for c in rows.T])
