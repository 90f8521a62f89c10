"""A cache of Triton's for a run on a GPU, filled ahead of time on a machine that has none.

    python benchmarks/gpu_cache.py plan --to plan.jsonl              needs torch
    python benchmarks/gpu_cache.py fill --plan plan.jsonl --archive gpu-cache.tar.xz [--minutes 20] [--workers 2]

Compiling is what a first run would spend its time on: a kernel takes seconds to a minute, and a run launches some four
hundred different ones. `plan` makes the calls of the run (`gpu_cases.py`) on tensors without data and writes down what
they would launch, in the order of the run. `fill` compiles that, until time is up, for sm_90, and packs what it has;
called again, it goes on where it stopped. `gpu_run.py --cache ARCHIVE` unpacks and uses it.

**The keys are the JIT's own.** `fill` does not compute them: it launches with `warmup=True`, through the very code that
looks a kernel up in the cache at a launch (`JITFunction.run`), under a driver that answers "sm_90" and has no device.
A key is made of the kernel's source and that of all it calls, the types of the arguments, which integers are 1 or
divisible by 16 and which pointers by 16 bytes, the constants and options, the target, the version of ptxas, some
environment variables (`TRITON_*` that change code: keep them unset), and every file of Triton's wheel. Hence `fill`
must run under the target machine's Triton, of the same wheel (its Python's minor version included), and the kernels
must not change afterwards. It needs no torch for that: where there is none, a stand-in offers what `kernels/` names of
it. The paths that Triton writes into a cache are absolute; unpacking rewrites them.

Launchers, small C extensions that Triton builds for every list of argument types, are in the archive as well.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[1]
#: Where a run keeps its cache.
DIRECTORY = Path("/tmp/mogeo-triton-cache")
MANIFEST = "mogeo-manifest.json"
ARCHITECTURE = 90  # H100 and H200

Launched = dict[str, Any]
"""A launch in JSON: stage, module and function of the kernel, arguments, options."""


# --------------------------------------------------------------------------------------------------------------------
# The plan


@contextlib.contextmanager
def noted(launches: list[Launched], stage: str = "", *, launch: bool = False) -> Iterator[None]:
    """Within, launches are written down; and carried out as well, if asked for."""
    from mogeo.kernels.target import Launch

    run = Launch.run

    def note(self: Launch) -> None:
        launches.append(
            {
                "stage": stage,
                "module": self.kernel.fn.__module__,
                "function": self.kernel.fn.__name__,
                "arguments": [_described(argument) for argument in self.arguments],
                "options": self.options,
            }
        )
        if launch:
            run(self)

    Launch.run = note  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.run = run  # type: ignore[method-assign]


def _described(argument: Any) -> Any:
    """What Triton specialises on; of integers a representative, so that alike launches look alike."""
    if hasattr(argument, "data_ptr"):
        # Memory from torch's allocator is aligned, so that an offset decides. (A tensor without data has no address.)
        aligned = (argument.storage_offset() * argument.element_size()) % 16 == 0
        return {"tensor": str(argument.dtype).removeprefix("torch."), "aligned": aligned}
    if isinstance(argument, bool) or not isinstance(argument, int) or argument == 1:
        return argument
    wide = 1 << 32 if argument >= 1 << 31 else 0
    return wide + (16 if argument % 16 == 0 else 17)


def plan(toy: bool = False) -> list[Launched]:
    """What a run launches, each once, in its order."""
    import torch
    from gpu_cases import REAL, TOY, work_of

    launches: list[Launched] = []
    for stage, work in work_of(TOY if toy else REAL):
        with noted(launches, stage):
            work(torch.device("meta"))
    return list({identity(launched): launched for launched in reversed(launches)}.values())[::-1]


def plan_of_tests(files: Sequence[str], *more: str) -> list[Launched]:
    """What the tests for a GPU launch, by running them without one (`gpu_launches.py`): takes some minutes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "launches.jsonl"
        from gpu_run import mirror

        top = mirror(Path(scratch))
        variables = {**os.environ, "GPU_LAUNCHES": str(path), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        variables["PYTHONPATH"] = os.pathsep.join(
            [str(top), str(top / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_launches", *files, *more]
        done = subprocess.run(command, cwd=top, env=variables, capture_output=True, text=True, check=False)
        if not path.exists():
            raise RuntimeError(f"the tests wrote down no launches:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        print(done.stdout[-300:].strip())
        return [json.loads(line) for line in path.read_text().splitlines()]


def identity(launched: Launched) -> str:
    """The same for launches of the same code."""
    return json.dumps({key: value for key, value in launched.items() if key != "stage"}, sort_keys=True)


# --------------------------------------------------------------------------------------------------------------------
# The fill


class Address:
    """A tensor, as far as a launch looks at it."""

    def __init__(self, dtype: Any, aligned: bool) -> None:
        self.dtype, self.address = dtype, 0 if aligned else 2

    def data_ptr(self) -> int:
        """Divisible by 16, or not."""
        return self.address

    def ptr_range(self) -> int:
        """For AMD's compiler: nothing is known."""
        return 1 << 40


class Driver:
    """A driver that knows its target and has no device."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """The first one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_device_interface(self) -> Any:
        """None is needed."""
        raise RuntimeError("no device here: kernels are compiled, not run")


def prepare(architecture: int = ARCHITECTURE) -> None:
    """Make `mogeo.kernels` importable, without torch and without installing anything, and launches compile only."""
    try:
        importlib.import_module("torch")
    except ImportError:
        sys.modules["torch"] = _stand_in()
        sys.modules["mogeo"] = package = types.ModuleType("mogeo")  # the real one asks for more of torch
        package.__path__ = []
    offer_kernels()
    from triton.runtime.driver import driver

    driver.set_active(Driver(architecture))


def offer_kernels() -> None:
    """Let `mogeo` and `mogeo.kernels` be those of this checkout, whatever may be installed."""
    if "mogeo.kernels" in sys.modules:
        return
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(
        "mogeo.kernels", ROOT / "kernels" / "__init__.py", submodule_search_locations=[str(ROOT / "kernels")]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["mogeo.kernels"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _stand_in() -> types.ModuleType:
    """As much of torch as the kernels' files name: dtypes, and which vendor this build is for."""

    class dtype:
        def __init__(self, name: str) -> None:
            self.name = name

        def __repr__(self) -> str:
            return f"torch.{self.name}"

    torch = types.ModuleType("torch")
    for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "int8", "bool"):
        setattr(torch, name, dtype(name))
    torch.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
    torch.device = type("device", (), {})  # type: ignore[attr-defined]
    torch.version = types.SimpleNamespace(hip=None)  # type: ignore[attr-defined]
    return torch


def compile_one(launched: Launched, launcher: bool = True) -> str:
    """Compile one launch, unless the cache has it; its key in the cache."""
    torch = importlib.import_module("torch")
    kernel = getattr(importlib.import_module(launched["module"]), launched["function"])
    arguments = [
        Address(getattr(torch, argument["tensor"]), argument["aligned"]) if isinstance(argument, dict) else argument
        for argument in launched["arguments"]
    ]
    compiled = kernel.run(*arguments, grid=(1,), warmup=True, **launched["options"])
    if launcher:
        _build_launcher(compiled)
    return str(compiled.hash)


def _build_launcher(compiled: Any) -> None:
    """What a launch builds beside the kernel. Nothing of it is loaded: that fails without a GPU."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    build._load_module_from_path = lambda name, path: types.SimpleNamespace(launch=None)
    with contextlib.suppress(AttributeError):  # the functions that a loaded module would have
        driver.CudaUtils()
    with contextlib.suppress(AttributeError):  # from Triton 3.7 on, one of these functions launches everything
        driver.CudaLauncher(compiled.src, compiled.metadata)


def _stand_in_for_libcuda(folder: Path) -> bool:
    """An empty libcuda.so.1 to link launchers against, named by TRITON_LIBCUDA_PATH; False without a C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        return False
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    done = subprocess.run([*command, "-x", "c", os.devnull], capture_output=True, check=False)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return done.returncode == 0


def _work(launched: Launched, launcher: bool) -> tuple[float, str | None]:
    """In a worker: seconds it took, and the error, if any."""
    start = time.monotonic()
    try:
        compile_one(launched, launcher)
    except Exception as error:
        return time.monotonic() - start, f"{type(error).__name__}: {error}"[:300]
    return time.monotonic() - start, None


def fill(
    launches: list[Launched], seconds: float, workers: int, *, launchers: bool = True, architecture: int = ARCHITECTURE
) -> dict[str, Any]:
    """Compile into TRITON_CACHE_DIR what it lacks, in order, until time is up; how many, how long, what failed."""
    end, start = time.monotonic() + seconds, time.monotonic()
    told: dict[str, Any] = {"planned": len(launches), "tried": 0, "seconds_each": [], "failed": {}}
    with tempfile.TemporaryDirectory() as scratch:
        launchers = launchers and _stand_in_for_libcuda(Path(scratch))
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare, initargs=(architecture,))
        waiting, running = iter(launches), {}
        try:
            for launched in itertools.islice(waiting, workers):
                running[pool.submit(_work, launched, launchers)] = launched
            while running and time.monotonic() < end:
                done, _ = wait(running, timeout=max(0.0, end - time.monotonic()), return_when=FIRST_COMPLETED)
                for future in done:
                    launched = running.pop(future)
                    took, error = future.result()
                    told["tried"] += 1
                    told["seconds_each"].append(round(took, 2))
                    if error:
                        told["failed"][identity(launched)] = error
                    for following in itertools.islice(waiting, 1):
                        running[pool.submit(_work, following, launchers)] = following
        finally:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # what is still compiled would outlast its time
                process.kill()
            for process in processes:
                process.join()
    return told | {"seconds": round(time.monotonic() - start, 1), "workers": workers}


# --------------------------------------------------------------------------------------------------------------------
# The archive


def entries(directory: Path) -> set[str]:
    """Names of what a cache holds: kernels and launchers."""
    if not directory.is_dir():
        return set()
    return {
        path.parent.name for path in directory.glob("*/*") if path.name.startswith("__grp__") or path.suffix == ".so"
    }


def here() -> dict[str, str]:
    """What a cache has to agree with."""
    import triton
    from triton.runtime.cache import triton_key

    sources = b"".join(path.read_bytes() for path in sorted((ROOT / "kernels").glob("*.py")))
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "kernels": hashlib.sha256(sources).hexdigest()[:16],
    }


def misfits(manifest: dict[str, Any]) -> list[str]:
    """Why a cache that was filled elsewhere does not fit here, if so."""
    return [f"{what}: {manifest.get(what)} there, {value} here" for what, value in here().items()
            if manifest.get(what) != value]  # fmt: skip


def pack(directory: Path, archive: Path, facts: dict[str, Any]) -> None:
    """Write directory and manifest as tar.xz, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).write_text(json.dumps(here() | facts, indent=1))
    partial = archive.with_name(archive.name + ".part")
    # What a launch needs: the stages of compilation before the binary are several times as large, and Triton reads
    # those that are there.
    with tarfile.open(partial, "w:xz", preset=6) as tar:
        for path in sorted([directory / MANIFEST, *directory.glob("*/*")]):
            if path.suffix in (".json", ".cubin", ".so"):
                tar.add(path, path.relative_to(directory))
    partial.replace(archive)


def unpack(archive: Path, directory: Path) -> dict[str, Any]:
    """Unpack, with the absolute paths inside rewritten; the manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(directory, filter="data")
    for group in directory.glob("*/__grp__*"):
        names = [name for name in json.loads(group.read_text())["child_paths"] if (group.parent / name).exists()]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    found: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    return found


def main() -> None:
    """Plan or fill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "fill"))
    parser.add_argument("--plan", type=Path, help="fill: a plan made elsewhere (default: make it)")
    parser.add_argument("--to", type=Path, default=Path("plan.jsonl"), help="plan: where to write it")
    parser.add_argument("--tests", action="store_true", help="plan: what `pytest -m gpu` launches, too (some minutes)")
    parser.add_argument("--archive", type=Path, default=Path("gpu-cache.tar.xz"), help="fill: grows, if it exists")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help=f"fill: the cache (default: {DIRECTORY})")
    parser.add_argument("--minutes", type=float, default=20.0, help="fill: stop after that (default: 20)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="fill: processes")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="fill: what these stages launch")
    parser.add_argument("--most", type=int, help="fill: at most that many launches")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    if arguments.what == "plan" or not arguments.plan:
        offer_kernels()
    if arguments.what == "plan":
        launches = plan()
        if arguments.tests:
            from gpu_run import TESTS

            launches += plan_of_tests(TESTS)
            launches = list({identity(launched): launched for launched in reversed(launches)}.values())[::-1]
        arguments.to.write_text("".join(json.dumps(launched) + "\n" for launched in launches))
        print(f"{len(launches)} launches, written to {arguments.to}")
        return
    os.environ["TRITON_CACHE_DIR"] = str(arguments.directory)
    given = arguments.plan.read_text().splitlines() if arguments.plan else None
    launches = plan() if given is None else [json.loads(line) for line in given]
    if arguments.archive.exists():
        manifest = unpack(arguments.archive, arguments.directory)
        if wrong := misfits(manifest):
            parser.error(f"{arguments.archive} was filled for another Triton or other kernels ({'; '.join(wrong)})")
    chosen = [launched for launched in launches if not arguments.only or launched["stage"] in arguments.only]
    told = fill(chosen[: arguments.most], 60 * arguments.minutes, arguments.workers)
    held = len(entries(arguments.directory))
    pack(arguments.directory, arguments.archive, {"entries": held, "planned": len(launches), "tried": told["tried"]})
    each = sorted(told.pop("seconds_each")) or [0.0]
    print(
        f"{told['tried']} of {len(launches)} launches in {told['seconds']} s by {told['workers']} processes; ", end=""
    )
    print(
        f"seconds each: median {each[len(each) // 2]}, most {each[-1]}, all {sum(each):.0f}; {held} entries, ", end=""
    )
    print(f"{arguments.archive.stat().st_size / 2**20:.1f} MiB; failed: {len(told['failed'])}")
    for launched, error in told["failed"].items():
        print(f"failed: {launched}: {error}")


if __name__ == "__main__":
    main()
