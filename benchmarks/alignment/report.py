"""Tables and pictures of everything that has been run, from the results on disk."""

from __future__ import annotations

import json
from pathlib import Path

from alignment import noise_report, tables
from alignment.cells import Result
from alignment.compare import FRESH, METHODS, REGIMES, VARIANTS, merit
from alignment.real_model import WEIGHTINGS
from mogeo.demo.world import OBJECTIVES


def report(folder: Path) -> None:
    """Write tables.md, cells.json and pictures of all results in a folder, and print the tables."""
    parts = [*_world_report(folder), *_study_report(folder), *_real_report(folder), *noise_report.parts(folder)]
    text = "\n\n".join(parts) + "\n"
    (folder / "tables.md").write_text(text, "utf-8")
    cells = {
        str(path.relative_to(folder)): [_without_series(result) for result in tables.read(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_dir() and any(path.glob("*.json")) and path != folder
    }
    with (folder / "cells.json").open("w", encoding="utf-8") as file:
        json.dump(cells, file)
    print(text)


def _world_report(folder: Path) -> list[str]:
    """The comparison on the generated world."""
    parts = []
    selection, before = (tables.read(folder / "world" / name) for name in ("selection", "before"))
    if selection:
        parts += ["## Learning rates (merit on the selection seeds)", tables.selection(selection, merit)]
    for regime in REGIMES:
        tested = [r for r in tables.read(folder / "world" / "test") if r["cell"]["regime"] == regime]
        if not tested:
            continue
        seeds = {r["cell"]["seed"] for r in tested}
        starts = [r for r in before if r["cell"]["seed"] in seeds and r["cell"]["regime"] in ("base", regime)]
        # The result of "before" is the same in all regimes; that of "before cdpo" is not.
        starts = [r for r in starts if r["cell"]["method"] == "before" or r["cell"]["regime"] == regime]
        order = ("before", "before cdpo", *METHODS)
        results = sorted([*starts, *tested], key=lambda r: tables.rank(r, order))
        runs = tables.by_label(results)
        parts += [f"## World, {regime}", tables.levels(runs, tables.WORLD_COLUMNS)]
        for kind in ("greedy", "sampled"):
            columns = {name: tables.net(kind, name) for name in ("overall", *OBJECTIVES)}
            parts += [f"### {kind}, by objective", tables.levels(runs, columns)]
        parts += [
            "### minus uniform, paired by seed",
            tables.differences(runs, tables.WORLD_COLUMNS, lambda label: tables.BASELINE),
            "### why",
            tables.explanation(runs, OBJECTIVES),
        ]
        for kind in ("greedy", "sampled"):
            title = f"World, {regime}: net win rate of {kind} answers, %"
            tables.draw_trade_offs(folder / f"trade-off-{regime}-{kind}.png", runs, OBJECTIVES, kind, title)
        tables.draw_weights(folder / f"weights-{regime}.png", runs, OBJECTIVES, f"World, {regime}: weights")
    return parts


def _study_report(folder: Path) -> list[str]:
    """The variants of MGDA-Decoupled; seeds from `FRESH` on are shown apart."""
    parts = []
    results = tables.read(folder / "world" / "study")
    for regime in dict.fromkeys(r["cell"]["regime"] for r in results):
        ours = [r for r in results if r["cell"]["regime"] == regime]
        fresh = sorted({r["cell"]["seed"] for r in ours})
        for seeds in ([s for s in fresh if s < FRESH], [s for s in fresh if s >= FRESH]):
            order = tuple(f"study {variant}" for variant in VARIANTS)
            chosen = sorted((r for r in ours if r["cell"]["seed"] in seeds), key=lambda r: tables.rank(r, order))
            if not chosen:
                continue
            runs = tables.by_label(chosen)
            parts += [
                f"## Study, {regime}, seeds {seeds[0]} to {seeds[-1]}",
                tables.levels(runs, tables.WORLD_COLUMNS),
                "### minus uniform",
                tables.differences(runs, tables.WORLD_COLUMNS, lambda label: tables.BASELINE),
                "### minus its static twin",
                tables.differences(runs, tables.WORLD_COLUMNS, lambda label: f"{tables.TWIN} of {label}"),
                "### why",
                tables.explanation(runs, OBJECTIVES),
            ]
            tables.draw_weights(
                folder / f"weights-study-{regime}-{seeds[0]}.png", runs, OBJECTIVES, f"Study, {regime}: weights"
            )
    return parts


def _real_report(folder: Path) -> list[str]:
    """The runs on real models, data set by data set."""
    parts = []
    for data in sorted((folder / "real").glob("*")):
        results = tables.read(data)
        if not results:
            continue
        objectives = results[0]["objectives"]
        runs = tables.by_label(sorted(results, key=lambda r: tables.rank(r, WEIGHTINGS)))
        baseline = tables.BASELINE if tables.BASELINE in runs else next(iter(runs))
        parts.append(f"## {data.name}")
        for key, digits in (("accuracy", 1), ("margin", 3)):
            columns = {f"{key}: {name}": tables.held_out(key, name) for name in ("mean", "worst", *objectives)}
            parts += [
                f"### held-out {key}",
                tables.levels(runs, columns, digits),
                tables.differences(runs, columns, lambda label, baseline=baseline: baseline, digits),
            ]
        parts += ["### why", tables.explanation(runs, objectives), tables.reported(runs, objectives)]
        tables.draw_weights(folder / f"weights-{data.name}.png", runs, objectives, f"{data.name}: weights")
    return parts


def _without_series(result: Result) -> Result:
    """The result without the weights of every step, which would make the file large."""
    explained = result.get("explained")
    if not explained:
        return result
    return {**result, "explained": {key: value for key, value in explained.items() if key != "weights"}}
