"""SketchedRows, and steps made from them: what is estimated, what stays exact, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer
from mogeo.gradients.sketches import SketchedRows
from tests.nets import NAMES, Net, callables, flat_grad, gradient_rows, inputs, separate_losses, shared_losses, wrapped


def fill(rows: SketchedRows, row: int, *grads: tuple[nn.Parameter, float]) -> None:
    with rows.capturing():
        rows.select(row)
        sum((p.sum() * value for p, value in grads), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        rows.collect()


def test_grams_of_all_dtypes_add_up_and_a_window_starts_from_zero() -> None:
    a, b = nn.Parameter(torch.ones(30)), nn.Parameter(torch.ones(20, dtype=torch.float64))
    rows = SketchedRows([a, b], 2, dimension=1 << 12)
    for _ in range(2):
        fill(rows, 0, (a, 1.0), (b, 2.0))
        fill(rows, 1, (b, 1.0))
        fill(rows, 1, (b, 2.0))  # a micro-batch more
        torch.testing.assert_close(rows.gram(), torch.tensor([[110.0, 120.0], [120.0, 180.0]], dtype=torch.float64))
        assert rows.touched() == [a, b]
        assert a.grad is None
        rows.drop()
        assert not rows.gram().any()
        assert not rows.touched()


@pytest.mark.parametrize("form", [shared_losses, separate_losses, callables])
def test_the_direction_is_exact_for_weights_that_are_not(form: object) -> None:
    """A sketch far too short: other weights, and a direction that is theirs to the last digits."""
    net, x = Net(), inputs()
    rows = gradient_rows(net, x)
    optimizer = wrapped(net, sketch=8)
    optimizer.backward(form(net, x))  # type: ignore[operator]
    report = optimizer.combine()
    exact = rows @ rows.T
    assert report.gram is not None
    assert not torch.allclose(report.gram, exact, rtol=1e-3)
    torch.testing.assert_close(flat_grad(net), report.weights @ rows)
    torch.testing.assert_close(report.direction_norm, (report.weights @ rows).norm())


def test_weights_come_nearer_as_the_sketch_grows() -> None:
    """Of gradients with 40,000 elements, against the Gram matrix of whole rows."""
    torch.manual_seed(0)
    rows = torch.randn(3, 40_000, dtype=torch.float64)
    rows[1] -= 0.3 * rows[0]
    parameter = nn.Parameter(torch.zeros(40_000, dtype=torch.float64))
    errors = []
    for dimension in (1 << 6, 1 << 10, 1 << 14):
        optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.0), "mgda", sketch=dimension)
        parameter.grad = None
        optimizer.backward(dict(zip(NAMES, rows @ parameter + 1, strict=True)))
        gram = optimizer.combine().gram
        assert gram is not None
        lengths = rows.norm(dim=1)
        error = ((gram - rows @ rows.T) / torch.outer(lengths, lengths)).abs().max().item()
        assert error <= 5 * (2 / dimension) ** 0.5
        errors.append(error)
    assert errors[2] < errors[0] / 4


def test_no_gradient_is_kept_beside_the_direction() -> None:
    net = Net(torch.float32)
    n = sum(p.numel() for p in net.parameters())
    optimizer = wrapped(net, sketch=16)
    optimizer.backward(shared_losses(net, inputs(dtype=torch.float32)))
    optimizer.combine()
    assert optimizer._captures.buffers is not None
    (block,) = optimizer._captures.buffers.blocks
    assert len(block) == 1
    assert n <= block.numel() <= n + 4 * len(list(net.parameters()))


def test_dropout_is_the_same_in_both_passes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = torch.randn(4, 8)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(net(x).square().mean() + 1)
        return seen[-1]

    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), sketch=16)
    optimizer.backward({"a": loss, "b": loss})
    optimizer.combine()
    assert len(seen) == 4
    assert torch.equal(torch.stack(seen[:2]), torch.stack(seen[2:]))
    assert seen[0] != seen[1]


def test_parameters_that_change_within_a_window_are_refused() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, sketch=64)
    optimizer.backward(shared_losses(net, x))
    net.trunk.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen between"):
        optimizer.combine()
    net.trunk.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.backward(shared_losses(net, x))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="sketches cannot move"):
        optimizer.backward(shared_losses(net, x))
    optimizer.backward(shared_losses(net, x))  # the window was dropped
    optimizer.step()


def test_a_loss_that_fails_the_second_time_drops_the_window() -> None:
    """What the first pass summed is not taken for the whole at the next try."""
    net, x = Net(), inputs()
    losses, evaluated = callables(net, x), 0

    def fails_once() -> Tensor:
        nonlocal evaluated
        evaluated += 1
        if evaluated == 2:
            raise ConnectionError
        return losses["honesty"]()

    optimizer = wrapped(net, sketch=16)
    optimizer.backward({**losses, "honesty": fails_once})
    with pytest.raises(ConnectionError):
        optimizer.combine()
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError, match="nothing to combine"):
        optimizer.combine()
    optimizer.backward({**losses, "honesty": fails_once})
    report = optimizer.combine()
    torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, x))


def test_constant_weights_need_no_sketch() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, "uniform", sketch=64)
    optimizer.backward(shared_losses(net, x))
    optimizer.combine()
    assert optimizer._captures.sketches is None
    torch.testing.assert_close(flat_grad(net), gradient_rows(net, x).mean(0))
