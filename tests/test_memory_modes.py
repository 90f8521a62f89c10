"""What benchmarks/memory_modes.py keeps of earlier runs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from memory_modes import keep


def test_only_figures_of_other_parts_are_kept() -> None:
    earlier = {
        "results": [{"mode": "exact", "time": 1, "peak_bytes": 2, "error": 3}, {"mode": "gone", "time": 4}],
        "judged": [5],
        "machine": {"torch": "old"},
    }
    document = {"results": [{"mode": "exact"}, {"mode": "new"}], "judged": [], "machine": {"torch": "new"}}
    keep(earlier, document, ["time", "quality"])
    assert document["results"] == [{"mode": "exact", "peak_bytes": 2, "error": 3}, {"mode": "new"}]
    assert document["machine"] == {"torch": "new"}
    assert document["earlier"] == [{"torch": "old"}]
