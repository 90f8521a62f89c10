"""The Triton kernels compiled ahead of time, without a GPU, and what their machine code looks like.

    python -m tests.kernels.machine_code            prints JSON: registers, stack, kinds of instructions
    python -m tests.kernels.machine_code --write    writes docs/registers.md

Run from the root of the repository, in a process of its own: Triton decides when it is imported whether it compiles or
interprets. Imported, this module offers the launch table and the page, and leaves Triton alone. What the code must look
like is said in `test_machine_code.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from mogeo.kernels.target import Launch
from tests.kernels import loads_in_flight

PAGE = Path(__file__).parents[2] / "docs" / "registers.md"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Columns of a model of 10^9 parameters: more than 2 GiB, which makes a difference to Triton on AMD's GPUs.
COLUMNS = 1 << 30
# Chunks of it, where segments or the caller decide how many.
CHUNKS = 1 << 15
# Buckets of a sketch of it.
BUCKETS = 1 << 18

# Kernels that pass over all elements, in whose main loops bytes on their way are counted.
IN_FLIGHT = ("gram_rows", "gram_dot", "combine", "sketch")

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# --------------------------------------------------------------------------------------------------------------------
# What is launched


@dataclasses.dataclass(frozen=True)
class Entry:
    """A launch of one kernel for K rows (or objectives) of one dtype."""

    kernel: str  #: a key of `_LAUNCHES`
    count: int  #: K
    dtype: torch.dtype
    case: str = ""  #: what is out of the ordinary
    candidate: int = 0  #: which of the kernel's `candidates`; the first is in use

    @property
    def name(self) -> str:
        text = f"{self.kernel} K={self.count} {DTYPE_NAMES[self.dtype]}"
        return f"{text}, {self.case}" if self.case else text

    @property
    def targets(self) -> tuple[str, ...]:
        """Where it is compiled: everywhere, unless that takes long and the rest of the table says as much."""
        if self.kernel in ("descent", "cagrad") or (self.kernel == "min_norm" and self.count <= 8) or self.candidate:
            return ("sm_90", "sm_100")
        if self.kernel == "combine" and self.count == 32:
            return ("sm_80", "sm_90", "sm_100")
        return TARGETS


_BF16, _FP16, _FP32, _FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Beside the variants in use, those that only hardware can tell from them: kernel, K, dtype, how many.
_CANDIDATES = (
    ("gram", 2, _BF16, 2), ("gram", 4, _BF16, 3), ("gram", 8, _BF16, 2),
    ("gram", 2, _FP32, 2), ("gram", 4, _FP32, 2), ("gram", 8, _FP32, 3),
    *(("combine", k, dtype, 2) for dtype in (_BF16, _FP32) for k in (2, 4, 8)),
    *(("sketch", 1, dtype, 3) for dtype in (_BF16, _FP32)),
)  # fmt: skip

ENTRIES = (
    *(Entry("gram", k, dtype) for dtype in (_BF16, _FP32) for k in (1, 2, 4, 7, 8, 16, 32)),
    *(Entry("gram", k, _FP32) for k in (10, 11)),
    *(Entry("gram", k, _FP16) for k in (4, 8)),
    Entry("gram", 4, _BF16, "by segment"),
    Entry("gram", 4, _BF16, "any strides"),
    Entry("reduce", 4, _FP64),
    Entry("reduce", 4, _FP64, "by segment"),
    *(Entry("combine", k, dtype) for dtype in (_BF16, _FP32) for k in (1, 2, 4, 8, 16, 32)),
    *(Entry("combine", 4, dtype) for dtype in (_FP16, _FP64)),
    Entry("combine", 4, _BF16, "no clipping"),
    *(Entry("settle", k, _FP64) for k in (4, 32)),
    *(Entry("scale", 1, dtype) for dtype in (_BF16, _FP32)),
    *(Entry("min_norm", k, _FP64) for k in (2, 4, 8, 16, 32)),
    Entry("min_norm", 4, _FP64, "l2, power 0.5"),
    *(Entry("descent", k, _FP64) for k in (4, 32)),
    *(Entry("psd_part", k, _FP64) for k in (4, 32)),
    *(Entry("cagrad", k, _FP64) for k in (4, 32)),
    *(Entry("sketch", 1, dtype) for dtype in (_BF16, _FP16, _FP32, _FP64)),
    Entry("sketch", 1, _BF16, "in one part"),
    Entry("sketch", 1, _BF16, "any dimension"),
    *(Entry("sketch_reduce", 1, dtype) for dtype in (_FP32, _FP64)),
    *(
        Entry(kernel, k, dtype, f"candidate {i + 1}", candidate=i)
        for kernel, k, dtype, count in _CANDIDATES
        for i in range(1, count)
    ),
)


def _empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gram(entry: Entry) -> Launch:
    from mogeo.kernels import gram

    chosen = gram.candidates(entry.count, entry.dtype)[entry.candidate]
    length = chosen.tiles * chosen.block
    pairs = entry.count * (entry.count + 1) // 2
    if entry.case == "any strides":
        rows = _empty(entry.count, 3 * COLUMNS + 1, dtype=entry.dtype)[:, ::3]  # neither strides nor N divisible by 2
    else:
        rows = _empty(entry.count, COLUMNS, dtype=entry.dtype)
    if entry.case == "by segment":
        return gram.launch(rows, _empty(CHUNKS + 1, dtype=torch.int64), length, _empty(pairs, CHUNKS), chosen)
    return gram.launch(rows, None, length, _empty(pairs, -(-rows.shape[1] // length)), chosen)


def _reduce(entry: Entry) -> Launch:
    from mogeo.kernels import gram

    segments = 100 if entry.case == "by segment" else 1
    ranges = _empty(segments, 2, dtype=torch.int64) if segments > 1 else None
    partials = _empty(entry.count * (entry.count + 1) // 2, CHUNKS)
    out = _empty(segments, entry.count, entry.count)
    return gram.launch_reduce(partials, ranges, out, add=False)


def _combine(entry: Entry) -> Launch:
    from mogeo.kernels import combine

    rows = _empty(entry.count, COLUMNS, dtype=entry.dtype)
    squares = _empty(4096)
    max_norm = None if entry.case == "no clipping" else 1.0
    chosen = combine.candidates(entry.count, entry.dtype)[entry.candidate]
    weights, matrix = _empty(entry.count), _empty(entry.count, entry.count)
    return combine.launch(rows, weights, rows[0], matrix, max_norm, squares, chosen)


def _settle(entry: Entry) -> Launch:
    from mogeo.kernels import combine

    weights, matrix = _empty(entry.count), _empty(entry.count, entry.count)
    return combine.launch_settle(_empty(4096), weights, matrix, _empty(3), 1.0, discard=True)


def _scale(entry: Entry) -> Launch:
    from mogeo.kernels import combine

    return combine.launch_scale(_empty(COLUMNS, dtype=entry.dtype), _empty(3))


def _min_norm(entry: Entry) -> Launch:
    from mogeo.kernels import min_norm

    k = entry.count
    absent, nonfinite = (_empty(k, dtype=torch.bool) for _ in range(2))
    outputs = (_empty(k), _empty(), _empty(dtype=torch.int64), None, nonfinite)
    how = ("l2", 0.5, "normalized") if entry.case else ("loss", 1.0, "raw")
    return min_norm.launch(_empty(k, k), _empty(k), absent, outputs, *how, propagate=False)


def _descent(entry: Entry) -> Launch:
    from mogeo.kernels import descent

    k = entry.count
    return descent.launch(_empty(k, k), _empty(k), _empty(k), _empty(k), _empty(dtype=torch.int64))


def _psd_part(entry: Entry) -> Launch:
    from mogeo.kernels import psd

    return psd.launch(_empty(entry.count, entry.count), _empty(entry.count, entry.count))


def _cagrad(entry: Entry) -> Launch:
    from mogeo.kernels import cagrad

    k = entry.count
    return cagrad.launch(_empty(k, k), _empty(k), _empty(k), _empty(), _empty(dtype=torch.int64), 0.4, clipped=True)


def _sketch(entry: Entry) -> Launch:
    from mogeo.kernels import sketch

    chosen = sketch.candidates(entry.dtype)[entry.candidate]
    dimension = 10**6 if entry.case == "any dimension" else BUCKETS
    n_chunks = -(-COLUMNS // dimension)
    n_parts = 1 if entry.case == "in one part" else sketch.parts(n_chunks, dimension, chosen)
    shape = (n_parts, dimension) if n_parts > 1 else (dimension,)
    sums = _empty(*shape, dtype=torch.promote_types(entry.dtype, _FP32))
    flat, signs = _empty(COLUMNS, dtype=entry.dtype), _empty(CHUNKS + dimension, dtype=torch.uint8)
    return sketch.launch(flat, _empty(n_chunks, 2, dtype=torch.int32), signs, sums, chosen)


def _sketch_reduce(entry: Entry) -> Launch:
    from mogeo.kernels import sketch

    return sketch.launch_reduce(_empty(8, BUCKETS, dtype=entry.dtype), _empty(BUCKETS, dtype=entry.dtype))


_LAUNCHES: dict[str, Callable[[Entry], Launch]] = {
    "gram": _gram,
    "reduce": _reduce,
    "combine": _combine,
    "settle": _settle,
    "scale": _scale,
    "min_norm": _min_norm,
    "descent": _descent,
    "psd_part": _psd_part,
    "cagrad": _cagrad,
    "sketch": _sketch,
    "sketch_reduce": _sketch_reduce,
}


# --------------------------------------------------------------------------------------------------------------------
# What it becomes


@dataclasses.dataclass(frozen=True)
class Code:
    """Machine code of one launch on one target."""

    function: str  #: name of the Triton function
    registers: int  #: per thread
    stack: int  #: bytes per thread
    spills: int  #: NVIDIA: loads from and stores to the stack; AMD: registers spilled
    loads_128: int  #: 128-bit loads from global memory, into registers or shared memory
    loads_other: int  #: narrower ones
    stores_128: int
    stores_other: int
    tensor: int  #: instructions to tensor (matrix) cores
    fp64_fma: int
    instructions: int
    shared_memory: int  #: bytes per program
    narrow: int  #: uses of a 32-bit argument other than to make it wider
    in_flight: float | None = None  #: sm_90: kilobytes on their way to a multiprocessor, if counted


Codes: TypeAlias = dict[str, dict[str, Code]]  # by name of the entry, and by target


@dataclasses.dataclass(frozen=True)
class _Binary:
    """What the compiler made of a launch: a cubin for NVIDIA, assembly for AMD."""

    function: str
    content: bytes
    shared_memory: int  #: bytes per program
    warps: int
    programs: int
    width: int  #: bytes that a thread takes at a time of what is read most
    share: float  #: of these bytes, how much is there: the rest is masked
    narrow: int


def _compile(entry: Entry, target_name: str) -> _Binary:
    """Build, and name the culprit if that fails."""
    try:
        return _build(entry, target_name)
    except Exception as error:
        raise RuntimeError(f"{entry.name}, for {target_name}: {error}") from error


def _build(entry: Entry, target_name: str) -> _Binary:
    """Compile as a launch on that GPU would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    is_amd = _is_amd(target_name)
    target = GPUTarget("hip", target_name, 64) if is_amd else GPUTarget("cuda", int(target_name[3:]), 32)
    hip = torch.version.hip
    try:
        torch.version.hip = "6.0" if is_amd else None  # what `mogeo.kernels.target` looks at
        kernel, grid, arguments, options = _LAUNCHES[entry.kernel](entry)
    finally:
        torch.version.hip = hip

    # As `JITFunction.run` does: Triton itself says what it would make of these arguments.
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, compile_options = bind(*arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, compile_options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=compile_options)
    return _Binary(
        kernel.__name__.removeprefix("_"),
        compiled.asm["amdgcn"].encode() if is_amd else compiled.asm["cubin"],
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        math.prod(grid),
        entry.dtype.itemsize if entry.kernel == "sketch" else 16,
        entry.count / options["SIDE"] if kernel.__name__ == "_gram_dot" else 1.0,
        _narrow(compiled.asm["ttir"]),
    )


def _narrow(ttir: str) -> int:
    """Uses of 32-bit arguments, in Triton's own intermediate code, other than to make them 64 bits wide.

    What is added to a length of nearly 2³¹ in 32 bits may wrap around.
    """
    (head,) = re.findall(r"^.*tt\.func public.*$", ttir, re.MULTILINE)
    body = ttir.replace(head, "")
    names = re.findall(r"%(\w+): i32", head)
    return sum(
        len(re.findall(rf"%{name}\b", body)) - len(re.findall(rf"arith\.extsi %{name} :", body)) for name in names
    )


def _is_amd(target: str) -> bool:
    return target.startswith("gfx")


def compile_all(entries: Sequence[Entry]) -> Codes:
    """Compile and read. Two processes: forks, which need not import torch again."""
    tasks = [(entry, target) for entry in sorted(entries, key=lambda entry: -entry.count) for target in entry.targets]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as workers:
        binaries = dict(zip(tasks, workers.map(_compile, *zip(*tasks, strict=True)), strict=True))
    codes: dict[tuple[Entry, str], Code] = {}
    for target in TARGETS:
        of_target = {task: binary for task, binary in binaries.items() if task[1] == target}
        read = _read_amd if _is_amd(target) else functools.partial(_read_nvidia, target)
        codes |= zip(of_target, read(list(of_target.values())), strict=True)
    return {entry.name: {target: codes[entry, target] for target in entry.targets} for entry in entries}


_RAW_BINARIES = {"sm_80": "SM80", "sm_90": "SM90a", "sm_100": "SM100a"}  # what Triton compiles for, to nvdisasm


def _read_nvidia(target: str, binaries: Sequence[_Binary]) -> Iterator[Code]:
    """Disassemble all at once: nvdisasm takes a third of a second to start, and none to read a kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    texts = [_text_section(binary.content) for binary in binaries]
    listing = _output_of(tools / "nvdisasm", "--binary", _RAW_BINARIES[target], of=b"".join(texts))
    said = loads_in_flight.read_listing(listing)
    end = 0
    for binary, text in zip(binaries, texts, strict=True):
        start, end = end, end + len(text)
        code = loads_in_flight.instructions(said, text, start)
        opcodes = Counter(instruction.opcode for instruction in code)
        count = functools.partial(_count, opcodes)
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _output_of(tools / "cuobjdump", "-res-usage", of=binary.content))
        assert usage
        loads, loads_128 = count(r"(LDG|LDGSTS)\b.*"), count(r"(LDG|LDGSTS)\b.*\.(128|256)\b.*")
        stores, stores_128 = count(r"STG\b.*"), count(r"STG\b.*\.(128|256)\b.*")
        yield Code(
            binary.function, int(usage[1]), int(usage[2]), count(r"(LDL|STL)\b.*"),
            loads_128, loads - loads_128, stores_128, stores - stores_128,
            count(r"(HMMA|HGMMA|UTC\w*MMA)\b.*"), count(r"DFMA\b.*"), opcodes.total() - count("NOP"),
            binary.shared_memory, binary.narrow,
            _in_flight(binary, code, int(usage[1])) if target == "sm_90" and binary.function in IN_FLIGHT else None,
        )  # fmt: skip


def _in_flight(binary: _Binary, code: Sequence[loads_in_flight.Instruction], registers: int) -> float | None:
    """Kilobytes on their way to a multiprocessor of an H100; None if nothing is loaded at the width expected."""
    loop = loads_in_flight.main_loop(code, binary.width)
    if not loop:
        return None
    resident = loads_in_flight.resident_programs(registers, binary.shared_memory, binary.warps)
    programs = min(resident, binary.programs / loads_in_flight.MULTIPROCESSORS)
    per_thread = binary.share * loads_in_flight.replay(loop, binary.width)
    return round(per_thread * 32 * binary.warps * programs / 1024, 1)


def _text_section(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    named = headers[names][4]
    (text,) = (
        cubin[place : place + length]
        for name, _, _, _, place, length in headers
        if cubin.startswith(b".text.", named + name)
    )
    return text


def _output_of(tool: Path, *options: str, of: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(of)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _read_amd(binaries: Sequence[_Binary]) -> Iterator[Code]:
    for binary in binaries:
        assembly = binary.content.decode()
        registers, stack, spills = (
            int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[0])
            for key in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        opcodes = Counter(re.findall(r"^\t([a-z]\w*)", assembly, re.MULTILINE))
        count = functools.partial(_count, opcodes)
        loads, loads_128 = (count(rf"(global|buffer|flat)_load_{width}") for width in (r"\w+", "dwordx4"))
        stores, stores_128 = (count(rf"(global|buffer|flat)_store_{width}") for width in (r"\w+", "dwordx4"))
        yield Code(
            binary.function, registers, stack, spills,
            loads_128, loads - loads_128, stores_128, stores - stores_128,
            count(r"v_mfma\w*"), count(r"v_fmac?_f64\w*"), opcodes.total() - count("s_nop"),
            binary.shared_memory, binary.narrow,
        )  # fmt: skip


def _count(opcodes: Counter[str], pattern: str) -> int:
    return sum(n for opcode, n in opcodes.items() if re.fullmatch(pattern, opcode))


# --------------------------------------------------------------------------------------------------------------------
# What is said of it


# Kilobytes on their way to a multiprocessor that should do, and where fewer are, with the Triton of the page.
ENOUGH_IN_FLIGHT = 40
FEW_IN_FLIGHT = {
    "combine K=1 bf16": "one vector a thread; combining one row is no more than a copy",
    "combine K=1 fp32": "one vector a thread; combining one row is no more than a copy",
    "gram K=4 bf16, any strides": "no vectors, which alone are counted",
    "sketch K=1 fp16": "the compiler packs two halves into a register as soon as they are there, and so waits for them",
    "sketch K=1 bf16, in one part": (
        "two programs per multiprocessor. Chunks of a tensor are dealt to several programs from 64 chunks on, 16.8 "
        "million elements for 2¹⁸ buckets; whether fewer should be, at the price of partial sums, a GPU has to tell"
    ),
}

_HEAD = """\
# Registers of the kernels

Made by `python -m tests.kernels.machine_code --write` with Triton {version}. That needs no GPU, since the wheel of
Triton brings LLVM and NVIDIA's ptxas. The tests compile the same launches again and compare with this table; they also
see to it that nothing spills to memory, that loads and stores are 128 bits wide (but for `sketch`, whose elements
lie at any place), that `gram_dot`, and nothing else, uses tensor cores, and that 40 KB or more are in flight but where
the list below the table says why fewer are.

- **kernel, case**: the function in `kernels/`, and what is out of the ordinary. Ordinary are rows aligned to 16 bytes,
  directions clipped and measured, and for `min_norm` objectives normalised by their losses, some of them absent;
  `cagrad` is RACO's, which clips.
- **K, dtype**: rows or objectives, and the dtype of the rows, or else of what is computed. The rows are those of a
  model of 10⁹ parameters; a sketch of them has 2¹⁸ buckets.
- **sm_80** (A100), **sm_90** (H100), **sm_100** (B200): registers of a thread, of 255.
- **gfx942** (MI300): vector registers of a thread, of 512.
- **KB in flight** (sm_90): of the kernels that pass over all elements, kilobytes of these that are on their way to a
  multiprocessor of an H100 at a time. See below.

Bytes of stack, and spills (instructions on NVIDIA, registers on AMD), follow in brackets where there are any. What
takes long to compile and adds little is left out on sm_80 and gfx942. A **candidate** is what `candidates` in the
kernel's file offers beside the variant in use: which is faster, only hardware can tell.

**What is counted as in flight.** A multiprocessor gets its share of 3 TB/s if 40 KB and more are on their way to it at
a time. How many a kernel keeps there follows from three things that the machine code says.

1. The main loop: the first one that loads vectors of 16 bytes (`sketch`: elements). Of several ways through it, the one
   that loads most; of those, the shortest.
2. When it waits: an instruction names the scoreboards that must be empty before it may be issued, and a load names the
   one that counts it. The loop is replayed on a clock where a load takes one unit, and everything else nothing, be it
   a barrier. Bytes that a thread loads in a round, divided by the units that a round takes, are on their way in the
   mean. Loads of other widths, of weights or tables, are waited for like the others, though the cache has them, and
   their bytes are not counted. Nor are those that are masked where a tile has more rows than there are.
3. How many threads there are: as many programs as registers, shared memory, threads and blocks of an H100 allow, or as
   the launch has per multiprocessor if those are fewer.

So it is what the compiler allows for, in the middle of a long run. It says nothing of the ends of a program, of what
the memory system can keep track of, nor of the arithmetic in between, for which other warps must be ready.
"""


def page(codes: Codes, triton_version: str) -> str:
    """docs/registers.md."""
    lines = [
        _HEAD.format(version=triton_version),
        "| kernel | case | K | dtype | " + " | ".join(TARGETS) + " | KB in flight |",
        "| --- | --- | ---: | --- |" + " ---: |" * (len(TARGETS) + 1),
    ]
    for entry in ENTRIES:
        by_target = codes[entry.name]
        (function,) = {code.function for code in by_target.values()}
        cells = [function, entry.case, str(entry.count), DTYPE_NAMES[entry.dtype]]
        cells += [_cell(by_target.get(target)) for target in TARGETS]
        in_flight = by_target["sm_90"].in_flight
        cells.append("" if in_flight is None else f"{in_flight:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_few_in_flight()]) + "\n"


def _few_in_flight() -> list[str]:
    """The list below the table."""
    return [
        "",
        f"Of what is in use, these have fewer than {ENOUGH_IN_FLIGHT} KB in flight:",
        "",
        *(f"- {name}: {reason}." for name, reason in FEW_IN_FLIGHT.items()),
    ]


def _cell(code: Code | None) -> str:
    if code is None:
        return ""
    extra = [f"stack {code.stack}"] * (code.stack > 0) + [f"spills {code.spills}"] * (code.spills > 0)
    return f"{code.registers} ({', '.join(extra)})" if extra else str(code.registers)


def read_json(text: str) -> tuple[Codes, str]:
    """What the script printed: entry → target → code, and the version of Triton."""
    printed = json.loads(text)
    codes = {
        name: {target: Code(**fields) for target, fields in by_target.items()}
        for name, by_target in printed["codes"].items()
    }
    return codes, printed["triton"]


def main() -> None:
    """Compile the table, with none of the user's Triton settings, and print or write what came out."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.machine_code")
    parser.add_argument("--write", action="store_true", help="write docs/registers.md in place of printing JSON")
    write = parser.parse_args().write
    for variable in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[variable]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        codes = compile_all(ENTRIES)
    import triton

    if write:
        PAGE.write_text(page(codes, triton.__version__))
    else:
        fields = {name: {t: dataclasses.asdict(code) for t, code in of.items()} for name, of in codes.items()}
        print(json.dumps({"triton": triton.__version__, "codes": fields}, indent=1))


if __name__ == "__main__":
    main()
