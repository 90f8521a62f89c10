"""Groups with `multi_objective: False`: the mean gradient, outside the Gram matrix. All ways of making a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer
from tests.deciders import QUICK_WAYS, WAYS, let_decide
from tests.nets import NAMES, Net, callables, gradient_rows, inputs, poisoned, separate_losses, shared_losses
from tests.profiles import slow_but


@pytest.fixture(autouse=True, params=slow_but(WAYS, *QUICK_WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds however a step is made."""
    let_decide(request.param, monkeypatch)


def with_plain_heads(net: Net, weighting: object = "mgda-decoupled", **options: object) -> MultiObjectiveOptimizer:
    groups = [
        {"params": list(net.trunk.parameters()) + list(net.unused.parameters())},
        {"params": list(net.heads.parameters()), "multi_objective": False, "lr": 0.01},
    ]
    return MultiObjectiveOptimizer(torch.optim.SGD(groups, lr=0.1), weighting, **options)  # type: ignore[arg-type]


def split(net: Net, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the trunk and of the heads."""
    trunk = sum(p.numel() for p in net.trunk.parameters())
    heads = sum(p.numel() for p in net.heads.parameters())
    return rows[:, :trunk], rows[:, trunk : trunk + heads]


def grads(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform", "linear(1, 2, 3)", "group-dro"])
@pytest.mark.parametrize("form", [shared_losses, separate_losses, callables])
@pytest.mark.parametrize("refresh_every", [1, 2])
def test_weights_for_the_trunk_and_the_mean_for_heads(
    form: Callable[..., dict], weighting: str, refresh_every: int
) -> None:
    net = Net()
    optimizer = with_plain_heads(net, weighting, refresh_every=refresh_every)
    for step in range(2):
        x = inputs(step)
        trunk, heads = split(net, gradient_rows(net, x))
        optimizer.zero_grad()
        optimizer.backward(form(net, x))
        report = optimizer.combine()
        torch.testing.assert_close(grads(net.trunk), report.weights @ trunk)
        torch.testing.assert_close(grads(net.heads), heads.mean(0))
        torch.testing.assert_close(report.direction_norm, (report.weights @ trunk).norm())
        if report.gram is not None:
            torch.testing.assert_close(report.gram, trunk @ trunk.T)
        optimizer.step()


def test_micro_batches_add_up() -> None:
    net = Net()
    optimizer = with_plain_heads(net, objectives=NAMES)
    for seed in (0, 1):
        for name, loss in callables(net, inputs(seed)).items():
            optimizer.backward(loss, objective=name)
    report = optimizer.combine()
    trunk, heads = split(net, gradient_rows(net, inputs(0), inputs(1)))
    torch.testing.assert_close(grads(net.trunk), report.weights @ trunk)
    torch.testing.assert_close(grads(net.heads), heads.mean(0))


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform"])
def test_both_are_clipped_together(weighting: str) -> None:
    net, x = Net(), inputs()
    optimizer = with_plain_heads(net, weighting, max_grad_norm=0.5)
    optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    trunk, heads = split(net, gradient_rows(net, x))
    whole = torch.cat([grads(net.trunk), grads(net.heads)])
    assert whole.norm().item() == pytest.approx(0.5)
    torch.testing.assert_close(grads(net.heads), report.clip_factor * heads.mean(0))
    torch.testing.assert_close(report.direction_norm, (report.weights @ trunk).norm())  # before, and of the trunk


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform"])
def test_a_loss_that_is_not_finite_is_left_out_of_both(weighting: str) -> None:
    net, x = Net(), inputs()
    optimizer = with_plain_heads(net, weighting)
    with pytest.warns(RuntimeWarning, match="honesty"):
        optimizer.backward(poisoned(net, x, "honesty", "loss"))
        report = optimizer.combine()
    trunk, heads = split(net, gradient_rows(net, x))
    torch.testing.assert_close(grads(net.trunk), report.weights[[0, 2]] @ trunk[[0, 2]])
    torch.testing.assert_close(
        grads(net.heads), heads[[0, 2]].sum(0)[heads[[0, 2]].any(0)] / 3
    )  # honesty's head: untouched


def test_a_gradient_that_is_not_finite_among_the_mean_leaves_out_the_step() -> None:
    net, x = Net(), inputs()
    optimizer = with_plain_heads(net)
    before = [p.detach().clone() for p in net.parameters()]
    head = net.heads[1].weight
    losses = shared_losses(net, x)
    losses["honesty"] = losses["honesty"] + (head.flatten()[0] * 0).sqrt()  # finite, of infinite slope times zero
    with pytest.warns(RuntimeWarning, match="left objective"):
        optimizer.backward(losses)
        report = optimizer.combine()
        optimizer.step()
    assert report.nonfinite.all()
    for p, q in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, q)
    raising = with_plain_heads(net, nonfinite="raise")
    losses = shared_losses(net, x)
    losses["honesty"] = losses["honesty"] + (head.flatten()[0] * 0).sqrt()
    raising.backward(losses)
    with pytest.raises(RuntimeError, match="multi_objective=False"):
        raising.combine()
    passing = with_plain_heads(net, nonfinite="propagate")
    losses = shared_losses(net, x)
    losses["honesty"] = losses["honesty"] + (head.flatten()[0] * 0).sqrt()
    passing.backward(losses)
    passing.combine()
    assert not grads(net.heads).isfinite().all()


def test_groups_may_be_marked_between_steps() -> None:
    net, x = Net(), inputs()
    optimizer = with_plain_heads(net)
    for marked in (True, False, True):
        optimizer.param_groups[1]["multi_objective"] = marked
        rows = gradient_rows(net, x)
        trunk, heads = split(net, rows)
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, x))
        report = optimizer.combine()
        assert report.gram is not None
        expected = torch.cat([trunk, heads], 1) if marked else trunk
        torch.testing.assert_close(report.gram, expected @ expected.T)
        optimizer.step()


def test_a_mark_goes_with_the_checkpoint() -> None:
    net, x = Net(), inputs()
    optimizer = with_plain_heads(net)
    optimizer.backward(shared_losses(net, x))
    optimizer.step()
    groups = [list(net.trunk.parameters()) + list(net.unused.parameters()), list(net.heads.parameters())]
    other = MultiObjectiveOptimizer(torch.optim.SGD([{"params": ps} for ps in groups], lr=0.1))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[1]["multi_objective"] is False


def test_something_must_be_left_to_balance() -> None:
    net = Net()
    base = torch.optim.SGD([{"params": list(net.parameters()), "multi_objective": False}], lr=0.1)
    with pytest.raises(ValueError, match="multi_objective=False"):
        MultiObjectiveOptimizer(base).backward(shared_losses(net, inputs()))


def test_a_loss_that_is_not_finite_propagates() -> None:
    net, x = Net(), inputs()
    optimizer = with_plain_heads(net, nonfinite="propagate")
    losses = shared_losses(net, x)
    losses["help"] = losses["help"] * math.nan
    optimizer.backward(losses)
    optimizer.combine()
    assert grads(net.trunk).isnan().all()


@pytest.mark.parametrize("form", [torch.Tensor.sum, lambda x: lambda: x.sum()], ids=["tensors", "callables"])
def test_an_objective_of_weight_zero_reaches_the_mean_alone(form: Callable[[Tensor], object]) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    groups = [{"params": [a]}, {"params": [b], "multi_objective": False}]
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(groups, lr=0.1), "linear(0, 1)", objectives=("x", "y"))
    optimizer.backward(form(a * a), objective="x")  # type: ignore[arg-type]
    optimizer.backward(form(b * a.sum()), objective="y")  # type: ignore[arg-type]
    optimizer.step()
    assert a.grad is not None
    assert a.grad.tolist() == [3.0, 3.0]
    assert b.grad is not None
    assert b.grad.tolist() == [1.0, 1.0, 1.0]
