"""From the figures of a run on a GPU to what the docs say of them: tables, targets met or not, the roofline.

    python benchmarks/gpu_report.py runs/gpu/results.jsonl              prints Markdown
    python benchmarks/gpu_report.py runs/gpu/results.jsonl --write      puts it into docs/, with the picture

A page takes what stands between its markers, `<!-- gpu: NAME -->` and `<!-- /gpu: NAME -->`. What was not measured is
shown as such, and so is every failure. The figures of a rehearsal are printed, and written nowhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from gpu_records import Figures, read

ROOT = Path(__file__).absolute().parents[1]
PICTURE = ROOT / "docs" / "images" / "gpu-roofline.png"
MISSING = "not measured"
DTYPES = ("bf16", "fp32")

# Targets.
SHARE_OF_COPY, LONG_ENOUGH, MOST_ROWS = 0.9, 10**8, 8
SOLVER_MICROSECONDS, SOLVER_ROWS = 20.0, 4
STEP_OVERHEAD, STEP_TOKENS = 0.03, 4096
OVER_PRODUCT, SLOW_PRODUCT = 1.5, 0.6


class Target(NamedTuple):
    """Something to reach, and whether it was."""

    name: str
    verdict: str  #: "met", "NOT met" or "not measured"
    figure: str


# --------------------------------------------------------------------------------------------------------------------
# Looking up


def case_of(records: Iterable[Figures], stage: str, case: str) -> Figures | None:
    """The figures of a case; None where it was not tried, or failed before it had any."""
    found = [record for record in records if (record["stage"], record.get("case")) == (stage, case) and "ok" in record]
    return found[-1] if found else None


def measured(records: Iterable[Figures]) -> list[Figures]:
    """What `kernels.measure` found, all cases together."""
    return [result for record in records if record["stage"] == "bandwidth" for result in record.get("results", ())]


def bandwidth_of(records: Sequence[Figures], name: str, count: int, columns: int, dtype: str) -> Figures | None:
    """One contestant on rows [K, N]."""
    for result in measured(records):
        if (result["name"], result["k"], result["n"], result["dtype"]) == (name, count, columns, dtype):
            return result
    return None


def counts_of(records: Iterable[Figures]) -> list[int]:
    """K that were timed."""
    return sorted({result["k"] for result in measured(records)})


def machine_of(records: Iterable[Figures]) -> Figures:
    """What ran where; empty if the run did not come that far."""
    found = case_of(records, "environment", "machine") or {}
    return dict(found.get("machine", {}))


def is_rehearsal(records: Iterable[Figures]) -> bool:
    """Whether these figures say nothing about a GPU. A run that does not say where it ran counts as one."""
    found = case_of(records, "environment", "machine")
    return found is None or bool(found.get("rehearsal", True)) or "gpu" not in found.get("machine", {})


def solved(records: Iterable[Figures], count: int) -> list[Figures]:
    """Of the solver at K, family by family."""
    found = case_of(records, "solver", f"K={count}") or {}
    return list(found.get("results", ()))


# --------------------------------------------------------------------------------------------------------------------
# Targets


def targets(records: Sequence[Figures]) -> list[Target]:
    """All that were set, whether they were measured or not."""
    found = []
    for operation in ("gram", "combine"):
        for dtype in DTYPES:
            for count in (2, 4, MOST_ROWS):
                name = f"{operation}, K = {count}, {dtype}: at least {SHARE_OF_COPY:.0%} of a copy, N = 1e8"
                result = bandwidth_of(records, f"mogeo.{operation}", count, LONG_ENOUGH, dtype)
                share = None if result is None else result["of_copy"]
                found.append(_target(name, share, lambda value: value >= SHARE_OF_COPY, "{:.0%}"))
    found += _against_the_product(records)
    families = solved(records, SOLVER_ROWS)
    replays = [family["microseconds"]["mogeo, graph replay"]["p50"] for family in families
               if "mogeo, graph replay" in family["microseconds"]]  # fmt: skip
    cold = [family["inside_a_step"] for family in families if "inside_a_step" in family]
    what = f"solver, K = {SOLVER_ROWS}: at most {SOLVER_MICROSECONDS:.0f} µs"
    enough: Callable[[float], bool] = lambda value: value <= SOLVER_MICROSECONDS  # noqa: E731
    found.append(_target(f"{what}, replayed, slowest family", max(replays, default=None), enough, "{:.1f} µs"))
    for how in ("difference", "events"):
        value = cold[0][how]["p50"] if cold else None
        found.append(_target(f"{what}, within a step, by {how}", value, enough, "{:.1f} µs"))
    step = case_of(records, "step", f"{STEP_TOKENS} tokens") or {}
    ratios = [result["ratio"]["p50"] - 1 for result in step.get("results", ()) if result["contestant"] == "mogeo"]
    name = f"step at {STEP_TOKENS:,} tokens an objective: at most {STEP_OVERHEAD:.0%} over plain training"
    found.append(_target(name, ratios[0] if ratios else None, lambda value: value <= STEP_OVERHEAD, "{:+.1%}"))
    for contestant in ("mogeo", "mogeo uniform"):
        cases = [case_of(records, "step", f"{contestant}: {what}") for what in ("waiting", "launches")]
        name = f"{contestant}: a step never waits for the device"
        if any(case is None for case in cases) or is_rehearsal(records):
            found.append(Target(name, MISSING, ""))
        else:
            wrong = [case["error"] for case in cases if case is not None and not case["ok"]]
            found.append(Target(name, "NOT met" if wrong else "met", "; ".join(wrong)[:200]))
    return found


def _against_the_product(records: Sequence[Figures]) -> list[Target]:
    found = []
    for dtype in DTYPES:
        for count in counts_of(records):
            ours, theirs = (
                bandwidth_of(records, name, count, LONG_ENOUGH, dtype) for name in ("mogeo.gram", "rows @ rows.T")
            )
            if ours is None or theirs is None or theirs["of_copy"] >= SLOW_PRODUCT:
                continue
            name = f"gram, K = {count}, {dtype}: at least {OVER_PRODUCT} × `G @ G.T`, which is slow there"
            ratio = theirs["ms"]["p50"] / ours["ms"]["p50"]
            found.append(_target(name, ratio, lambda value: value >= OVER_PRODUCT, "{:.2f} ×"))
    name = f"gram: at least {OVER_PRODUCT} × `G @ G.T` where that reaches less than {SLOW_PRODUCT:.0%} of a copy"
    return found or [Target(name, MISSING, "")]


def _target(name: str, value: float | None, reached: Callable[[float], bool], form: str) -> Target:
    if value is None:
        return Target(name, MISSING, "")
    return Target(name, "met" if reached(value) else "NOT met", form.format(value))


# --------------------------------------------------------------------------------------------------------------------
# Tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column to the left, all others to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def where(records: Sequence[Figures]) -> str:
    """One sentence on the machine."""
    machine = machine_of(records)
    copied = case_of(records, "bandwidth", "copy") or {}
    names = ("gpu", "driver", "cuda", "python", "torch", "triton", "transformers", "commit", "date")
    facts = [f"{name} {machine.get(name, 'unknown')}" for name in names]
    rate = f"{copied['gb_s']:.0f} GB/s" if copied else MISSING
    peak = f"{copied['peak']:.0f} GB/s" if copied.get("peak") else "unknown"
    return f"{', '.join(facts)}. A large copy, read and write: {rate}; data sheet: {peak}."


def bandwidth_table(records: Sequence[Figures], operation: str) -> str:
    """Share of the copy by K, N and dtype, GB/s in brackets; `gram` also over the product."""
    widths = sorted({result["n"] for result in measured(records)}, reverse=True)
    counts = counts_of(records)
    rows = []
    for columns in widths:
        for dtype in DTYPES:
            cells = []
            for count in counts:
                ours = bandwidth_of(records, f"mogeo.{operation}", count, columns, dtype)
                plain = "rows @ rows.T" if operation == "gram" else "weights @ rows"
                theirs = bandwidth_of(records, plain, count, columns, dtype)
                cells.append(_share(ours, theirs))
            rows.append([f"N = {columns:,}, {dtype}", *cells])
    return table([operation, *(f"K = {count}" for count in counts)], rows) if rows else f"{operation}: {MISSING}."


def _share(ours: Figures | None, theirs: Figures | None) -> str:
    if ours is None:
        return MISSING
    over = "" if theirs is None else f", {theirs['ms']['p50'] / ours['ms']['p50']:.1f} ×"
    mark = "" if ours["timed"] == "graph" else " (with launches)"
    return f"{ours['of_copy']:.0%} ({ours['gb_per_s']['p50']:.0f}{over}){mark}"


def sketch_table(records: Sequence[Figures]) -> str:
    """Of sketches of two rows."""
    found = [result for result in measured(records) if result["name"] == "mogeo SignedSketch"]
    rows = [
        [f"N = {result['n']:,}, {result['dtype']}", f"{result['of_copy']:.0%}", f"{result['gb_per_s']['p50']:.0f}"]
        for result in found
    ]
    return table(["sketch", "of a copy", "GB/s"], rows) if rows else f"sketch: {MISSING}."


def solver_table(records: Sequence[Figures]) -> str:
    """Microseconds by K."""
    counts = [int(record["case"].removeprefix("K=")) for record in records
              if record["stage"] == "solver" and record.get("results")]  # fmt: skip
    rows = []
    for count in sorted(set(counts)):
        families = solved(records, count)
        cells = [str(count)]
        for how in ("mogeo, graph replay", "mogeo"):
            times = [family["microseconds"][how]["p50"] for family in families if how in family["microseconds"]]
            cells += [f"{median(times):.1f}", f"{max(times):.1f}"] if times else [MISSING] * 2
        cold = [family["inside_a_step"] for family in families if "inside_a_step" in family]
        cells += [f"{cold[0][how]['p50']:.1f}" if cold else MISSING for how in ("difference", "events")]
        cells.append(str(sum(family["not_optimal"] for family in families)))
        projected = (case_of(records, "solver", f"psd_part K={count}") or {}).get("microseconds")
        rows.append([*cells, f"{projected['p50']:.1f}" if projected else MISSING])
    header = ["K", "replay: middle family, µs", "slowest", "with launch: middle", "slowest"]
    header += ["within a step: difference", "events", "not optimal", "PSD part, replay: µs"]
    return table(header, rows) if rows else f"solver: {MISSING}."


def variants_table(records: Sequence[Figures]) -> str:
    """Each kernel's candidates, the one in use first, the fastest in bold."""
    rows = []
    for record in records:
        if record["stage"] != "variants" or not record.get("results"):
            continue
        fastest = min(result["ms"]["p50"] for result in record["results"])
        cells = []
        for result in record["results"]:
            text = f"{result['variant']}: {result['of_copy']:.0%}"
            text += f", bias {result['bias']:.0e}" if "bias" in result else ""
            cells.append(f"**{text}**" if result["ms"]["p50"] == fastest else text)
        rows.append([f"{record['kernel']}, K = {record['k']}, {record['dtype']}", "; ".join(cells)])
    return table(["kernel", "candidates: share of a copy"], rows) if rows else f"variants: {MISSING}."


def step_table(records: Sequence[Figures]) -> str:
    """Time, memory and launches of a step."""
    rows = []
    for record in records:
        if record["stage"] != "step" or "tokens" not in record:
            continue
        for result in record.get("results", ()):
            ratio, peak = result["ratio"], result["peak_mib"]
            rows.append(
                [
                    f"{record['tokens']:,} tokens, {result['contestant']}",
                    f"{result['ms']['p50']:.1f}",
                    f"{ratio['p50']:.3f} ({ratio['p20']:.3f} … {ratio['p80']:.3f})",
                    f"{result['host_ms']['p50']:.1f}",
                    MISSING if peak is None else f"{peak:,.0f}",
                ]
            )
    header = ["step", "ms", "over plain (20 … 80 %)", "host ms", "peak MiB"]
    return table(header, rows) if rows else f"step: {MISSING}."


def launches_table(records: Sequence[Figures]) -> str:
    """What the profiler counted of one step."""
    rows = []
    for record in records:
        if record["stage"] == "step" and "counted" in record:
            counted = record["counted"]
            waits = ", ".join(f"{what} {n}" for what, n in counted["waits"].items()) or "none"
            counts = [str(counted[what]) for what in ("kernels", "copies", "operators")]
            rows.append([record["contestant"], *counts, waits])
    header = ["a step", "kernels launched", "copies and fills", "operators of torch", "calls that wait"]
    return table(header, rows) if rows else f"launches: {MISSING}."


def correctness_table(records: Sequence[Figures]) -> str:
    """The worst of all cases, by dtype."""
    rows = []
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        own = [r for r in records if r["stage"] == "correctness" and "ok" in r and dtype in str(r.get("case"))]
        judged = [record for record in own if "gram_error" in record]
        if not own:
            rows.append([dtype, MISSING, *[""] * 5])
            continue
        worst = {what: max((abs(float(r[what])) for r in judged), default=float("nan"))
                 for what in ("gram_error", "gram_bias", "combine_error", "weights_error")}  # fmt: skip
        same = all(record.get("same_bits", False) for record in own)
        rows.append([dtype, f"{sum(r['ok'] for r in own)} of {len(own)}", *(f"{v:.1e}" for v in worst.values()),
                     "yes" if same else "NO"])  # fmt: skip
    header = ["dtype", "cases ok", "Gram: largest error", "largest bias of the diagonal", "combine", "weights",
              "same bits"]  # fmt: skip
    return table(header, rows)


def targets_table(records: Sequence[Figures]) -> str:
    """Met or not."""
    return table(["target", "", "measured"], [[t.name, t.verdict, t.figure] for t in targets(records)])


def failures(records: Sequence[Figures]) -> str:
    """Every case that failed, every one that was not tried, every stage that did not end by itself."""
    lines = [
        f"- {record['stage']}, {record['case']}: **failed**: {str(record.get('error', ''))[:300]}"
        for record in records
        if record.get("ok") is False
    ]
    lines += [f"- {r['stage']}, {r['case']}: left out: {r['left_out']}" for r in records if "left_out" in r]
    lines += [f"- stage {r['stage']}: {r['outcome']}" for r in records if r.get("outcome", "done") != "done"]
    return "\n".join(lines) or "No case failed, and none was left out."


def tests_line(records: Sequence[Figures]) -> str:
    """What `pytest -m gpu` said."""
    told = [f"{record['stage']}: {record['tests']}" for record in records if "tests" in record]
    return "; ".join(told) or f"`pytest -m gpu`: {MISSING}."


# --------------------------------------------------------------------------------------------------------------------
# Pages


def pages(records: Sequence[Figures]) -> dict[str, str]:
    """By the name of its markers, what a page gets."""
    step = "\n\n".join([step_table(records), launches_table(records)])
    kernels = [correctness_table(records)]
    kernels += [bandwidth_table(records, operation) for operation in ("gram", "combine")]
    kernels += [sketch_table(records), solver_table(records), variants_table(records)]
    machine = machine_of(records)
    return {
        "status": f"Measured on {machine.get('gpu', 'an unknown GPU')}, {machine.get('date', 'at an unknown time')}.",
        "machine": where(records),
        "targets": targets_table(records),
        "kernels": "\n\n".join(kernels),
        "step": step,
        "failures": "\n\n".join([tests_line(records), failures(records)]),
    }


def put(page: str, contents: dict[str, str]) -> tuple[str, list[str]]:
    """The page with what belongs between its markers; and whose markers it has.

    Raises:
        ValueError: a marker is opened and not closed.
    """
    found = []
    for name, content in contents.items():
        first, last = f"<!-- gpu: {name} -->", f"<!-- /gpu: {name} -->"
        if first not in page:
            continue
        head, rest = page.split(first, 1)
        if last not in rest:
            raise ValueError(f"{first} is not closed: put {last} behind what the figures replace")
        page = f"{head}{first}\n{content}\n{last}{rest.split(last, 1)[1]}"
        found.append(name)
    return page, found


def brief(records: Sequence[Figures]) -> list[str]:
    """The figures that matter most, for a terminal."""
    lines = [where(records), ""]
    for target in targets(records):
        lines.append(f"{target.verdict:12} {target.name}: {target.figure}".rstrip(": "))
    tables = (correctness_table, step_table, solver_table, variants_table)
    for text in (bandwidth_table(records, "gram"), bandwidth_table(records, "combine"), sketch_table(records)):
        lines += ["", text]
    for make in tables:
        lines += ["", make(records)]
    return [*lines, "", tests_line(records)]


def draw(records: Sequence[Figures], path: Path) -> None:
    """The roofline, of what was measured."""
    from roofline import draw as draw_roofline

    copied: dict[str, Any] = case_of(records, "bandwidth", "copy") or {}
    document = {
        "machine": machine_of(records), "results": measured(records),
        "copy_gb_per_s": copied.get("gb_s", 0.0), "peak_gb_per_s": copied.get("peak"),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_roofline(document, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.jsonl of gpu_run.py")
    parser.add_argument("--write", action="store_true", help="between the markers of docs/*.md, and the picture")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="default: docs/")
    parser.add_argument("--plot", type=Path, help="draw the roofline there")
    options = parser.parse_args(arguments)
    records = read(options.results)
    if not records:
        parser.error(f"{options.results} holds no record of a run")
    contents = pages(records)
    if options.plot:
        draw(records, options.plot)
    if not options.write:
        print("\n\n".join(f"## {name}\n\n{content}" for name, content in contents.items()))
        return 0
    if is_rehearsal(records):
        parser.error(f"{options.results} is of a rehearsal, on no GPU: its figures have no place in docs/")
    placed = set()
    for path in sorted(options.docs.glob("*.md")):
        page, found = put(path.read_text("utf-8"), contents)
        if found:
            path.write_text(page, "utf-8")
            placed |= set(found)
            print(f"{path}: {', '.join(found)}")
    for name in set(contents) - placed:
        print(f"no page has <!-- gpu: {name} -->: its figures are nowhere")
    draw(records, options.docs / PICTURE.relative_to(ROOT / "docs"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
