"""Tables and pictures of the comparison, from the cells on disk. Runs nothing, and every number comes from a cell."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from alignment.cells import Result

Metric = Callable[[Result], float]
BASELINE = "uniform"
TWIN = "static"


def read(folder: Path) -> list[Result]:
    """The cells of a folder, by name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def net(kind: str, column: str) -> Metric:
    """Net win rate in percent: overall, of the worst objective of the run, or of one."""

    def metric(result: Result) -> float:
        rates = result[kind]
        worst = min(value for name, value in rates.items() if name != "overall")
        return 100 * (worst if column == "worst" else rates[column])

    return metric


def held_out(key: str, column: str) -> Metric:
    """Accuracy in percent, or margin, on held-out pairs: the mean, the worst objective of the run, or one."""

    def metric(result: Result) -> float:
        after = result["after"][key] if "after" in result else None
        if after is None:  # before alignment, by definition
            return 50.0 if key == "accuracy" else 0.0
        value = {"mean": fmean(after.values()), "worst": min(after.values()), **after}[column]
        return 100 * value if key == "accuracy" else value

    return metric


WORLD_COLUMNS: dict[str, Metric] = {
    "greedy overall": net("greedy", "overall"),
    "greedy worst": net("greedy", "worst"),
    "sampled overall": net("sampled", "overall"),
    "sampled worst": net("sampled", "worst"),
    "accuracy mean": held_out("accuracy", "mean"),
    "accuracy worst": held_out("accuracy", "worst"),
}
"""What is told of every run on the generated world."""


def nobody_lost(results: Sequence[Result]) -> str:
    """In how many of the runs no objective's held-out accuracy ended below 50 %, where all begin."""
    worst = held_out("accuracy", "worst")
    return f"{sum(worst(result) >= 50 for result in results)}/{len(results)}"


def label_of(result: Result) -> str:
    """The method's name in tables: twins by what they are twins of."""
    cell = result["cell"]
    twin = cell.get("twin of")
    if twin is not None:
        return f"{TWIN} of {str(twin).removeprefix('study ')}"
    return str(cell["method"]).removeprefix("study ")


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def summary(values: Sequence[float], digits: int = 1, signed: bool = True) -> str:
    """Mean ± half the 95 % interval."""
    width, mean = interval(values), fmean(values)
    told = _signed(mean, digits) if signed else f"{mean:.{digits}f}"
    return told + ("" if math.isnan(width) else f" ± {width:.{digits}f}")


def paired(values: Sequence[float], others: Sequence[float], digits: int = 1) -> str:
    """Mean difference ± half its 95 % interval, in how many pairs it is positive, and p of a paired t-test."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    above = sum(d > 0 for d in differences)
    told = f"{summary(differences, digits)} ({above}/{len(differences)}"
    if len(differences) > 1 and stdev(differences) > 0:
        p = float(stats.ttest_rel(values, others).pvalue)
        told += ", p < 0.001" if p < 0.001 else f", p = {p:.2g}"
    return told + ")"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


Runs = Mapping[str, Mapping[int, Result]]
"""label → seed → its result."""


def rank(result: Result, order: Sequence[str]) -> tuple[int, int, int]:
    """Sorts results by method in this order, each method followed by its twin, and then by seed."""
    cell = result["cell"]
    method = cell.get("twin of", cell["method"])
    return (order.index(method) if method in order else len(order), "twin of" in cell, cell["seed"])


def by_label(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Results by method and seed, the methods in the order in which they come."""
    runs: dict[str, dict[int, Result]] = {}
    for result in results:
        runs.setdefault(label_of(result), {})[result["cell"]["seed"]] = result
    return runs


def levels(
    runs: Runs,
    columns: Mapping[str, Metric],
    digits: int = 1,
    counts: Mapping[str, Callable[[Sequence[Result]], str]] | None = None,
) -> str:
    """Mean ± 95 % interval of each column, a row a method; and columns of what is counted over its seeds."""
    counts = counts or {}
    rows = []
    for label, by_seed in runs.items():
        cells = [
            summary([metric(r) for r in by_seed.values()], digits, signed="accuracy" not in name)
            for name, metric in columns.items()
        ]
        rows.append([f"`{label}`", *cells, *(count(list(by_seed.values())) for count in counts.values())])
    return markdown(["", *columns, *counts], rows)


def differences(runs: Runs, columns: Mapping[str, Metric], to: Callable[[str], str], digits: int = 1) -> str:
    """Each method minus the one that `to` names, paired by seed; a method without a partner has no row."""
    rows = []
    for label, by_seed in runs.items():
        other = runs.get(to(label))
        if other is None or to(label) == label:
            continue
        seeds = [seed for seed in by_seed if seed in other]
        cells = [
            paired([m(by_seed[seed]) for seed in seeds], [m(other[seed]) for seed in seeds], digits)
            for m in columns.values()
        ]
        rows.append([f"`{label}` − `{to(label)}`", *cells])
    return markdown(["", *columns], rows)


def explanation(runs: Runs, objectives: Sequence[str]) -> str:
    """Why: conflicts, steps that hurt an objective, and the weights. Means over seeds."""
    rows = []
    for label, by_seed in runs.items():
        found = [r["explained"] for r in by_seed.values() if r.get("explained")]
        if not found:
            continue
        memories = [f["memory"] for f in found if f["memory"] is not None]
        alignments = [f["alignment"] for f in found if f["alignment"] is not None]
        hurt = [f["hurt"] for f in found if f["hurt"] is not None]
        rows.append(
            [
                f"`{label}`",
                f"{100 * fmean(f['conflict'] for f in found):.0f}",
                f"{100 * fmean(hurt):.0f}" if hurt else "–",
                _signed(fmean(alignments), 2) if alignments else "–",
                " ".join(f"{fmean(f['weight'][name] for f in found):.2f}" for name in objectives),
                f"{fmean(f['weight_sd'][name] for f in found for name in objectives):.3f}",
                _signed(fmean(memories), 2) if memories else "–",
            ]
        )
    header = [
        "",
        "pairs in conflict, %",
        "steps that hurt, %",
        "smallest alignment",
        f"weights ({', '.join(objectives)})",
        "sd over steps",
        "memory",
    ]
    return markdown(header, rows)


def reported(runs: Runs, objectives: Sequence[str]) -> str:
    """What the runs' own reports said, by objective: steps that hurt it, of those that can tell; evidence of its mean
    gradient; and its noise scale.

    Means over the seeds in which it is known.
    """

    def told(found: Sequence[Result], key: str, scale: float) -> str:
        cells = []
        for name in objectives:
            values = [f[key][name] for f in found if f.get(key) and f[key][name] is not None]
            cells.append(f"{scale * fmean(values):.{0 if scale > 1 else 2}f}" if values else "–")
        return " ".join(cells)

    rows = []
    for label, by_seed in runs.items():
        found = [r["explained"] for r in by_seed.values() if r.get("explained")]
        if found:
            hurt, evidence = told(found, "hurt_by_objective", 100), told(found, "evidence", 1)
            rows.append([f"`{label}`", hurt, evidence, told(found, "noise_scale", 1)])
    names = ", ".join(objectives)
    return markdown(["", f"steps that hurt, % ({names})", "evidence", "noise scale, mini-batches"], rows)


def selection(results: Sequence[Result], merit: Metric) -> str:
    """Mean merit by method and learning rate, in percent; the chosen rate's in bold."""
    rates = sorted({r["cell"]["lr"] for r in results})
    rows = []
    for method in by_label(results):
        of = [r for r in results if label_of(r) == method]
        merits = {rate: [100 * merit(r) for r in of if r["cell"]["lr"] == rate] for rate in rates}
        means = {rate: fmean(found) for rate, found in merits.items() if found}
        best = max(means, key=means.__getitem__)
        shown = {rate: _signed(mean, 1) for rate, mean in means.items()}
        shown[best] = f"**{shown[best]}**"
        rows.append([f"`{method}`", *(shown.get(rate, "–") for rate in rates)])
    return markdown(["", *(f"{rate:g}" for rate in rates)], rows)


# ---- pictures --------------------------------------------------------------------------------------------------------

COLOURS = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999", "#8B4513", "#6A0DAD",
    "#B8860B", "#E6399B", "#4D4D00",
)  # fmt: skip
MARKERS = "osD^v<>Pp*Xhd"


def draw_trade_offs(path: Path, runs: Runs, objectives: Sequence[str], kind: str, title: str) -> None:
    """Every pair of objectives: each method's mean net win rates, with 95 % intervals."""
    figure = _figure((13, 8))
    pairs = list(combinations(objectives, 2))
    axes = figure.subplots(2, math.ceil(len(pairs) / 2), squeeze=False).flatten()
    for axis, (first, second) in zip(axes, pairs, strict=False):
        for index, (label, by_seed) in enumerate(runs.items()):
            values = [[net(kind, name)(r) for r in by_seed.values()] for name in (first, second)]
            axis.errorbar(
                fmean(values[0]), fmean(values[1]), xerr=interval(values[0]), yerr=interval(values[1]), label=label,
                color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], capsize=2, linewidth=0.8,
            )  # fmt: skip
        axis.set_xlabel(first)
        axis.set_ylabel(second)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_weights(path: Path, runs: Runs, objectives: Sequence[str], title: str) -> None:
    """w / Σw over the steps, a panel a method whose weights vary: mean over seeds, and in pale each seed."""
    shown = {
        label: [r["explained"]["weights"] for r in by_seed.values()]
        for label, by_seed in runs.items()
        if all(r.get("explained") for r in by_seed.values())
        and any(max(r["explained"]["weight_sd"].values()) > 1e-6 for r in by_seed.values())
    }
    if not shown:
        return
    figure = _figure((4 * min(3, len(shown)), 3.2 * math.ceil(len(shown) / 3) + 0.6))
    axes = figure.subplots(math.ceil(len(shown) / 3), min(3, len(shown)), sharey=True, squeeze=False).flatten()
    for axis, (label, seeds) in zip(axes, shown.items(), strict=False):
        for index, name in enumerate(objectives):
            series = [[step[index] for step in seed] for seed in seeds]
            for one in series:
                axis.plot(range(1, len(one) + 1), one, color=COLOURS[index + 1], alpha=0.15, linewidth=0.7)
            mean = [fmean(column) for column in zip(*series, strict=True)]
            axis.plot(range(1, len(mean) + 1), mean, color=COLOURS[index + 1], label=name, linewidth=1.6)
        axis.set_title(label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")
