"""Small constant tensors, made once per device: to copy numbers from the host would wait for a GPU, step by step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def constant_tensor(values: tuple[float | bool, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor [n] on the device. Shared: not to be written to."""
    return torch.tensor(values, dtype=dtype, device=device)
