"""The run on a GPU, as far as a CPU can hold it: deadlines, what failures leave behind, the cache, the report.

The rehearsal of the whole run is in benchmarks/test_scripts.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_cache
import gpu_report
import gpu_run
import timing
from gpu_records import SPOILT, Records, read

from tests.profiles import slow_but

ROOT = Path(__file__).absolute().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(script: str, *, name: str = "stage", seconds: float = 20.0, needs: str | None = None) -> gpu_run.Stage:
    """A stage that runs a script."""
    return gpu_run.Stage(name, seconds, [sys.executable, "-c", script], needs)


def conducted(stages: list[gpu_run.Stage], output: Path, budget: float = 60.0) -> dict[str, str]:
    """How each stage ended."""
    return {o.stage: o.how for o in gpu_run.conduct(stages, budget, output, dict(os.environ), output)}


# --------------------------------------------------------------------------------------------------------------------
# The conductor


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_or_is_not_there_does_not_stop_the_next(tmp_path: Path) -> None:
    hang = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    stages = [
        python("raise SystemExit(9)", name="means something")._replace(codes={9: "failed: errors of memory"}),
        python("raise SystemExit(7)", name="fails"),
        python(f"{hang}; open('child', 'w').write('x'); time.sleep(600)", name="hangs", seconds=5.0),
        python("", name="absent", needs="no-such-program"),
        gpu_run.Stage("unknown", 5.0, ["/no/such/program"]),
        python("print('fine')", name="works"),
    ]
    start = time.monotonic()
    ended = conducted(stages, tmp_path)
    assert time.monotonic() - start < 90
    assert ended.pop("unknown").startswith("failed (")
    assert ended == {
        "means something": "failed: errors of memory",
        "fails": "failed (7)",
        "hangs": "killed at its deadline",
        "absent": "left out: no-such-program is not there",
        "works": "done",
    }
    assert [record["outcome"] for record in read(tmp_path / "results.jsonl")][:2] == list(ended.values())[:2]
    assert "fine" in (tmp_path / "log.txt").read_text()


def test_all_that_a_stage_started_ends_with_it(tmp_path: Path) -> None:
    child = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    script = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}])
while not (os.path.exists("pid") and os.path.getsize("pid")): time.sleep(0.05)
"""
    assert conducted([python(script)], tmp_path) == {"stage": "done"}
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")


@pytest.mark.slow
def test_the_budget_is_kept_and_shared(tmp_path: Path) -> None:
    """Three stages that would take all there is: each has its share, and what is not started is said."""
    stages = [python("import time; time.sleep(600)", name=name, seconds=300.0) for name in ("a", "b", "c")]
    start = time.monotonic()
    ended = conducted(stages, tmp_path, budget=12.0)
    assert time.monotonic() - start < 40
    assert ended == {"a": "killed at its deadline", "b": "killed at its deadline", "c": "left out: no time left"}


def test_a_stage_with_a_spoilt_context_goes_on_in_a_fresh_process(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
from gpu_records import Records
records = Records(Path("results.jsonl"), "stage")
def spoil(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
records.case("first", lambda: {{"n": 1}})
records.case("second", spoil)
records.case("third", lambda: {{"n": 3}})
"""
    assert conducted([python(script)], tmp_path) == {"stage": "done"}
    cases = [record for record in read(tmp_path / "results.jsonl") if "case" in record]
    assert [(record["case"], record["ok"]) for record in cases] == [("first", True), ("second", False), ("third", True)]


# --------------------------------------------------------------------------------------------------------------------
# The records


def test_a_failing_case_is_a_line_and_so_is_the_next(tmp_path: Path) -> None:
    records = Records(tmp_path / "results.jsonl", "stage")

    def fail() -> None:
        raise ValueError("no such luck")

    records.case("fails", fail)
    records.case("is wrong", lambda: {"error_found": float("nan"), "wrong": ["nan over 1e-6"]})
    records.case("works", lambda: {"figure": 1.5})
    records.case("works", fail)  # done before: not again
    assert records.failed == 2
    lines = read(tmp_path / "results.jsonl")
    assert [(line["case"], line["ok"]) for line in lines] == [("fails", False), ("is wrong", False), ("works", True)]
    assert lines[0]["error"] == "ValueError: no such luck"
    assert lines[1]["error_found"] == "nan"


def test_what_no_time_is_left_for_is_a_line(tmp_path: Path) -> None:
    records = Records(tmp_path / "results.jsonl", "stage", budget=-1.0)
    records.case("late", lambda: {})
    (line,) = read(tmp_path / "results.jsonl")
    assert line["left_out"] == "no time left"


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    Records(tmp_path / "results.jsonl", "stage").note(case="whole")
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"stage": "stage", "ca')
    assert [line["case"] for line in read(tmp_path / "results.jsonl")] == ["whole"]


def test_an_error_that_spoils_the_context_ends_the_process(tmp_path: Path) -> None:
    records = Records(tmp_path / "results.jsonl", "stage")

    def spoil() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(SystemExit) as ended:
        records.case("spoils", spoil)
    assert ended.value.code == SPOILT


# --------------------------------------------------------------------------------------------------------------------
# The mirror, and what pytest finds there

# What the tests use and a machine with a GPU may lack.
ABSENT = (
    "quadprog", "qpsolvers", "torchjd", "trl", "datasets", "lion_pytorch", "pytorch_optimizer", "gguf", "openai",
    "fastapi", "uvicorn",
)  # fmt: skip
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
def test_tests_for_a_gpu_are_collected_where_packages_are_missing_and_nothing_is_installed(tmp_path: Path) -> None:
    """In the mirror, with kernels that nobody interprets; and the run names every file that has any."""
    top = gpu_run.mirror(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(tmp_path), str(top)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert found == set(gpu_run.TESTS)


def test_the_mirror_has_the_kernels_and_leaves_nothing_in_the_checkout(tmp_path: Path) -> None:
    top = gpu_run.mirror(tmp_path)
    assert (top / "mogeo" / "kernels" / "gram.py").exists()
    assert (top / "mogeo" / "optimizer.py").samefile(ROOT / "mogeo" / "optimizer.py")
    assert not (top / ".git").exists()


# --------------------------------------------------------------------------------------------------------------------
# The cache

KEYS = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, "benchmarks")
import json, torch
import gpu_cache, gpu_cases
from mogeo.geometry import triton_backend
from mogeo.kernels.target import Launch

gpu_cache.prepare()
keys = []

def compile_only(self):
    keys.append(self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.options).hash)

Launch.run = compile_only
case = gpu_cases.Case(2, "bf16", 4096, sys.argv[1])
rows = gpu_cases.rows_of(case, torch.device("cpu"))
triton_backend.gram(rows)
triton_backend.combine(rows, gpu_cases.weights_of(2, rows.device), torch.empty(4096, dtype=rows.dtype))
launched = len(gpu_cache.entries(gpu_cache.Path(os.environ["TRITON_CACHE_DIR"])))

planned = []
with gpu_cache.noted(planned):
    rows = gpu_cases.rows_of(case, torch.device("meta"))
    triton_backend.gram(rows)
    triton_backend.combine(rows, gpu_cases.weights_of(2, rows.device), torch.empty_like(rows[0]))
again = json.loads(json.dumps(planned))  # by way of a file
others = [gpu_cache.compile_one(launch, launcher=False) for launch in again]
print(json.dumps({"launched": keys, "planned": others, "entries": launched, "after":
    len(gpu_cache.entries(gpu_cache.Path(os.environ["TRITON_CACHE_DIR"])))}))
"""


@needs_triton
@pytest.mark.parametrize("layout", ["aligned", "offset"])
@pytest.mark.slow
def test_a_plan_has_the_keys_of_the_launches(layout: str, tmp_path: Path) -> None:
    """Tensors with data, launched through Triton's own code, find what was compiled from a plan without any."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", KEYS, layout], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**variables, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(set(found["launched"])) == 3
    assert found["planned"] == found["launched"]
    assert found["after"] == found["entries"] == 3


@needs_triton
@pytest.mark.slow
def test_a_cache_is_filled_with_torch_or_without_and_moves(tmp_path: Path) -> None:
    """Two launches, compiled beside torch; a machine without it, and another folder, find both in the archive."""
    launches = [launch for launch in gpu_cache.plan(toy=True) if launch["function"] in ("_settle", "_scale")][:2]
    plan = tmp_path / "plan.jsonl"
    plan.write_text("".join(json.dumps(launch) + "\n" for launch in launches))
    (tmp_path / "sitecustomize.py").write_text(BLOCK.replace(repr(ABSENT), repr(("torch",))))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}

    def fill(directory: str, path: Path) -> set[str]:
        """Keys of the kernels in the cache afterwards."""
        command = [sys.executable, "benchmarks/gpu_cache.py", "fill", "--plan", str(plan), "--workers", "1"]
        command += ["--archive", str(tmp_path / "cache.tar.xz"), "--directory", str(tmp_path / directory)]
        environment = {**variables, "PYTHONPATH": str(path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "failed: 0" in done.stdout
        return {path.parent.name for path in (tmp_path / directory).glob("*/*.cubin")}

    with_torch = fill("one", gpu_run.mirror(tmp_path))
    assert len(with_torch) == 2
    assert fill("other", tmp_path) == with_torch
    assert not list((tmp_path / "other").glob("*/*.ttir"))  # of what is compiled, the archive holds none: nothing was
    manifest = json.loads((tmp_path / "other" / gpu_cache.MANIFEST).read_text())
    assert gpu_cache.misfits(manifest) == []
    assert gpu_cache.misfits(manifest | {"kernels": "changed"}) != []
    for group in (tmp_path / "other").glob("*/__grp__*"):
        children = json.loads(group.read_text())["child_paths"].values()
        assert all(Path(child).parent == group.parent for child in children)


@needs_triton
@pytest.mark.slow
def test_the_plan_holds_what_the_stages_launch() -> None:
    """At toy sizes, under the interpreter: every launch of a stage is one that was planned."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the interpreter")
    from gpu_cases import TOY
    from gpu_stages import Run, correctness, long, variants

    planned = {gpu_cache.identity(launch) for launch in gpu_cache.plan(toy=True)}
    launched: list[gpu_cache.Launched] = []
    path = Path(os.devnull)
    for stage in (variants, long, correctness):
        records = Records(path, stage.__name__)
        with gpu_cache.noted(launched, launch=True):
            stage(Run(records, torch.device("cpu"), TOY._replace(repeats=0, rounds=1, counts=(2,)), path))
        assert not records.failed
    assert launched
    assert {gpu_cache.identity(launch) for launch in launched} <= planned


@needs_triton
@pytest.mark.parametrize("contestant", slow_but(["mogeo", "mogeo uniform"], "mogeo"))
def test_the_plan_holds_what_a_step_launches(contestant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model, decided by the kernels as on a GPU."""
    from gpu_cases import _stepped
    from step_overhead import Setting, make_model, steps_of

    from tests.deciders import let_decide

    let_decide("device", monkeypatch)
    setting = Setting("qwen-shape-tiny", torch.device("cpu"), "fp32", 2, 128)
    model = make_model(setting)
    step = steps_of(contestant, model, setting)
    launched: list[gpu_cache.Launched] = []
    with gpu_cache.noted(launched, launch=True):
        step()
    planned: list[gpu_cache.Launched] = []
    with gpu_cache.noted(planned):
        _stepped(sum(parameter.numel() for parameter in model.parameters()), 2, torch.device("meta"))
    assert launched
    assert {gpu_cache.identity(launch) for launch in launched} <= {gpu_cache.identity(launch) for launch in planned}


@needs_triton
@pytest.mark.slow
def test_the_plan_can_hold_what_tests_launch() -> None:
    """A kernel's own test, and a property of the backend "cuda", which a CPU has to skip otherwise."""
    chosen = "gram_of_one_block or (cuda and (mixes_huge or one_segment))"
    launches = gpu_cache.plan_of_tests(
        ["tests/geometry/test_triton_backend.py", "tests/geometry/test_ops.py"], "-k", chosen
    )
    assert {launch["stage"] for launch in launches} == {"tests"}
    assert {"_gram_rows", "_gram_reduce"} <= {launch["function"] for launch in launches}


def test_what_a_cut_short_fill_has_serves_every_stage() -> None:
    stages = [launch["stage"] for launch in gpu_cache.plan()]
    assert set(stages[: len(stages) // 2]) == {"correctness", "bandwidth", "solver", "variants", "step", "long"}


# --------------------------------------------------------------------------------------------------------------------
# The benchmarks that the stages are made of


def broken(*arguments: object, **options: object) -> torch.Tensor:
    """A kernel that does not run."""
    raise RuntimeError("out of resource: shared memory")


def test_a_contestant_that_fails_is_written_down_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", ROOT / "benchmarks" / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)  # by its path: `kernels` is also what lies at the top level
    spec.loader.exec_module(kernels)
    monkeypatch.setattr(kernels.mogeo, "gram", broken)
    ceilings = kernels.Ceilings(torch.device("cpu"), timing.wall_clock(torch.device("cpu")), 10.0, None)
    failures = kernels.Failures()
    found = kernels.measure(2, 300, "fp32", 1, False, ceilings, kernels.LeftOut(), failures, ("gram", "combine"))
    assert [(failure["name"], failure["k"]) for failure in failures.records] == [("mogeo.gram", 2)]
    assert {"rows @ rows.T", "mogeo.combine"} <= {record["name"] for record in found}


@pytest.mark.slow
def test_a_mode_that_fails_is_written_down_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import memory_modes
    from step_overhead import Setting

    original = memory_modes.optimizer_of
    bad = memory_modes.Mode({"weighting": "uniform"})
    listed = {memory_modes.PLAIN: memory_modes.Mode(None), "bad": bad, memory_modes.EXACT: memory_modes.Mode({})}
    monkeypatch.setattr(
        memory_modes, "optimizer_of", lambda mode, base: (broken if mode is bad else original)(mode, base)
    )
    setting = Setting("qwen-shape-tiny", torch.device("cpu"), "fp32", 2, 128)
    course = memory_modes.Course()
    clock = timing.wall_clock(setting.device)
    *_, last = memory_modes.time_of(listed, setting, 1, 2, clock, course)
    assert set(last) == {memory_modes.PLAIN, memory_modes.EXACT}
    assert dict(memory_modes.memory_by_mode(listed, setting, 1, course)).keys() == last.keys()
    assert set(course.failed) == {"time: bad", "memory: bad"}


# --------------------------------------------------------------------------------------------------------------------
# The report

GPU = {"stage": "environment", "case": "machine", "ok": True, "rehearsal": False}
MACHINE = {"gpu": "a made-up GPU", "torch": "2", "date": "2026-01-01 00:00 UTC", "cpu": "x", "threads": "1"}


def timed(name: str, operation: str, count: int, ms: float, share: float) -> dict[str, object]:
    """A record of `kernels.measure`, of 1e8 bf16 columns."""
    spread = {"p20": ms, "p50": ms, "p80": ms, "samples": 1}
    rates = {"p20": 3e3 * share, "p50": 3e3 * share, "p80": 3e3 * share, "samples": 1}
    where = {"k": count, "n": 10**8, "dtype": "bf16", "timed": "graph", "flops_per_byte": float(count)}
    return {"name": name, "operation": operation, "ms": spread, "gb_per_s": rates, "of_copy": share, **where}


def made_up() -> list[dict[str, object]]:
    """Figures of no machine: some targets met, some not, some never measured."""
    results = [
        timed("mogeo.gram", "gram", 4, 1.0, 0.95), timed("rows @ rows.T", "gram", 4, 3.0, 0.3),
        timed("mogeo.gram", "gram", 8, 2.0, 0.5), timed("rows @ rows.T", "gram", 8, 2.2, 0.45),
        timed("mogeo.combine", "combine", 4, 1.0, 0.91),
    ]  # fmt: skip
    quantiles = {"p20": 1.0, "p50": 12.0, "p80": 1.0}
    family = {"k": 4, "family": "f", "not_optimal": 0, "microseconds": {"mogeo, graph replay": quantiles}}
    cold = {"inside_a_step": {"difference": quantiles, "events": {**quantiles, "p50": 25.0}}}
    ratio = {"p20": 1.0, "p50": 1.021, "p80": 1.1}
    step = {"contestant": "mogeo", "ms": quantiles, "ratio": ratio, "host_ms": quantiles, "peak_mib": 1234.0}
    return [
        {**GPU, "machine": MACHINE},
        {"stage": "bandwidth", "case": "copy", "ok": True, "gb_s": 3000.0, "peak": 3350.0},
        {"stage": "bandwidth", "case": "K=4", "ok": True, "results": results},
        {"stage": "solver", "case": "K=4", "ok": True, "results": [{**family, **cold}]},
        {"stage": "solver", "case": "psd_part K=4", "ok": True, "microseconds": {**quantiles, "p50": 34.5}},
        {"stage": "step", "case": "4096 tokens", "ok": True, "tokens": 4096, "results": [step]},
        *({"stage": "step", "case": f"mogeo: {what}", "ok": True} for what in ("waiting", "launches")),
        {"stage": "correctness", "case": "K=8 bf16", "ok": False, "error": "gram_error 3e-3 over 1e-6"},
        {"stage": "long", "case": "N=3", "left_out": "no time left"},
        {"stage": "memcheck", "outcome": "left out: compute-sanitizer is not there", "seconds": 0.0},
    ]


def test_targets_are_met_or_not_or_not_measured() -> None:
    verdicts = {target.name: (target.verdict, target.figure) for target in gpu_report.targets(made_up())}

    def of(*words: str) -> list[tuple[str, str]]:
        return [verdict for name, verdict in verdicts.items() if all(word in name for word in words)]

    assert of("gram, K = 4, bf16", "of a copy") == [("met", "95%")]
    assert of("gram, K = 8, bf16", "of a copy") == [("NOT met", "50%")]
    assert of("combine, K = 4, bf16") == [("met", "91%")]
    assert of("combine, K = 2, bf16") == of("gram, K = 4, fp32", "of a copy") == [("not measured", "")]
    assert of("gram, K = 4, bf16", "G @ G.T") == [("met", "3.00 ×")]
    assert of("gram, K = 8, bf16", "G @ G.T") == [("NOT met", "1.10 ×")]
    assert of("replayed") == of("difference") == [("met", "12.0 µs")]
    assert of("events") == [("NOT met", "25.0 µs")]
    assert of("step at 4,096") == [("met", "+2.1%")]
    assert of("mogeo: a step never waits") == [("met", "")]
    assert of("mogeo uniform: a step never waits") == [("not measured", "")]


def test_nothing_measured_is_nothing_met() -> None:
    assert {target.verdict for target in gpu_report.targets([])} == {"not measured"}
    assert all(gpu_report.MISSING in page or "unknown" in page or not page.count("|")
               for page in gpu_report.pages([]).values())  # fmt: skip


def test_figures_take_their_places_in_the_docs_and_failures_with_them(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(record) + "\n" for record in made_up()))
    names = list(gpu_report.pages([]))
    page = "# Page\n" + "".join(f"\n<!-- gpu: {name} -->\nold\n<!-- /gpu: {name} -->\n" for name in names) + "end\n"
    (tmp_path / "page.md").write_text(page)
    for _ in range(2):  # twice: what stood there is replaced
        assert gpu_report.main([str(results), "--write", "--docs", str(tmp_path)]) == 0
    written = (tmp_path / "page.md").read_text()
    assert "old" not in written
    assert written.endswith("end\n")
    assert written.count("| gram, K = 4, bf16: at least 90% of a copy, N = 1e8 | met | 95% |") == 1
    assert "**failed**: gram_error 3e-3 over 1e-6" in written
    assert " | 34.5 |\n" in written
    assert "left out: no time left" in written
    assert "compute-sanitizer is not there" in written
    assert (tmp_path / "images" / "gpu-roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_rehearsal_has_no_place_in_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps({**record, "rehearsal": True}) + "\n" for record in made_up()))
    with pytest.raises(SystemExit):
        gpu_report.main([str(results), "--write", "--docs", str(tmp_path)])
    assert "of a rehearsal" in capsys.readouterr().err


def test_a_marker_that_is_not_closed_is_named() -> None:
    with pytest.raises(ValueError, match="<!-- gpu: targets --> is not closed"):
        gpu_report.put("<!-- gpu: targets -->\n", gpu_report.pages([]))
