"""The functional core: gram, combine, min_norm_weights, descent_weights, conflict_averse_weights, psd_part; sketches.

Checks its arguments (`mogeo.geometry.projection` checks those of sketches); the one place that chooses an
implementation.

Knows tensors, no optimizer and no weighting. CUDA and ROCm tensors take the Triton kernels
(`mogeo.geometry.triton_backend`), all others PyTorch operations and the scalar solver (`mogeo.geometry.torch_backend`).
The functions are operators of torch (`torch.ops.mogeo`), so that `torch.compile` keeps them whole.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mogeo.geometry import torch_backend
from mogeo.geometry.exact_harmless import ROUNDING

_OLDEST_TRITON = (3, 3)  # earlier ones cannot compile loops that carry tuples

ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MinNorm(NamedTuple):
    """A min-norm point in the convex hull of K gradients; for a batch of problems, with its leading dimensions."""

    weights: Tensor  #: fp64 [K], on the simplex
    gap: Tensor  #: fp64 [], the duality gap aᵀMa − min_i (Ma)_i over the hull, in units of the Gram matrix
    status: Tensor  #: int64 [], a `mogeo.Status`


class ConflictAverse(NamedTuple):
    """CAGrad's direction, or RACO's; for a batch of problems, with its leading dimensions."""

    weights: Tensor  #: fp64 [K], on the raw gradients
    gap: Tensor  #: fp64 [], what the objective that gains least may gain more, at most, in units of the Gram matrix
    status: Tensor  #: int64 [], a `mogeo.Status`


class Descent(NamedTuple):
    """The direction nearest to a given one that hurts no objective; for a batch, with its leading dimensions."""

    weights: Tensor  #: fp64 [K], w + μ
    correction: Tensor  #: fp64 [K], μ ≥ 0
    status: Tensor  #: int64 [], a `mogeo.Status`


# --------------------------------------------------------------------------------------------------------------------
# The functions


def gram(rows: Tensor) -> Tensor:
    """Inner products of gradient rows.

    Args:
        rows: [K, N], fp64, fp32, bf16 or fp16, one flattened gradient per row.

    Returns:
        G Gᵀ, fp64 [K, K], exactly symmetric, on the device of `rows`. Each entry is within 1e-6 of the largest diagonal
        entry for any N (4e-6 if all elements have one magnitude, so that roundings add up). A row with NaN or infinity
        spoils its own row and column only.

    Raises:
        TypeError: `rows` is no tensor of one of these dtypes.
        ValueError: `rows` is not two-dimensional, or has no row.
    """
    _check_rows(rows)
    result: Tensor = torch.ops.mogeo.gram(rows.detach())
    return result


def gram_by_segment(rows: Tensor, boundaries: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inner products of gradient rows segment by segment (layer by layer, say), and over all columns.

    On a GPU one pass over the rows yields all of them, so that segments cost nothing.

    Args:
        rows: [K, N], as for `gram`.
        boundaries: b_0 = 0 ≤ b_1 ≤ … ≤ b_S = N: segment s is the columns b_s … b_{s+1} − 1.

    Returns:
        The Gram of all columns, fp64 [K, K], and that of each segment, fp64 [S, K, K], which sum to it.

    Raises:
        TypeError, ValueError: as for `gram`; or the boundaries do not cut the columns.
    """
    _check_rows(rows)
    boundaries = [int(boundary) for boundary in boundaries]
    if len(boundaries) < 2 or (boundaries[0], boundaries[-1]) != (0, rows.shape[1]) or boundaries != sorted(boundaries):
        raise ValueError(
            f"boundaries {boundaries} do not cut {rows.shape[1]} columns: pass 0, …, {rows.shape[1]} in ascending order"
        )
    grams: Tensor = torch.ops.mogeo.gram_by_segment(rows.detach(), boundaries)
    return grams[-1], grams[:-1]


def combine(rows: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The weighted sum wᵀ rows.

    Args:
        rows: [K, N], fp64, fp32, bf16 or fp16.
        weights: [K], any real dtype. A row whose weight is 0 is not read, so it may hold NaN.
        out: where to write, [N], on the device of `rows`, of any of these dtypes. `rows[0]` works in place; any other
            row does not.

    Returns:
        `out`, or a new tensor in the dtype of the rows. Half-precision rows are accumulated in fp32 and rounded once,
        or not at all if `out` is fp32.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes do not fit, or `out` overlaps a row other than the first.
    """
    _check_rows(rows)
    count, columns = rows.shape
    if weights.shape != (count,):
        raise ValueError(f"weights have shape {tuple(weights.shape)} for {count} rows: pass one weight per row")
    rows = rows.detach()
    weights = weights.detach().to(device=rows.device, dtype=torch.float64, non_blocking=True)
    if out is None:
        result: Tensor = torch.ops.mogeo.combine(rows, weights)
        return result
    if out.dtype not in ROW_DTYPES:
        raise TypeError(f"out is {out.dtype}: pass fp64, fp32, bf16 or fp16")
    if out.shape != (columns,) or out.device != rows.device:
        raise ValueError(
            f"out has shape {tuple(out.shape)} on {out.device}, but the rows have {columns} columns on {rows.device}"
        )
    torch.ops.mogeo.combine_out(rows, weights, out)
    return out


def min_norm_weights(gram: Tensor) -> MinNorm:
    """The min-norm point of the convex hull of K gradients, from their Gram matrix: argmin over the simplex of aᵀ M a.

    Exact (an active-set method in fp64 that certifies its result, and takes more digits where fp64 does not suffice:
    `mogeo.geometry.exact_min_norm`, and for up to 32 objectives on a GPU `mogeo.kernels.min_norm`) and deterministic;
    on CPUs the same on every machine. Objectives whose gradient is zero (diagonal ≤ 0) or not finite are left out of
    the hull and get weight 0.

    Args:
        gram: M [K, K], a real floating dtype, symmetric positive semi-definite up to rounding. The mean of M and Mᵀ is
            used. [..., K, K] solves many problems: on a GPU in one launch.

    Returns:
        `MinNorm(weights, gap, status)` on the device of `gram`.

    Raises:
        TypeError: `gram` is not floating point.
        ValueError: `gram` is not square, or empty.

    Source: Désidéri, *Multiple-gradient descent algorithm (MGDA)*, 2012.
    """
    _check_square("gram", gram)
    return normalized_min_norm(gram, None, "none", 1.0, "raw")


def descent_weights(gram: Tensor, weights: Tensor, *, rounding: float | None = None) -> Descent:
    """Weights of the direction nearest to d = Gᵀw that hurts no objective: ⟨v, g_k⟩ ≥ 0 for all k, to first order.

    v = Gᵀ(w + μ), with μ ≥ 0 exact and certified as the weights of `min_norm_weights` are. Where d hurts nobody
    already, w comes back as it is, to the last bit.

    A Gram matrix knows inner products to their rounding only. That decides v, unless some of the gradients balance out
    (a combination of them with weights ≥ 0 vanishes, as near a Pareto optimum): then rows that differ in the last digit
    may have another nearest direction, up to |d| away. The status says which it is:

    - `OPTIMAL`: v is within 1e-3 |d| (or 4 √ε Σ_j |w_j| ‖g_j‖, if that is more) of the nearest direction of any rows
      whose Gram is this up to ε ‖g_i‖ ‖g_j‖, ε being `rounding`; for gradients that do not nearly balance out, within
      about 1e-12 |d|. And ⟨v, g_k⟩ is never below −1e-13 ‖g_k‖ Σ_j (|w_j| + μ_j) ‖g_j‖.
    - `UNDECIDED`: it may not be: gradients that balance out to rounding are taken to do so exactly. v hurts nobody by
      more than rounding, ⟨v, g_k⟩ ≥ −½ ε^⅓ ‖g_k‖ |d|, which is 5e-6 ‖g_k‖ |d| for an fp64 Gram.
    - `STALLED`: M is not positive semi-definite, as the Gram of fp32 rows may be. ⟨v, g_k⟩ ≥ 0 holds to about as much
      as M lacks, and the nearest direction may be another.
    - `ZERO`, `NONFINITE`: no objective has a gradient, or a finite one; w comes back as it is.

    Args:
        gram: M [K, K], a real floating dtype, symmetric positive semi-definite up to rounding; or [..., K, K].
        weights: w [K], on the raw gradients; or [..., K].
        rounding: ε, > 0 and < 1: how far M_ij may be from ⟨g_i, g_j⟩, in units of ‖g_i‖ ‖g_j‖. By default 4 units in
            the last place of the dtype of `gram`, right for sums of products in that dtype. `mogeo.gram` of rows that
            are not fp64 sums their products in fp32 first: pass 1e-6, for `OPTIMAL` to be about those rows.

    Returns:
        `Descent(weights, correction, status)` on the device of `gram`.

    Raises:
        TypeError: `gram` is not floating point.
        ValueError: `gram` is not square, or empty, or `weights` does not fit, or `rounding` is out of range.
    """
    _check_square("gram", gram)
    if weights.shape != gram.shape[:-1]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}: a Gram {tuple(gram.shape)} needs [..., K]")
    rounding = 4 * torch.finfo(gram.dtype).eps if rounding is None else rounding
    if not 0 < rounding < 1:
        raise ValueError(f"rounding={rounding}: pass the relative error of an entry of the Gram, > 0 and < 1")
    weights = weights.detach().to(device=gram.device, dtype=torch.float64)
    return Descent(*torch.ops.mogeo.descent(gram.detach().to(torch.float64), weights, rounding))


def psd_part(matrix: Tensor) -> Tensor:
    """The positive semi-definite matrix nearest to the symmetric part (M + Mᵀ)/2, by the Frobenius norm.

    That is the symmetric part with its negative eigenvalues set to zero: for estimates of a Gram matrix, which need
    not be one. Symmetric to the last bit, with a diagonal ≥ 0; a row of zeros stays one. Where no eigenvalue is below
    −4 K ε ‖M‖, ε = 2⁻⁵², and no entry of the diagonal below 0, the symmetric part comes back as it is, to the last bit.
    All else is right to 1e-13 ‖M‖: rows that lie decades apart should be divided by their norms before. On a GPU, up to
    K = 32 nothing waits for the device.

    Args:
        matrix: M [K, K], a real floating dtype; or [..., K, K].

    Returns:
        fp64, of that shape, on the device of `matrix`. NaN wherever a matrix has an entry that is not finite.

    Raises:
        TypeError: `matrix` is not floating point.
        ValueError: `matrix` is not square, or empty.

    Source: Higham, *Computing a nearest symmetric positive semidefinite matrix*, 1988, theorem 2.1.
    """
    _check_square("matrix", matrix)
    result: Tensor = torch.ops.mogeo.psd_part(matrix.detach().to(torch.float64))
    return result


def conflict_averse_weights(gram: Tensor, weights: Tensor, c: float, *, clipped: bool = False) -> ConflictAverse:
    """Weights of CAGrad's direction: the one within c‖g₀‖ of g₀ along which the objective that gains least gains most.

    g₀ = Σ_k v_k g_k. With p = argmin bᵀp + s √(pᵀMp) over the simplex, b = Mv, s = c‖g₀‖, and g_p = Σ_k p_k g_k, it is
    d = g₀ + s g_p / ‖g_p‖: exact and certified, as the weights of `min_norm_weights` are. RACO's direction has
    min(p, v) in place of p. Solved objectives and gradients that are not finite take no part and get weight 0.

    - `OPTIMAL`: no ⟨d, g_k⟩ of CAGrad's d lies below the optimum by more than 1e-13 ‖g_k‖ Σ_j w_j ‖g_j‖, w being the
      weights of d.
    - `UNDECIDED`: gradients balance out: g_p is shorter than 1e-3 Σ_k p_k ‖g_k‖, which may be the rounding of a Gram
      matrix of fp32 rows, and its direction is not known. The weights are v.
    - `STALLED`: M is not positive semi-definite; the weights are those of the p that was found.
    - `ZERO`: no objective has a gradient; the weights are v. `NONFINITE`: no objective has a finite one; they are 0.

    Args:
        gram: M [K, K], a real floating dtype, symmetric positive semi-definite up to rounding; or [..., K, K].
        weights: v [K], > 0; scaled to the sum 1 over who takes part. Or [..., K].
        c: ≥ 0. Below 1, d descends on Σ_k v_k L_k.
        clipped: RACO's.

    Returns:
        `ConflictAverse(weights, gap, status)` on the device of `gram`.

    Raises:
        TypeError: `gram` is not floating point.
        ValueError: `gram` is not square, or empty, or `weights` does not fit, or c is out of range.

    Sources: Liu et al., *Conflict-averse gradient descent for multi-task learning*, 2021 (CAGrad, arXiv 2110.14048);
    RACO, arXiv 2602.02495.
    """
    _check_square("gram", gram)
    if weights.shape != gram.shape[:-1]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}: a Gram {tuple(gram.shape)} needs [..., K]")
    if not 0 <= c < math.inf:
        raise ValueError(f"c={c}: pass a finite number ≥ 0, the radius around the mean in units of its length")
    weights = weights.detach().to(device=gram.device, dtype=torch.float64)
    return ConflictAverse(*torch.ops.mogeo.cagrad(gram.detach().to(torch.float64), weights, c, clipped))


def normalized_min_norm(
    gram: Tensor,
    losses: Tensor | None,
    normalize: Literal["none", "l2", "loss", "loss+"],
    power: float,
    apply_to: Literal["raw", "normalized"],
) -> MinNorm:
    """`min_norm_weights` of gradients divided by the normalisers of `mogeo.weightings.MGDA`; arguments as checked.

    Args:
        gram: M of the raw gradients [..., K, K].
        losses: L, [..., K], where they normalise.
        normalize: what divides each gradient; `power`: the exponent of that.
        apply_to: "raw": the coefficients are the weights; "normalized": they are divided by the normalisers.
    """
    losses = None if losses is None else losses.detach().to(device=gram.device, dtype=torch.float64)
    return MinNorm(*torch.ops.mogeo.min_norm(gram.detach().to(torch.float64), losses, normalize, power, apply_to))


def sketch_(row: Tensor, gradient: Tensor, chunks: Tensor, signs: Tensor) -> None:
    """row += S gradient, with what `sketch_tables` returned for this tensor; arguments as checked.

    Of K gradients [K, n] into K rows [K, d] as well.
    """
    torch.ops.mogeo.sketch_(row, gradient.detach(), chunks, signs)


def sketch_tables(signs: Tensor, chunks: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """What `SignedSketch` drew, in the form and the place that `sketch_` reads it for that device.

    Args:
        signs: ±1, int8 [n].
        chunks: per tensor int32 [C, 3], a chunk's rotation, the first entry of its window, and its sign.
    """
    code = _for_cuda() if device.type == "cuda" else torch_backend
    table, moved = code.sketch_tables(signs, chunks, device)
    return table, moved


# --------------------------------------------------------------------------------------------------------------------
# The choice


def _lack_of_triton() -> str | None:
    """Why the kernels cannot be used, if so."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return None if version >= _OLDEST_TRITON else f"triton {triton.__version__} is too old for mogeo's kernels"


@functools.cache
def _for_cuda() -> ModuleType:
    lack = _lack_of_triton()
    if lack is not None:
        warnings.warn(
            f"{lack}: on this GPU mogeo runs as PyTorch operations, which are slower and wait for the device at every "
            "step. pip install --upgrade triton",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch_backend
    from mogeo.geometry import triton_backend

    return triton_backend


def device_code(blocks: Sequence[Tensor]) -> ModuleType | None:
    """The Triton backend, if it can take a step over these blocks of rows [K, N_b] without asking the host; else None.

    That is where all of them lie on one GPU, K ≤ 32, and Triton is there.
    """
    if any(block.device.type != "cuda" or block.device != blocks[0].device for block in blocks):
        return None
    code = _for_cuda()
    return code if code is not torch_backend and len(blocks[0]) <= code.MOST_ROWS else None


_OPERATORS = {
    "gram": "(Tensor rows) -> Tensor",
    "gram_by_segment": "(Tensor rows, int[] boundaries) -> Tensor",
    "combine": "(Tensor rows, Tensor weights) -> Tensor",
    "combine_out": "(Tensor rows, Tensor weights, Tensor(a!) out) -> ()",
    "min_norm": "(Tensor gram, Tensor? losses, str normalize, float power, str apply_to) -> (Tensor, Tensor, Tensor)",
    "descent": f"(Tensor gram, Tensor weights, float rounding={ROUNDING!r}) -> (Tensor, Tensor, Tensor)",
    "psd_part": "(Tensor matrix) -> Tensor",
    "cagrad": "(Tensor gram, Tensor weights, float c, bool clipped) -> (Tensor, Tensor, Tensor)",
    "sketch_": "(Tensor(a!) row, Tensor gradient, Tensor chunks, Tensor signs) -> ()",
}
# Not torch.library.custom_op: that costs ten microseconds a call, this two.
_LIBRARY = torch.library.Library("mogeo", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _OPERATORS.items():
    _LIBRARY.define(_name + _schema)  # type: ignore[no-untyped-call]


def _register(key: str, code: Callable[[], ModuleType]) -> None:
    """Register the functions of `code()` for a dispatch key. `code` is called late: importing Triton takes a second."""

    def gram(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            result: Tensor = code().gram(rows)
        return result

    def gram_by_segment(rows: Tensor, boundaries: Sequence[int]) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            result: Tensor = code().gram_by_segment(rows, boundaries)
        return result

    def combine(rows: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = code().combine(rows, weights, rows.new_empty(rows.shape[1]))
        return result

    def combine_out(rows: Tensor, weights: Tensor, out: Tensor) -> None:
        if _overlaps_later_row(out, rows):  # here and not before, for a compiler has no addresses to compare
            raise ValueError("out overlaps a row other than the first, and would overwrite it unread: use rows[0]")
        code().combine(rows, weights, out)

    def min_norm(
        gram: Tensor, losses: Tensor | None, normalize: str, power: float, apply_to: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = code().min_norm(gram, losses, normalize, power, apply_to)
        return result

    def descent(gram: Tensor, weights: Tensor, rounding: float = ROUNDING) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = code().descent(gram, weights, rounding)
        return result

    def psd_part(matrix: Tensor) -> Tensor:
        result: Tensor = code().psd_part(matrix)
        return result

    def cagrad(gram: Tensor, weights: Tensor, c: float, clipped: bool) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = code().cagrad(gram, weights, c, clipped)
        return result

    def sketch_(row: Tensor, gradient: Tensor, chunks: Tensor, signs: Tensor) -> None:
        code().sketch_(row, gradient, chunks, signs)

    for implementation in (gram, gram_by_segment, combine, combine_out, min_norm, descent, cagrad, psd_part, sketch_):
        _LIBRARY.impl(implementation.__name__, implementation, key)  # type: ignore[no-untyped-call]


_register("CompositeExplicitAutograd", lambda: torch_backend)  # all devices but those named below
_register("CUDA", _for_cuda)


def _register_fakes() -> None:
    """Shapes and dtypes of the results, for torch.compile."""

    def gram(rows: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[0], rows.shape[0], dtype=torch.float64)

    def gram_by_segment(rows: Tensor, boundaries: Sequence[int]) -> Tensor:
        return rows.new_empty(len(boundaries), rows.shape[0], rows.shape[0], dtype=torch.float64)

    def combine(rows: Tensor, weights: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[1])

    def combine_out(rows: Tensor, weights: Tensor, out: Tensor) -> None:
        return None

    def min_norm(
        gram: Tensor, losses: Tensor | None, normalize: str, power: float, apply_to: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        status = gram.new_empty(gram.shape[:-2], dtype=torch.int64)
        return gram.new_empty(gram.shape[:-1]), gram.new_empty(gram.shape[:-2]), status

    def descent(gram: Tensor, weights: Tensor, rounding: float = ROUNDING) -> tuple[Tensor, Tensor, Tensor]:
        status = gram.new_empty(gram.shape[:-2], dtype=torch.int64)
        return torch.empty_like(weights), torch.empty_like(weights), status

    def psd_part(matrix: Tensor) -> Tensor:
        return matrix.new_empty(matrix.shape)

    def cagrad(gram: Tensor, weights: Tensor, c: float, clipped: bool) -> tuple[Tensor, Tensor, Tensor]:
        status = gram.new_empty(gram.shape[:-2], dtype=torch.int64)
        return torch.empty_like(weights), gram.new_empty(gram.shape[:-2]), status

    def sketch_(row: Tensor, gradient: Tensor, chunks: Tensor, signs: Tensor) -> None:
        return None

    for fake in (gram, gram_by_segment, combine, combine_out, min_norm, descent, cagrad, psd_part, sketch_):
        torch.library.register_fake(f"mogeo::{fake.__name__}", fake, lib=_LIBRARY)


_register_fakes()


# --------------------------------------------------------------------------------------------------------------------
# Checks


def _check_square(name: str, matrix: Tensor) -> None:
    if not matrix.is_floating_point():
        raise TypeError(f"{name} is {matrix.dtype}: pass a real floating-point matrix")
    if matrix.ndim < 2 or matrix.shape[-2] != matrix.shape[-1] or matrix.shape[-1] == 0:
        shape = tuple(matrix.shape)
        raise ValueError(f"{name} has shape {shape}: pass a square matrix [K, K], K ≥ 1, or a batch of them")


def _check_rows(rows: Tensor) -> None:
    if rows.dtype not in ROW_DTYPES:
        raise TypeError(f"rows are {rows.dtype}: pass fp64, fp32, bf16 or fp16")
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ValueError(f"rows have shape {tuple(rows.shape)}: pass [K, N], one flattened gradient per row, K ≥ 1")


def _overlaps_later_row(out: Tensor, rows: Tensor) -> bool:
    if out.numel() == 0 or out.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr():
        return False
    in_place = out.dtype == rows.dtype and out.data_ptr() == rows[0].data_ptr()
    if in_place and out.stride() == rows[0].stride() and rows.stride(0) != 0:
        return False
    first = rows.data_ptr()
    last = rows[-1, -1:].data_ptr()
    return out.data_ptr() <= last and out[-1:].data_ptr() >= first
