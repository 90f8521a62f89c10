"""Gram matrix, combination, min-norm point and sketch in plain PyTorch, written for a CPU and its memory hierarchy.

Knows tensors only, and takes its arguments as checked: `mogeo.geometry.ops` is the door. Runs on every device, but asks
the host there: `combine`, `min_norm`, `descent`, `cagrad` and `sketch_` copy what is small to it, and `psd_part` waits
for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mogeo.geometry import exact_cagrad as scalar_cagrad
from mogeo.geometry import exact_harmless as scalar_descent
from mogeo.geometry import exact_min_norm as scalar

_BLOCK = 512  # columns of one partial Gram: an fp32 sum this short keeps 2e-7 of random entries, and costs no speed
_CHUNK = 1 << 24  # elements handed to one batched product: bounds the partial Grams held at a time
_UPCAST_CHUNK = 1 << 20  # elements of half-precision rows upcast at a time: 4 MiB of fp32, which stays in cache
_AXPY_CHUNK = 1 << 18  # columns combined at a time: the 1 MiB of output stays in cache while K rows stream past
_ROUNDING = 4 * 2.0**-52  # times K and the largest: how far below 0 an eigenvalue counts as 0
_TINY = 1e-30  # mean square below which products of fp32 elements come near the subnormal range


def gram(rows: Tensor) -> Tensor:
    """G Gᵀ for rows G [K, N] → fp64 [K, K], exactly symmetric.

    A plain fp32 `mm` sums 1e7 products in fp32 and loses three digits. Here fp32 sums run over 512 products and fp64
    takes over from there. Half precision is upcast chunk by chunk: its products are exact in fp32.
    """
    # Away from the CPU an fp32 product may mean TF32, by a setting that is the user's.
    fp32 = rows.dtype != torch.float64 and rows.device.type == "cpu"
    result = _blocked_gram(rows, torch.float32 if fp32 else torch.float64)
    if fp32 and _left_fp32_range(rows, result.diagonal()):
        result = _blocked_gram(rows, torch.float64)
    return (result + result.T) / 2


def gram_by_segment(rows: Tensor, boundaries: Sequence[int]) -> Tensor:
    """The Gram of each segment, columns b_s … b_{s+1} − 1, and last that of all: fp64 [S + 1, K, K]."""
    grams = [gram(rows[:, start:end]) for start, end in itertools.pairwise(boundaries)]
    return torch.stack([*grams, gram(rows)])


def _left_fp32_range(rows: Tensor, squared_norms: Tensor) -> bool:
    """Whether squares overflowed fp32 or sank into its subnormals, in a row that is not simply zero."""
    suspect = ~(squared_norms.isfinite() & (squared_norms >= _TINY * rows.shape[1]))
    return any(bool(rows[k].any()) for k in suspect.nonzero().flatten().tolist())


def _blocked_gram(rows: Tensor, compute_dtype: torch.dtype) -> Tensor:
    count, columns = rows.shape
    total = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    elements = _CHUNK if rows.dtype == compute_dtype else _UPCAST_CHUNK
    step = max(_BLOCK, elements // count // _BLOCK * _BLOCK)
    for start in range(0, columns, step):
        chunk = rows[:, start : start + step].to(compute_dtype)
        if chunk.stride(1) != 1:  # on transposed storage GEMM would add its products in another, less accurate order
            chunk = chunk.contiguous()
        whole = chunk.shape[1] // _BLOCK * _BLOCK
        if whole:
            blocks = chunk[:, :whole].view(count, -1, _BLOCK).transpose(0, 1)
            total += torch.bmm(blocks, blocks.mT).sum(0, dtype=torch.float64)
        if whole < chunk.shape[1]:
            tail = chunk[:, whole:].double()
            total += tail @ tail.T
    return total


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """wᵀ rows → `out` [N], which may be rows[0]. Each row is read once; a row with weight 0 is not read at all.

    Accumulates in the wider dtype of both, at least in fp32, and anything in fp64 if a weight leaves fp32's range.
    """
    terms = [(row, weight) for row, weight in zip(rows, weights.tolist(), strict=True) if weight != 0.0]
    if not terms:
        return out.zero_()
    dtype = torch.promote_types(torch.promote_types(rows.dtype, out.dtype), torch.float32)
    if max(abs(weight) for _, weight in terms) > torch.finfo(torch.float32).max:
        dtype = torch.float64
    columns = min(_AXPY_CHUNK, out.numel())
    scratch = None if dtype == out.dtype else torch.empty(columns, dtype=dtype, device=out.device)
    for start in range(0, out.numel(), _AXPY_CHUNK):
        target = out[start : start + _AXPY_CHUNK]
        partial = target if scratch is None else scratch[: target.numel()]
        for position, (row, weight) in enumerate(terms):
            source = row[start : start + _AXPY_CHUNK]
            if position == 0:
                partial.copy_(source).mul_(weight)
            else:
                partial.add_(source, alpha=weight)
        if partial is not target:
            target.copy_(partial)
    return out


def min_norm(
    gram: Tensor, losses: Tensor | None, normalize: str, power: float, apply_to: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights fp64 [..., K], gap fp64 [...] and status int64 [...] of the MGDA family, from a Gram fp64 [..., K, K]."""
    count = gram.shape[-1]
    matrices = gram / 2 + gram.mT / 2
    if normalize != "none":
        normalizers = _normalizers(matrices.diagonal(dim1=-2, dim2=-1), losses, normalize, power)
        matrices = matrices / (normalizers[..., :, None] * normalizers[..., None, :])
    points = [scalar.min_norm(matrix) for matrix in matrices.reshape(-1, count, count).tolist()]
    weights = torch.tensor([point[0] for point in points], dtype=torch.float64, device=gram.device)
    weights = weights.reshape(gram.shape[:-1])
    if normalize != "none" and apply_to == "normalized":
        weights = torch.where(weights != 0, weights / normalizers, 0.0)  # a normaliser may have underflowed
    gap = torch.tensor([point[1] for point in points], dtype=torch.float64, device=gram.device)
    status = torch.tensor([int(point[2]) for point in points], dtype=torch.int64, device=gram.device)
    return weights, gap.reshape(gram.shape[:-2]), status.reshape(gram.shape[:-2])


def descent(gram: Tensor, weights: Tensor, rounding: float = scalar_descent.ROUNDING) -> tuple[Tensor, Tensor, Tensor]:
    """w + μ and μ, fp64 [..., K], and status int64 [...], from a Gram fp64 [..., K, K] and weights w fp64 [..., K].

    `rounding` as in `mogeo.descent_weights`.
    """
    count = gram.shape[-1]
    matrices = (gram / 2 + gram.mT / 2).reshape(-1, count, count).tolist()
    found = [
        scalar_descent.nearest_descent(matrix, given, rounding)
        for matrix, given in zip(matrices, weights.reshape(-1, count).tolist(), strict=True)
    ]
    correction = torch.tensor([each[0] for each in found], dtype=torch.float64, device=gram.device)
    status = torch.tensor([int(each[1]) for each in found], dtype=torch.int64, device=gram.device)
    correction = correction.reshape(weights.shape)
    return weights + correction, correction, status.reshape(gram.shape[:-2])


def cagrad(gram: Tensor, weights: Tensor, c: float, clipped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights fp64 [..., K], gap fp64 [...], status int64 [...], from a Gram fp64 [..., K, K] and v fp64 [..., K].

    As `mogeo.geometry.exact_cagrad.conflict_averse`.
    """
    count = gram.shape[-1]
    matrices = (gram / 2 + gram.mT / 2).reshape(-1, count, count).tolist()
    found = [
        scalar_cagrad.conflict_averse(matrix, given, c, clipped)
        for matrix, given in zip(matrices, weights.reshape(-1, count).tolist(), strict=True)
    ]
    made = torch.tensor([each[0] for each in found], dtype=torch.float64, device=gram.device)
    gap = torch.tensor([each[1] for each in found], dtype=torch.float64, device=gram.device)
    status = torch.tensor([int(each[2]) for each in found], dtype=torch.int64, device=gram.device)
    return made.reshape(weights.shape), gap.reshape(gram.shape[:-2]), status.reshape(gram.shape[:-2])


def psd_part(matrix: Tensor) -> Tensor:
    """The positive semi-definite matrix nearest to (M + Mᵀ)/2, fp64 [..., K, K], from M likewise.

    Properties as in `mogeo.geometry.ops.psd_part`.
    """
    symmetric = matrix / 2 + matrix.mT / 2
    largest = symmetric.abs().amax((-2, -1), keepdim=True)
    finite = largest < torch.inf
    # Scaled by a power of two, exactly: eigenvalues of the largest numbers would overflow.
    mantissa, _ = torch.frexp(largest)
    unit = torch.where(finite & (largest > 0), largest / (2 * mantissa), 1.0)
    values, vectors = torch.linalg.eigh(torch.where(finite, symmetric, 0.0) / unit)
    projected = (vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT
    projected = (projected / 2 + projected.mT / 2) * unit
    zero = (symmetric == 0).all(-1)
    projected = projected.masked_fill(zero[..., :, None] | zero[..., None, :], 0.0)
    rounding = _ROUNDING * matrix.shape[-1] * values.abs().amax(-1)
    is_psd = (values.amin(-1) >= -rounding) & (symmetric.diagonal(dim1=-2, dim2=-1).amin(-1) >= 0)
    return torch.where(finite, torch.where(is_psd[..., None, None], symmetric, projected), torch.nan).contiguous()


def sketch_tables(signs: Tensor, chunks: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """What `sketch_` reads: signs ±1, int8 [n], as fp32 on the device; chunks, int32 [C, 3] per tensor, on the host."""
    return signs.to(device, torch.float32), list(chunks)


def sketch_(row: Tensor, gradient: Tensor, chunks: Tensor, signs: Tensor) -> None:
    """row += S gradient, as `mogeo.geometry.projection.SignedSketch` says; or of K rows [K, d] and gradients [K, n].

    Per chunk two fused multiply-adds, of what lies before and behind the end of the buckets.
    """
    flat, dimension = gradient if row.ndim == 2 else gradient.reshape(-1), row.shape[-1]
    for start, (rotation, window, sign) in zip(range(0, flat.shape[-1], dimension), chunks.tolist(), strict=True):
        chunk = flat[..., start : start + dimension].to(row.dtype)
        mine = signs[window : window + dimension].to(row.dtype)
        split = min(dimension - rotation, chunk.shape[-1])
        wrapped = chunk.shape[-1] - split
        end = rotation + split
        row[..., rotation:end].addcmul_(chunk[..., :split], mine[rotation:end], value=sign)
        if wrapped:
            row[..., :wrapped].addcmul_(chunk[..., split:], mine[:wrapped], value=sign)


def _normalizers(squared_norms: Tensor, losses: Tensor | None, normalize: str, power: float) -> Tensor:
    if normalize == "l2":
        base = squared_norms.sqrt()
    else:
        assert losses is not None
        base = losses if normalize == "loss" else losses * squared_norms.sqrt()
    # A solved objective (zero gradient) stays a zero row whatever divides it; 1 keeps 0/0 out of it.
    return torch.where(squared_norms == 0, 1.0, base**power)
