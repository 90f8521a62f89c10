"""What the kernels must know of the device at hand: one place for the differences between NVIDIA and AMD."""

from __future__ import annotations

import torch


def threads_per_warp() -> int:
    """32 on NVIDIA GPUs, 64 on AMD's (CDNA)."""
    return 64 if torch.version.hip else 32


def fp32_dot_precision() -> str:
    """Triton's `input_precision` for products of fp32 with fp32 accuracy: AMD's matrix cores multiply fp32 as it is."""
    return "ieee" if torch.version.hip else "tf32x3"
