"""Writing gradients into flat rows, and keeping book of what each row holds. Knows tensors; no parameters, no ranks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_WIDE, _DTYPE = {torch.float32, torch.float64}, attrgetter("dtype")
_SMALL = 1 << 14  # elements of a tensor up to which what an operator costs is mostly its call


class FlatRow:
    """A row (or the direction) as views with the shapes of parameters, and what it holds.

    Args:
        views: one per parameter.
        dirty: flags to share with a row in the same memory; by default its own.

    Attributes:
        written: a byte per parameter: 1 where a gradient of this window was written.
        dirty: a byte per parameter: 1 where there may be anything but zeros.
    """

    def __init__(self, views: list[Tensor], dirty: bytearray | None = None) -> None:
        self.views = views
        self.written = bytearray(len(views))
        self.dirty = bytearray(len(views)) if dirty is None else dirty

    def fill(self, grads: list[Tensor], weight: float) -> bool:
        """Write gradients of all parameters at once, multiplied by `weight`, as most often can be done.

        Returns:
            Whether it was done: not where some parameters were written in this window and others were not.
        """
        if any(self.written) and not all(self.written):
            return False
        # Dirty first: an interrupt may leave gradients half written.
        self.dirty[:] = b"\1" * len(self.views)
        write(self.views, grads, weight, fresh=not any(self.written))
        self.written[:] = self.dirty
        return True

    def zero_stale(self) -> None:
        """Zero what this window did not write."""
        if self.written == self.dirty:
            return
        for i, stale in enumerate(self.dirty):
            if stale and not self.written[i]:
                self.views[i].zero_()
                self.dirty[i] = 0

    def take_over(self, old: FlatRow, places: Sequence[tuple[int, int]]) -> None:
        """Copy what this window wrote to another row: (index here, index there) of each parameter that both have."""
        for i, j in places:
            if old.written[j] and old.views[j].shape == self.views[i].shape:
                self.dirty[i] = 1
                self.views[i].copy_(old.views[j])
                self.written[i] = 1

    def drop(self) -> None:
        """Close the window: what was written is stale from now on."""
        self.written[:] = bytes(len(self.written))


def union(flags: Sequence[bytes | bytearray]) -> bytes:
    """1 where any of the flags is, byte by byte."""
    total = functools.reduce(operator.or_, (int.from_bytes(each, "little") for each in flags))
    return total.to_bytes(len(flags[0]), "little")


def write(targets: list[Tensor], grads: list[Tensor], weight: float, fresh: bool) -> None:
    """Write weighted gradients, or add them to what is there. Weights keep all their digits, whatever the dtype.

    Args:
        targets: where to; not empty.
        grads: as many, of any floating dtypes.
        weight: what to multiply by.
        fresh: whether to overwrite.
    """
    if weight == 1.0:
        (torch._foreach_copy_ if fresh else torch._foreach_add_)(targets, grads)
        return
    # A GPU multiplies in fp32. A CPU rounds the factor first where the dtype is half precision: 0.2 % off. And fp16
    # takes no factor beyond its own range, 65504, on either.
    exact = not targets[0].is_cpu or _WIDE.issuperset(map(_DTYPE, targets))
    if abs(weight) > torch.finfo(torch.float16).max and not _WIDE.issuperset(map(_DTYPE, targets)):
        for target, grad in zip(targets, grads, strict=True):
            product = grad.to(torch.promote_types(target.dtype, torch.float32)) * weight
            target.copy_(product if fresh else product.add_(target))
        return
    if fresh:
        small = []
        for at, target in enumerate(targets):
            if exact and target.numel() <= _SMALL:
                small.append(at)
            else:
                torch.mul(grads[at], weight, out=target)
        if small:  # for these, two calls in all cost less than one call each
            targets, grads = [targets[at] for at in small], [grads[at] for at in small]
            torch._foreach_zero_(targets)
            torch._foreach_add_(targets, grads, alpha=weight)
    elif exact:
        torch._foreach_add_(targets, grads, alpha=weight)
    else:
        for target, grad in zip(targets, grads, strict=True):
            wide = torch.promote_types(target.dtype, torch.float32)
            target.copy_(target.to(wide, copy=True).add_(grad, alpha=weight))
