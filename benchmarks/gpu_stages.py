"""The stages of a run on a GPU: `gpu_run.py` starts each as a process of its own; a case is a line of JSON at once.

    environment  versions, card, clocks, whether a cache of Triton's fits, seconds to the first launch
    compile      what the cache lacks, on all cores, in the order of the run
    correctness  every kernel against fp64: error, bias, status, the same bits on every run; outputs poisoned before
    bandwidth    gram, combine and sketch beside a copy and PyTorch's own product (`kernels.py`)
    solver       graph replay, and within a step (`kernels.py`); the PSD part, by graph replay
    variants     the candidates that the kernels name, against each other, round by round
    step         the whole step at the shape of Qwen2.5-0.5B beside plain training; launches, host time, waiting
    long         rows and sketches on either side of what 32 bits count

On a CPU (`--device cpu`, with TRITON_INTERPRET=1) the same code runs at toy sizes, the kernels interpreted: that says
whether the run works, and nothing about a GPU.

Run: python benchmarks/gpu_run.py. One stage alone: python benchmarks/gpu_stages.py correctness --output runs/gpu
"""

from __future__ import annotations

import argparse
import copy
import gc
import gzip
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

if os.environ.get("TRITON_INTERPRET") == "1":  # before kernels are imported: what the tests do, for the same reasons
    from tests import triton_bf16, triton_speed

    triton_bf16.install()
    triton_speed.install()

import gpu_cache
import gpu_cases
import numpy as np
from gpu_cases import DTYPES, REAL, TOY, Case, Made, Sizes
from gpu_records import Figures, Records
from machine import clocks, data_sheet_bandwidth, describe
from timing import captured, copy_bandwidth, device_clock, interleaved, rounds_of, spread, synchronisation, wall_clock
from torch import Tensor

from mogeo.geometry import torch_backend, triton_backend
from mogeo.geometry.projection import SignedSketch
from mogeo.kernels import combine as combine_kernels
from mogeo.kernels import gram as gram_kernels
from mogeo.kernels import sketch as sketch_kernels
from tests.row_asserts import COMBINE_TOLERANCE, GRAM_TOLERANCE

#: What is timed beside mogeo: the product that it is held against, and what the memory gives.
CONTESTANTS = (
    "mogeo.gram", "rows @ rows.T", "mogeo.combine", "weights @ rows", "mogeo SignedSketch", "sum of all", "copy",
)  # fmt: skip
STEPPERS = ("plain", "mogeo", "mogeo uniform")
#: What waits for the device, as the profiler names it.
WAITING = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize",
)  # fmt: skip
CHUNK = 1 << 22


class Run(NamedTuple):
    """What a stage knows."""

    records: Records
    device: torch.device
    sizes: Sizes
    output: Path

    @property
    def on_gpu(self) -> bool:
        """Or on a CPU, as a rehearsal."""
        return self.device.type == "cuda"


# --------------------------------------------------------------------------------------------------------------------
# Environment and cache


def environment(run: Run) -> None:
    """What ran where."""
    run.records.case("machine", partial(_machine, run))
    run.records.case("cache", _cache)
    run.records.case("first launch", partial(_first_launch, run))


def _machine(run: Run) -> Figures:
    names = ("triton", "numpy", "transformers", "pytest", "pytest-xdist", "hypothesis", "torchjd", "quadprog")
    facts = describe(*names, device=run.device)
    facts["tools"] = {tool: shutil.which(tool) for tool in ("nvidia-smi", "compute-sanitizer", "ncu", "nvcc", "gcc")}
    return {"machine": facts, "device": str(run.device), "rehearsal": not run.on_gpu}


def _cache() -> Figures:
    """Whether the unpacked cache, if any, was filled for this Triton and these kernels."""
    directory = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    manifest = directory / gpu_cache.MANIFEST
    held = len(gpu_cache.entries(directory))
    found: Figures = {"directory": str(directory), "entries": held, "here": gpu_cache.here()}
    if not manifest.exists():
        return found | {"archive": "none"}
    told = json.loads(manifest.read_text())
    wrong = gpu_cache.misfits(told)
    return found | {"archive": told, "wrong": [f"the cache does not fit: {reason}" for reason in wrong]}


def _first_launch(run: Run) -> Figures:
    """From nothing to a Gram matrix: with a cache that fits, seconds at most."""
    before = gpu_cache.entries(Path(os.environ.get("TRITON_CACHE_DIR", "")))
    rows = gpu_cases.rows_of(Case(4, "bf16", run.sizes.columns, "aligned"), run.device)
    start = time.monotonic()
    triton_backend.gram(rows).tolist()
    took = time.monotonic() - start
    new = gpu_cache.entries(Path(os.environ.get("TRITON_CACHE_DIR", ""))) - before
    return {"first_launch_s": round(took, 3), "new_entries": len(new)}


def compile_all(run: Run) -> None:
    """Fill what the cache lacks. Interpreted kernels need none: then it is the plan that is made."""

    def case() -> Figures:
        launches = gpu_cache.plan(toy=not run.on_gpu)
        if not run.on_gpu:
            return {"planned": len(launches), "compiled": "nothing: interpreted"}
        directory = Path(os.environ["TRITON_CACHE_DIR"])
        before = len(gpu_cache.entries(directory))
        major, minor = torch.cuda.get_device_capability(run.device)
        left = run.records.end - time.monotonic()
        told = gpu_cache.fill(launches, left, os.cpu_count() or 1, architecture=10 * major + minor)
        slowest = sorted(told.pop("seconds_each"))[-5:]
        wrong = [f"{launched}: {error}" for launched, error in told["failed"].items()]
        return told | {"slowest_s": slowest, "entries_before": before, "wrong": wrong}

    run.records.case("fill", case)


# --------------------------------------------------------------------------------------------------------------------
# Correctness


def correctness(run: Run) -> None:
    """Every kernel, in every layout."""
    for case in gpu_cases.cases(run.sizes):
        run.records.case(case.name, partial(_judged, run, case))
    for dtype in DTYPES:
        for size, dimension in run.sizes.sketches:
            name = f"sketch {dtype} N={size} d={dimension}"
            run.records.case(name, partial(_sketched, run, size, dimension, dtype))


def poison(device: torch.device) -> None:
    """Leave NaN in memory that the allocator hands out next: what is not written shows."""
    large = torch.full((1 << (26 if device.type == "cuda" else 16),), torch.nan, device=device)
    small = [torch.full((1 << 10,), torch.nan, device=device) for _ in range(64)]
    del large, small


def exact_gram(rows: Tensor) -> Tensor:
    """G Gᵀ in fp64."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for chunk in rows.split(CHUNK, dim=1):
        wide = chunk.double()
        total += wide @ wide.T
    return total


def combination_error(rows: Tensor, weights: Tensor, found: Tensor, factor: float = 1.0) -> float:
    """The largest error of an entry, relative to Σ|w_k||g_k|; NaN if any is NaN."""
    worst = torch.zeros((), dtype=torch.float64, device=rows.device)
    tiny = torch.finfo(rows.dtype).smallest_normal
    for chunk, part in zip(rows.split(CHUNK, dim=1), found.split(CHUNK), strict=True):
        wide = chunk.double()
        reach = weights.abs() @ wide.abs() * abs(factor) + tiny
        error = (part.double() - weights @ wide * factor).abs() / reach
        worst = torch.where(error.isnan().any(), torch.nan, torch.maximum(worst, error.nan_to_num(torch.inf).max()))
    return float(worst)


def _judged(run: Run, case: Case) -> Figures:
    rows = gpu_cases.rows_of(case, run.device)
    poison(run.device)
    made = gpu_cases.make_all(rows)
    figures = judged(rows, made)
    same = all(_same_bits(made, gpu_cases.make_all(rows)) for _ in range(run.sizes.repeats))
    if not same:
        figures["wrong"].append(f"not the same bits on {run.sizes.repeats} runs")
    return figures | {"repeats": run.sizes.repeats, "same_bits": same}


def _same_bits(one: Made, other: Made) -> bool:
    return all(
        torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in (zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)])
    )


def judged(rows: Tensor, made: Made) -> Figures:
    """Errors against fp64, and which of them are too large."""
    (count, columns), dtype, device = rows.shape, rows.dtype, rows.device
    weights = gpu_cases.weights_of(count, device)
    exact = exact_gram(rows)
    norms = exact.diagonal().sqrt()
    reach = norms[:, None] * norms
    parts = [exact_gram(part) for part in rows.split([columns // 3 + 1, columns - columns // 3 - 1], dim=1)]
    found = made.gram.cpu()
    solved, gap, status = torch_backend.min_norm(
        found, gpu_cases.losses_of(count, torch.device("cpu")), "loss", 1.0, "raw"
    )
    corrected, _, _ = torch_backend.descent(found, weights.cpu())
    estimate = gpu_cases.estimate_of(found)
    psd_error = (made.psd.cpu() - torch_backend.psd_part(estimate)).abs().max()
    psd_unit = torch.linalg.matrix_norm(estimate, 2).clamp(min=1e-300)  # of a single row the estimate is zero
    length = float((weights @ exact @ weights).sqrt())
    limit = gpu_cases.max_norm_of(count, columns)
    factor = min(1.0, limit / length)
    figures: Figures = {
        "gram_error": float(((made.gram - exact).abs() / reach).max()),
        "gram_bias": float(((made.gram - exact).diagonal() / exact.diagonal()).mean()),
        "segments_error": float(((made.segments - torch.stack([*parts, exact])).abs() / reach).max()),
        "weights_error": float((made.weights.cpu() - solved).abs().max()),
        "gap_error": float((made.gap.cpu() - gap).abs() / found.diagonal().max()),
        "status": int(made.status),
        "descent_error": float((made.corrected.cpu() - corrected).abs().max()),
        "descent_status": int(made.descent_status),
        "psd_error": float(psd_error / psd_unit),
        "combine_error": combination_error(rows, weights, made.combined),
        "clipped_error": combination_error(rows, weights, made.clipped, factor),
        "measured_error": combination_error(rows, weights, made.measured, factor),
        "norm_error": abs(float(made.by_gram.squared_norm) / length**2 - 1),
        "measured_norm_error": abs(float(made.by_measure.squared_norm) / length**2 - 1),
        "factor_error": abs(float(made.by_gram.clip_factor) / factor - 1),
    }
    once = COMBINE_TOLERANCE[dtype] * 1.01
    allowed = {
        "gram_error": GRAM_TOLERANCE[dtype], "segments_error": GRAM_TOLERANCE[dtype], "weights_error": 1e-9,
        "gap_error": 1e-9, "descent_error": 1e-9, "psd_error": 1e-13, "combine_error": once,
        "clipped_error": once + 2e-6, "measured_error": 2 * once + 2e-6, "norm_error": 1e-5,
        "measured_norm_error": 1e-3, "factor_error": 1e-5, "status": int(status), "descent_status": 0,
    }  # fmt: skip
    # Not `>`: NaN is wrong, too.
    wrong = [
        f"{name} {figures[name]:.2e} over {most:.1e}" for name, most in allowed.items() if not figures[name] <= most
    ]
    if not torch.equal(made.gram, made.gram.T):
        wrong.append("the Gram matrix is not symmetric")
    if bool(made.nonfinite.any()):
        wrong.append("finite objectives are said not to be")
    return figures | {"wrong": wrong}


def _sketched(run: Run, size: int, dimension: int, dtype: str) -> Figures:
    """Against the CPU's sketch, in fp64."""
    generator = torch.Generator(run.device).manual_seed(size)
    gradient = torch.empty(size, dtype=DTYPES[dtype], device=run.device).normal_(generator=generator)
    poison(run.device)
    found = gpu_cases.sketch_of(gradient, dimension)
    expected = torch.zeros(dimension, dtype=torch.float64)
    SignedSketch([size], dimension, device=torch.device("cpu")).add_(expected, 0, gradient.cpu().double())
    error = float((found.cpu().double() - expected).norm() / expected.norm())
    same = all(torch.equal(found, gpu_cases.sketch_of(gradient, dimension)) for _ in range(run.sizes.repeats))
    most = 1e-13 if dtype == "fp64" else 2e-6
    wrong = [f"sketch_error {error:.2e} over {most:.0e}"] * (not error <= most) + ["not the same bits"] * (not same)
    return {"sketch_error": error, "same_bits": same, "wrong": wrong}


# --------------------------------------------------------------------------------------------------------------------
# Time


def _ceilings(run: Run) -> Any:
    from kernels import Ceilings

    clock = device_clock(run.device) if run.on_gpu else wall_clock(run.device)
    return Ceilings(run.device, clock, _copied(run), data_sheet_bandwidth(run.device))


def _copied(run: Run) -> float:
    """GB/s of a copy; of a small one in a rehearsal."""
    return copy_bandwidth(run.device, None if run.on_gpu else 1 << 22)


def bandwidth(run: Run) -> None:
    """What `kernels.py` measures, of fewer contestants."""
    from kernels import Failures, LeftOut, measure

    ceilings = _ceilings(run)
    run.records.note(case="copy", ok=True, gb_s=ceilings.copy, peak=ceilings.peak, clocks=clocks(run.device))

    def case(operations: tuple[str, ...], count: int, columns: int, dtype: str) -> Figures:
        left_out, failures = LeftOut(), Failures()
        found = measure(
            count, columns, dtype, run.sizes.rounds, False, ceilings, left_out, failures, operations, CONTESTANTS, 0.3
        )
        gc.collect()
        wrong = [f"{failure['name']}: {failure['error']}" for failure in failures.records]
        if not found:
            wrong.append("; ".join(f"{what}: {why}" for what, why in left_out.reasons.items()) or "nothing measured")
        return {"results": found, "not_measured": left_out.reasons, "wrong": wrong}

    for columns in run.sizes.widths:
        for count in run.sizes.timed:
            for dtype in ("bf16", "fp32"):
                work = partial(case, ("gram", "combine", "limit"), count, columns, dtype)
                run.records.case(f"K={count} N={columns} {dtype}", work)
    for columns in run.sizes.widths:
        for dtype in ("bf16", "fp32"):
            run.records.case(f"sketch N={columns} {dtype}", partial(case, ("sketch", "limit"), 2, columns, dtype))
    run.records.note(case="clocks after", ok=True, clocks=clocks(run.device))


def solver(run: Run) -> None:
    """What `kernels.py` measures, one Gram matrix of each family; and the PSD part of a symmetric Gaussian one."""
    from kernels import Failures, LeftOut, measure_solvers

    ceilings = _ceilings(run)

    def case(count: int) -> Figures:
        left_out, failures = LeftOut(), Failures()
        found = measure_solvers(
            (count,), 1, run.sizes.rounds, ceilings, left_out, failures, run.records.end, others=False
        )
        wrong = [f"{failure['name']}: {failure['error']}" for failure in failures.records]
        return {"results": found, "not_measured": left_out.reasons, "wrong": wrong}

    for count in run.sizes.timed:
        run.records.case(f"K={count}", partial(case, count))
    for count in run.sizes.timed:
        run.records.case(f"psd_part K={count}", partial(_projected, run, count))


def _projected(run: Run, count: int) -> Figures:
    """Microseconds, cold caches."""
    from tests.strategies import symmetric

    matrix = torch.from_numpy(symmetric(np.random.default_rng(count), count)).to(run.device)
    call: Callable[[], object] = partial(triton_backend.psd_part, matrix)
    call, reason = captured(call, run.device) if run.on_gpu else (call, None)
    clock = device_clock(run.device) if run.on_gpu else wall_clock(run.device)
    seconds = interleaved({"psd_part": call}, run.sizes.rounds, clock, 0.1)["psd_part"]
    return {"microseconds": spread([1e6 * value for value in seconds]), "not_captured": reason}


def variants(run: Run) -> None:
    """Candidates of a kernel in turn, on one set of rows that no cache holds; the first is the one in use."""
    copied = _copied(run)
    for count in run.sizes.timed:
        for dtype in ("bf16", "fp32"):
            for kernel in ("gram", "combine"):
                run.records.case(f"{kernel} K={count} {dtype}", partial(_raced, run, kernel, count, dtype, copied))
    for dtype in ("bf16", "fp32"):
        run.records.case(f"sketch {dtype}", partial(_raced, run, "sketch", 1, dtype, copied))


def _raced(run: Run, kernel: str, count: int, dtype: str, copied: float) -> Figures:
    columns, device = run.sizes.variants, run.device
    rows = gpu_cases.rows_of(Case(count, dtype, columns, "aligned"), device)
    size = columns * rows.element_size()
    calls: dict[str, Callable[[], object]] = {}
    if kernel == "gram":
        n_bytes = count * size
        for gram_variant in gram_kernels.candidates(count, rows.dtype):
            calls[gram_variant.name] = partial(gram_kernels.gram, rows, chosen=gram_variant)
    elif kernel == "combine":
        n_bytes = (count + 1) * size
        weights = gpu_cases.weights_of(count, device)
        for combine_variant in combine_kernels.candidates(count, rows.dtype):
            calls[combine_variant.name] = partial(combine_kernels.combine_, rows, weights, chosen=combine_variant)
    else:
        n_bytes = size
        dimension = (1 << 18) if run.on_gpu else (1 << 10)
        drawn = SignedSketch([columns], dimension, device=torch.device("cpu"))
        signs, (chunks,) = sketch_kernels.tables(drawn.signs.to(torch.int8), drawn.chunks, device)
        row = torch.zeros(dimension, device=device)
        for variant in sketch_kernels.candidates(rows.dtype):
            calls[variant.name] = partial(sketch_kernels.sketch_, row, rows[0], chunks, signs, chosen=variant)
    errors, wrong, how = {}, [], {}
    exact = exact_gram(rows) if kernel == "gram" else None
    for name, call in list(calls.items()):
        try:
            found = call()
            if exact is not None and isinstance(found, Tensor):
                diagonal = exact.diagonal()
                errors[name] = {"error": float((found - exact).abs().max() / diagonal.max()),
                                "bias": float(((found - exact).diagonal() / diagonal).mean())}  # fmt: skip
            if run.on_gpu:
                calls[name], how[name] = captured(call, device)
        except Exception as error:  # one variant that does not compile or launch: the others race
            wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])
            del calls[name]
    if not calls:
        return {"kernel": kernel, "k": count, "dtype": dtype, "n": columns, "results": [], "wrong": wrong}
    clock = device_clock(device) if run.on_gpu else wall_clock(device)
    results = []
    for index, (name, seconds) in enumerate(interleaved(calls, run.sizes.rounds, clock, 0.3).items()):
        rates = spread([n_bytes / value / 1e9 for value in seconds])
        told = {"variant": name, "default": index == 0 and not wrong, "ms": spread([1e3 * value for value in seconds])}
        results.append(told | {"gb_per_s": rates, "of_copy": rates["p50"] / copied, **errors.get(name, {})})
    return {
        "kernel": kernel, "k": count, "dtype": dtype, "n": columns, "results": results, "wrong": wrong,
        "not_captured": {name: reason for name, reason in how.items() if reason},
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The step


def step(run: Run) -> None:
    """Plain training, mgda-decoupled and constant weights, side by side; then what a step launches and waits for."""
    from step_overhead import MODELS, Setting, make_model

    model_name = "qwen-0.5b" if run.on_gpu else "qwen-shape-tiny"
    objectives = 4 if run.on_gpu else 2
    settings = [Setting(model_name, run.device, "fp32", objectives, tokens) for tokens in MODELS[model_name].tokens]
    with run.device:  # a CPU takes many seconds to draw the weights
        model = make_model(settings[0])
    for setting in settings[::-1]:
        run.records.case(f"{setting.tokens} tokens", partial(_compared, run, model, setting))
    for name in STEPPERS:
        if name != "plain":
            run.records.case(f"{name}: waiting", partial(_waiting, run, model, settings[0], name))
        run.records.case(f"{name}: launches", partial(_launches, run, model, settings[0], name))


def _compared(run: Run, model: torch.nn.Module, setting: Any) -> Figures:
    """Time round by round; memory of each as it is built, over what the others hold."""
    from step_overhead import release, steps_of

    steps: dict[str, Callable[[], None]] = {}
    peaks, held = {}, {}
    release(run.device)
    for name in STEPPERS:
        before = torch.cuda.memory_allocated(run.device) if run.on_gpu else 0
        steps[name] = steps_of(name, copy.deepcopy(model), setting)
        if run.on_gpu:
            torch.cuda.reset_peak_memory_stats(run.device)
        for _ in range(2):
            steps[name]()
        if run.on_gpu:
            torch.cuda.synchronize(run.device)
            peaks[name] = (torch.cuda.max_memory_allocated(run.device) - before) / 2**20
            held[name] = (torch.cuda.memory_allocated(run.device) - before) / 2**20
    rounds = max(run.sizes.rounds, 2)
    clock = wall_clock(run.device)
    records = list(rounds_of(steps, rounds, clock, 1))
    host = {name: spread([1e3 * _host_seconds(call, run.device) for _ in range(5)]) for name, call in steps.items()}
    results = []
    for name in STEPPERS:
        ratio = spread([record[name] / record["plain"] for record in records])
        told: Figures = {"contestant": name, "ms": spread([1e3 * record[name] for record in records]), "ratio": ratio}
        results.append(told | {"host_ms": host[name], "peak_mib": peaks.get(name), "held_mib": held.get(name)})
    figures = {"tokens": setting.tokens, "objectives": setting.objectives, "model": setting.model, "rounds": rounds}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del steps
    release(run.device)
    return figures | {"parameters": parameters, "results": results}


def _host_seconds(call: Callable[[], None], device: torch.device) -> float:
    """Until the call returns, the device idle before: what the host needs to launch it, unless its queue runs full."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _waiting(run: Run, model: torch.nn.Module, setting: Any, name: str) -> Figures:
    """Steps while torch refuses to wait for the device."""
    from step_overhead import release, steps_of

    call = steps_of(name, copy.deepcopy(model), setting)
    for _ in range(3):
        call()
    if not run.on_gpu:
        return {"refused": "nothing to refuse on a CPU"}
    torch.cuda.synchronize(run.device)
    wrong = []
    try:
        with synchronisation("error"):
            for _ in range(3):
                call()
    except RuntimeError as error:
        wrong.append(f"a step waits for the device: {error}"[:300])
    del call
    release(run.device)
    return {"steps": 3, "wrong": wrong}


def _launches(run: Run, model: torch.nn.Module, setting: Any, name: str) -> Figures:
    """One profiled step: kernels, copies, and calls that wait; the trace of mogeo's."""
    from step_overhead import release, steps_of

    call = steps_of(name, copy.deepcopy(model), setting)
    for _ in range(3):
        call()
    counted = _profiled(call, run.device, run.output / "trace.json" if name == "mogeo" else None)
    del call
    release(run.device)
    wrong = [f"a step waits: {counted['waits']}"] if counted["waits"] and name != "plain" else []
    return {"contestant": name, "counted": counted, "wrong": wrong}


def _profiled(call: Callable[[], None], device: torch.device, trace: Path | None) -> Figures:
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    for _ in range(2 if device.type == "cuda" else 1):  # a first profile pays for setting up
        with profile(activities=activities) as profiler:
            with record_function("one step"):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    events = profiler.events()
    (whole,) = (event for event in events if event.name == "one step" and event.device_type.name == "CPU")
    within = whole.time_range
    names = [
        event.name
        for event in events
        if event.device_type.name == "CPU" and within.start <= event.time_range.start <= within.end
    ]
    counts: dict[str, int] = {}
    for called in names:
        if called.startswith(("cuda", "cu")):
            counts[called] = counts.get(called, 0) + 1
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
        with trace.open("rb") as plain, gzip.open(trace.with_suffix(".json.gz"), "wb") as packed:
            shutil.copyfileobj(plain, packed)
        trace.unlink()
    return {
        "host_ms": (within.end - within.start) / 1e3,
        "kernels": sum(count for called, count in counts.items() if "LaunchKernel" in called),
        "copies": sum(count for called, count in counts.items() if "Memcpy" in called or "Memset" in called),
        "operators": sum(called.startswith("aten::") for called in names),
        "waits": {called: counts[called] for called in WAITING if called in counts},
        "calls": counts,
    }


# --------------------------------------------------------------------------------------------------------------------
# Long rows


def long(run: Run) -> None:
    """Indices on either side of 2³¹, and sketches of as many elements."""
    for columns in run.sizes.long:
        case = Case(2, "bf16", columns, "aligned")
        run.records.case(case.name, partial(_judged_once, run, case))
    for columns in run.sizes.long:
        run.records.case(f"sketch bf16 N={columns}", partial(_long_sketch, run, columns))


def _judged_once(run: Run, case: Case) -> Figures:
    """Five directions at once would not fit, nor need to."""
    rows = gpu_cases.rows_of(case, run.device)
    figures = judged(rows, gpu_cases.make_all(rows))
    del rows
    gc.collect()
    if run.on_gpu:
        torch.cuda.empty_cache()
    return figures


def _long_sketch(run: Run, columns: int) -> Figures:
    """All zero but the ends: they arrive, each in a bucket of its own or added up."""
    gradient = torch.zeros(columns, dtype=torch.bfloat16, device=run.device)
    gradient[:3] = gradient[-3:] = torch.tensor([1.0, 2.0, 3.0])
    found = gpu_cases.sketch_of(gradient, (1 << 20) if run.on_gpu else 1 << 10)
    values = sorted(float(value) for value in found[found != 0].abs().cpu())
    wrong = [] if values == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0] else [f"found {values}"]
    return {"found": values, "wrong": wrong}


# --------------------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Run], None]] = {
    "environment": environment,
    "compile": compile_all,
    "correctness": correctness,
    "bandwidth": bandwidth,
    "solver": solver,
    "variants": variants,
    "step": step,
    "long": long,
}


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of results.jsonl")
    parser.add_argument("--budget", type=float, default=600.0, help="no case starts after so many seconds")
    parser.add_argument("--few", action="store_true", help="K = 2 and 11 only, short rows, once: for a memory checker")
    parser.add_argument("--as", dest="name", help="the stage's name in results.jsonl")
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if arguments.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu: set TRITON_INTERPRET=1, so that the kernels run on a CPU")
    sizes = REAL if arguments.device.type == "cuda" else TOY
    if arguments.few:
        few = {"counts": (2, 11), "repeats": 1, "sketches": ((min(sizes.sketches)[0], 1000),)}
        sizes = sizes._replace(columns=min(sizes.columns, 100_000), **few)
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = Records(arguments.output / "results.jsonl", arguments.name or arguments.stage, arguments.budget)
    STAGES[arguments.stage](Run(records, arguments.device, sizes, arguments.output))
    sys.exit(1 if records.failed else 0)


if __name__ == "__main__":
    main()
