"""SignedSketch: gradients of N elements kept as d ≪ N numbers, whose inner products estimate those of the gradients.

Knows tensors only; no optimizer, no weighting, no ranks. What is random is drawn here, on the CPU, and moved; the
arithmetic lies behind `mogeo.geometry.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo.geometry import ops

MOST_BUCKETS = 1 << 30
"""The longest sketch: a kernel counts its elements in 32 bits."""

_MOST_WINDOWS = 1 << 19  # the table of signs takes some 512 KiB + d bytes on a GPU, whatever the size of the model


class SignedSketch:
    """A random linear map S: R^N → R^d with E⟨Sg, Sh⟩ = ⟨g, h⟩, fed tensor by tensor.

    Each tensor is flattened and cut into chunks of d elements, the last one shorter. Chunk c, g_c, is added to the
    buckets b = 0 … d − 1 with a random rotation r_c and random signs:

        (Sg)_b = Σ_c σ_c u[t_c + b] g_c[(b − r_c) mod d],

    where σ_c = ±1, u is one table of random signs, and t_c is where the window of chunk c begins in it. All are uniform
    and independent, but that no two t_c are the same. One contiguous pass over the gradient: no scatter, and no hash of
    an element.

    **Unbiased.** Elements of one chunk never share a bucket; those of two chunks c ≠ c' have the factor σ_c σ_c', of
    mean 0. So E⟨Sg, Sh⟩ = ⟨g, h⟩ exactly, whatever the rotations and windows.

    **Variance.** ⟨Sg, Sh⟩ − ⟨g, h⟩ = Σ_{c ≠ c'} σ_c σ_c' Y_cc', so that only Y_cc'² and Y_cc' Y_c'c have a mean. Two
    windows differ in every bucket, and no two buckets read the same two entries of u; so the mean of products of two
    buckets is 0, too. Two elements of different chunks share a bucket with probability 1/d. Together

        Var⟨Sg, Sh⟩ = (‖g‖²‖h‖² + ⟨g, h⟩² − Σ_c (‖g_c‖²‖h_c‖² + ⟨g_c, h_c⟩²)) / d  ≤  (‖g‖²‖h‖² + ⟨g, h⟩²) / d,

    for all g and h. A cosine is off by some 1/√d, and what lies in one chunk is exact.

    Without the σ_c, windows at equal distances (t_c − t_c' = t_e − t_e') would add up wherever elements have a mean.
    Without the rotations, an outlier feature whose column stride divides d would pile up in few buckets.

    **More than T = 524,288 chunks.** The windows are dealt again, in a new order. Two chunks then have the same signs
    with probability 1/T at most: the estimate stays unbiased, and 1/d in the bound becomes 1/d + 1/T.

    Args:
        sizes: number of elements of each tensor (a parameter's gradient), 0 included; N is their sum.
        dimension: d, 1 … 2³⁰. A GPU likes multiples of 1,024.
        seed: of everything random. S is a function of `sizes`, `dimension` and `seed` alone: the same on every
            machine, device and rank. Parts of one vector that are sketched apart and added up need different seeds.
        device: where gradients and rows are.

    Raises:
        ValueError: a size is negative, or the dimension below 1 or above 2³⁰.

    Source: CountSketch (Charikar, Chen & Farach-Colton, *Finding frequent items in data streams*, 2002) with a chunk's
    elements in buckets of their own; inner products of signed sums: AMS (Alon, Matias & Szegedy, *The space complexity
    of approximating the frequency moments*, 1996); the same variance for hashed features: Weinberger et al., *Feature
    hashing for large scale multitask learning*, 2009.
    """

    def __init__(self, sizes: Sequence[int], dimension: int, *, seed: int = 0, device: torch.device) -> None:
        if not 1 <= dimension <= MOST_BUCKETS:
            raise ValueError(f"dimension is {dimension}: a sketch needs 1 to {MOST_BUCKETS} buckets")
        if any(size < 0 for size in sizes):
            raise ValueError(f"sizes are {list(sizes)}: pass the number of elements of each tensor, none negative")
        self.sizes = tuple(sizes)
        self.dimension = dimension
        counts = [-(-size // dimension) for size in sizes]
        total = sum(counts)
        windows = max(1, min(total, _MOST_WINDOWS))
        # Integers only: their draws are the same on every machine.
        generator = torch.Generator().manual_seed(seed)
        signs = _signs(windows + dimension, generator)
        rotations = torch.randint(dimension, (total,), generator=generator)
        flips = _signs(total, generator)
        rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-total // windows))]
        dealt = torch.cat([*rounds, torch.empty(0, dtype=torch.int64)])[:total]
        drawn = torch.stack([rotations, dealt, flips], dim=1).to(torch.int32)
        #: u, and per tensor int32 [C, 3], a chunk's r, t and σ: in the form and the place that the device's code reads.
        self.signs, self.chunks = ops.sketch_tables(signs, torch.split(drawn, counts), device)

    def add_(self, row: Tensor, index: int, gradient: Tensor) -> None:
        """row += S_index gradient, in the dtype of `row`; on a GPU, without waiting for it.

        Args:
            row: [d], fp32 or fp64, contiguous.
            index: which of the tensors in `sizes` this is.
            gradient: fp64 (into fp64 rows only), fp32, bf16 or fp16, of any shape and strides; it is taken in logical
                order, which copies one that is not contiguous. One that is not finite spoils the row.

        Raises:
            IndexError: there is no such tensor.
            TypeError: a dtype is not supported, or `row` is narrower than the gradient.
            ValueError: shapes, strides or devices do not fit.
        """
        if not 0 <= index < len(self.sizes):
            raise IndexError(f"tensor {index} of {len(self.sizes)}: the sketch was made for the sizes it was given")
        if gradient.dtype not in ops.ROW_DTYPES:
            raise TypeError(f"gradient {index} is {gradient.dtype}: pass fp64, fp32, bf16 or fp16")
        if row.dtype not in (torch.float32, torch.float64) or row.dtype.itemsize < gradient.dtype.itemsize:
            raise TypeError(f"row is {row.dtype} for gradient {index} in {gradient.dtype}: pass fp32, or fp64 for fp64")
        if row.shape != (self.dimension,) or not row.is_contiguous():
            raise ValueError(f"row has shape {tuple(row.shape)}: pass a contiguous row [{self.dimension}]")
        if gradient.numel() != self.sizes[index]:
            raise ValueError(f"gradient {index} has {gradient.numel()} elements, but its size was {self.sizes[index]}")
        if not row.device == gradient.device == self.signs.device:
            raise ValueError(
                f"row on {row.device}, gradient on {gradient.device}, sketch on {self.signs.device}: put them on one"
            )
        ops.sketch_(row, gradient, self.chunks[index], self.signs)

    def add_rows_(self, rows: Tensor, index: int, gradients: Tensor) -> None:
        """rows[k] += S_index gradients[k] for all k: on a CPU in one pass over the chunks. Arguments are not checked.

        Args:
            rows: [K, d], fp32 or fp64, contiguous.
            index: which of the tensors in `sizes` each gradient is.
            gradients: [K, n], no wider than the rows, each gradient contiguous.
        """
        ops.sketch_(rows, gradients, self.chunks[index], self.signs)


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """±1, int8 [count]."""
    return 1 - 2 * torch.randint(2, (count,), dtype=torch.int8, generator=generator)
