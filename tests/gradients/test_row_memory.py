"""`row_dtype`, `host_rows`: rows of another dtype or place than the gradients. What they hold, and how exact it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mogeo import MultiObjectiveOptimizer
from tests.deciders import DECIDERS, let_decide
from tests.nets import Net, callables, flat_grad, gradient_rows, inputs, poisoned, shared_losses, wrapped

#: Relative rounding of one element.
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

decided_by = pytest.mark.parametrize("decider", DECIDERS)


@decided_by
@pytest.mark.parametrize("dtype", HALF)
def test_rows_in_half_precision(dtype: torch.dtype, decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of a row is rounded once; the direction is summed in fp32, of rounded rows."""
    let_decide(decider, monkeypatch)
    net, x = Net(torch.float32), inputs(dtype=torch.float32)
    rows = gradient_rows(net, x)
    optimizer = wrapped(net, row_dtype=dtype)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(callables(net, x))
        report = optimizer.combine()
    buffers = optimizer._captures.buffers
    assert buffers is not None
    assert [block.dtype for block in buffers.blocks] == [dtype]
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    rounded = rows.to(dtype).double()
    torch.testing.assert_close(report.gram, rounded @ rounded.T, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(flat_grad(net).double(), report.weights @ rounded, rtol=1e-5, atol=1e-6)
    lengths = rows.norm(dim=1).double()
    error = (report.gram - rows.double() @ rows.double().T).abs() / torch.outer(lengths, lengths)  # type: ignore[operator]
    assert error.max() <= 2.1 * HALF[dtype]


@decided_by
def test_only_wider_gradients_are_narrowed(decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    wide, narrow = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).bfloat16())
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([wide, narrow], lr=0.1), row_dtype=torch.bfloat16)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward({"a": (wide * 3).sum() + 1, "b": (narrow.float() * 2).sum() + (wide * 3).sum()})
        optimizer.combine()
    assert {block.dtype for block in optimizer._captures.buffers.blocks} == {torch.bfloat16}  # type: ignore[union-attr]
    assert wide.grad is not None
    assert narrow.grad is not None
    assert (wide.grad.dtype, narrow.grad.dtype) == (torch.float32, torch.bfloat16)
    assert wide.grad.tolist() == [3.0] * 4


@decided_by
@pytest.mark.parametrize("row_dtype", [None, torch.bfloat16])
def test_constant_weights_need_no_rows_of_their_own(
    row_dtype: torch.dtype | None, decider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_decide(decider, monkeypatch)
    grads = []
    for dtype in (None, row_dtype):
        net = Net(torch.float32)
        optimizer = wrapped(net, "uniform", row_dtype=dtype)
        optimizer.backward(shared_losses(net, inputs(dtype=torch.float32)))
        optimizer.combine()
        grads.append(flat_grad(net).clone())
    assert torch.equal(*grads)


@decided_by
def test_micro_batches_add_up_in_the_rows_dtype(decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    net = Net(torch.float32)
    optimizer = wrapped(net, row_dtype=torch.bfloat16)
    for seed in range(4):
        optimizer.backward(shared_losses(net, inputs(seed, torch.float32)))
    report = optimizer.combine()
    rows = gradient_rows(net, *(inputs(seed, torch.float32) for seed in range(4)))
    error = (flat_grad(net) - report.weights.float() @ rows).norm() / flat_grad(net).norm()
    assert error <= 4 * 2.0**-8


@decided_by
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_row_that_is_not_finite_is_left_out(what: str, decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    net, x = Net(), inputs()
    optimizer = wrapped(net, row_dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="honesty"):
        optimizer.backward(poisoned(net, x, "honesty", what))
        report = optimizer.combine()
        optimizer.step()
        optimizer.backward(shared_losses(net, x))
    assert flat_grad(net).isfinite().all()
    assert report.weights[1] == 0


def test_rows_of_the_host_are_those_beside_the_gradients_on_a_cpu() -> None:
    grads = []
    for host_rows in (False, True):
        net = Net()
        optimizer = wrapped(net, host_rows=host_rows)
        optimizer.backward(callables(net, inputs()))
        optimizer.combine()
        grads.append(flat_grad(net).clone())
    assert torch.equal(*grads)
