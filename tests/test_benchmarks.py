"""The benchmark scripts run to their end, on settings too small to mean anything: no figure is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("gram.py", ["--columns", "3000", "--rounds", "1", "--objectives", "2"]),
        ("solver.py", ["--samples", "1", "--repeats", "1"]),
        ("step_overhead.py", ["--tokens", "128", "--rounds", "2", "--objectives", "2", "--only", "mogeo"]),
    ],
)
def test_runs_and_writes_its_figures(script: str, options: list[str], tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *options, "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] in done.stdout
    assert figures.get("results") or figures.get("records")
