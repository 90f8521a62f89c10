"""Everything that only a GPU can tell, in one command: is it right, how fast is it, what does a step cost.

    python benchmarks/gpu_run.py [--budget 540] [--output runs/gpu] [--cache gpu-cache.tar.xz]
    python benchmarks/gpu_run.py --rehearse        every stage on a CPU, at toy sizes: does the run work?

Each stage is a process group of its own with a deadline, in the order of what is learnt per second; one that fails,
hangs or is killed leaves the cases it had finished, and the next one starts. Every case is a line of JSON in
`results.jsonl`, written at once. A case that fails is a line as well: the exit code is 0 if the run came to its end,
whatever it found, and what failed is printed last, above the table. No stage starts that the budget leaves no time for.

Nothing needs to be installed but torch, Triton, numpy, pytest, hypothesis and transformers: the children run in a
mirror of this checkout, made of links in a temporary folder, where `kernels/` is `mogeo.kernels`. They leave nothing in
the checkout. pytest-xdist, compute-sanitizer and all else are used where they are there, and missed aloud.

The output folder gets at most eight files: results.jsonl, summary.txt, log.txt (what all stages printed), tests.xml,
trace.json.gz (a profiled step). `gpu_report.py` makes the tables of docs/ from results.jsonl; `gpu_cache.py` fills the
archive of --cache, without which the first minutes go to the compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gpu_cache
from gpu_records import SPOILT, Figures, Records, read

ROOT = Path(__file__).absolute().parents[1]
#: Files with tests for a GPU. To collect the others takes longer than to run these.
TESTS = (
    "tests/test_gpu.py", "tests/geometry/test_triton_backend.py", "tests/geometry/test_ops.py",
    "tests/geometry/test_exact_min_norm.py", "tests/geometry/test_exact_harmless.py",
    "tests/geometry/test_exact_cagrad.py",
    "tests/kernels/test_gram.py", "tests/kernels/test_combine.py", "tests/kernels/test_min_norm.py",
    "tests/kernels/test_psd.py", "tests/kernels/test_sketch.py",
)  # fmt: skip
#: Those that need most of the GPU's memory, one at a time.
LARGE = "beyond_two_to_the_31 or 32_bits_count"
MOST_PRINTED = 11_000  # characters of the summary
LEAST = 5.0  # seconds below which no stage is worth starting
RESTARTS = 3  # of a stage whose GPU context an error has spoilt


class Stage(NamedTuple):
    """A process group."""

    name: str
    seconds: float  #: until it is killed
    command: Sequence[str]  #: {budget} is replaced by the seconds in which it should end by itself
    needs: str | None = None  #: a program without which it is left out
    codes: Mapping[int, str] = {}  #: what exit codes mean, other than 0 and 1


class Outcome(NamedTuple):
    """How a stage ended."""

    stage: str
    how: str  #: "done", "failed (1)", "killed at its deadline", "left out: …"
    seconds: float


# --------------------------------------------------------------------------------------------------------------------
# What runs


def stages(options: argparse.Namespace, output: Path) -> list[Stage]:
    """All, in order, those that say most per second first."""
    python, device = sys.executable, "cpu" if options.rehearse else "cuda"
    results = str(output)

    def own(name: str, *more: str) -> list[str]:
        script = ["-W", "ignore", "benchmarks/gpu_stages.py", name]
        return [python, *script, "--device", device, "--output", results, "--budget", "{budget}", *more]

    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "gpu_reports", "--tb=short"]
    # Only what is named: others that happen to be installed there may warn, and warnings are errors.
    pytest += ["-p", "_hypothesis_pytestplugin"]
    tests = [*pytest, *(TESTS[:1] if options.rehearse else TESTS), "-k", f"not ({LARGE})"]
    tests.append(f"--junitxml={output / 'tests.xml'}")
    if importlib.util.find_spec("xdist") is not None and not options.rehearse:
        tests += ["-p", "xdist.plugin", "-n", "12", "--dist", "worksteal"]
    large = [*pytest, "tests/test_gpu.py", "-k", LARGE, f"--junitxml={output / 'large.xml'}"]
    # An allocation each, so that what lies beyond a tensor is nobody's.
    memcheck = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", "memcheck"]
    memcheck += ["--error-exitcode", "9", "--print-limit", "20", *own("correctness", "--few", "--as", "memcheck")]
    found = {9: "failed: errors of memory, told in log.txt"}
    listed = [
        Stage("environment", 60, own("environment")),  # a cold disk reads torch for a while
        Stage("compile", 150, own("compile")),  # soon done where the cache has it all
        Stage("correctness", 100, own("correctness")),
        Stage("bandwidth", 90, own("bandwidth")),
        Stage("solver", 40, own("solver")),
        Stage("variants", 60, own("variants")),
        Stage("step", 120, own("step")),
        Stage("tests", 130, tests),
        Stage("long", 45, own("long")),
        Stage("large tests", 45, large),
        Stage("memcheck", 60, memcheck, "compute-sanitizer", found),
    ]
    # A rehearsal's figures mean nothing, nor do its times: a busy machine may take its time.
    return [stage._replace(seconds=3 * stage.seconds) for stage in listed] if options.rehearse else listed


def mirror(folder: Path) -> Path:
    """A checkout of links to this one in which `kernels/` is `mogeo.kernels`, as it is once installed."""
    top = folder / "checkout"
    (top / "mogeo").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in ("mogeo", ".git", "runs"):
            (top / path.name).symlink_to(path)
    for path in (ROOT / "mogeo").iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (top / "mogeo" / path.name).symlink_to(path)
    (top / "mogeo" / "kernels").symlink_to(ROOT / "kernels")
    return top


def environment(options: argparse.Namespace, top: Path, output: Path) -> dict[str, str]:
    """Of the children."""
    path = [str(top), str(top / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(options.cache_directory),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "GPU_REPORTS": str(output / "results.jsonl"),
    }
    if options.rehearse:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "CXX": "false"}
    else:
        variables.pop("TRITON_INTERPRET", None)
    return variables


# --------------------------------------------------------------------------------------------------------------------
# The conductor


def conduct(
    chosen: Sequence[Stage], budget: float, output: Path, variables: dict[str, str], folder: Path
) -> list[Outcome]:
    """Run stages one after another, none beyond its deadline nor all beyond the budget.

    Where that is less than all their deadlines together, each has its share of what is left, so that none starves for
    those before it; what one saves goes to those behind it.
    """
    end = time.monotonic() + budget
    outcomes = []
    for index, stage in enumerate(chosen):
        left = end - time.monotonic()
        share = left * stage.seconds / sum(following.seconds for following in chosen[index:])
        if stage.needs is not None and shutil.which(stage.needs) is None:
            outcome = Outcome(stage.name, f"left out: {stage.needs} is not there", 0.0)
        elif left < LEAST:
            outcome = Outcome(stage.name, "left out: no time left", 0.0)
        else:
            outcome = _carried_out(stage, min(stage.seconds, max(share, LEAST)), output, variables, folder)
        outcomes.append(outcome)
        Records(output / "results.jsonl", stage.name).note(outcome=outcome.how, seconds=round(outcome.seconds, 1))
        print(f"{outcome.seconds:6.1f} s  {outcome.stage}: {outcome.how}", flush=True)
    return outcomes


def _carried_out(stage: Stage, limit: float, output: Path, variables: dict[str, str], folder: Path) -> Outcome:
    start = time.monotonic()
    for attempt in range(RESTARTS + 1):
        left = limit - (time.monotonic() - start)
        command = [part.replace("{budget}", f"{max(1.0, left - 3):.1f}") for part in stage.command]
        with (output / "log.txt").open("ab") as log:
            log.write(f"\n===== {stage.name}, attempt {attempt + 1}: {' '.join(command)}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    command, cwd=folder, env=variables | {"GPU_REPORTS_STAGE": stage.name}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return Outcome(stage.name, f"failed ({error})", time.monotonic() - start)
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                return Outcome(stage.name, "killed at its deadline", time.monotonic() - start)
            finally:  # whatever it started and left running, as well; also where Ctrl-C ends this very process
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != SPOILT or limit - (time.monotonic() - start) < LEAST:
            break
    how = "done" if code == 0 else stage.codes.get(code, f"failed ({code})")
    return Outcome(stage.name, how, time.monotonic() - start)


# --------------------------------------------------------------------------------------------------------------------
# What is printed


def summary(records: Sequence[Figures], outcomes: Sequence[Outcome]) -> str:
    """What failed, what was left out, how the stages ended, and the figures that matter most."""
    lines = []
    failed = [record for record in records if record.get("ok") is False]
    lines.append(f"FAILED: {len(failed)}" if failed else "No case failed.")
    for record in failed[:25]:
        lines.append(f"  {record['stage']}: {record['case']}: {str(record.get('error', ''))[:160]}")
    if len(failed) > 25:
        lines.append(f"  … and {len(failed) - 25} more, in results.jsonl")
    lines += [f"  stage {o.stage}: {o.how}" for o in outcomes if o.how.startswith(("killed", "failed"))]
    left_out = [record for record in records if "left_out" in record]
    for stage in dict.fromkeys(record["stage"] for record in left_out):
        names = [str(record["case"]) for record in left_out if record["stage"] == stage]
        lines.append(f"left out of {stage}: {len(names)} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})")
    lines.append("")
    for outcome in outcomes:
        own = [record for record in records if record["stage"] == outcome.stage and "ok" in record]
        good = sum(bool(record["ok"]) for record in own)
        lines.append(f"{outcome.stage:12} {outcome.seconds:6.1f} s  {good:3} of {len(own):3} ok  {outcome.how}")
    import gpu_report

    lines += ["", *gpu_report.brief(records)]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    names = [stage.name for stage in stages(argparse.Namespace(rehearse=True), Path())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for all (default: 540)")
    parser.add_argument("--output", type=Path, help="a folder for the figures (default: runs/gpu)")
    parser.add_argument("--cache", type=Path, metavar="ARCHIVE", help="of gpu_cache.py: unpacked and used")
    parser.add_argument(
        "--cache-directory", type=Path, default=gpu_cache.DIRECTORY, help=f"default: {gpu_cache.DIRECTORY}"
    )
    parser.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help=f"some of: {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy sizes, kernels interpreted")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, and print what came of it."""
    options = parse(arguments)
    start = time.monotonic()
    output = (options.output or ROOT / "runs" / "gpu").absolute()
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    for name in ("results.jsonl", "log.txt", "summary.txt", "tests.xml", "large.xml", "trace.json.gz"):
        (output / name).unlink(missing_ok=True)
    notes = Records(results, "run")
    notes.note(case="options", options={name: str(value) for name, value in vars(options).items()})
    with tempfile.TemporaryDirectory(prefix="mogeo-gpu-run-") as scratch:
        if options.rehearse:
            options.cache_directory = Path(scratch) / "cache"
        top = mirror(Path(scratch))
        if options.cache:
            unpacked = time.monotonic()
            notes.case("cache", lambda: {"archive": gpu_cache.unpack(options.cache, options.cache_directory)})
            print(f"{time.monotonic() - unpacked:6.1f} s  unpacked {options.cache}", flush=True)
        chosen = [stage for stage in stages(options, output) if not options.stages or stage.name in options.stages]
        left = options.budget - (time.monotonic() - start)
        outcomes = conduct(chosen, left, output, environment(options, top, output), top)
    told = summary(read(results), outcomes)
    notes.note(case="end", seconds=round(time.monotonic() - start, 1))
    (output / "summary.txt").write_text(told + "\n", "utf-8")
    # What is read of a long output is its end: what failed has to be in it.
    print("\n" + (told if len(told) <= MOST_PRINTED else f"{told[:MOST_PRINTED]}\n… the rest is in summary.txt"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
