"""What launches share: their form, and what they must know of the device at hand, NVIDIA's or AMD's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel and what it is launched with: apart, so that it can be compiled without a device as well."""

    kernel: Any  #: a jitted function
    grid: tuple[int, ...]
    arguments: list[Any]
    options: dict[str, Any]  #: constants of the kernel, and options of the compiler

    def run(self) -> None:
        """Launch it on the GPU of its tensors, and on the current stream there: Triton takes the current device's."""
        device = next((given.device for given in self.arguments if isinstance(given, Tensor) and given.is_cuda), None)
        if device is None or device.index == torch.cuda.current_device():
            self.kernel[self.grid](*self.arguments, **self.options)
        else:  # changing devices costs more than asking which one it is
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.arguments, **self.options)


def square_side(count: int) -> int:
    """Edge of the square that a [K, K] matrix is loaded into: a power of two, as Triton's blocks are."""
    return max(2, 1 << (count - 1).bit_length())


def threads_per_warp() -> int:
    """32 on NVIDIA GPUs, 64 on AMD's (CDNA)."""
    return 64 if torch.version.hip else 32


def stages(wanted: int) -> int:
    """Of the pipeline that copies vectors of rows ahead, into shared memory. AMD's compiler would fill registers."""
    return 1 if torch.version.hip else wanted


def fp32_dot_precision() -> str:
    """Triton's `input_precision` for products of fp32 with fp32 accuracy: AMD's matrix cores multiply fp32 as it is."""
    return "ieee" if torch.version.hip else "tf32x3"
