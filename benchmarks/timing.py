"""How the benchmarks measure time: clocks for CPU and GPU, contestants in turn, cold caches, graph replay.

Knows callables, no contestant. A clock is a function that runs a call and returns its seconds. Contestants run round by
round in rotating order, so that noise and drift of the machine fall on all of them alike.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from machine import l2_bytes

Call = Callable[[], object]
Clock = Callable[[Call], float]

_GB = 1e9


def rotated(names: list[str], turn: int) -> list[str]:
    """The names, starting with another one each turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def rounds_of(calls: Mapping[str, Call], rounds: int, clock: Clock, warm_up: int = 2) -> Iterator[dict[str, float]]:
    """Seconds per contestant, round by round, after rounds that warm up."""
    names = list(calls)
    for turn in range(-warm_up, rounds):
        seconds = {name: clock(calls[name]) for name in rotated(names, turn)}
        if turn >= 0:
            yield seconds


def interleaved(calls: Mapping[str, Call], rounds: int, clock: Clock, limit: float) -> dict[str, list[float]]:
    """Seconds per contestant; one that would need more than `limit` seconds sits out rounds, in regular turn."""
    names = list(calls)
    for name in names:
        calls[name]()
    first = {name: clock(calls[name]) for name in names}
    every = {name: min(max(1, int(first[name] * rounds / limit)), max(1, rounds // 3)) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in rotated(names, turn):
            if turn % every[name] == 0:
                seconds[name].append(clock(calls[name]))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Quantiles 20, 50 and 80 %, and of how many samples."""
    low, middle, high = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return {"p20": low, "p50": middle, "p80": high, "samples": len(values)}


def wall_clock(device: torch.device) -> Clock:
    """Seconds on the host until a call's work is done, launches and waiting included."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def clock(call: Call) -> float:
        settle()
        start = time.perf_counter()
        call()
        settle()
        return time.perf_counter() - start

    return clock


def cpu_clock(call: Call) -> float:
    """Seconds of CPU that a call takes on all threads of this process: what others run meanwhile counts little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def device_clock(device: torch.device) -> Clock:
    """Seconds on the device between two events, with caches that hold nothing of the call's inputs.

    Other memory, three times the L2, is read beforehand. It is read, not written: what a memset leaves in the cache
    would be written back at the expense of the call. While it is read, the host launches the call, so that launching
    does not count unless it takes longer than that.
    """
    other = torch.ones(max(2**28, 3 * l2_bytes(device)) // 4, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def clock(call: Call) -> float:
        other.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def behind(first: Call, call: Call, device: torch.device) -> float:
    """Seconds of a call on the device, right after other work, whose kernels leave the caches to themselves.

    Before that the device spins for a while, so that the host is ahead, and what is timed is not its launching.
    """
    if device.type != "cuda":
        first()
        return wall_clock(device)(call)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(4_000_000)  # cycles: some 2 ms
    first()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def synchronisation(mode: str) -> Iterator[None]:
    """Within, torch refuses ("error") or reports ("warn") whatever waits for the device; then as before, come what may.

    Setting the mode warns once a process that it is a prototype. Where warnings are errors that comes as an exception
    with the mode already set: hence both inside, or every later copy to the device would fail.
    """
    before = torch.cuda.get_sync_debug_mode()

    def turn(to: str | int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(to)

    try:
        turn(mode)
        yield
    finally:
        turn(before)


def captured(call: Call, device: torch.device) -> tuple[Call, str | None]:
    """The call as the replay of a CUDA graph; or the call itself, and why it cannot be captured."""
    call()  # whatever compiles or makes handles
    torch.cuda.synchronize(device)
    try:  # asked first: a capture that fails halfway can leave the allocator in a state of its own
        with synchronisation("error"):
            call()
    except RuntimeError as error:
        return call, first_line(error)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return call, first_line(error)
    return graph.replay, None


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """GB/s of a copy, bytes read plus bytes written, median: what the memory gives to plain code."""
    size = size or (2**30 if device.type == "cuda" else 2**28)
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    clock = device_clock(device) if device.type == "cuda" else wall_clock(device)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 50, clock, limit=1.0)["copy"]
    return 2 * size / spread(seconds)["p50"] / _GB


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]
