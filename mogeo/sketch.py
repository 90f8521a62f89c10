"""SignedSketch: gradients of N elements kept as d ≪ N numbers, whose inner products estimate those of the gradients.

Knows tensors only; no optimizer, no weighting, no ranks. What is random is drawn here, on the CPU, and moved; the
arithmetic lies behind `mogeo.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo import ops

_WIDTH = 8  # buckets of a vector: 16 bytes of half precision, and a byte of signs
_MOST_WINDOWS = 1 << 16  # keeps the signs within 64 KiB + d/8 bytes on a GPU, whatever the size of the model
_PART = 1 << 20  # buckets that the parts of a large gradient have in all, so that a GPU has threads enough


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

    Without the σ_c, windows at equal distances (t_c − t_c' = t_e − t_e') would add up wherever elements have a mean:
    with all elements equal, to some C²/(2T) times this variance for C chunks in T windows. Without the rotations, an
    outlier feature whose column stride divides d would pile up in few buckets.

    **Vectors.** t_c + r_c is a multiple of A = gcd(8, d), which the above leaves open. Chunks with the same r_c mod A
    can be added as whole vectors of A elements and A signs, and be rotated by the rest at the end: what a GPU does.

    **More than T = 65,536 chunks.** The windows are dealt again, in a new order. Two chunks then have the same signs
    with probability 1/(A T) at most: the estimate stays unbiased, and 1/d in the bound becomes 1/d + 1/(A T).

    Args:
        sizes: number of elements of each tensor (a parameter's gradient), 0 included; N is their sum.
        dimension: d ≥ 1. Multiples of 1,024 suit a GPU; odd ones are slow there.
        seed: of everything random. S is a function of `sizes`, `dimension` and `seed` alone: the same on every
            machine, device and rank. Parts of one vector that are sketched apart and added up need different seeds.
        device: where gradients and rows are.

    Raises:
        ValueError: a size is negative, or the dimension below 1.

    Source: CountSketch (Charikar, Chen & Farach-Colton, *Finding frequent items in data streams*, 2002) with a chunk's
    elements in buckets of their own; inner products of signed sums: AMS (Alon, Matias & Szegedy, *The space complexity
    of approximating the frequency moments*, 1996); the same variance for hashed features: Weinberger et al., *Feature
    hashing for large scale multitask learning*, 2009.
    """

    def __init__(self, sizes: Sequence[int], dimension: int, *, seed: int = 0, device: torch.device) -> None:
        if dimension < 1:
            raise ValueError(f"dimension is {dimension}: a sketch needs at least one bucket")
        if any(size < 0 for size in sizes):
            raise ValueError(f"sizes are {list(sizes)}: pass the number of elements of each tensor, none negative")
        self.sizes = tuple(sizes)
        self.dimension = dimension
        self.width = math.gcd(_WIDTH, dimension)  #: A
        counts = [-(-size // dimension) for size in sizes]
        total = sum(counts)
        windows = max(1, min(total, _MOST_WINDOWS))
        # Integers only: their draws are the same on every machine.
        generator = torch.Generator().manual_seed(seed)
        signs = _signs(self.width * windows + dimension, generator)
        rotations = torch.randint(dimension, (total,), generator=generator)
        flips = _signs(total, generator)
        rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-total // windows))]
        dealt = torch.cat([*rounds, torch.empty(0, dtype=torch.int64)])[:total]
        starts = self.width * (dealt + 1) - rotations % self.width
        places = torch.cat([torch.arange(count) for count in counts] or [torch.empty(0, dtype=torch.int64)])
        drawn = torch.stack([places, rotations, starts, flips], dim=1).to(torch.int32)
        # Sorted by r mod A: what is rotated alike within vectors is added up as whole vectors.
        tensors = [chunks[(chunks[:, 1] % self.width).argsort(stable=True)] for chunks in torch.split(drawn, counts)]
        #: Per tensor int32 [C, 4], a chunk's place in the tensor, r, t and σ: on the CPU, whose code reads them.
        self.chunks = tensors
        #: Per tensor int32 [P, 3], see `_parts`.
        self.parts = [_parts(chunks, dimension, self.width).to(device) for chunks in tensors]
        self.table = ops.sketch_table(signs, self.width, device)  #: u, in the form that the device's code reads

    def add_(self, row: Tensor, index: int, gradient: Tensor, weight: float = 1.0) -> None:
        """row += weight · S_index gradient, in the dtype of `row`; on a GPU, without waiting for it.

        Args:
            row: [d], fp32 or fp64, contiguous.
            index: which of the tensors in `sizes` this is.
            gradient: fp64 (into fp64 rows only), fp32, bf16 or fp16, of any shape and strides; it is taken in logical
                order, which copies one that is not contiguous. One that is not finite spoils the row.
            weight: a factor.

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
        if not row.device == gradient.device == self.table.device:
            raise ValueError(
                f"row on {row.device}, gradient on {gradient.device}, sketch on {self.table.device}: put them on one"
            )
        ops.sketch_(row, gradient, self.chunks[index], self.parts[index], self.table, self.width, weight)


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """±1, int8 [count]."""
    return 1 - 2 * torch.randint(2, (count,), dtype=torch.int8, generator=generator)


def _parts(chunks: Tensor, dimension: int, width: int) -> Tensor:
    """Runs of chunks with one r mod A, to be added up apart: int32 [P, 3], r mod A, first chunk and one past the last.

    As many as threads are wanted, and no run of one r mod A much longer than another.
    """
    parts = []
    longest = -(-len(chunks) * dimension // _PART)
    first = 0
    for lane, count in enumerate(torch.bincount(chunks[:, 1] % width, minlength=width).tolist()):
        for run in torch.arange(first, first + count).tensor_split(-(-count // longest)) if count else ():
            parts.append([lane, int(run[0]), int(run[-1]) + 1])
        first += count
    return torch.tensor(parts, dtype=torch.int32).reshape(-1, 3)
