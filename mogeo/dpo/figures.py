"""Pictures and reports of runs: histories in, PNGs and one self-contained HTML page out.

Needs matplotlib (extra `report`). Knows the records of `metrics.jsonl` and tables of text; nothing of models, data or
how a run was made. Pictures are drawn on figures of their own, without pyplot: matplotlib's global state (settings,
backend, open figures) is not changed, so that a caller's is safe.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mogeo.errors import InputError

Record = Mapping[str, Any]  # one line of metrics.jsonl; `kind` is "train" or "eval"
Floats = NDArray[np.float64]

# Okabe and Ito's colours, told apart with any colour vision; their yellow is left out, as it vanishes on white. Lines
# are objectives or runs, bars are methods: they begin with different colours, so that nobody reads one as the other.
# After the last colour, lines go on with the next dash, bars with the next hatch.
LINES = ("#D55E00", "#009E73", "#CC79A7", "#000000", "#0072B2", "#E69F00", "#56B4E9")
BARS = ("#999999", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "//", "..", "xx")
_MAX_PAIRS = 10  # above, lines of single pairs cannot be told apart: their range is drawn instead


class MissingMatplotlibError(InputError, ImportError):
    """Raised when a picture is asked for and matplotlib is not installed."""


def require_matplotlib() -> None:
    """Raise MissingMatplotlibError where matplotlib is missing: to be called before hours of work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlibError("pictures and reports need matplotlib: pip install 'mogeo[report]'") from error


@dataclass(frozen=True)
class Table:
    """A table of text; the first column is left-aligned, the others (numbers) are right-aligned."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self) -> str:
        """The table for a terminal, its columns aligned."""
        lines = [tuple(self.header), *map(tuple, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        body = [
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        body.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, *(line.rstrip() for line in body), *([self.note] if self.note else [])])

    def html(self) -> str:
        """The table as HTML, every cell escaped."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in self.rows)
        note = f"<p class=note>{html.escape(self.note)}</p>" if self.note else ""
        return f"<h2>{html.escape(self.title)}</h2>\n<table><tr>{head}</tr>\n{rows}</table>\n{note}"


@dataclass(frozen=True)
class Bars:
    """A panel of grouped bars: `series[label][category]` holds one value a seed; the bar is their mean."""

    title: str
    ylabel: str
    categories: Sequence[str]
    series: Mapping[str, Sequence[Sequence[float]]]
    baseline: float = 0.0  # where bars start, and what they are read against


def write_report(
    output: Path,
    title: str,
    objectives: Sequence[str],
    runs: Mapping[str, Sequence[Record]],
    tables: Sequence[Table],
    notes: Sequence[str],
    pictures: Sequence[Path] = (),
) -> list[Path]:
    """Write `report.html` and the pictures in it (losses, weights, cosines, accuracy) into `output`.

    Args:
        runs: label -> its records, in order. A picture that none of the runs has numbers for (cosines under a weighting
            that needs no gradients' geometry, accuracy without evaluations) is left out.
        notes: sentences put on top of the page.
        pictures: PNG files of the caller's own, shown first.

    Returns the files written, `report.html` first. Raises MissingMatplotlibError (an ImportError) without matplotlib.
    """
    output.mkdir(parents=True, exist_ok=True)
    drawn = [
        _draw_over_steps(output / "losses.png", "Loss", objectives, runs, "loss"),
        _draw_over_steps(output / "weights.png", "Weight on the raw gradients", objectives, runs, "weight"),
        _draw_cosines(output / "cosines.png", objectives, runs),
        _draw_accuracy(output / "accuracy.png", objectives, runs),
    ]
    written = [path for path in drawn if path is not None]
    page = output / "report.html"
    page.write_text(_page(title, tables, notes, [*pictures, *written]), encoding="utf-8")
    return [page, *written]


def write_comparison(
    path: Path,
    title: str,
    panels: Sequence[Bars],
    objectives: Sequence[str],
    weights: Sequence[Sequence[Record]],
    weights_title: str,
) -> Path:
    """One picture that compares methods: a panel for each of `panels`, and the weights over time of one method.

    Args:
        panels: bars; the same label has the same colour in all of them.
        weights: the records of that method's runs, one list a seed: lines are means over the seeds, bands their range.
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


def _draw_over_steps(
    path: Path, what: str, objectives: Sequence[str], runs: Mapping[str, Sequence[Record]], field: str
) -> Path | None:
    """One panel a run, one line an objective: the values of `field` over the steps, pale, and their running mean."""
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


def _draw_cosines(path: Path, objectives: Sequence[str], runs: Mapping[str, Sequence[Record]]) -> Path | None:
    """One panel a run that has them: the cosine of each pair of objectives' gradients; below zero they conflict."""
    panels = {label: [r for r in _train(records) if r.get("cosines")] for label, records in runs.items()}
    panels = {label: records for label, records in panels.items() if records}
    pairs = list(combinations(range(len(objectives)), 2))
    if not panels or not pairs:
        return None
    title = "Cosine between two objectives' gradients (below zero: conflict)"
    figure, axes = _panels(len(panels), title, xlabel="step", share_y=True)
    for ax, (label, records) in zip(axes, panels.items(), strict=True):
        steps = [record["step"] for record in records]
        # None is how a cosine that is not a number (a zero or a skipped gradient) comes out of JSON.
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


def _draw_accuracy(path: Path, objectives: Sequence[str], runs: Mapping[str, Sequence[Record]]) -> Path | None:
    """One panel an objective, one line a run: held-out preference accuracy over the steps."""
    evaluations = {label: [r for r in records if r["kind"] == "eval"] for label, records in runs.items()}
    evaluations = {label: records for label, records in evaluations.items() if records}
    if not evaluations:
        return None
    figure, axes = _panels(len(objectives), "Held-out preference accuracy", xlabel="step", share_y=True)
    for ax, name in zip(axes, objectives, strict=True):
        for i, (label, records) in enumerate(evaluations.items()):
            steps = [record["step"] for record in records]
            # Runs are methods: they have the bars' colours, whose first (before alignment) is the line at one half.
            style = {**_line(i), "color": BARS[1 + i % (len(BARS) - 1)]}
            ax.plot(steps, _column(records, "accuracy", name), label=_plain(label), marker="o", markersize=3, **style)
        ax.axhline(0.5, color="black", linewidth=0.8)
        ax.set_title(_plain(name), fontsize=10, loc="left")
    _legend_below(figure, axes[0])
    figure.savefig(path)
    return path


def _draw_bars(ax: Any, bars: Bars, labels: Sequence[str]) -> None:
    """Grouped bars from the baseline; with several seeds, a dot is one of them."""
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


def _draw_mean_weights(ax: Any, objectives: Sequence[str], histories: Sequence[Sequence[Record]]) -> None:
    """Each objective's smoothed weight: the seeds' mean as a line, their range as a band, the mean of all as a dash."""
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
    # Names at the lines' ends spare the reader a second legend; from the lowest up, each as high as its line or higher.
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
    """A figure of `n` panels, each `width` inches wide, and its axes."""
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
    """One legend for all panels, in as many columns as the figure's width has room for."""
    handles, names = ax.get_legend_handles_labels()
    letters = 12 * figure.get_figwidth()  # that fit side by side at this font size
    columns = max(1, min(len(names), int(letters / (max(map(len, names)) + 6))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _plain(name: str) -> str:
    """A name as matplotlib has to be given it to show it as it is: it reads $...$ as mathematics and hides _names."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _colour(i: int) -> str:
    return LINES[i % len(LINES)]


def _line(i: int) -> dict[str, Any]:
    return {"color": _colour(i), "linestyle": _DASHES[i // len(LINES) % len(_DASHES)], "linewidth": 1.6}


def _train(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "train"]


def _column(records: Sequence[Record], field: str, name: str) -> Floats:
    """`record[field][name]` of each record; NaN where it is missing (a skipped objective, a null)."""
    values = [(record.get(field) or {}).get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _smooth(values: Floats) -> Floats:
    """Centred running mean over a twentieth of the steps; NaNs are left out, windows are cut at the ends."""
    half = len(values) // 40
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([_mean(window) for window in windows])


def _mean(values: Floats) -> float:
    """Mean of what is not NaN; NaN, without numpy's warning, where nothing is."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def _quantile(rows: Floats, q: float) -> Floats:
    """Quantile over the rows, NaN in a column which has nothing else (np.nanquantile would warn there)."""
    return np.array([np.nan if np.isnan(c).all() else np.nanquantile(c, q) for c in rows.T])


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; margin: 1rem 0 }
.note { color: #555; font-size: 0.9rem }
"""


def _page(title: str, tables: Sequence[Table], notes: Sequence[str], pictures: Sequence[Path]) -> str:
    """The whole report as one HTML page that needs no other file and no network."""
    paragraphs = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)
    body = "\n".join(table.html() for table in tables)
    images = "\n".join(
        f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{_base64(path)}">' for path in pictures
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
{paragraphs}
{body}
{images}
</body></html>
"""


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
