"""Pictures are drawn of whatever a run recorded, the page needs nothing but itself, and names can break neither."""

from __future__ import annotations

import html.parser
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from mogeo.errors import InputError
from mogeo.figures.charts import (
    Bars,
    MissingMatplotlibError,
    _draw_bars,
    _draw_mean_weights,
    _panels,
    write_comparison,
)
from mogeo.figures.html_report import write_report
from mogeo.figures.table import Table
from tests.profiles import slow_but

PNG = b"\x89PNG\r\n\x1a\n"
NAMES = ("helpfulness", "honesty", "truthfulness")
AWKWARD = ("_hidden", "$5 & <b>up</b>", "\"quoted\" 'n' \\slashed", "100 %")


def history(
    objectives: tuple[str, ...], steps: int = 30, geometry: bool = True, **changes: Any
) -> list[dict[str, Any]]:
    """What `align` records, with made-up numbers."""
    rng = np.random.default_rng(0)
    k = len(objectives)
    by_name = lambda low, high: dict(zip(objectives, rng.uniform(low, high, k).tolist(), strict=True))  # noqa: E731
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        cosines = rng.uniform(-1, 1, (k, k)).tolist() if geometry else None
        record = {"kind": "train", "step": step, "loss": by_name(0.5, 0.8), "weight": by_name(0, 1), "cosines": cosines}
        records.append({**record, **changes})
    evaluations = [{"kind": "eval", "step": step, "accuracy": by_name(0.4, 0.7)} for step in (0, steps)]
    return [evaluations[0], *records, evaluations[1]]


def size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def report(tmp_path: Path, objectives: tuple[str, ...], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [path.name for path in write_report(tmp_path, "A run", objectives, runs, [], [])]


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", slow_but([1, 2, 5], 2))
def test_every_picture_of_complete_runs_is_written(tmp_path: Path, runs: int) -> None:
    histories = {f"run {i}": history(NAMES) for i in range(runs)}
    written = write_report(tmp_path / "new" / "folder", "A run", NAMES, histories, [], [])
    assert [path.name for path in written] == [
        "report.html",
        "losses.png",
        "weights.png",
        "cosines.png",
        "accuracy.png",
    ]
    assert all(min(size(path)) > 200 for path in written[1:])


def test_a_picture_without_numbers_is_left_out(tmp_path: Path) -> None:
    without_geometry = {"uniform": history(NAMES, geometry=False)}
    assert "cosines.png" not in report(tmp_path, NAMES, without_geometry)
    without_evaluation = {"run": [r for r in history(NAMES) if r["kind"] == "train"]}
    assert "accuracy.png" not in report(tmp_path, NAMES, without_evaluation)
    assert report(tmp_path, NAMES, {}) == ["report.html"]
    assert "cosines.png" not in report(tmp_path, ("alone",), {"run": history(("alone",))})


@pytest.mark.parametrize("steps", slow_but([1, 2, 400], 1))
def test_short_and_long_runs(tmp_path: Path, steps: int) -> None:
    assert len(report(tmp_path, NAMES, {"run": history(NAMES, steps)})) == 5


@pytest.mark.slow
def test_more_objectives_than_colours(tmp_path: Path) -> None:
    names = tuple(f"objective {i}" for i in range(12))
    assert len(report(tmp_path, names, {"run": history(names)})) == 5


def test_gaps_in_the_records_are_gaps_in_the_lines(tmp_path: Path) -> None:
    """Skipped objectives and nulls (NaN in JSON), in some steps or in all; any warning would fail this test."""
    records = history(NAMES)
    records[5]["loss"] = {"honesty": math.nan}
    records[6]["cosines"] = [[None] * 3] * 3
    records[7]["weight"] = None
    nowhere = history(NAMES, weight=dict.fromkeys(NAMES), cosines=[[None] * 3] * 3)
    assert len(report(tmp_path, NAMES, {"gaps": records, "nowhere": nowhere})) == 5


class Page(html.parser.HTMLParser):
    """Collects what a browser would show and fetch."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.shown: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def test_the_page_needs_no_other_file_and_shows_names_as_they_are(tmp_path: Path) -> None:
    table = Table("<i>Title</i>", ["method", *AWKWARD], [["<script>alert(1)</script>", *AWKWARD]], note="a < b & c")
    write_report(tmp_path, "<h1>Report", AWKWARD, {"<b>": history(AWKWARD)}, [table], ["x < y", "</p>"])
    source = (tmp_path / "report.html").read_text("utf-8")
    page = Page(source)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?:|url\(|@import", source)
    assert not {"script", "b", "i", "link"} & set(page.tags)
    for text in ("<i>Title</i>", *AWKWARD, "<script>alert(1)</script>", "a < b & c", "<h1>Report", "x < y", "</p>"):
        assert text in page.shown
    assert page.tags.count("td") == page.tags.count("th") == 5


def test_pictures_of_the_callers_own_come_first(tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    own.write_bytes(PNG + b"own")
    written = write_report(tmp_path, "A run", NAMES, {"run": history(NAMES)}, [], [], pictures=[own])
    assert own not in written
    alts = re.findall(r'alt="(\w+)"', (tmp_path / "report.html").read_text("utf-8"))
    assert alts == ["own", "losses", "weights", "cosines", "accuracy"]


# ---- comparison ------------------------------------------------------------------------------------------------------


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
    _, (ax,) = _panels(1, "title")
    _draw_bars(ax, Bars("greedy", "rate", NAMES, {"one": values, "two": values[::-1]}, baseline=0.05), ["one", "two"])
    tops = [bar.get_y() + bar.get_height() for bar in ax.patches]
    assert tops == pytest.approx([0.2, -0.3, 0.0, 0.0, -0.3, 0.2])
    assert all(bar.get_y() == pytest.approx(0.05) for bar in ax.patches)
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert [list(dot.get_ydata()) for dot in dots] == values + values[::-1]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx(centres)
    assert len(set(centres)) == 6


def test_mean_weights_are_over_seeds_and_their_names_do_not_overlap() -> None:
    _, (ax,) = _panels(1, "title")
    weights = dict(zip(NAMES, (0.3, 0.301, 0.6), strict=True))
    histories = [[{"kind": "train", "step": s, "weight": {k: v + shift for k, v in weights.items()}} for s in (1, 2)]
                 for shift in (-0.1, 0.1)]  # fmt: skip
    _draw_mean_weights(ax, NAMES, histories)
    drawn = [list(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == 1]
    assert drawn == [pytest.approx([w, w]) for w in weights.values()]
    low, high = ax.get_ylim()
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert len(heights) == 3
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.045 * (high - low)


# ---- matplotlib ------------------------------------------------------------------------------------------------------


def test_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    settings = [name for name in mpl.rcParams if name != "backend"]  # reading that one makes matplotlib choose one
    before = {name: mpl.rcParams[name] for name in settings}
    report(tmp_path, NAMES, {"run": history(NAMES)})
    assert {name: mpl.rcParams[name] for name in settings} == before


def test_pyplot_is_not_needed() -> None:
    """Importing it would choose a backend, and may open a display."""
    program = (
        "import sys; from mogeo.figures.charts import _panels; _panels(2, 'title'); "
        "assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingMatplotlibError, match=r"pip install 'mogeo\[report\]'") as caught:
        report(tmp_path, NAMES, {"run": history(NAMES)})
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, InputError)
