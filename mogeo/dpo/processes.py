"""The processes that train one model together ("ranks"): how they join, which device each takes, how they agree.

`torchrun` and `accelerate launch` tell each process by environment variables how many they started. A process that
finds no such variables is alone; nothing here then communicates. Knows no model.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mogeo.errors import InputError

T = TypeVar("T")

_LET_GO = 0.2  # seconds that gloo's threads are given to let go of their tensors
_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by a launcher, as is WORLD_SIZE


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the first process, which prints and writes files."""
        return self.rank == 0

    def share(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor [n, ...], where n is a multiple of `size`: the first rank has the first rows."""
        return whole.chunk(self.size)[self.rank]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum_(torch.tensor(float(flag)))) if self.size > 1 else flag

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_first(self, act: Callable[[], T]) -> T:
        """Call a function on the first rank only. All ranks return its result, or raise its InputError."""
        if self.size == 1:
            return act()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told = [act(), None]
            except InputError as error:
                told = [None, error]
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        result: T = told[0]
        return result

    def check_agreed(self, settings: dict[str, Any]) -> None:
        """Check, on all ranks together, that they have the same settings.

        Raises:
            InputError: they do not; raised on every rank, and naming the first difference.
        """
        for rank, theirs in enumerate(every := self.gather(settings)):
            for key, value in theirs.items():
                if value != every[0].get(key):
                    raise InputError(
                        f"rank 0 has {key} {every[0].get(key)!r}, rank {rank} has {value!r}: start every rank with the "
                        "same options, and with the same files"
                    )


def current_processes() -> Processes:
    """The processes of torch's default process group; a single one if there is no group.

    Raises:
        InputError: the group has no backend for tensors on the CPU, which scores and stop requests are sent as.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Processes()
    backends = dist.get_backend_config()
    if "cpu:" not in backends:
        raise InputError(
            f"the process group has the backend {backends}, and nothing for the CPU: leave the backend out of "
            "init_process_group, which then has gloo as well"
        )
    return Processes(dist.get_rank(), dist.get_world_size())


def launched_processes() -> Processes:
    """The processes that a launcher started, by the environment; they need not have joined a group yet.

    Raises:
        InputError: the environment says that there are several, but not which of them this one is.
    """
    size = _number("WORLD_SIZE", "1")
    if size == 1:
        return Processes()
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start with torchrun --nproc-per-node {size} "
            "-m mogeo align ..., or unset WORLD_SIZE to run alone"
        )
    return Processes(_number("RANK"), size)


def resolve_device(name: str) -> str:
    """The name of a device that torch can use: for "auto" CUDA if there is one, else the CPU.

    Raises:
        InputError: torch cannot use the device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise InputError(f"device '{name}' cannot be used ({str(error).splitlines()[0]})") from None
    return name


def device_of_rank(device: str, ranks: Processes) -> torch.device:
    """The device of this process. With several processes on a machine, each takes the GPU of its LOCAL_RANK.

    Args:
        device: cpu, cuda, cuda:1, ..., or auto.
        ranks: the processes that train together.

    Raises:
        InputError: torch cannot use the device, one GPU was named for several processes, or there are fewer GPUs than
            processes on this machine.
    """
    chosen = torch.device(resolve_device(device))
    if ranks.size == 1 or chosen.type != "cuda":
        return chosen
    if chosen.index is not None:
        raise InputError(f"device '{device}' is one GPU for {ranks.size} ranks: name cuda, and each rank takes its own")
    local, count = _number("LOCAL_RANK", str(ranks.rank)), torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"rank {ranks.rank} needs a GPU of its own, the {local + 1}th on this machine, which has {count}: start at "
            f"most {count} ranks on it, or take device cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes that a launcher started into a process group, for as long as this context lasts.

    Does nothing if the process is alone, or if there is a process group already.

    Args:
        device: that of training, or auto: NCCL is used for CUDA tensors, gloo for tensors on the CPU.

    Yields:
        The processes.

    Raises:
        InputError: see `launched_processes` and `device_of_rank`.
    """
    ranks = launched_processes()
    if ranks.size == 1 or dist.is_initialized():
        yield current_processes()
        return
    place = device_of_rank(device, ranks)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield ranks
    except BaseException:
        # With NCCL this would wait for the other ranks, which may never come. The group ends with the process anyway.
        if place.type != "cuda":
            _end_group()
        raise
    leave_process_group()


def leave_process_group() -> None:
    """End torch's default process group, when all ranks have come here. A collective.

    Whoever calls this is about to end the process, which must not abort: a run that has done all its work would be
    reported as failed.
    """
    gc.collect()  # a model in DistributedDataParallel holds the group, and reference cycles hold the model
    with suppress(RuntimeError):  # another rank failed, and says itself why
        current_processes().any(False)  # waits for all ranks
    _end_group()


def _end_group() -> None:
    """Destroy the default group, and give gloo's threads time to let go of the tensors of its collectives.

    A thread of gloo does so some time after the collective has returned, and needs Python's lock (the GIL) for it. If
    it asks for the lock while Python ends the process, the process aborts ("terminate called without an active
    exception"). A group that nothing refers to any more waits for its threads when it is destroyed. But torch's caches
    still refer to the group of an FSDP2 model, and then nothing waits: so this function sleeps, which frees the lock.
    """
    dist.destroy_process_group()
    time.sleep(_LET_GO)


def _number(variable: str, default: str = "") -> int:
    """The number in an environment variable."""
    text = os.environ.get(variable, default)
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{variable} is {text!r}: it has to be a number, as torchrun sets it; unset it to run alone"
        ) from None
