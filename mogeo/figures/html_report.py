"""`report.html`: one page with notes, tables and charts, which needs no other file and no network.

Needs matplotlib (extra `report`) for the charts.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from mogeo.figures.charts import (
    Runs,
    draw_accuracy,
    draw_alignment,
    draw_cosines,
    draw_hurt,
    draw_noise,
    draw_over_steps,
)
from mogeo.figures.table import Table


def write_report(
    output: Path,
    title: str,
    objectives: Sequence[str],
    runs: Runs,
    tables: Sequence[Table],
    notes: Sequence[str],
    pictures: Sequence[Path] = (),
) -> list[Path]:
    """Write `report.html` and the charts in it (losses, weights, alignment, steps that hurt, cosines, noise, accuracy)
    into a folder.

    A chart is left out if no run recorded the numbers for it: alignment and cosines are missing under a weighting that
    does not need gradients, noise in a run without tracking, accuracy in one without evaluations.

    Args:
        output: the folder; it is made if it does not exist.
        title: heading of the page.
        objectives: names, in the order of their colours.
        runs: label -> the records of `metrics.jsonl`, in order.
        tables: shown below the notes.
        notes: sentences at the top of the page.
        pictures: further PNG files, shown before the charts.

    Returns:
        The files that were written, `report.html` first.

    Raises:
        MissingMatplotlibError: matplotlib is not installed.
    """
    output.mkdir(parents=True, exist_ok=True)
    drawn = [
        draw_over_steps(output / "losses.png", "Loss", objectives, runs, "loss"),
        draw_over_steps(output / "weights.png", "Weight on the raw gradients", objectives, runs, "weight"),
        draw_alignment(output / "alignment.png", objectives, runs),
        draw_hurt(output / "hurt.png", objectives, runs),
        draw_cosines(output / "cosines.png", objectives, runs),
        draw_noise(output / "noise.png", objectives, runs),
        draw_accuracy(output / "accuracy.png", objectives, runs),
    ]
    written = [path for path in drawn if path is not None]
    page = output / "report.html"
    page.write_text(_page(title, tables, notes, [*pictures, *written]), encoding="utf-8")
    return [page, *written]


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
