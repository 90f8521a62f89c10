"""What a step moves between ranks, and how long it takes: plain DDP, K all-reduces, and rows scattered over ranks.

A model of `--width` squared times 8 parameters on `--ranks` CPU processes over gloo. Contestants:

- plain DDP: one forward of all batches and one backward of the summed losses; no balancing.
- DDP: the losses as callables, each gradient reduced by DDP.
- no_sync: DDP reduces nothing, mogeo does, once per step.
- no_sync, shard_rows: the same, as each objective ends.
- FSDP2: `fully_shard` per layer and at the root, resharded after the forward.
- FSDP2 plain: the same with one forward of all batches and one backward.

Bytes are what the loopback interface of this machine counted meanwhile, all ranks together, divided by their number:
gloo talks over it, and so does anything else that happens to run. They are given in units of N elements per rank,
beside the formula of docs/distributed.md. Time is that of the slowest rank, contestants in rotating order, round by
round.

`--scale` measures nothing: it prints what the formula gives for larger models and more ranks.

Run: python benchmarks/communication.py [--ranks 4] [--objectives 4] [--width 512] [--rounds 7] [--json PATH] [--scale]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from machine import describe
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mogeo import MultiObjectiveOptimizer
from mogeo.dpo.processes import leave_process_group

LAYERS = 8


def formula(contestant: str, objectives: int, ranks: int) -> float:
    """Elements that a rank sends per step, in units of N."""
    passes = {
        "plain DDP": 2.0,
        "DDP": 2.0 * objectives,
        "no_sync": objectives + 1.0,
        "no_sync, shard_rows": objectives + 1.0,
        # Gathered for the forward and for the backward; gloo's reduce-scatter moves what an all-reduce moves.
        "FSDP2 plain": 4.0,
        "FSDP2": 4.0 * objectives,
    }
    return passes[contestant] * (ranks - 1) / ranks


CONTESTANTS = ("plain DDP", "DDP", "no_sync", "no_sync, shard_rows", "FSDP2 plain", "FSDP2")


def make_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width, bias=False), nn.Tanh())]
    return nn.Sequential(*layers)


def step_of(contestant: str, width: int, objectives: int) -> Callable[[], None]:
    """One training step of a contestant."""
    model = make_model(width)
    if contestant.startswith("FSDP2"):
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        spread: Any = fully_shard(model)
    else:
        spread = DistributedDataParallel(model)
    base = torch.optim.SGD(spread.parameters(), lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())
    batches = [torch.randn(4, width) for _ in range(objectives)]
    losses: list[Callable[[], Tensor]] = [
        lambda x=x, k=k: (spread(x) - k).square().mean() + 0.1 for k, x in enumerate(batches)
    ]
    if "plain" in contestant:

        def step() -> None:
            base.zero_grad()
            scores = spread(torch.cat(batches)).split(4)
            torch.stack([(s - k).square().mean() + 0.1 for k, s in enumerate(scores)]).sum().backward()
            base.step()

        return step

    optimizer = MultiObjectiveOptimizer(base, shard_rows="shard_rows" in contestant)
    quiet = spread.no_sync if "no_sync" in contestant else contextlib.nullcontext

    def balanced() -> None:
        optimizer.zero_grad()
        with quiet():
            optimizer.backward(losses)
        optimizer.step()

    return balanced


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried so far."""
    with open("/proc/net/dev") as file:
        return int(next(line for line in file if line.strip().startswith("lo:")).split(":")[1].split()[0])


def measure(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    """Body of one rank; rank 0 writes the figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    steps = {name: step_of(name, options.width, options.objectives) for name in CONTESTANTS}
    moved: dict[str, list[float]] = {name: [] for name in steps}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(-2, options.rounds):  # two rounds warm up: buckets are rebuilt in the second
        for name in names[index % len(names) :] + names[: index % len(names)]:
            dist.barrier()
            before, start = loopback_bytes(), time.perf_counter()
            steps[name]()
            seconds = torch.tensor([time.perf_counter() - start])
            dist.barrier()
            after = loopback_bytes()
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if index >= 0:
                moved[name].append((after - before) / ranks)
                taken[name].append(seconds.item())
    if rank == 0:
        with open(f"{folder}/figures.json", "w") as file:
            json.dump({"bytes": moved, "seconds": taken}, file)
    del steps  # or its models would still hold the group
    leave_process_group()


def print_scale(objectives: int) -> None:
    """GB of bf16 gradients that a rank sends per step, and holds at most: the formula, no measurement.

    Held are the rows, and beside them the gradient that autograd makes. FSDP2 is counted with a reduce-scatter that
    moves each element once, as NCCL's does.
    """
    columns = ("DDP, plain", "DDP", "no_sync, shard_rows", "FSDP2, plain", "FSDP2")
    print(f"K = {objectives}, bf16; GB sent per rank and step / GB of gradients held per rank\n")
    print(f"{'N':>5} {'ranks':>6}", *(f"{name:>22}" for name in columns), sep="")
    for parameters in (0.5e9, 7e9, 70e9):
        for ranks in (8, 64, 1024):
            share, size = (ranks - 1) / ranks, 2 * parameters / 1e9
            sent = (2, 2 * objectives, objectives + 1, 3, 3 * objectives)
            held = (1, objectives + 1, 2 + objectives / ranks, 1 / ranks, (objectives + 1) / ranks)
            cells = [f"{s * share * size:.3g} / {h * size:.3g}" for s, h in zip(sent, held, strict=True)]
            print(f"{parameters / 1e9:4g}B {ranks:6d}", *(f"{cell:>22}" for cell in cells), sep="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--objectives", type=int, default=4, help="K (default 4)")
    parser.add_argument("--width", type=int, default=512, help="of the layers (default 512: N = 2.1 million)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--scale", action="store_true", help="print the formula for 0.5B to 70B, and 8 to 1,024 ranks")
    options = parser.parse_args()
    if options.scale:
        print_scale(options.objectives)
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=measure, args=(rank, options.ranks, folder, options))
            for rank in range(options.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed")
        with open(f"{folder}/figures.json") as file:
            figures = json.load(file)
    facts = describe("mogeo")
    size = options.width**2 * LAYERS
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"N = {size:,} fp32, K = {options.objectives}, {options.ranks} ranks on gloo, {options.rounds} rounds")
    print(f"\n{'':22}{'N sent per rank (lowest … highest)':>36}{'formula':>9}   {'ms a step, median (quartiles)':>32}")
    results = []
    for name in CONTESTANTS:
        sent = sorted(value / 4 / size for value in figures["bytes"][name])
        low, middle, high = (1e3 * q for q in statistics.quantiles(figures["seconds"][name], n=4))
        expected = formula(name, options.objectives, options.ranks)
        print(
            f"{name:22}{statistics.median(sent):20.2f} ({sent[0]:.2f} … {sent[-1]:.2f}){expected:9.2f}"
            f"   {middle:15.1f} ({low:.1f} … {high:.1f})"
        )
        results.append({"contestant": name, "sent": sent, "formula": expected, "ms": [low, middle, high]})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": facts, "options": vars(options), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
