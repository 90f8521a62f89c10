"""What counts once, what is reduced, and what is identical on every rank.

Knows process groups and DTensors; no weighting and no optimizer. Engines reduce gradients as they always do; mogeo adds
one small all-reduce of the Gram matrix and the losses, from which every rank decides alike. Plain tensors are replicas:
where an engine did not reduce them, mogeo does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What FSDP1 and DeepSpeed's ZeRO-3 leave on parameters that are shards without being DTensors.
_PLAIN_SHARDS = ("_is_flat_param", "_fsdp_flattened", "ds_id")

Group = Any  # dist.ProcessGroup, which is no type where torch was built without distributed


class Ranks:
    """The processes that hold one model between them.

    Args:
        group: their process group; by default all processes.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)

    def share_of(self, parameter: Tensor) -> float:
        """1 / number of ranks that hold the same part of a parameter: with it, a sum over ranks counts each part once.

        Raises:
            NotImplementedError: the parameter is a DTensor with partial sums.
        """
        if any(hasattr(parameter, name) for name in _PLAIN_SHARDS):
            raise NotImplementedError(
                f"a parameter of shape {tuple(parameter.shape)} is a shard in a plain tensor, as FSDP1 and ZeRO-3 make "
                "them: use FSDP2 (torch.distributed.fsdp.fully_shard), whose shards say what they are"
            )
        if not is_sharded(parameter):
            return 1 / self.size
        parts: int = 1
        for dimension, placement in enumerate(sharded(parameter).placements):
            if placement.is_partial():
                raise NotImplementedError(
                    f"a parameter of shape {tuple(parameter.shape)} holds partial sums: redistribute it"
                )
            if not placement.is_replicate():
                parts *= sharded(parameter).device_mesh.size(dimension)
        return parts / self.size

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; the same bits on each."""
        dist.all_reduce(values, group=self.group)
        return values

    def mean_(self, values: Tensor) -> Tensor:
        """Mean over ranks, in place. Where all ranks hold the same already, it stays."""
        return self.sum_(values).div_(self.size)

    def max_(self, values: Tensor) -> Tensor:
        """Largest over ranks, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def scattered_mean(self, row: Tensor) -> Tensor:
        """This rank's piece [N / n] of the mean over ranks of `row` [N], n dividing N."""
        if dist.get_backend(self.group) == "nccl":
            if row.dtype == torch.float16:
                row.div_(self.size)  # before the sum, which could overflow
            piece = row.new_empty(row.numel() // self.size)
            _collective("reduce_scatter_single", "reduce_scatter_tensor")(piece, row, group=self.group)
            return piece if row.dtype == torch.float16 else piece.div_(self.size)
        # gloo's reduce_scatter moves as much as an all-reduce; this moves each piece once, to its owner.
        pieces = torch.empty_like(row)
        dist.all_to_all_single(pieces, row, group=self.group)
        wide = torch.promote_types(row.dtype, torch.float32)
        return pieces.view(self.size, -1).sum(0, dtype=wide).div_(self.size).to(row.dtype)

    def gather(self, out: Tensor, piece: Tensor) -> None:
        """The pieces [N / n] of all ranks into `out` [N]."""
        _collective("all_gather_single", "all_gather_into_tensor")(out, piece, group=self.group)

    def first_(self, values: Tensor) -> Tensor:
        """Those of the first rank, on all."""
        dist.broadcast(values, src=0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group)
        return values

    def differ(self, values: Tensor) -> bool:
        """Whether `values` is not the same on every rank, bit for bit. NaN differs from nothing."""
        both = torch.cat([values, -values]).nan_to_num(0.0)
        self.max_(both)
        return bool((both[: len(values)] != -both[len(values) :]).any())

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agreed(self, what: str, value: Any) -> None:
        """Raise ValueError, on every rank, if they do not all hold the same value."""
        values = self.gathered(value)
        if any(other != values[0] for other in values):
            listed = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
            raise ValueError(f"{what} differ between ranks: {listed}")


def in_process_group() -> bool:
    """Whether this process belongs to a group, be it alone there."""
    return dist.is_available() and dist.is_initialized()


def ranks_of(group: Group | None) -> Ranks | None:
    """The ranks of a process group, or of all processes; None where there is only one process."""
    if not in_process_group():
        return None
    ranks = Ranks(group)
    return ranks if ranks.size > 1 else None


def _collective(name: str, older: str) -> Callable[..., Any]:
    """A collective by the name it has from torch 2.13 on, or by the one it had."""
    collective: Callable[..., Any] = getattr(dist, name, None) or getattr(dist, older)
    return collective


def sharded(tensor: Tensor) -> Any:
    """A DTensor as what it is: `Tensor` has no placements."""
    return tensor


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor: a tensor over a mesh of devices, of which this rank holds a part."""
    return hasattr(tensor, "placements")


def part_of(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Over which dimensions of its mesh a DTensor is cut into parts, and the number of the part that this rank holds.

    Ranks that hold the same part have the same number. A plain tensor is one part: ((), 0).
    """
    if not is_sharded(tensor):
        return (), 0
    mesh, number, cut_over = sharded(tensor).device_mesh, 0, []
    for dimension, placement in enumerate(sharded(tensor).placements):
        if not placement.is_replicate():
            number = number * mesh.size(dimension) + mesh.get_local_rank(dimension)
            cut_over.append(dimension)
    return tuple(cut_over), number


def local_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: itself, if it is no DTensor."""
    if not is_sharded(tensor):
        return tensor
    local: Any = sharded(tensor).to_local()
    part: Tensor = local.wait() if hasattr(local, "wait") else local  # a collective that is still under way
    return part


def gradient_of(parameter: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of a gradient, placed as its parameter is: partial sums are reduced first."""
    if is_sharded(grad) and is_sharded(parameter):
        placements = tuple(sharded(parameter).placements)
        if tuple(sharded(grad).placements) != placements:
            grad = sharded(grad).redistribute(placements=placements)
    return local_of(grad)


def like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """A local part as a gradient of its parameter: a DTensor over the same mesh, without a copy."""
    if not is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = sharded(parameter).device_mesh, sharded(parameter).placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def value_of(loss: Tensor) -> Tensor:
    """A loss as a plain scalar; a DTensor (loss parallelism) is gathered."""
    full: Tensor = sharded(loss).full_tensor() if is_sharded(loss) else loss
    return full


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Several fp64 tensors in one, [n], so that one all-reduce carries them."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
