"""Run a function on several ranks, each a process of its own on gloo: `run(2, case, arguments)` → what each returned.

A fork server imports torch once; processes then start in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = 300.0  # seconds: a hang's end, and more than a busy machine needs
_PRELOAD = ["torch", "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch._dynamo", "mogeo.optimizer"]


class RankFailedError(AssertionError):
    """A rank raised; the message holds its traceback."""


def run(ranks: int, case: Callable[..., Any], *arguments: Any, timeout: float = _TIMEOUT) -> list[Any]:
    """Call `case(*arguments)` on every rank of a new process group; returns the results, by rank.

    Args:
        ranks: number of processes.
        case: a function of a test module, at its top level. Its result must be something that torch.save takes.
        timeout: of every collective, in seconds; and of the processes, if it is more than five minutes.

    Raises:
        RankFailedError: a rank raised, died, or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_main, args=(rank, ranks, folder, timeout, case, arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(_TIMEOUT, timeout))
        for process in processes:
            process.kill()
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.failed"))]
        missing = [r for r in range(ranks) if not (Path(folder) / f"{r}.result").exists()]
        if failures or missing:
            raise RankFailedError("\n".join(failures) or f"ranks {missing} of {ranks} returned nothing")
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(ranks)]


def _main(
    rank: int, ranks: int, folder: str, timeout: float, case: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # As a launcher would; the ranks meet in a file, so nobody listens at that address.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    try:
        result = case(*arguments)
        torch.save(result, f"{folder}/{rank}.part")
        os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}.result")
        dist.barrier()
    except BaseException:
        Path(f"{folder}/{rank}.failed").write_text(f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()
