"""What several ranks do to the rows they hold: average replicas that no engine averaged, and add up Gram matrices.

Knows blocks and ranks; no parameters and no autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo.geometry import ops
from mogeo.gradients.blocks import Block
from mogeo.gradients.ranks import Ranks


def gram_of(parts: Sequence[tuple[Tensor, float]], device: torch.device) -> Tensor:
    """Σ share · rows rowsᵀ, fp64 [K, K] on `device`, over (rows [K, n], share)."""
    if len(parts) == 1 and parts[0][1] == 1.0:
        return ops.gram(parts[0][0]).to(device)
    return torch.stack([ops.gram(rows).to(device) * share for rows, share in parts]).sum(0)


def average_rows(blocks: Sequence[Block], ranks: Ranks, written: Sequence[bytearray], device: torch.device) -> None:
    """Average the rows of plain parameters over ranks, unless they are the same on all: an engine did so already.

    An average that is averaged again stays, so it does not matter which of the backwards an engine reduced, or which
    micro-batches: none (`no_sync`), the first of several, or the last.

    Args:
        blocks: all of them.
        ranks: who holds the others.
        written: for each row, flags of the parameters; afterwards those of all ranks together.
        device: where ranks compare.
    """
    plain = [block for block in blocks if not block.kind.sharded]
    if not plain:
        return
    if not any(block.scattered for block in plain):
        if not ranks.differ(torch.cat([_fingerprint(block.rows).to(device) for block in plain])):
            return
        for block in plain:
            for index, row in enumerate(block.rows):
                block.average(index, row)
    for block in blocks:
        block.settle()
    _united(ranks, written, device)


def average_direction(blocks: Sequence[Block], ranks: Ranks, written: bytearray, device: torch.device) -> None:
    """`average_rows` for a direction in which gradients were summed."""
    plain = [block for block in blocks if not block.kind.sharded]
    if not plain:
        return
    if not any(block.scattered for block in plain):
        if not ranks.differ(torch.cat([_fingerprint(block.direction[None]).to(device) for block in plain])):
            return
        for block in plain:
            block.average(None, block.direction)
    _united(ranks, [written], device)


def _united(ranks: Ranks, written: Sequence[bytearray], device: torch.device) -> None:
    """A parameter that this rank did not touch, but another did, has a gradient now."""
    both = torch.tensor([list(flags) for flags in written], dtype=torch.uint8, device=device)
    for flags, union in zip(written, ranks.max_(both).tolist(), strict=True):
        flags[:] = bytes(union)


def _fingerprint(block: Tensor) -> Tensor:
    """Sums over up to 256 parts of each row [K, n], fp64: replicas that differ have others. (Norms would not do: a pair
    of answers that two ranks see in opposite order gives g and −g.)
    """
    count, columns = block.shape
    if not columns:
        return torch.zeros(0, dtype=torch.float64, device=block.device)
    stretches = math.gcd(columns // 16, 16)  # the length of a row is a multiple of 16
    parts = block.view(count, stretches, -1, 16)
    # Row by row: on a CPU, torch copies what it sums to the dtype of the sum.
    return torch.stack([row.sum(1, dtype=torch.float64) for row in parts]).flatten()
