"""Rules for the kernels' machine code, compiled without a GPU: nothing spills, accesses are wide, units well chosen."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.kernels.machine_code import (
    ENOUGH_IN_FLIGHT,
    ENTRIES,
    FEW_IN_FLIGHT,
    PAGE,
    Code,
    Codes,
    Entry,
    page,
    read_json,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed"),
]

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.kernels.machine_code"]

# Bytes on the stack that pass with another Triton than that of docs/registers.md: it brings another ptxas, which lacks
# a few registers in places (3.6.0: up to 16 bytes; 3.9.0: up to 32). A kernel that keeps too much costs kilobytes.
OTHER_TRITONS = 32

# Bytes that a program may have.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

MOST_REGISTERS = 255  # NVIDIA has no more; on AMD's CDNA, from 257 on, no second wave fits on a SIMD unit


@pytest.fixture(scope="module")
def compiled() -> tuple[Codes, str]:
    """The table compiled, and Triton's version. In a process of its own, since this one may interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(COMMAND, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return read_json(done.stdout)


@pytest.fixture(scope="module")
def codes(compiled: tuple[Codes, str]) -> Codes:
    return compiled[0]


@pytest.fixture(scope="module")
def is_the_pages_triton(compiled: tuple[Codes, str]) -> bool:
    found = re.search(r"Triton (\d+\.\d+\.\d+)", PAGE.read_text())
    assert found, f"{PAGE} names no version of Triton"
    return found[1] == compiled[1]


def each(*kernels: str, but: str = "") -> pytest.MarkDecorator:
    """A test of each entry of some kernels (of all, if none is named), but for one case."""
    entries = [entry for entry in ENTRIES if not kernels or entry.kernel in kernels]
    entries = [entry for entry in entries if not but or entry.case != but]
    assert entries
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def offenders(codes: Codes, entry: Entry, keeps_the_rule: Callable[[Code], bool]) -> dict[str, Code]:
    assert tuple(codes[entry.name]) == entry.targets
    return {target: code for target, code in codes[entry.name].items() if not keeps_the_rule(code)}


def lanes(target: str) -> int:
    return 64 if target.startswith("gfx") else 32


@each()
def test_nothing_spills(codes: Codes, entry: Entry, is_the_pages_triton: bool) -> None:
    allowed = 0 if is_the_pages_triton else OTHER_TRITONS
    for target, code in codes[entry.name].items():
        assert code.stack <= allowed, (target, code)
        assert allowed or code.spills == 0, (target, code)


@each()
def test_registers(codes: Codes, entry: Entry) -> None:
    assert not offenders(codes, entry, lambda code: 0 < code.registers <= MOST_REGISTERS)


@each()
def test_shared_memory_is_there(codes: Codes, entry: Entry) -> None:
    for target, code in codes[entry.name].items():
        assert code.shared_memory <= SHARED_MEMORY[target], (target, code)


@each("gram", "reduce", "combine", "scale")
def test_lengths_are_made_wide_before_anything_is_added(codes: Codes, entry: Entry) -> None:
    """Triton takes an argument below 2³¹ for an int32, in which a sum with the size of a tile may wrap around."""
    assert not offenders(codes, entry, lambda code: code.narrow == 0)


PASSES = [entry for entry in ENTRIES if entry.kernel in ("gram", "combine", "sketch") and not entry.candidate]


@pytest.mark.parametrize("entry", PASSES, ids=lambda entry: entry.name)
def test_enough_bytes_are_in_flight(codes: Codes, entry: Entry, is_the_pages_triton: bool) -> None:
    """On an H100; how they are counted, docs/registers.md says."""
    if not is_the_pages_triton:
        pytest.skip("another version of Triton than that of docs/registers.md arranges loads otherwise")
    in_flight = codes[entry.name]["sm_90"].in_flight or 0.0
    assert (in_flight < ENOUGH_IN_FLIGHT) == (entry.name in FEW_IN_FLIGHT), in_flight


@each("gram", but="any strides")
def test_gram_loads_vectors(codes: Codes, entry: Entry) -> None:
    """Of every tile, in the loop and in the tail behind it; with segments, whose ends lie anywhere, in the loop."""
    from mogeo.kernels.gram import candidates

    by_segment = entry.case == "by segment"
    chosen = candidates(entry.count, entry.dtype)[entry.candidate]
    for target, code in codes[entry.name].items():
        assert code.function == f"gram_{chosen.kernel}"
        threads = chosen.threads if chosen.kernel == "rows" else lanes(target)
        vectors_of_tile = entry.count * chosen.block * entry.dtype.itemsize / 16 / threads
        assert code.loads_128 >= vectors_of_tile * (1 if by_segment else 2), (target, code)
        # Where the chunk is summed again in fp64, `dot` may load less at a time: that is as good as never.
        if not by_segment and (chosen.kernel == "rows" or entry.dtype == torch.float16):
            assert code.loads_other == 0, (target, code)


@each("combine")
def test_combine_loads_and_stores_vectors(codes: Codes, entry: Entry) -> None:
    """In the loop and in the tail, with sums in fp32 and in fp64. The other loads are of weights and Gram matrix."""
    loads = entry.count * (2 if entry.dtype == torch.float64 else 4)
    assert not offenders(codes, entry, lambda code: code.loads_128 >= loads)
    # The one narrow store is that of the sum of squares.
    assert not offenders(codes, entry, lambda code: code.stores_128 >= 2 and code.stores_other == 1)


@each("scale")
def test_scale_loads_and_stores_vectors(codes: Codes, entry: Entry) -> None:
    # The narrow load is that of the factor.
    assert not offenders(codes, entry, lambda code: code.loads_128 >= 1 and code.loads_other <= 1)
    assert not offenders(codes, entry, lambda code: code.stores_128 >= 1 and code.stores_other == 0)


@each("sketch")
def test_sketch_reads_side_by_side(codes: Codes, entry: Entry) -> None:
    """Rotations are arbitrary, so that no vector would be aligned: threads take one element each, side by side."""
    from mogeo.kernels.sketch import _SLICES, candidates

    loads = _SLICES * (candidates(entry.dtype)[entry.candidate].unroll + 1)  # of whole tiles, and of one that is cut
    assert not offenders(codes, entry, lambda code: code.loads_128 == 0 and code.loads_other >= loads)
    assert not offenders(codes, entry, lambda code: code.stores_128 == 0 and code.stores_other == _SLICES)


@each()
def test_only_dot_uses_tensor_cores(codes: Codes, entry: Entry) -> None:
    assert not offenders(codes, entry, lambda code: (code.tensor > 0) == (code.function == "gram_dot"))


def test_both_variants_are_in_the_table(codes: Codes) -> None:
    functions = {code.function for entry in ENTRIES for code in codes[entry.name].values()}
    assert functions == {
        "gram_rows", "gram_dot", "gram_reduce", "combine", "settle", "scale", "min_norm", "descent", "psd_part",
        "cagrad", "sketch", "sketch_reduce",
    }  # fmt: skip


@each("min_norm", "descent", "psd_part", "cagrad")
def test_solver_computes_in_fp64(codes: Codes, entry: Entry) -> None:
    assert not offenders(codes, entry, lambda code: code.fp64_fma > 0)


def test_page_is_up_to_date(compiled: tuple[Codes, str], is_the_pages_triton: bool) -> None:
    codes, version = compiled
    if not is_the_pages_triton:
        pytest.skip(f"Triton {version} is installed, docs/registers.md was made with another: not compared")
    assert page(codes, version) == PAGE.read_text(), f"run: python {' '.join(COMMAND[1:])} --write"
