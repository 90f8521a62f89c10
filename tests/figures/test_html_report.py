"""Pictures are drawn of whatever a run recorded, the page needs nothing but itself, and names can break neither."""

from __future__ import annotations

import html.parser
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mogeo.figures.html_report import write_report
from mogeo.figures.table import Table
from tests.figures.histories import NAMES, before_tracking, history
from tests.figures.pictures import AWKWARD, PNG, size
from tests.profiles import slow_but

UNTRACKED = ["report.html", "losses.png", "weights.png", "alignment.png", "hurt.png", "cosines.png", "accuracy.png"]
TRACKED = [*UNTRACKED[:-1], "noise.png", "accuracy.png"]


def report(tmp_path: Path, objectives: tuple[str, ...], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [path.name for path in write_report(tmp_path, "A run", objectives, runs, [], [])]


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", slow_but([1, 2, 5], 2))
def test_every_picture_of_complete_runs_is_written(tmp_path: Path, runs: int) -> None:
    histories = {f"run {i}": history(NAMES, tracked=i == 0) for i in range(runs)}
    written = write_report(tmp_path / "new" / "folder", "A run", NAMES, histories, [], [])
    assert [path.name for path in written] == TRACKED
    assert all(min(size(path)) > 200 for path in written[1:])


def test_a_picture_without_numbers_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path: path.write_bytes(PNG)
    )  # which ones, not what is in them
    without_geometry = {"uniform": history(NAMES, geometry=False)}
    assert report(tmp_path, NAMES, without_geometry) == ["report.html", "losses.png", "weights.png", "accuracy.png"]
    assert report(tmp_path, NAMES, {"untracked": history(NAMES)}) == UNTRACKED
    assert report(tmp_path, NAMES, {"of an earlier version": before_tracking(history(NAMES))}) == UNTRACKED
    without_evaluation = {"run": [r for r in history(NAMES) if r["kind"] == "train"]}
    assert "accuracy.png" not in report(tmp_path, NAMES, without_evaluation)
    assert report(tmp_path, NAMES, {}) == ["report.html"]
    assert "cosines.png" not in report(tmp_path, ("alone",), {"run": history(("alone",))})


@pytest.mark.parametrize("steps", slow_but([1, 2, 400], 1))
def test_short_and_long_runs(tmp_path: Path, steps: int) -> None:
    assert report(tmp_path, NAMES, {"run": history(NAMES, steps, tracked=True)}) == TRACKED


@pytest.mark.slow
def test_more_objectives_than_colours(tmp_path: Path) -> None:
    names = tuple(f"objective {i}" for i in range(12))
    assert report(tmp_path, names, {"run": history(names, tracked=True)}) == TRACKED


def test_gaps_in_the_records_are_gaps_in_the_lines(tmp_path: Path) -> None:
    """Skipped objectives and nulls (NaN in JSON), in some steps or in all; any warning would fail this test."""
    records = history(NAMES, tracked=True)
    records[5]["loss"] = {"honesty": math.nan}
    records[6]["cosines"] = [[None] * 3] * 3
    records[7]["weight"] = None
    records[8]["noise_scale"] = {"honesty": 0.0}  # no noise at all, which has no place on a logarithmic axis
    records[9]["alignment_error"] = dict.fromkeys(NAMES, math.inf)
    unknown: dict[str, Any] = {
        **dict.fromkeys(("weight", "alignment", "alignment_error", "noise_scale", "evidence"), dict.fromkeys(NAMES)),
        **dict.fromkeys(("cosines", "mean_cosines"), [[None] * 3] * 3),
        "noise_scale_interval": {key: [0.0, None] for key in NAMES},
    }
    nowhere = history(NAMES, tracked=True, **unknown)
    assert report(tmp_path, NAMES, {"gaps": records, "nowhere": nowhere}) == TRACKED


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


def test_pictures_of_the_callers_own_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: path.write_bytes(PNG))
    own = tmp_path / "own.png"
    own.write_bytes(PNG + b"own")
    written = write_report(tmp_path, "A run", NAMES, {"run": history(NAMES)}, [], [], pictures=[own])
    assert own not in written
    alts = re.findall(r'alt="(\w+)"', (tmp_path / "report.html").read_text("utf-8"))
    assert alts == ["own", *(Path(name).stem for name in UNTRACKED[1:])]
