"""How every picture looks: panels, colours, legends and the manner in which noisy numbers are drawn.

Needs matplotlib (extra `report`). Uses matplotlib's `Figure` class and never `pyplot`, so that the caller's own
matplotlib settings, backend and open figures stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mogeo.errors import InputError
from mogeo.figures.records import Floats, running_mean, window

# The palette of Okabe and Ito, which people with any colour vision can tell apart, without its yellow, which is hard to
# see on white. Lines stand for objectives or runs and bars for methods, so the two lists begin with different colours.
# When the colours are used up, lines start over with another dash pattern and bars with another hatch pattern.
LINES = ("#D55E00", "#009E73", "#CC79A7", "#000000", "#0072B2", "#E69F00", "#56B4E9")
BARS = ("#999999", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00")
HATCHES = ("", "//", "..", "xx")
_DASHES = ("-", "--", ":", "-.")


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


def make_panels(
    n: int, title: str, *, width: float = 4.2, xlabel: str = "", share_y: bool = False, columns: int | None = None
) -> tuple[Any, list[Any]]:
    """A figure with `n` panels.

    Args:
        n: number of panels.
        title: heading of the figure.
        width: of a panel, in inches.
        xlabel: below each panel.
        share_y: whether all panels have the same vertical axis.
        columns: panels side by side; None: what looks best.

    Returns:
        The figure, and the axes of the panels.

    Raises:
        MissingMatplotlibError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = columns or {1: 1, 2: 2, 4: 2}.get(n, 3)
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
    figure.suptitle(plain(title), fontsize=12)
    return figure, grid[:n]


def head(ax: Any, title: str, remark: str = "") -> None:
    """Write the heading of a panel, and a remark below it that says what is drawn and how."""
    ax.set_title("\n".join(plain(text) for text in (title, remark) if text), fontsize=9 if remark else 10, loc="left")


def draw_noisy(ax: Any, steps: Sequence[int], values: Floats, label: str, style: dict[str, Any]) -> None:
    """Draw the value of every step as a pale dot, and their running mean as a line, which ends where none is known.

    The axis spans the dots: a mean hides how far the values of single steps lie apart.
    """
    draw_dots(ax, steps, values, style["color"])
    ax.plot(steps, np.where(np.isnan(values), np.nan, running_mean(values)), label=plain(label), **style)


def draw_dots(ax: Any, steps: Sequence[int], values: Floats, colour: str) -> None:
    """Draw the value of every step as a pale dot."""
    ax.plot(steps, values, ".", color=colour, alpha=0.4, markersize=4.5, markeredgewidth=0)


def dots_and_line(count: int) -> str:
    """The remark on a panel of `count` steps that `draw_noisy` has drawn: what is a dot, and what the line."""
    over = window(count)
    return f"dots: steps; line: mean over {over} of them" if over > 1 else "dots: steps; line: from step to step"


def legend_below(figure: Any, ax: Any) -> None:
    """Put one legend for all panels below them, with as many columns as the figure is wide enough for."""
    handles, names = ax.get_legend_handles_labels()
    letters = 12 * figure.get_figwidth()  # how many letters fit side by side at this font size
    columns = max(1, min(len(names), int(letters / (max(map(len, names)) + 6))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def plain(name: str) -> str:
    """Escape a name: matplotlib would read $...$ as a formula, and leave names that begin with "_" out of legends."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def colour(i: int) -> str:
    """The colour of the i-th objective, or run."""
    return LINES[i % len(LINES)]


def line(i: int) -> dict[str, Any]:
    """The style of the i-th objective's, or run's, line."""
    return {"color": colour(i), "linestyle": _DASHES[i // len(LINES) % len(_DASHES)], "linewidth": 1.6}
