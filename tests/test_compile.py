"""The functional core as operators of torch: what they promise to a compiler, and what compiled code returns."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mogeo
import mogeo.geometry.ops
from tests.row_asserts import assert_combined, gaussian
from tests.strategies import lay_out

WEIGHTS = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
LOSSES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRAM = mogeo.gram(gaussian(3, 20))

# Of torch's own making, as it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++")),
    reason="inductor needs a C++ compiler",
)
INDUCTOR = pytest.param("inductor", marks=needs_compiler)
COMPILERS = ["eager", "aot_eager", INDUCTOR]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Compile anew in each test, and leave nothing behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# Schemas, and shapes without data


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("gram", (gaussian(3, 20),)),
        ("gram", (gaussian(1, 0, torch.float16),)),
        ("gram", (lay_out(gaussian(4, 30, torch.bfloat16), "every second"),)),
        ("gram_by_segment", (gaussian(3, 20), [0, 7, 7, 20])),
        ("gram_by_segment", (lay_out(gaussian(2, 20, torch.bfloat16), "transposed"), [0, 20])),
        ("combine", (gaussian(3, 20), WEIGHTS)),
        ("combine", (lay_out(gaussian(3, 20, torch.bfloat16), "offset"), WEIGHTS)),
        ("combine_out", (gaussian(3, 20), WEIGHTS, torch.empty(20))),
        ("combine_out", (gaussian(3, 20, torch.float16), WEIGHTS, torch.empty(20, 2, dtype=torch.float16)[:, 1])),
        ("min_norm", (GRAM, None, "none", 1.0, "raw")),
        ("min_norm", (GRAM, LOSSES, "loss+", 0.5, "normalized")),
        ("min_norm", (GRAM.expand(2, 5, 3, 3), LOSSES.expand(2, 5, 3), "loss", 1.0, "raw")),
        ("min_norm", (GRAM.expand(0, 3, 3), None, "none", 1.0, "raw")),
    ],
)
def test_operators_keep_their_promises(operator: str, arguments: tuple[Any, ...]) -> None:
    """Nothing changes but `out`, nothing aliases, and the fake results look like the real ones."""
    torch.library.opcheck(getattr(torch.ops.mogeo, operator).default, arguments)


# --------------------------------------------------------------------------------------------------------------------
# Compiled


def balance(rows: Tensor) -> tuple[Tensor, mogeo.MinNorm, Tensor]:
    """Rows to direction, with something to fuse on either side."""
    gram = mogeo.gram(rows * 2)
    solved = mogeo.min_norm_weights(gram)
    return mogeo.combine(rows * 2, solved.weights) + 1, solved, gram


def balance_in_place(rows: Tensor) -> tuple[Tensor, Tensor]:
    weights = mogeo.min_norm_weights(mogeo.gram(rows)).weights
    return mogeo.combine(rows, weights, out=rows[0]), weights


def by_segment(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, segments = mogeo.gram_by_segment(rows, [0, 7, 7, rows.shape[1]])
    return total, segments, mogeo.min_norm_weights(segments + torch.eye(len(rows))).weights


def compiled(function: Callable[..., Any], compiler: str) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=compiler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_is_as_eager(compiler: str, dtype: torch.dtype) -> None:
    """To the bit, for one number of columns and another, and outside autograd."""
    assert_as_eager(compiler, dtype, 1000, 1037)


@needs_compiler
@pytest.mark.slow
def test_compiled_by_inductor_is_as_eager() -> None:
    assert_as_eager("inductor", torch.float32, 1000)


def assert_as_eager(compiler: str, dtype: torch.dtype, *columns: int) -> None:
    function = compiled(balance, compiler)
    for n in columns:
        rows = gaussian(3, n, dtype).requires_grad_()
        (direction, solved, gram), expected = function(rows), balance(rows)
        assert torch.equal(gram, expected[2])
        assert all(torch.equal(a, b) for a, b in zip(solved, expected[1], strict=True))
        assert torch.equal(direction, expected[0])
        assert not direction.requires_grad


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_in_place_is_as_eager(compiler: str) -> None:
    rows = gaussian(3, 1000)
    expected_rows = rows.clone()
    direction, weights = compiled(balance_in_place, compiler)(rows)
    expected, expected_weights = balance_in_place(expected_rows)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(direction, expected)
    assert torch.equal(rows, expected_rows)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_segments_are_as_eager(compiler: str) -> None:
    rows = gaussian(3, 500)
    for value, expected in zip(compiled(by_segment, compiler)(rows), by_segment(rows), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_code_overwrites_no_row_that_it_still_reads(compiler: str) -> None:
    """It copies the rows first, or refuses as eager code does."""
    rows = gaussian(3, 100)
    before, weights = rows.clone(), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    combine = compiled(lambda rows, weights: mogeo.combine(rows, weights, out=rows[1]), compiler)
    try:
        combine(rows, weights)
    except ValueError as error:
        assert re.search(r"out overlaps.*rows\[0\]", str(error))  # noqa: PT017
        assert torch.equal(rows, before)
    else:
        assert_combined(before, weights, rows[1])
        assert torch.equal(rows[::2], before[::2])
