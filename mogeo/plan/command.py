"""`mogeo plan`: options, and the table and advice that it prints.

The numbers come from `activations`, `memory` and `cost`, the choice of a mode from `recommend`. Must not import torch
at the top: `mogeo plan --help` has to answer at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogeo.errors import InputError
from mogeo.figures.table import Table
from mogeo.plan.cost import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY, DEVICES, HOST_BANDWIDTH, Device, ratio
from mogeo.plan.memory import ENGINES, OPTIMIZERS, PRECISIONS, Mode, Setup, fsdp_ranks, lora_bytes, memory, modes
from mogeo.plan.recommend import SLACK, Candidate, choose

if TYPE_CHECKING:
    from mogeo.plan.activations import Precision, Trace

_DESCRIPTION = """\
Tell what a fine-tune with K objectives takes before anything is loaded or rented: memory per rank, item by item and
mode by mode; what a step costs over plain training; and which mode to take. Needs the model's config only. Activations
are measured, by running the model's shapes through the DPO loss and its backward.
"""

_EPILOG = f"""\
modes
  uniform      constant weights, one row: plain training        exact      a row per objective
  bf16 rows    rows rounded to bf16 (weights in fp32)           host rows  rows in the host's memory, pinned
  sketch       short sketches of the rows; weights by them, then a second, weighted backward
  refresh      weights solved for at every T-th step only, the rows freed in between
  Those that the installed mogeo does not know are left out, and named. `track` adds a megabyte or less to each; with it
  uniform keeps a row per objective, or a sketch, as the other modes do.

engines
  none             one process                 ddp      DistributedDataParallel
  ddp-shard-rows   DDP in no_sync(), rows shared out over ranks (shard_rows=True)
  fsdp2            fully_shard of each layer, and of the rest

assumptions
  Figures of devices are data sheets', of which training reaches {COMPUTE_EFFICIENCY:.0%} of the operations and {
    BANDWIDTH_EFFICIENCY:.0%} of the bytes per second; "cpu" is a
  guess. Nothing overlaps. All parameters are trained, by a fused optimizer. GB are 1e9 bytes.

examples
  mogeo plan --model Qwen/Qwen2.5-0.5B-Instruct --objectives 4 --device rtx4090
  mogeo plan --model folder/config.json --objectives 4 --tokens 2048 --gradient-checkpointing --device h100 \\
             --engine fsdp2 --ranks 8 --json plan.json
"""

_GB = 1e9
_LORA_RANK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG

    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--model", required=True, metavar="M", help="hub name, folder, config.json, or .gguf file; no weights are read"
    )
    what.add_argument("--objectives", type=int, required=True, metavar="K", help="losses to balance")
    what.add_argument(
        "--sequences", type=int, default=2, metavar="B", help="of an objective at once: two a pair (default: 2)"
    )
    what.add_argument("--tokens", type=int, default=1024, metavar="T", help="of a sequence (default: %(default)s)")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--precision", choices=PRECISIONS, default="autocast",
        help="autocast: fp32 weights, bf16 products; fp32; bf16: both; mixed: fp32 weights that FSDP2 gathers as bf16 "
        "(default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--no-autocast-cache", action="store_true",
        help="torch.autocast(..., cache_enabled=False): with gradient checkpointing it saves the copies that autocast "
        "keeps of the weights",
    )  # fmt: skip
    how.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="sgd has momentum (default: %(default)s)")
    how.add_argument("--gradient-checkpointing", action="store_true", help="of each layer")
    how.add_argument("--engine", choices=ENGINES, default="none", help="see below (default: %(default)s)")
    how.add_argument("--ranks", type=int, default=1, metavar="N", help="devices (default: 1)")
    how.add_argument(
        "--resident-reference", action="store_true",
        help="the reference model stays on the device (default: its scores are computed beforehand, as by mogeo align)",
    )  # fmt: skip
    how.add_argument(
        "--sketch", type=int, default=262_144, metavar="D", help="numbers in a sketched row (default: %(default)s)"
    )
    how.add_argument(
        "--refresh-every", type=int, default=10, metavar="T", help="steps between solves (default: %(default)s)"
    )

    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=DEVICES, default="h100", help="whose figures hold (default: %(default)s)")
    where.add_argument("--memory", type=float, metavar="GB", help="of the device (default: the device's)")
    where.add_argument(
        "--reserve", type=float, metavar="GB",
        help="kept free, for the CUDA context, libraries and fragmentation (default: 1, and 5 %% of the memory)",
    )  # fmt: skip
    where.add_argument("--tflops", type=float, metavar="X", help="1e12 operations per second, by the data sheet")
    where.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the memory")
    where.add_argument("--pcie", type=float, metavar="GB/s", help="to the host, in one direction")
    where.add_argument("--link", type=float, metavar="GB/s", help="to other ranks, in one direction")

    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here as well")


def run(args: argparse.Namespace) -> int:
    """Carry out the command.

    Returns:
        The exit code, 0.

    Raises:
        InputError: something that the user can mend.
    """
    _check(args)
    device = _device(args)
    # Check the options before a model is built: torch and transformers take seconds to import. Shape and peaks, which
    # are not known yet, do not matter for that.
    from mogeo.plan.memory import Peaks, Shape

    _setup(args, Shape(1, 0, 1, 1, 1, 1), Peaks(0, 0))
    from mogeo.plan.activations import outline, read_config, trace

    config = read_config(args.model)
    shape = outline(config)

    def traced_in(precision: Precision) -> Trace:
        return trace(
            config,
            sequences=args.sequences,
            tokens=args.tokens,
            precision=precision,
            checkpointing=args.gradient_checkpointing,
            autocast_cache=not args.no_autocast_cache,
        )

    traced = traced_in(args.precision)
    setup = _setup(args, shape, traced.peaks)
    known, unknown = _known(modes(setup))
    operations = traced.forward + traced.backward
    candidates = [Candidate(mode, memory(mode, setup), ratio(mode, setup, device, operations)) for mode in known]
    limit = device.memory - _reserve(args, device)
    chosen = choose(candidates, limit)

    print(_heading(args, config, setup), end="\n\n")
    print(memory_table(candidates, limit).text(), end="\n\n")
    print(_assumptions(args, device, limit, unknown), end="\n\n")
    if chosen is None:
        print(_nothing_fits(args, setup, candidates, limit, traced_in("bf16").peaks.streamed))
    else:
        print(_advice(args, setup, chosen, limit))
    if args.json is not None:
        found = _as_json(args, setup, traced, device, limit, candidates, chosen)
        try:
            args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise InputError(f"--json {args.json}: cannot be written ({error.strerror})") from error
    return 0


# ---- what is given ---------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for an option that is out of its range, or does not go with another."""
    if args.sequences < 2 or args.sequences % 2:
        raise InputError(f"--sequences {args.sequences}: give an even number, for a pair is two sequences")
    if args.no_autocast_cache and args.precision != "autocast":
        raise InputError(f"--no-autocast-cache with --precision {args.precision}: only autocast has a cache")
    if args.tokens < 2:
        raise InputError(f"--tokens {args.tokens}: give at least 2, for the first token of a sequence is not scored")
    for option in ("memory", "tflops", "bandwidth", "pcie", "link"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise InputError(f"--{option} {value:g}: give a positive number")


def _device(args: argparse.Namespace) -> Device:
    """The device's figures: those of its data sheet, unless the user gave others."""
    given = {
        "memory": (args.memory, 1e9),
        "bf16": (args.tflops, 1e12),
        "fp32": (args.tflops, 1e12),
        "bandwidth": (args.bandwidth, 1e9),
        "pcie": (args.pcie, 1e9),
        "link": (args.link, 1e9),
    }
    device = DEVICES[args.device]
    device = device._replace(**{name: value * unit for name, (value, unit) in given.items() if value is not None})
    reserve = _reserve(args, device)
    if not 0 <= reserve < device.memory:
        raise InputError(f"--reserve {reserve / _GB:g}: give less than the memory, {device.memory / _GB:g} GB")
    return device


def _reserve(args: argparse.Namespace, device: Device) -> float:
    """Bytes of the device's memory that are kept free."""
    return float(args.reserve * _GB) if args.reserve is not None else _GB + 0.05 * device.memory


def _setup(args: argparse.Namespace, shape: Any, peaks: Any) -> Setup:
    """The fine-tune that the options describe, of a model with this shape and these activations."""
    return Setup(
        shape=shape,
        peaks=peaks,
        objectives=args.objectives,
        precision=args.precision,
        optimizer=args.optimizer,
        engine=args.engine,
        ranks=args.ranks,
        resident_reference=args.resident_reference,
        sketch=args.sketch,
        refresh_every=args.refresh_every,
    )


def _known(listed: Sequence[Mode]) -> tuple[list[Mode], list[Mode]]:
    """The modes whose keywords `MultiObjectiveOptimizer` takes in this version, and the others."""
    import inspect

    from mogeo import MultiObjectiveOptimizer

    keywords = set(inspect.signature(MultiObjectiveOptimizer).parameters)
    known = [mode for mode in listed if set(mode.keywords) <= keywords]
    return known, [mode for mode in listed if mode not in known]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def memory_table(candidates: Sequence[Candidate], limit: float) -> Table:
    """GB per rank, item by item: one row per mode. Items that no mode needs have no column.

    Args:
        candidates: the modes.
        limit: bytes that a rank may take.
    """
    items = [name for name in asdict(candidates[0].memory) if any(getattr(c.memory, name) for c in candidates)]
    on_device = [name for name in items if name != "host"]
    header = ["mode", *on_device, "total", "fits", *(["host"] if "host" in items else []), "step"]
    rows = []
    for mode, held, step in candidates:
        row = [mode.name, *(_gb(getattr(held, name)) for name in on_device), _gb(held.device)]
        row.append("yes" if held.device <= limit else "no")
        rows.append([*row, *([_gb(held.host)] if "host" in items else []), f"{step:.3f}"])
    note = "step: over one of plain training with the same batches"
    return Table("GB per rank at the peak of a step", header, rows, note)


def _gb(count: float) -> str:
    return f"{count / _GB:.2f}"


def _heading(args: argparse.Namespace, config: Any, setup: Setup) -> str:
    """What was asked for, in two lines."""
    shape = setup.shape
    checkpointing = "with" if args.gradient_checkpointing else "without"
    place = "one process" if setup.engine == "none" else f"{setup.engine} on {setup.ranks} ranks"
    return (
        f"{args.model}: {config.model_type}, {shape.elements:,} parameters, {shape.layers} layers\n"
        f"{setup.objectives} objectives, {args.sequences} sequences of {args.tokens} tokens each, {setup.precision}, "
        f"{setup.optimizer}, {checkpointing} gradient checkpointing, {place}"
    )


def _assumptions(args: argparse.Namespace, device: Device, limit: float, unknown: Sequence[Mode]) -> str:
    """The figures that the table rests on, and the modes that are not in it."""
    pace = device.fp32 if args.precision == "fp32" else device.bf16
    lines = [
        f"taken for granted: {args.device} with {_gb(device.memory)} GB, of which {_gb(device.memory - limit)} stay "
        f"free; {pace / 1e12:g} TFLOP/s (of which {COMPUTE_EFFICIENCY:.0%}), {device.bandwidth / 1e9:g} GB/s memory, "
        f"{device.pcie / 1e9:g} GB/s PCIe, {device.link / 1e9:g} GB/s between ranks (of which "
        f"{BANDWIDTH_EFFICIENCY:.0%}), {HOST_BANDWIDTH / 1e9:g} GB/s on the host"
    ]
    if unknown:
        lines.append(f"left out, for this version of mogeo lacks them: {', '.join(mode.name for mode in unknown)}")
    return "\n".join(lines)


def _advice(args: argparse.Namespace, setup: Setup, chosen: Candidate, limit: float) -> str:
    """Which mode to take and why, as code and as a command line."""
    free = limit - chosen.memory.device
    lines = [
        f"Take {chosen.mode.name}: {chosen.mode.exactness}, {_gb(chosen.memory.device)} GB of {_gb(limit)}, steps of "
        f"{chosen.ratio:.3f} times plain training's: the most exact of those that fit and take at most {SLACK:.0%} "
        f"longer than the cheapest. {_gb(free)} GB are left for a larger micro-batch.",
        "",
        f"  optimizer = MultiObjectiveOptimizer({_BASES[setup.optimizer]}{_keywords(chosen.mode, setup)})",
        "  optimizer.backward({name: callable, ...})"
        + ("  # within model.no_sync()" if setup.engine == "ddp-shard-rows" else ""),
    ]
    if args.gradient_checkpointing:
        lines.insert(2, '  model.gradient_checkpointing_enable({"use_reentrant": False})')
    elif setup.optimizer == "adamw" and not setup.resident_reference:
        lines += _align(args, chosen.mode, setup)
    return "\n".join(lines)


_BASES = {
    "adamw": "torch.optim.AdamW(model.parameters(), lr=..., fused=True)",
    "sgd": "torch.optim.SGD(model.parameters(), lr=..., momentum=0.9, fused=True)",
    "lion": "Lion(model.parameters(), lr=...)",
}


def _keywords(mode: Mode, setup: Setup) -> str:
    keywords = dict(mode.keywords)
    if setup.engine == "ddp-shard-rows" and mode.rows == "all":
        keywords["shard_rows"] = "True"
    return "".join(f", {name}={value}" for name, value in keywords.items())


def _align(args: argparse.Namespace, mode: Mode, setup: Setup) -> list[str]:
    """The command line of `mogeo align` that does the same; empty if `mogeo align` cannot."""
    if setup.precision in ("bf16", "mixed") or setup.engine == "ddp-shard-rows":
        return []
    launch = "mogeo" if setup.ranks == 1 else f"torchrun --nproc-per-node {setup.ranks} -m mogeo"
    model = args.model.removesuffix("config.json").rstrip("/") or "."
    options = [
        f"--model {model} --data D --output O --max-length {args.tokens}",
        f"--micro-batch {args.sequences // 2} --autocast {'bf16' if setup.precision == 'autocast' else 'none'}",
        *(["--fsdp"] if setup.engine == "fsdp2" else []),
    ]
    command = f"  {launch} align {' '.join(options)}"
    of_mode = " ".join(_option(name, value) for name, value in mode.keywords.items())
    return ["or", *([f"{command} \\", f"    {of_mode}"] if of_mode else [command])]


def _option(keyword: str, value: str) -> str:
    """A keyword of the optimizer as an option of `mogeo align`."""
    option = f"--{keyword.replace('_', '-')}"
    return option if value == "True" else f"{option} {_VALUES.get(value, value)}"


_VALUES = {"torch.bfloat16": "bf16", '"uniform"': "uniform"}


def _nothing_fits(
    args: argparse.Namespace, setup: Setup, candidates: Sequence[Candidate], limit: float, in_bf16: int
) -> str:
    """What to say if no mode fits: which takes the least, and what would fit.

    Args:
        args: the options.
        setup: the fine-tune.
        candidates: the modes.
        limit: bytes that a rank may take.
        in_bf16: bytes of activations if the whole model is bf16, for LoRA.
    """
    balancing = [c for c in candidates if c.mode.rows != "one"]
    smallest = min(balancing, key=lambda c: c.memory.device)
    lines = [
        f"Nothing fits into {_gb(limit)} GB: {smallest.mode.name} takes the least, {_gb(smallest.memory.device)} GB, "
        f"of which {_gb(smallest.memory.activations)} are activations."
    ]
    for mode in {"exact": balancing[0].mode, smallest.mode.name: smallest.mode}.values():
        ranks = fsdp_ranks(mode, setup, limit)
        if ranks is not None:
            lines.append(f"{mode.name} fits on {ranks} ranks of FSDP2 (--engine fsdp2 --ranks {ranks}).")
        else:
            lines.append(f"{mode.name} fits on no number of FSDP2 ranks: activations are not shared out.")
    lora = lora_bytes(setup, _LORA_RANK, in_bf16)
    verdict = "fits" if lora <= limit else "does not fit either"
    lines.append(
        f"LoRA of rank {_LORA_RANK} on every linear map of the layers, over bf16 weights, {verdict} on one device: "
        f"{_gb(lora)} GB."
    )
    if not args.gradient_checkpointing:
        lines.append("Activations shrink with --gradient-checkpointing.")
    elif args.precision == "autocast" and not args.no_autocast_cache:
        lines.append("Activations shrink with --no-autocast-cache.")
    if args.sequences > 2:
        lines.append("Activations shrink with fewer --sequences, and more micro-batches.")
    return "\n".join(lines)


def _as_json(
    args: argparse.Namespace,
    setup: Setup,
    traced: Trace,
    device: Device,
    limit: float,
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
) -> dict[str, Any]:
    return {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("argv",)},
        "model": setup.shape._asdict(),
        "operations": {"forward": traced.forward, "backward": traced.backward},
        "peaks": traced.peaks._asdict(),
        "device": device._asdict(),
        "limit": limit,
        "modes": [
            {
                "name": c.mode.name,
                "keywords": c.mode.keywords,
                "exactness": c.mode.exactness,
                "bytes": {**asdict(c.memory), "device": c.memory.device},
                "fits": c.memory.device <= limit,
                "step": c.ratio,
            }
            for c in candidates
        ],
        "chosen": None if chosen is None else chosen.mode.name,
    }
