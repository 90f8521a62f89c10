"""What only hardware can tell: no synchronisation, CUDA graphs, determinism, mixed precision, lengths beyond 2³¹.

The property tests of the kernels run on a GPU as well, and `pytest -m gpu` runs all of it: tests/kernels, and
tests/geometry with the backend "cuda".
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mogeo
from mogeo import MultiObjectiveOptimizer
from mogeo.geometry.ops import psd_part
from mogeo.geometry.projection import SignedSketch
from tests.strategies import symmetric

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from timing import synchronisation

pytestmark = pytest.mark.gpu
NAMES = ("help", "honesty", "truth")
WEIGHTINGS = ["mgda-decoupled", "mgda-normalized", "group-dro", "uniform", "raco(0.4)"]


def make_net(dtype: torch.dtype = torch.float32, device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 3)).to(device=device, dtype=dtype)


def batch(device: str = "cuda") -> Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(device)


def losses_of(net: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    dtype = next(net.parameters()).dtype
    return {name: (lambda k=k: (net(x.to(dtype))[:, k].float() - k).square().mean()) for k, name in enumerate(NAMES)}


def step(net: nn.Module, optimizer: MultiObjectiveOptimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses_of(net, x))
    optimizer.step()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    with synchronisation("error"):
        yield


def held(optimizer: MultiObjectiveOptimizer) -> int:
    """Bytes of the device that are in use between two steps, once all reports have arrived."""
    torch.cuda.synchronize()
    assert optimizer.report is not None
    assert optimizer.report.to_dict()["direction_norm"] > 0
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01}, {"nonfinite": "propagate"}, {"track": 0.9}], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_step_never_synchronises_and_holds_no_more_than_the_one_before(
    weighting: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    net, x = make_net(dtype), batch()
    optimizer = MultiObjectiveOptimizer(torch.optim.AdamW(net.parameters(), fused=True), weighting, **options)
    for _ in range(3):
        step(net, optimizer, x)
    before = held(optimizer)
    with no_synchronisation():
        for _ in range(5):
            step(net, optimizer, x)
    # Not memory_reserved: how the allocator cuts its segments is its own affair, and it may want another one.
    assert held(optimizer) == before


@pytest.mark.parametrize("track", [0.9, "auto"])
def test_averages_that_were_loaded_on_the_host_go_on_here(track: Any) -> None:
    net, x = make_net(), batch()
    twin = copy.deepcopy(net)
    first, second = (
        MultiObjectiveOptimizer(torch.optim.AdamW(model.parameters()), objectives=NAMES, track=track)
        for model in (net, twin)
    )
    for _ in range(8):
        step(net, first, x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    twin.load_state_dict(net.state_dict())
    for _ in range(3):
        step(net, first, x)
        step(twin, second, x)
    assert first.report is not None
    assert second.report is not None
    torch.testing.assert_close(first.report.weights, second.report.weights, rtol=1e-9, atol=0.0)
    assert bool((second.report.evidence == 1).all())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_captured_step_replays_as_it_would_have_run(weighting: str) -> None:
    net, x = make_net(), batch()
    twin = copy.deepcopy(net)

    def optimizer_of(model: nn.Module) -> MultiObjectiveOptimizer:
        base = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
        return MultiObjectiveOptimizer(base, weighting, max_grad_norm=0.1)

    captured, eager = optimizer_of(net), optimizer_of(twin)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, captured, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    captured.zero_grad()
    with torch.cuda.graph(graph):
        step(net, captured, x)
    for _ in range(10):
        graph.replay()
    for _ in range(13):
        step(twin, eager, x)
    assert captured.report is not None
    assert eager.report is not None
    torch.testing.assert_close(captured.report.weights, eager.report.weights, rtol=1e-6, atol=1e-9)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
def test_the_same_bits_a_hundred_times(k: int, dtype: torch.dtype) -> None:
    rows = torch.randn(k, 300_007, device="cuda").to(dtype)
    gram = mogeo.gram(rows)
    point = mogeo.min_norm_weights(gram)
    direction = mogeo.combine(rows, point.weights)
    for _ in range(100):
        again = mogeo.gram(rows)
        assert torch.equal(again, gram)
        solved = mogeo.min_norm_weights(again)
        assert torch.equal(solved.weights, point.weights)
        assert torch.equal(solved.gap, point.gap)
        assert torch.equal(mogeo.combine(rows, solved.weights), direction)


@pytest.mark.parametrize(
    ("k", "columns"),
    [(2, 1_000_000_000), (4, 600_000_000), (2, 2**31 - 1), (2, 2**31 - 17), (2, 2**31 + 37)],
)
def test_lengths_beyond_two_to_the_31(k: int, columns: int) -> None:
    if torch.cuda.mem_get_info()[0] < 2.2 * k * columns * 2:
        pytest.skip(f"needs {2.2 * k * columns * 2 / 2**30:.0f} GiB of free GPU memory")
    from mogeo.geometry.triton_backend import finish_

    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.empty(k, columns, dtype=torch.bfloat16, device="cuda")
    rows.normal_(generator=generator)
    exact = torch.zeros(k, k, dtype=torch.float64, device="cuda")
    for start in range(0, columns, 1 << 26):
        chunk = rows[:, start : start + (1 << 26)].double()
        exact += chunk @ chunk.T
    assert ((mogeo.gram(rows) - exact).abs().max() / exact.diagonal().max()).item() < 1e-6
    weights = torch.linspace(0.1, 1, k, dtype=torch.float64, device="cuda")
    expected = weights @ rows[:, -1000:].double()
    tail = mogeo.combine(rows, weights, out=rows[0])[-1000:].double()
    torch.testing.assert_close(tail, expected, rtol=2**-8, atol=1e-2)
    direction = rows[0]
    before = direction[-1000:].clone()
    squares = torch.tensor([1.0], dtype=torch.float64, device="cuda")
    finish_([direction], squares, weights, None, 0.5, discard=True)  # halves a direction of length 1
    assert torch.equal(direction[-1000:], before * 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_of_more_elements_than_32_bits_count(dtype: torch.dtype) -> None:
    """2³¹ + 5 elements, all zero but some at the end."""
    size, dimension = 2**31 + 5, 1 << 20
    if torch.cuda.mem_get_info()[0] < 1.1 * size * dtype.itemsize:
        pytest.skip(f"needs {1.1 * size * dtype.itemsize / 2**30:.0f} GiB of free GPU memory")
    sketch = SignedSketch([size], dimension, device=torch.device("cuda"))
    gradient = torch.zeros(size, dtype=dtype, device="cuda")
    gradient[-5:] = torch.arange(1.0, 6.0)
    row = torch.zeros(dimension, device="cuda")
    sketch.add_(row, 0, gradient)
    found = row[row != 0].abs().sort().values
    assert found.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_is_that_of_the_cpu_and_never_synchronises(dtype: torch.dtype) -> None:
    sizes, dimension = [5, 300_001, 70_000], 4096
    gradients = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in sizes]
    here, there = (SignedSketch(sizes, dimension, device=torch.device(device)) for device in ("cpu", "cuda"))
    mine, theirs = torch.zeros(dimension), torch.zeros(dimension, device="cuda")
    moved = [gradient.cuda() for gradient in gradients]
    scratch = torch.zeros_like(theirs)
    for index, gradient in enumerate(gradients):
        here.add_(mine, index, gradient)
        there.add_(scratch, index, moved[index])  # compiled now
    with no_synchronisation():
        for index in range(len(sizes)):
            there.add_(theirs, index, moved[index])
    torch.testing.assert_close(theirs.cpu(), mine, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [1, 4, 9, 32])
def test_a_psd_part_is_that_of_the_cpu_and_never_synchronises(k: int) -> None:
    matrix = torch.from_numpy(symmetric(np.random.default_rng(k), k))
    moved = matrix.cuda()
    psd_part(moved)  # compiled now
    with no_synchronisation():
        found = psd_part(moved)
    torch.testing.assert_close(found.cpu(), psd_part(matrix), rtol=0, atol=1e-13 * k)


@pytest.mark.parametrize(
    "options",
    [
        {"guarantee_descent": True},
        {"track": 0.9, "weigh_by": "mini-batch"},
        {"refresh_every": 3},
        {"preference": (1.0, 2.0, 3.0), "min_weight": 0.05, "smoothing": 0.5},
        {"host_rows": True},
        {"host_rows": True, "row_dtype": torch.bfloat16, "refresh_every": 2},
        {"row_dtype": torch.bfloat16},
        {"sketch": 1 << 16},  # so long that hardly two elements meet
        {"sketch": 1 << 16, "refresh_every": 3, "guarantee_descent": True},
    ],
    ids=str,
)
def test_settings_for_large_models_train_as_on_a_cpu(options: dict[str, Any]) -> None:
    def train(device: str) -> tuple[Tensor, list[Tensor]]:
        net, x = make_net(device=device), batch(device)
        optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), max_grad_norm=1.0, **options)
        weights = []
        for _ in range(7):
            step(net, optimizer, x)
            assert optimizer.report is not None
            weights.append(optimizer.report.weights.cpu())
        return torch.stack(weights), [p.detach().cpu() for p in net.parameters()]

    (weights, parameters), (expected, expected_parameters) = train("cuda"), train("cpu")
    near = {"rtol": 1e-2, "atol": 1e-2} if "row_dtype" in options else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(weights, expected, **near)
    for p, q in zip(parameters, expected_parameters, strict=True):
        torch.testing.assert_close(p, q, **near)


def test_rows_on_the_host_are_pinned_and_leave_the_gpu_one_direction() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), host_rows=True)
    step(net, optimizer, batch())
    assert optimizer._captures.buffers is not None
    for rows in optimizer._captures.buffers.blocks:
        assert rows.is_pinned()
    assert all(p.grad is not None and p.grad.is_cuda for p in net.parameters())


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform"])
def test_grad_scaler_under_fp16_autocast(weighting: str) -> None:
    net, x = make_net(), batch()
    optimizer = MultiObjectiveOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-2), weighting, nonfinite="propagate")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)  # so large that the first steps overflow
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            losses = {name: make() for name, make in losses_of(net, x).items()}
        optimizer.backward(losses, backward=lambda loss, **kwargs: scaler.scale(loss).backward(**kwargs))
        optimizer.combine()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        values.append(sum(loss.item() for loss in losses.values()))
    assert scaler.get_scale() < 2.0**24
    assert all(p.isfinite().all() for p in net.parameters())
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_language_model_trains_as_on_a_cpu(weighting: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(256, (3, 4, 32), generator=torch.Generator().manual_seed(2))

    def train(device: str) -> tuple[list[list[float]], list[Tensor]]:
        net, data = copy.deepcopy(model).to(device), tokens.to(device)
        optimizer = MultiObjectiveOptimizer(torch.optim.AdamW(net.parameters(), lr=1e-3), weighting, max_grad_norm=1.0)
        weights = []
        for _ in range(20):
            optimizer.zero_grad()
            optimizer.backward({name: (lambda k=k: net(data[k], labels=data[k]).loss) for k, name in enumerate(NAMES)})
            optimizer.step()
            assert optimizer.report is not None
            weights.append(optimizer.report.weights.tolist())
        return weights, [p.detach().cpu() for p in net.parameters()]

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        on_gpu, on_cpu = train("cuda"), train("cpu")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.testing.assert_close(torch.tensor(on_gpu[0]), torch.tensor(on_cpu[0]), rtol=1e-2, atol=1e-3)
    for p, q in zip(on_gpu[1], on_cpu[1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3)
