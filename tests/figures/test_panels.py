"""Dots are steps and the axis spans them, the line is their mean; matplotlib's own state is nobody else's business."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogeo.errors import InputError
from mogeo.figures.html_report import write_report
from mogeo.figures.panels import MissingMatplotlibError, dots_and_line, draw_noisy, line, make_panels
from mogeo.figures.records import running_mean
from tests.figures.histories import NAMES, history
from tests.profiles import examples


@given(st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), min_size=1, max_size=120))
@examples(20)
def test_the_axis_spans_every_step_and_not_only_their_mean(values: list[float]) -> None:
    _, (ax,) = make_panels(1, "title")
    draw_noisy(ax, range(len(values)), np.array(values), "honesty", line(0))
    dots, mean = ax.lines
    np.testing.assert_equal(dots.get_ydata(), values)
    known = ~np.isnan(values)
    np.testing.assert_equal(np.isnan(mean.get_ydata()), ~known)  # a mean of others is no value of this step
    np.testing.assert_equal(mean.get_ydata()[known], running_mean(np.array(values))[known])
    low, high = ax.get_ylim()
    assert all(low <= value <= high for value in np.array(values)[known])
    assert dots.get_alpha() < 1
    assert dots.get_linestyle() == "None"
    assert list(ax.get_legend_handles_labels()[1]) == ["honesty"]


@pytest.mark.parametrize(("steps", "over"), [(40, 3), (200, 11)])
def test_a_panel_says_over_how_many_steps_its_mean_is(steps: int, over: int) -> None:
    assert dots_and_line(steps) == f"dots: steps; line: mean over {over} of them"
    impulse = np.zeros(steps)
    impulse[steps // 2] = 1.0
    assert np.count_nonzero(running_mean(impulse)) == over


def test_a_run_too_short_for_a_mean_does_not_claim_one() -> None:
    assert "mean" not in dots_and_line(39)
    assert running_mean(np.arange(39.0)).tolist() == list(range(39))


# ---- matplotlib ------------------------------------------------------------------------------------------------------


def test_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    settings = [name for name in mpl.rcParams if name != "backend"]  # reading that one makes matplotlib choose one
    before = {name: mpl.rcParams[name] for name in settings}
    write_report(tmp_path, "A run", NAMES, {"run": history(NAMES, tracked=True)}, [], [])
    assert {name: mpl.rcParams[name] for name in settings} == before


def test_pyplot_is_not_needed() -> None:
    """Importing it would choose a backend, and may open a display."""
    program = (
        "import sys; from mogeo.figures.panels import make_panels; make_panels(2, 'title'); "
        "assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingMatplotlibError, match=r"pip install 'mogeo\[report\]'") as caught:
        write_report(tmp_path, "A run", NAMES, {"run": history(NAMES)}, [], [])
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, InputError)
