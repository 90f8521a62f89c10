"""The figure of benchmarks/kernels.py: measured GB/s under the lines that the memory draws. Knows its JSON only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# What is drawn: operation and name, colour, marker, filled.
SERIES = (
    ("gram", "mogeo.gram", "tab:blue", "o", True),
    ("gram", "rows @ rows.T", "tab:blue", "o", False),
    ("combine", "mogeo.combine", "tab:orange", "s", True),
    ("combine", "weights @ rows", "tab:orange", "s", False),
    ("sketch", "mogeo SignedSketch", "tab:green", "^", True),
    ("sketch", "index_add of hashed buckets", "tab:green", "^", False),
)


def draw(document: dict[str, Any], path: Path) -> None:
    """One panel per dtype, at the largest N that was measured for every K; nothing is drawn without figures."""
    dtypes = list(dict.fromkeys(record["dtype"] for record in document["results"]))
    if not dtypes:
        return
    size = (max(6.5, 5.2 * len(dtypes)), 4.6)
    figure, panels = plt.subplots(1, len(dtypes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        _panel(axes, document, [record for record in document["results"] if record["dtype"] == dtype], dtype)
    lines = [document["copy_gb_per_s"], document["peak_gb_per_s"] or 0.0]
    highest = max(record["gb_per_s"]["p80"] for record in document["results"] if record["operation"] != "limit")
    panels[0, 0].set_ylim(-0.06 * max(highest, *lines), 1.12 * max(highest, *lines))
    panels[0, 0].set_ylabel("GB/s of the bytes that must be moved")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    machine = document["machine"]
    where = machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, threads: {machine['threads']}"
    figure.suptitle(f"{where}, torch {machine['torch']}, {machine['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axes: Axes, document: dict[str, Any], records: list[dict[str, Any]], dtype: str) -> None:
    counts = {record["k"] for record in records}
    complete = [n for n in {r["n"] for r in records} if {r["k"] for r in records if r["n"] == n} == counts]
    columns = max(complete or {record["n"] for record in records})
    for operation, name, colour, marker, filled in SERIES:
        chosen = [r for r in records if (r["n"], r["operation"], r["name"]) == (columns, operation, name)]
        if not chosen:
            continue
        intensities = [record["flops_per_byte"] for record in chosen]
        rates = [record["gb_per_s"]["p50"] for record in chosen]
        spreads = [
            [record["gb_per_s"]["p50"] - record["gb_per_s"]["p20"] for record in chosen],
            [record["gb_per_s"]["p80"] - record["gb_per_s"]["p50"] for record in chosen],
        ]
        axes.errorbar(
            intensities, rates, spreads, color=colour, marker=marker, markerfacecolor=colour if filled else "white",
            linestyle="-" if filled else ":", linewidth=1, label=name,
        )  # fmt: skip
        if filled and operation != "sketch":  # K at the foot of the panel; of a sketch, all stand in one place
            # Those of combine stand too close together to name them all.
            for record in chosen if operation == "gram" else [chosen[0], chosen[-1]][: len(chosen)]:
                x, foot = record["flops_per_byte"], axes.get_xaxis_transform()
                axes.text(x, 0.015, f"K={record['k']}", transform=foot, color=colour, fontsize=8, ha="center")
    axes.axhline(document["copy_gb_per_s"], color="0.35", linestyle="--", linewidth=1.2, label="copy, measured")
    if document["peak_gb_per_s"]:
        axes.axhline(document["peak_gb_per_s"], color="0.0", linewidth=1.2, label="data sheet")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("flop per byte")
    axes.set_title(f"{dtype}, N = {columns:,}", fontsize=10)
    axes.grid(alpha=0.25)
