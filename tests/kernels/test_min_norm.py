"""The min-norm kernel where tests/geometry/test_exact_min_norm.py does not reach: normalisation, and who takes no part.

Expected are the coefficients that the 120-digit oracle finds for the normalised Gram matrix, divided as the user asks.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mogeo import Status
from mogeo.geometry import torch_backend
from tests.backends import KERNEL_DEVICE, needs_kernels
from tests.min_norm_asserts import assert_gap_is_true, assert_same_direction, judge
from tests.profiles import slow_but
from tests.reference import high_precision
from tests.strategies import FAMILIES, WELL_POSED

pytest.importorskip("triton")

from mogeo.kernels import min_norm as kernels

pytestmark = needs_kernels

NORMALIZATIONS = ("none", "l2", "loss", "loss+")
# Families that determine the weights themselves, not only the direction.
DETERMINED = tuple(family for family in WELL_POSED if family != "near-collinear")
LEFT_OUT = (math.nan, math.inf, -math.inf)


class Solved(NamedTuple):
    """What the kernel wrote, on the CPU."""

    weights: Tensor
    gap: Tensor
    status: Tensor
    nonfinite: Tensor
    iterations: Tensor


def solve(gram: Tensor, losses: Tensor | None = None, *, absent: Tensor | None = None, **options: Any) -> Solved:
    """Solve on the device of the kernels, with every output."""

    def there(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(KERNEL_DEVICE)

    nonfinite = torch.zeros(gram.shape[:-1], dtype=torch.bool, device=KERNEL_DEVICE)
    iterations = torch.full(gram.shape[:-2], -1, dtype=torch.int64, device=KERNEL_DEVICE)
    result = kernels.min_norm(
        there(gram), there(losses), absent=there(absent), nonfinite=nonfinite, iterations=iterations, **options
    )
    return Solved(*(value.cpu() for value in (*result, nonfinite, iterations)))


def problem(family: str, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Gram of that family, and losses from 0.1 to 10."""
    rng = np.random.default_rng([seed, k])
    return torch.from_numpy(FAMILIES[family](rng, k)), torch.from_numpy(10.0 ** rng.uniform(-1, 1, k))


def normalizers(gram: Tensor, losses: Tensor, normalize: str, power: float) -> Tensor:
    """n [K], by its definition."""
    norms = gram.diagonal().sqrt()
    base = {"none": torch.ones_like(norms), "l2": norms, "loss": losses, "loss+": losses * norms}[normalize]
    return base**power


def without(rows: list[int], k: int) -> list[int]:
    return [i for i in range(k) if i not in rows]


# --------------------------------------------------------------------------------------------------------------------
# Normalisation


@pytest.mark.parametrize("family", slow_but(WELL_POSED, "near-collinear", "strong conflict"))
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("normalize", slow_but(NORMALIZATIONS, "l2", "loss+"))
def test_normalized_weights(normalize: str, power: float, family: str) -> None:
    gram, losses = problem(family, 4)
    n = normalizers(gram, losses, normalize, power)
    normalized = gram / (n[:, None] * n)
    raw = solve(gram, losses, normalize=normalize, power=power)
    divided = solve(gram, losses, normalize=normalize, power=power, apply_to="normalized")
    torch.testing.assert_close(divided.weights, raw.weights / n, rtol=1e-14, atol=0)
    assert (int(raw.status), int(divided.status)) == (Status.OPTIMAL, Status.OPTIMAL)
    assert not raw.nonfinite.any()
    if family in DETERMINED:
        expected = [float(w) for w in high_precision.min_norm_point(normalized.tolist()).weights]
        torch.testing.assert_close(raw.weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    else:
        alone = solve(normalized)
        assert_same_direction(normalized, raw.weights, alone.weights)
    assert_gap_is_true(judge(normalized, raw.weights), raw.gap)


@pytest.mark.parametrize("family", slow_but(DETERMINED, "strong conflict"))
def test_agrees_with_the_cpu(family: str) -> None:
    for k, normalize in itertools.product((2, 5, 9), NORMALIZATIONS):
        gram, losses = problem(family, k, seed=1)
        expected, _, status = torch_backend.min_norm(gram, losses, normalize, 1.0, "normalized")
        result = solve(gram, losses, normalize=normalize, apply_to="normalized")
        torch.testing.assert_close(result.weights, expected, rtol=1e-9, atol=0)
        assert torch.equal(result.status, status)


def test_normalizers_that_leave_the_range_leave_their_objective_out() -> None:
    """(1e-200)² underflows, and a squared norm of 1e-10 over it overflows: that one has nothing left to say."""
    gram, _ = problem("gaussian, N = 1000", 3)
    result = solve(gram, torch.tensor([1.0, 1e-200, 1.0], dtype=torch.float64), normalize="loss")
    kept = torch.tensor([0, 2])
    alone = solve(gram[kept][:, kept].contiguous())
    assert result.weights[1] == 0
    assert torch.equal(result.weights[kept], alone.weights)


# --------------------------------------------------------------------------------------------------------------------
# Who takes no part


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("rows", [[1], [0, 3], [0, 1, 2]])
def test_absent_objectives_are_left_out(rows: list[int], normalize: str) -> None:
    """To the bit, whatever their loss and gradient are; and nobody is told of these."""
    gram, losses = problem("gaussian, N = K + 1", 5)
    gram[rows[0], :] = gram[:, rows[0]] = math.nan
    losses[rows[-1]] = -math.inf
    absent = torch.zeros(5, dtype=torch.bool)
    absent[rows] = True
    kept = torch.tensor(without(rows, 5))
    result = solve(gram, losses, absent=absent, normalize=normalize)
    alone = solve(gram[kept][:, kept].contiguous(), losses[kept], normalize=normalize)
    assert bool((result.weights[rows] == 0).all())
    assert torch.equal(result.weights[kept], alone.weights)
    assert torch.equal(result.gap, alone.gap)
    assert int(result.status) == Status.OPTIMAL
    assert not result.nonfinite.any()


@pytest.mark.parametrize("normalize", slow_but(NORMALIZATIONS, "loss"))
@pytest.mark.parametrize("entry", LEFT_OUT)
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_nonfinite_objectives_are_left_out_and_reported(where: str, entry: float, normalize: str) -> None:
    gram, losses = problem("gaussian, N = K + 1", 4)
    if where == "gradient":
        gram[2, :] = gram[:, 2] = entry
    else:
        losses[2] = entry
    kept = torch.tensor([0, 1, 3])
    result = solve(gram, losses, normalize=normalize)
    alone = solve(gram[kept][:, kept].contiguous(), losses[kept], normalize=normalize)
    assert result.weights[2] == 0
    assert torch.equal(result.weights[kept], alone.weights)
    assert torch.equal(result.gap, alone.gap)
    assert int(result.status) == Status.OPTIMAL
    assert result.nonfinite.tolist() == [False, False, True, False]


def test_nothing_finite() -> None:
    gram, _ = problem("gaussian, N = K + 1", 3)
    result = solve(gram, torch.full((3,), math.nan, dtype=torch.float64), normalize="loss")
    assert int(result.status) == Status.NONFINITE
    assert torch.equal(result.weights, torch.zeros(3, dtype=torch.float64))
    assert bool(result.nonfinite.all())
    assert result.gap == 0


def test_nobody_present() -> None:
    gram, losses = problem("gaussian, N = K + 1", 3)
    result = solve(gram, losses, absent=torch.ones(3, dtype=torch.bool))
    assert int(result.status) == Status.NONFINITE
    assert torch.equal(result.weights, torch.zeros(3, dtype=torch.float64))
    assert not result.nonfinite.any()


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("normalize", ["loss", "loss+"])
@pytest.mark.parametrize("loss", [0.0, -0.3])
def test_a_loss_that_cannot_divide_is_told_and_left_out(loss: float, normalize: str, power: float) -> None:
    gram, losses = problem("gaussian, N = K + 1", 4)
    losses[1] = loss
    kept = torch.tensor([0, 2, 3])
    for apply_to in ("raw", "normalized"):
        options = {"normalize": normalize, "power": power, "apply_to": apply_to}
        result = solve(gram, losses, **options)
        alone = solve(gram[kept][:, kept].contiguous(), losses[kept], **options)
        assert int(result.status) == Status.NONPOSITIVE_LOSS
        assert result.weights[1] == 0
        assert torch.equal(result.weights[kept], alone.weights)
        assert torch.equal(result.gap, alone.gap)
        assert not result.nonfinite.any()


def test_no_loss_can_divide() -> None:
    gram, losses = problem("gaussian, N = K + 1", 3)
    result = solve(gram, -losses, normalize="loss+")
    assert int(result.status) == Status.NONPOSITIVE_LOSS
    assert torch.equal(result.weights, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_losses_that_do_not_divide_may_be_anything_finite(normalize: str) -> None:
    gram, _ = problem("gaussian, N = K + 1", 4)
    expected = solve(gram, None, normalize=normalize)
    result = solve(gram, torch.tensor([-1.0, 0.0, 1e300, 5.0], dtype=torch.float64), normalize=normalize)
    assert torch.equal(result.weights, expected.weights)
    assert int(result.status) == Status.OPTIMAL


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_a_solved_objective_may_have_any_loss(normalize: str) -> None:
    """Its gradient is zero: nothing is divided."""
    gram, losses = problem("gaussian, N = K + 1", 4)
    gram[3, :] = gram[:, 3] = 0.0
    expected = solve(gram[:3, :3].contiguous(), losses[:3], normalize=normalize)
    for loss in (0.0, -1.0):
        losses[3] = loss
        result = solve(gram, losses, normalize=normalize)
        assert int(result.status) == Status.OPTIMAL
        assert torch.equal(result.weights, torch.cat([expected.weights, torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize("apply_to", ["raw", "normalized"])
def test_solved_objectives_alone_share_the_weights(apply_to: str) -> None:
    """None of them has a gradient, one has no finite loss, one is absent."""
    losses = torch.tensor([2.0, -3.0, math.nan, 4.0, 5.0], dtype=torch.float64)
    absent = torch.tensor([False, False, False, True, False])
    zeros = torch.zeros(5, 5, dtype=torch.float64)
    result = solve(zeros, losses, absent=absent, normalize="loss+", apply_to=apply_to)
    assert int(result.status) == Status.ZERO
    torch.testing.assert_close(
        result.weights, torch.tensor([1, 1, 0, 0, 1], dtype=torch.float64) / 3, rtol=1e-15, atol=0
    )
    assert result.nonfinite.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("where", ["gradient", "loss", "nowhere", "absent"])
def test_propagate(where: str) -> None:
    """NaN weights for all, if someone present is not finite."""
    gram, losses = problem("gaussian, N = K + 1", 3)
    absent = torch.tensor([False, where == "absent", False])
    if where in ("gradient", "absent"):
        gram[1, 1] = math.inf
    elif where == "loss":
        losses[1] = math.nan
    result = solve(gram, losses, absent=absent, normalize="loss", propagate=True)
    calm = solve(gram, losses, absent=absent, normalize="loss")
    assert bool(calm.weights.isfinite().all())
    assert torch.equal(result.nonfinite, calm.nonfinite)
    if where in ("gradient", "loss"):
        assert bool(result.weights.isnan().all())
    else:
        assert torch.equal(result.weights, calm.weights)


# --------------------------------------------------------------------------------------------------------------------
# Many problems, and how long they take


def test_a_batch_has_its_own_losses_and_absentees() -> None:
    """[2, 3] problems of all kinds, and one by one, to the bit."""
    families = ("gaussian, N = K + 1", "strong conflict", "norms 1e-6 … 1e3", "vertex", "zero rows", "duplicates")
    grams, losses = (torch.stack(values) for values in zip(*(problem(f, 5) for f in families), strict=True))
    absent = torch.zeros(6, 5, dtype=torch.bool)
    absent[0, 1] = absent[3, 4] = absent[3, 0] = True
    grams[1, 2, :] = grams[1, :, 2] = math.nan
    losses[2, 0], losses[5, 3] = -1.0, math.inf
    options = {"normalize": "loss+", "power": 0.5, "apply_to": "normalized"}
    together = solve(grams.view(2, 3, 5, 5), losses.view(2, 3, 5), absent=absent.view(2, 3, 5), **options)
    assert together.weights.shape == together.nonfinite.shape == (2, 3, 5)
    assert together.gap.shape == together.status.shape == together.iterations.shape == (2, 3)
    for i in range(6):
        alone = solve(grams[i], losses[i], absent=absent[i], **options)
        for all_of_them, this in zip(together, alone, strict=True):
            assert torch.equal(all_of_them.flatten(0, 1)[i], this)
    assert together.status.flatten().tolist() == [0, 0, Status.NONPOSITIVE_LOSS, 0, 0, 0]
    assert together.nonfinite.flatten().nonzero().flatten().tolist() == [7, 28]


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_an_empty_batch(batch: tuple[int, ...]) -> None:
    result = solve(torch.zeros(*batch, 3, 3, dtype=torch.float64))
    assert (result.weights.shape, result.gap.shape, result.status.shape) == ((*batch, 3), batch, batch)


@pytest.mark.parametrize("k", slow_but([1, 2, 4, 8], 2, 4))
def test_iterations_are_told_and_few(k: int) -> None:
    """Each objective enters about once; where fp64 did not suffice, once more in double-double."""
    for family in FAMILIES:
        gram, _ = problem(family, k)
        iterations = int(solve(gram).iterations)
        assert 0 < iterations <= 4 * k + 4, family
