"""Under torch.compile: what operators of the functional core promise and return, and loops that use the optimizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mogeo
import mogeo.geometry.ops
from tests.profiles import slow_but
from tests.row_asserts import assert_combined, gaussian
from tests.strategies import lay_out

WEIGHTS = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
LOSSES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRAM = mogeo.gram(gaussian(3, 20))

pytestmark = [
    # Of torch's own making, as it imports its compiler,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    # and as it looks at the tensors that live where a graph ends.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

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
        ("psd_part", (GRAM - 20 * torch.eye(3),)),
        ("psd_part", ((GRAM + torch.arange(18.0).view(2, 3, 3)).mT,)),
        ("psd_part", (GRAM.expand(2, 5, 3, 3),)),
        ("psd_part", (GRAM.expand(0, 3, 3),)),
        ("cagrad", (GRAM, LOSSES, 0.4, False)),
        ("cagrad", (GRAM.expand(2, 5, 3, 3), LOSSES.expand(2, 5, 3), 0.4, True)),
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


# --------------------------------------------------------------------------------------------------------------------
# Training loops


class Narrated(mogeo.MultiObjectiveOptimizer):
    """A user's subclass that adds to backward() and step()."""

    def backward(self, losses: Any, **options: Any) -> None:
        super().backward(losses, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


def two_losses(out: Tensor) -> dict[str, Tensor]:
    return {"left": (out[:, 0] - 1).square().mean() + 0.1, "right": (out[:, 1] + 2).square().mean() + 0.1}


def after_three_steps(
    kind: type[mogeo.MultiObjectiveOptimizer],
    wrap: Callable[[Callable[..., None]], Callable[..., None]],
    **options: Any,
) -> list[Tensor]:
    """Parameters after steps whose whole loop body, clipping in between, went through `wrap`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = kind(torch.optim.AdamW(net.parameters(), lr=0.01), **options)

    def one_step(x: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward(two_losses(net(x)))
        optimizer.combine()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()

    step = wrap(one_step)
    for _ in range(3):
        step(torch.randn(5, 6))
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    ("compiler", "kind", "options"),
    [
        ("eager", mogeo.MultiObjectiveOptimizer, {}),
        ("eager", mogeo.MultiObjectiveOptimizer, {"track": 0.9, "guarantee_descent": True}),
        *slow_but([("aot_eager", Narrated, {"sketch": 64})]),
        *slow_but([("aot_eager", mogeo.MultiObjectiveOptimizer, {"refresh_every": 2})]),
    ],
)
def test_a_compiled_loop_trains_as_it_does_without_a_compiler(
    compiler: str, kind: type[mogeo.MultiObjectiveOptimizer], options: dict[str, Any]
) -> None:
    loop = after_three_steps(kind, lambda step: torch.compile(step, backend=compiler), **options)
    torch.testing.assert_close(loop, after_three_steps(kind, lambda step: step, **options), rtol=0, atol=0)


@needs_compiler
@pytest.mark.slow
def test_a_loop_compiled_by_inductor_trains_as_it_does_without_a_compiler() -> None:
    loop = after_three_steps(mogeo.MultiObjectiveOptimizer, torch.compile)
    torch.testing.assert_close(loop, after_three_steps(mogeo.MultiObjectiveOptimizer, lambda step: step))


@pytest.mark.parametrize(("memory", "times"), [(mogeo.Rows(), 1), (mogeo.Sketch(4), 2)], ids=["rows", "sketch"])
def test_a_compiled_model_stays_compiled_inside_backward(memory: Any, times: int) -> None:
    """A callable runs inside backward(), which itself is not compiled, and compiles the model once for all runs."""
    compiled: list[int] = []
    ran: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(1)

        def run(*arguments: Tensor) -> Any:
            ran.append(1)
            return graph(*arguments)

        return run

    net = nn.Linear(6, 2)
    model = torch.compile(net, backend=count)
    optimizer = mogeo.MultiObjectiveOptimizer(torch.optim.AdamW(net.parameters()), memory=memory)
    x = torch.randn(5, 6)
    for _ in range(2):
        optimizer.backward({name: (lambda n=name: two_losses(model(x))[n]) for name in ("left", "right")})
        optimizer.step()
    assert len(ran) == 2 * 2 * times
    assert len(compiled) == 1


def test_a_compiled_forward_that_cannot_keep_its_graph_is_named() -> None:
    """Torch lets the first backward overwrite what a compiled forward saved, unless that first one keeps the graph."""
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2))
    optimizer = mogeo.MultiObjectiveOptimizer(torch.optim.AdamW(net.parameters()))

    def compiled_and_run_once() -> Callable[[Tensor], Tensor]:
        torch._dynamo.reset()
        model = torch.compile(net, backend="aot_eager")
        model(torch.ones(5, 6)).sum().backward()
        optimizer.zero_grad()
        return model

    with torch._functorch.config.patch(donated_buffer=True):
        model = compiled_and_run_once()
        with pytest.raises(RuntimeError, match=r"objective 'left' shares a compiled forward.*donated_buffer = False"):
            optimizer.backward(two_losses(model(torch.ones(5, 6))))
    with torch._functorch.config.patch(donated_buffer=False):
        model = compiled_and_run_once()
        optimizer.backward(two_losses(model(torch.ones(5, 6))))
        optimizer.step()


@pytest.mark.slow
def test_importing_mogeo_does_not_import_the_compiler() -> None:
    code = "import sys, mogeo; mogeo.MultiObjectiveOptimizer; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
