"""The benchmark scripts run to their end, on settings too small to mean anything: no figure is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

IN_TURN = """
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""


def run(script: str, *options: str, timeout: float = 300.0) -> str:
    """What a script prints on a CPU."""
    return printed_by([str(BENCHMARKS / script), *options], timeout)


def run_in_turn(script: str, *commands: list[str]) -> str:
    """What a script prints under several commands, in one process, which imports everything once."""
    calls = [[str(BENCHMARKS / script), *options] for options in commands]
    return printed_by(["-c", IN_TURN, json.dumps(calls)], 300.0)


def printed_by(arguments: list[str], timeout: float) -> str:
    """Without a compiler: what torch.compile would do on a CPU takes half a minute."""
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = {**os.environ, "CXX": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


QWEN = ["--model", "qwen-shape-tiny", "--rounds", "2", "--objectives", "2", "--only"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("kernels.py", ["--quick", "--columns", "3e3", "--rounds", "2", "--objectives", "2", "--dtypes", "fp64"]),
        ("solver.py", ["--samples", "1", "--repeats", "1"]),
        ("statuses.py", ["--samples", "1", "--sizes", "3"]),
        ("tracking_theory.py", ["--quick"]),
        ("communication.py", ["--ranks", "2", "--width", "32", "--rounds", "2", "--objectives", "2"]),
        ("paper_step.py", ["--model", "tiny", "--layers", "1", "--tokens", "16"]),
        ("plan_check.py", ["--quick", "--only", "tiny, refresh", "--repeats", "0"]),
        ("step_overhead.py", ["--tokens", "128", "--rounds", "2", "--objectives", "2", "--only", "plain"]),
        ("step_overhead.py", ["--model", "small-tensors", "--rounds", "2", "--objectives", "2"]),
        ("step_overhead.py", [*QWEN, "torchjd best effort"]),
        ("step_overhead.py", [*QWEN, "mogeo", "--weights", "bf16", "--alternate"]),
    ],
    ids=[
        "kernels",
        "solver",
        "statuses",
        "tracking",
        "communication",
        "paper",
        "plan",
        "llama",
        "small tensors",
        "qwen autocast",
        "qwen bf16, one at a time",
    ],
)
def test_runs_and_writes_its_figures(script: str, options: list[str], tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    printed = run(script, *options, "--json", str(target))
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] in printed
    assert figures.get("results") or figures.get("records")


@pytest.mark.slow
def test_kernels_are_drawn_and_what_cannot_run_is_left_out_aloud(tmp_path: Path) -> None:
    drawn, target = tmp_path / "roofline.png", tmp_path / "figures.json"
    sizes = ["--columns", "3000", "1e15", "--rounds", "1", "--objectives", "2"]
    printed = run("kernels.py", *sizes, "--json", str(target), "--plot", str(drawn))
    assert drawn.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(target.read_text())
    assert {record["k"] for record in figures["solver"]} == {2}
    assert {(record["n"], record["dtype"]) for record in figures["results"]} == {(3000, "bf16"), (3000, "fp32")}
    left_out = "\n".join(f"left out: {what}: {why}" for what, why in figures["left_out"].items())
    for what in ("graph replay", "N = 1,000,000 ", "N = 1,000,000,000,000,000", "compiled products"):
        assert what in left_out
    assert all(line in printed for line in left_out.splitlines())


@pytest.mark.slow
def test_every_mode_is_measured_and_drawn(tmp_path: Path) -> None:
    drawn, target = tmp_path / "modes.png", tmp_path / "figures.json"
    sizes = ["--quick", "--refresh-every", "2", "--rounds", "2", "--seeds", "1", "--threads", "1", "--clock", "cpu"]
    some = ["--modes", "uniform", "exact", "host rows", "sketch 2^14", "refresh", "refresh, tracked"]
    printed = run("memory_modes.py", *sizes, *some, "--json", str(target), "--plot", str(drawn))
    assert drawn.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(target.read_text())
    assert figures["machine"]["torch"] in printed
    assert [f"left out: {what}: {why}" in printed for what, why in figures["left_out"].items()] == [True]
    results = {result["mode"]: result for result in figures["results"]}
    assert all(result["time"]["ms"] > 0 and result["peak_bytes"] > 0 for result in results.values())
    errors = {mode: result["error"]["mean"] for mode, result in results.items() if "error" in result}
    # At the first step, an exact mode and one that has just solved agree; at the second, held weights are old.
    assert errors["exact"] == 0 < errors["refresh"]
    assert {judged["cell"]["method"] for judged in figures["judged"]} == set(errors)
    assert set(results) - set(errors) == {"plain"}


@pytest.mark.slow
def test_the_comparison_runs_is_resumed_and_reported(tmp_path: Path) -> None:
    place = ["--output", str(tmp_path), "--workers", "1", "--quick"]
    run("alignment", *place, "world", "--seeds", "1")
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*=*.json")}
    printed = run_in_turn("alignment", [*place, "world", "--seeds", "1"], [*place, "report"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*=*.json")} == cells
    assert (tmp_path / "tables.md").read_text() in printed
    for method in ("before cdpo", "uniform", "mgda-decoupled", "static of mgda-decoupled", "modpo", "cdpo"):
        assert printed.count(f"| `{method}` |") >= 6, method  # two regimes, three tables
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"trade-off-base-greedy.png", "trade-off-noisehelp-sampled.png", "weights-noisehelp.png"} <= pictures


@pytest.mark.slow
def test_what_noise_does_is_measured_resumed_and_reported(tmp_path: Path) -> None:
    place, target = ["--output", str(tmp_path), "--workers", "1", "--quick"], tmp_path / "figures.json"
    commands = {
        "estimators": ["--json", str(target)],
        "realised": [],
        "map": ["--dial", "0.5", "--imbalance", "few helpfulness"],
        "tracked": ["--regime", "base"],
    }
    run_in_turn("alignment", *([*place, name, "--seeds", "1", *options] for name, options in commands.items()))
    figures = json.loads(target.read_text())
    assert "transformers" in figures["machine"]
    assert {record["where"] for record in (cell["cell"] for cell in figures["records"])} == {
        "at rest 1",
        "along the run",
    }
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*=*.json")}
    assert len(cells) == 2 + 6 + 4 + (4 + 4 + 2) + 2  # tracked: to choose rates, runs, twins; and models before them
    printed = run_in_turn("alignment", [*place, "map", "--seeds", "1", *commands["map"]], [*place, "report"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*=*.json")} == cells
    assert printed.count("| `mgda-decoupled, track 0.95` |") >= 6
    for title in ("## Tracked gradients, base", "## Estimators", "## Realised steps", "## Map"):
        assert title in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("kernels.py", ["--quick", "--columns", "3e3", "--objectives", "2"]),
        ("step_overhead.py", ["--tokens", "128", "--only", "plain"]),
        ("memory_modes.py", ["--quick", "--rounds", "2"]),
    ],
)
def test_what_no_time_is_left_for_is_left_out_aloud(script: str, options: list[str], tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    printed = run(script, *options, "--budget", "0", "--json", str(target))
    figures = json.loads(target.read_text())
    late = [what for what, why in figures["left_out"].items() if why == "no time left (--budget)"]
    assert late
    assert all(f"left out: {what}: no time left" in printed for what in late)
    assert not figures["failed"]


@pytest.mark.slow
def test_the_run_on_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    """Every stage, one case at least of each ok, and none that fails; eight files at most."""
    # It takes a minute; a machine that is busy with other things may take its time.
    printed = run("gpu_run.py", "--rehearse", "--output", str(tmp_path), "--budget", "900", timeout=950.0)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record for record in records if record.get("ok") is False] == []
    ended = {record["stage"]: record["outcome"] for record in records if "outcome" in record}
    assert ended.pop("memcheck") in ("done", "left out: compute-sanitizer is not there")
    assert set(ended) == {
        "environment", "compile", "correctness", "bandwidth", "solver", "variants", "step", "tests", "long",
        "large tests",
    }  # fmt: skip
    assert set(ended.values()) == {"done"}
    assert all(any(record["stage"] == stage and record.get("ok") for record in records) for stage in ended)
    files = list(tmp_path.rglob("*"))
    assert len(files) <= 8
    assert all(path.parent == tmp_path for path in files)
    assert "No case failed." in printed
    assert printed.count("not measured ") >= 19  # the targets: a CPU has nothing to say of them
    assert printed.rstrip().endswith((tmp_path / "summary.txt").read_text().rstrip()[-500:])


@pytest.mark.slow
def test_some_stages_of_the_run_on_a_gpu(tmp_path: Path) -> None:
    run("gpu_run.py", "--rehearse", "--output", str(tmp_path), "--stages", "environment")
    stages = {json.loads(line)["stage"] for line in (tmp_path / "results.jsonl").read_text().splitlines()}
    assert stages == {"run", "environment"}
