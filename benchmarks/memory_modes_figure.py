"""The figure of benchmarks/memory_modes.py: step time and peak memory of each mode, and the error of its weights.

Knows its JSON only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

MIB = 2**20
_ANGLES = np.radians([0, 180, 30, -30, 150, -150, 50, -50, 130, -130, 90, -90, 70, -70, 110, -110])
_DISTANCES = range(11, 190, 6)  # points from a marker to where its label begins


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw modes with a time and a peak; those without an error, their own or their twin's, have no colour."""
    by_mode = {result["mode"]: result for result in document["results"]}
    shown = [result for result in by_mode.values() if "time" in result and "peak_bytes" in result]
    if not shown:
        return
    errors = {i: error for i, result in enumerate(shown) if (error := error_of(result, by_mode)) is not None}
    highest = max(errors.values(), default=0.0) or 1.0

    figure = Figure(figsize=(9.5, 5.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    quartiles = np.array([result["time"]["ratio"] for result in shown])
    x, y = quartiles[:, 1], np.array([result["peak_bytes"] / MIB for result in shown])
    spread = np.abs(quartiles[:, [0, 2]].T - x)
    axes.errorbar(x, y, xerr=spread, fmt="none", ecolor="0.6", elinewidth=1, capsize=2, zorder=1)
    # The larger the error, the larger the dot, and the further below: dots in one place are rings around each other.
    measured = sorted(errors, key=lambda i: -errors[i])
    sizes = [45 + 180 * errors[i] / highest for i in measured]
    dots = axes.scatter(
        x[measured], y[measured], c=[errors[i] for i in measured], cmap="viridis_r", vmin=0.0, vmax=highest,
        s=sizes, edgecolors="black", linewidths=0.7, zorder=3,
    )  # fmt: skip
    bare = [i for i in range(len(shown)) if i not in errors]
    axes.scatter(x[bare], y[bare], s=30, marker="s", facecolors="white", edgecolors="black", linewidths=1.2, zorder=4)
    figure.colorbar(dots, ax=axes, label="‖w − w_exact‖₁, mean over the steps of a run (beside the names)", pad=0.02)

    axes.margins(x=0.25, y=0.14)
    clock = {"cpu": "seconds of CPU a step", "wall": "step time"}[document["clock"]]
    axes.set_xlabel(f"{clock} over plain training (median, quartiles)")
    axes.set_ylabel("peak of torch's allocations, MiB")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    machine = document["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, threads: {machine['threads']}"
    told = f"{document['parameters'] / 1e6:.2f} M parameters, K = {document['objectives']}"
    figure.suptitle(
        f"Modes: {told}, T = {document['refresh_every']}; {where}, torch {machine['torch']}, {machine['date'][:10]}",
        fontsize=10,
    )
    canvas.draw()  # the layout is settled now, so that labels know where points are
    figure.set_layout_engine("none")
    names = [result["mode"] + (f": {errors[i]:.3f}" if i in errors else "") for i, result in enumerate(shown)]
    _label(canvas, axes, names, quartiles, y)
    figure.savefig(path)


def error_of(result: dict[str, Any], by_mode: dict[str, Any]) -> float | None:
    """A mode's mean error, or that of the mode whose weights it has."""
    found = result.get("error") or by_mode.get(result["twin"], {}).get("error")
    return None if found is None else found["mean"]


def _label(canvas: Any, axes: Any, names: Sequence[str], quartiles: Any, y: Any) -> None:
    """A label beside each point, as near as can be: over no point, bar or label, nor its line, and within the frame."""
    renderer, scale = canvas.get_renderer(), axes.figure.dpi / 72
    x = quartiles[:, 1]
    points, lows, highs = (axes.transData.transform(np.column_stack([q, y])) for q in (x, *quartiles[:, [0, 2]].T))
    taken = [Bbox.from_extents(*(point - 8 * scale), *(point + 8 * scale)) for point in points]
    taken += [Bbox.from_extents(*(a - 2 * scale), *(b + 2 * scale)) for a, b in zip(lows, highs, strict=True)]
    frame = axes.get_window_extent(renderer)
    for i in np.lexsort((y, x)):
        for distance, angle in product(_DISTANCES, _ANGLES):
            shift = distance * np.array([np.cos(angle), np.sin(angle)])
            if _crosses(points[i], shift * scale, points, 8 * scale, taken[2 * len(points) :]):
                continue
            side = "left" if shift[0] > 3 else "right" if shift[0] < -3 else "center"
            line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
            note = axes.annotate(
                names[i], (x[i], y[i]), shift, textcoords="offset points", ha=side, va="center", fontsize=9,
                arrowprops=line if distance > _DISTANCES[0] else None,
            )  # fmt: skip
            note.update_positions(renderer)
            extent = Text.get_window_extent(note, renderer).padded(1.5 * scale)  # of the text, without its line
            inside = frame.x0 < extent.x0 and extent.x1 < frame.x1 and frame.y0 < extent.y0 and extent.y1 < frame.y1
            if inside and not any(extent.overlaps(other) for other in taken):
                taken.append(extent)
                break
            note.remove()
        else:
            axes.annotate(names[i], (x[i], y[i]), fontsize=9)  # no room anywhere: better covered than missing


def _crosses(start: Any, way: Any, points: Any, width: float, labels: Sequence[Bbox]) -> bool:
    """Whether a line from one of the points comes near another one (but those in the same place), or over a label."""
    steps = start + np.linspace(0, 1, 30)[:, None] * way
    others = points[np.hypot(*(points - start).T) > width]
    near = np.hypot(*(steps[:, None] - others).transpose(2, 0, 1)) < width
    return bool(near.any()) or any(label.count_contains(steps) for label in labels)
