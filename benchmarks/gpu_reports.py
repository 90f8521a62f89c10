"""A plugin of pytest for a run on a GPU: what fails is written down at once, and how many passed, now and at the end.

Loaded by `gpu_run.py` with `-p gpu_reports`; GPU_REPORTS names the file. With pytest-xdist only the controller writes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
from gpu_records import Records


class Reports:
    """Counts, and writes."""

    def __init__(self, path: Path, stage: str) -> None:
        self.records = Records(path, stage)
        self.counts: Counter[str] = Counter()
        self.told = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test has ended."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else str(report.longrepr)
            lines = str(report.longrepr).splitlines()
            self.records.note(case=report.nodeid, ok=False, error=text[:600], where="\n".join(lines[-12:])[-1200:])
        elif time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            self.records.note(case="so far", so_far=dict(self.counts))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected fails, too."""
        if report.failed:
            self.counts["failed"] += 1
            self.records.note(case=report.nodeid, ok=False, error=str(report.longrepr)[-600:])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """The last word."""
        done = {"exit": int(exitstatus), **{what: self.counts[what] for what in ("passed", "failed", "skipped")}}
        self.records.note(case="all", ok=not self.counts["failed"], tests=done)


def pytest_configure(config: pytest.Config) -> None:
    """In the controller only."""
    if not hasattr(config, "workerinput"):
        path = Path(os.environ["GPU_REPORTS"])
        config.pluginmanager.register(Reports(path, os.environ.get("GPU_REPORTS_STAGE", "tests")), "gpu-reports")
