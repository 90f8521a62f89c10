"""MultiObjectiveOptimizer: what it captures, combines and hands out, against gradients computed one by one."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given
from torch import Tensor, nn

import mogeo
from mogeo import MultiObjectiveOptimizer
from mogeo.gradients import arrivals
from tests.deciders import DECIDERS, QUICK_WAYS, WAYS, let_decide
from tests.nets import (
    NAMES,
    WEIGHTINGS,
    Net,
    assert_direction,
    callables,
    flat_grad,
    gradient_rows,
    inputs,
    poisoned,
    separate_losses,
    shared_losses,
    wrapped,
)
from tests.profiles import examples, slow_but

pytestmark = pytest.mark.parametrize("decider", slow_but(WAYS, *QUICK_WAYS), indirect=True)


@pytest.fixture(autouse=True)
def decider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file holds whoever decides, and wherever rows lie."""
    let_decide(request.param, monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("form", [shared_losses, separate_losses, callables])
def test_every_form_gives_the_weighted_sum_of_the_gradients(form: Callable[..., dict], weighting: str) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting)
    for _ in range(3):
        rows = gradient_rows(net, x)
        losses = torch.stack(list(separate_losses(net, x).values())).detach()
        optimizer.zero_grad()
        optimizer.backward(form(net, x))
        report = optimizer.combine()
        assert_direction(net, report, rows)
        torch.testing.assert_close(report.losses, losses)
        if weighting not in ("group-dro",):  # stateful: already advanced
            expected = mogeo.weightings.resolve(weighting)(rows @ rows.T, losses)
            torch.testing.assert_close(report.weights, expected, rtol=1e-7, atol=1e-9)
        optimizer.step()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(order=st.permutations([(name, seed) for name in NAMES for seed in (0, 1)]))
@examples(10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_accumulation_is_one_solve_over_the_sums(weighting: str, order: list[tuple[str, int]]) -> None:
    """Micro-batches of single objectives, in any order, give what their sums give in one call."""
    net = Net()
    optimizer = wrapped(net, weighting, objectives=NAMES)
    for name, seed in order:
        optimizer.backward(callables(net, inputs(seed))[name], objective=name)
    report = optimizer.combine()
    assert_direction(net, report, gradient_rows(net, inputs(0), inputs(1)))
    together = Net()
    other = wrapped(together, weighting)
    other.backward({n: shared_losses(together, inputs(0))[n] + shared_losses(together, inputs(1))[n] for n in NAMES})
    torch.testing.assert_close(report.weights, other.combine().weights, rtol=1e-7, atol=1e-9)


def test_two_calls_with_all_objectives_accumulate_as_well() -> None:
    net = Net()
    optimizer = wrapped(net)
    for seed in (0, 1):
        optimizer.backward(shared_losses(net, inputs(seed)))
    assert_direction(net, optimizer.combine(), gradient_rows(net, inputs(0), inputs(1)))


def test_step_combines_what_is_due_and_only_once() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.backward(shared_losses(net, x))
    rows = gradient_rows(net, x)
    optimizer.step()
    assert optimizer.report is not None
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, net.parameters(), strict=True)]) / 0.1
    torch.testing.assert_close(moved, optimizer.report.weights @ rows)
    assert optimizer.combine() is optimizer.report


def test_sequences_take_the_order_of_the_objectives() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    optimizer.backward(list(shared_losses(net, x).values()))
    assert optimizer.objectives == ("0", "1", "2")
    named = wrapped(net, objectives=NAMES)
    named.backward(tuple(shared_losses(net, x).values()))
    assert torch.equal(optimizer.combine().weights, named.combine().weights)


def test_order_is_that_of_the_objectives_whatever_the_mapping() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, objectives=NAMES)
    optimizer.backward(dict(reversed(shared_losses(net, x).items())))
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


def test_one_objective() -> None:
    net, x = Net(), inputs()
    for weighting in ("mgda-decoupled", "uniform", "group-dro"):
        optimizer = wrapped(net, weighting, objectives=["truth"])
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, x)["truth"])
        assert optimizer.combine().weights.tolist() == [1.0]
        torch.testing.assert_close(flat_grad(net), gradient_rows(net, x)[2])


def test_one_tensor_as_two_objectives() -> None:
    net, x = Net(), inputs()
    loss = shared_losses(net, x)["help"]
    optimizer = wrapped(net)
    optimizer.backward({"a": loss, "b": loss})
    assert optimizer.combine().weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(flat_grad(net), gradient_rows(net, x)[0])


# --------------------------------------------------------------------------------------------------------------------
# p.grad


def test_plain_gradients_are_kept_and_added_to() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    net.unused.weight.sum().backward()
    shared_losses(net, inputs(7))["help"].backward()
    plain = flat_grad(net).clone()
    unused = net.unused.weight.grad
    optimizer.backward(shared_losses(net, x))
    assert torch.equal(flat_grad(net), plain)  # untouched until combine
    report = optimizer.combine()
    torch.testing.assert_close(flat_grad(net), plain + report.weights @ gradient_rows(net, x))
    assert net.unused.weight.grad is unused


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_last_direction_is_kept_where_the_user_does_not_zero(weighting: str) -> None:
    """It lives in row 0, which the next backward overwrites."""
    net = Net()
    optimizer = wrapped(net, weighting)
    expected = torch.zeros(())
    for seed in range(3):
        optimizer.backward(shared_losses(net, inputs(seed)))
        report = optimizer.combine()
        expected = expected + report.weights @ gradient_rows(net, inputs(seed))
        torch.testing.assert_close(flat_grad(net), expected)


def test_zero_grad_to_zeros_starts_afresh_too() -> None:
    net = Net()
    optimizer = wrapped(net)
    for seed in range(3):
        optimizer.zero_grad(set_to_none=False)
        optimizer.backward(shared_losses(net, inputs(seed)))
        torch.testing.assert_close(optimizer.combine().weights @ gradient_rows(net, inputs(seed)), flat_grad(net))


def test_zero_grad_drops_what_was_captured() -> None:
    net = Net()
    optimizer = wrapped(net)
    optimizer.backward(shared_losses(net, inputs(5)))
    optimizer.zero_grad()
    optimizer.backward(shared_losses(net, inputs(6)))
    assert_direction(net, optimizer.combine(), gradient_rows(net, inputs(6)))


def test_untouched_parameters_do_not_move() -> None:
    """With a zero gradient instead of none, weight decay would move them."""
    net = Net()
    base = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = MultiObjectiveOptimizer(base)
    before = net.unused.weight.detach().clone()
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()
    assert torch.equal(net.unused.weight, before)


def test_a_parameter_that_stops_being_touched_leaves_no_trace() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, objectives=["a", "b"])
    optimizer.backward({"a": shared_losses(net, x)["help"], "b": shared_losses(net, x)["honesty"]})
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward({"a": shared_losses(net, x)["help"], "b": shared_losses(net, x)["truth"]})
    report = optimizer.combine()
    rows = gradient_rows(net, x)[[0, 2]]
    torch.testing.assert_close(report.gram, rows @ rows.T)
    torch.testing.assert_close(flat_grad(net), report.weights @ rows)
    assert net.heads[1].weight.grad is None


def test_frozen_tied_empty_scalar_and_late_parameters(decider: str) -> None:
    if decider in ("sketched", "replayed"):
        pytest.skip("sketches cannot move to other parameters: gradients/test_sketches.py")
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    frozen = nn.Parameter(torch.randn(3, dtype=torch.float64), requires_grad=False)
    empty = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))
    scalar = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    late = nn.Parameter(torch.randn(2, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64)

    def losses() -> dict[str, Tensor]:
        tied = x @ weight @ weight.T  # one parameter, used twice
        return {
            "a": (tied + frozen).square().mean() + empty.sum(),
            "b": (scalar - 1) ** 2 * tied.abs().mean() + late.square().sum(),
        }

    base = torch.optim.SGD([{"params": [weight, frozen]}, {"params": [empty, scalar], "lr": 0.5}], lr=0.1)
    optimizer = MultiObjectiveOptimizer(base)
    optimizer.backward(losses())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(losses())  # a window that is open when parameters come and go
    optimizer.add_param_group({"params": [late]})
    frozen.requires_grad_(True)
    late.grad = None
    optimizer.backward(losses())
    report = optimizer.combine()
    parameters = [weight, scalar, empty, frozen, late]
    for p in parameters:
        expected = torch.zeros_like(p)
        for weight_k, loss in zip(report.weights, losses().values(), strict=True):
            (grad,) = torch.autograd.grad(loss, p, allow_unused=True, retain_graph=True)
            if grad is not None:
                # two windows' worth for those that were there all along
                expected += weight_k * grad * (1 if p is late or p is frozen else 2)
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform"])
def test_mixed_dtypes_in_one_model(weighting: str) -> None:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    parameters = [nn.Parameter(torch.randn(5, dtype=torch.float64).to(dtype)) for dtype in dtypes]

    def losses() -> list[Tensor]:
        joined = torch.cat([p.double() for p in parameters])
        return [(joined - 1).square().mean(), (joined * torch.arange(20)).sin().mean() + 2]

    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.1), weighting)
    grads = [torch.autograd.grad(loss, parameters) for loss in losses()]
    optimizer.backward(losses())
    report = optimizer.combine()
    for i, p in enumerate(parameters):
        assert p.grad is not None
        assert p.grad.dtype == p.dtype
        expected = sum(w * g[i].double() for w, g in zip(report.weights, grads, strict=True))
        eps = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.grad.double(), expected, rtol=4 * eps, atol=eps)
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_have_the_strides_of_their_parameters(fused: bool) -> None:
    """Fused optimizers walk both as flat memory."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    base = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=fused)
    optimizer = MultiObjectiveOptimizer(base, "uniform")
    reference = nn.Conv2d(3, 4, 3)
    reference.load_state_dict(conv.state_dict())
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.backward([conv(x).square().mean(), conv(x).abs().mean()])
        assert conv.weight.grad is None
        optimizer.combine()
        assert conv.weight.grad.stride() == conv.weight.stride()
        optimizer.step()
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
        ((reference(x).square().mean() + reference(x).abs().mean()) / 2).backward()
        reference_optimizer.step()
    torch.testing.assert_close(conv.weight, reference.weight, rtol=1e-4, atol=1e-5)


def test_sparse_gradients_become_dense() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 3, sparse=True, dtype=torch.float64)
    optimizer = wrapped(embedding)
    tokens = torch.tensor([1, 1, 4])
    optimizer.backward([embedding(tokens).square().sum(), embedding(tokens).sin().sum() + 9])
    report = optimizer.combine()
    weight = embedding.weight.detach()
    expected = torch.zeros_like(weight)
    for token in tokens.tolist():
        expected[token] += report.weights[0] * 2 * weight[token] + report.weights[1] * weight[token].cos()
    torch.testing.assert_close(embedding.weight.grad, expected)


# --------------------------------------------------------------------------------------------------------------------
# Memory


def test_rows_are_all_there_is(decider: str) -> None:
    """K·N elements, of which p.grad takes none of its own; N for constant weights."""
    if decider not in DECIDERS:
        pytest.skip("here the direction has memory of its own: gradients/test_row_memory.py")
    net = Net(torch.float32)
    n = sum(p.numel() for p in net.parameters())
    for weighting, rows in (("mgda-decoupled", 3), ("group-dro", 3), ("uniform", 1)):
        optimizer = wrapped(net, weighting)
        for _ in range(2):
            optimizer.backward(shared_losses(net, inputs(dtype=torch.float32)))
            optimizer.step()
            (block,) = optimizer._captures.buffers.blocks  # type: ignore[union-attr]
            assert block.shape[0] == rows
            assert n <= block.shape[1] <= n + 4 * len(list(net.parameters()))
            for p in net.parameters():
                if p.grad is not None:
                    assert p.grad.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
            optimizer.zero_grad()


def test_rows_and_parameters_start_at_16_bytes() -> None:
    parameters = [
        nn.Parameter(torch.randn(n, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32) for n in (3, 5)
    ]
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.1))
    optimizer.backward(
        [sum(p.float().square().sum() for p in parameters), sum(p.float().sum() ** 2 for p in parameters)]
    )
    optimizer.combine()
    for block in optimizer._captures.buffers.blocks:  # type: ignore[union-attr]
        assert block.stride(0) * block.element_size() % 16 == 0
    for p in parameters:
        assert p.grad is not None
        assert p.grad.storage_offset() * p.element_size() % 16 == 0


class Watched(torch.autograd.Function):
    """Identity that saves a tensor of its own, whose life can be watched."""

    saved: ClassVar[dict[str, weakref.ref[Tensor]]] = {}

    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:  # type: ignore[no-untyped-def, override]
        kept = x.detach().clone()
        ctx.save_for_backward(kept)
        Watched.saved[name] = weakref.ref(kept)
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        _ = ctx.saved_tensors
        return grad, None


def test_callables_have_one_live_graph_at_a_time() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1))
    alive: list[list[str]] = []

    def loss(name: str) -> Tensor:
        gc.collect()
        alive.append([other for other, ref in Watched.saved.items() if ref() is not None])
        return Watched.apply(parameter, name).square().sum()

    Watched.saved.clear()
    optimizer.backward({name: (lambda name=name: loss(name)) for name in NAMES})
    assert alive == [[], [], []]


def test_separate_graphs_are_freed_as_they_are_used(decider: str) -> None:
    if decider == "replayed":
        pytest.skip("graphs of loss tensors are kept until the weights are known: gradients/test_sketches.py")
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1))
    losses = {name: (parameter * (k + 1)).square().sum() for k, name in enumerate(NAMES)}
    graphs = [loss.grad_fn for loss in losses.values()]
    freed_after: list[int] = []

    def backward(loss: Tensor, **options: bool) -> None:
        assert not options  # nothing asked to retain a graph
        loss.backward()
        freed_after.append(sum(is_freed(graph) for graph in graphs))

    optimizer.backward(losses, backward=backward)
    assert freed_after == [1, 2, 3]


def is_freed(sum_backward: object) -> bool:
    """Whether the pow node below a sum has lost its saved input."""
    power = sum_backward.next_functions[0][0]  # type: ignore[attr-defined]
    try:
        _ = power._saved_self
    except RuntimeError:
        return True
    return False


def test_shared_graphs_are_freed_by_their_last_loss(decider: str) -> None:
    if decider == "replayed":
        pytest.skip("graphs of loss tensors are kept until the weights are known: gradients/test_sketches.py")
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    losses = shared_losses(net, x)
    optimizer.backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses["help"].backward()


def test_retain_graph_keeps_everything() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    losses = shared_losses(net, x)
    optimizer.backward(losses, retain_graph=True)
    optimizer.backward(losses)
    assert_direction(net, optimizer.combine(), 2 * gradient_rows(net, x))


# --------------------------------------------------------------------------------------------------------------------
# Objectives that are solved, absent, or not finite


def test_a_solved_objective_does_not_freeze_the_others() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    losses = shared_losses(net, x)
    losses["honesty"] = losses["honesty"] * 0.0
    optimizer.backward(losses)
    report = optimizer.combine()
    assert report.weights[1] == 0
    assert report.direction_norm > 1e-3
    assert report.skipped == ()


def test_when_every_objective_is_solved_nothing_moves() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    optimizer.backward({name: loss * 0.0 for name, loss in shared_losses(net, x).items()})
    report = optimizer.combine()
    assert report.status == mogeo.Status.ZERO
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_an_objective_absent_from_the_whole_window_has_no_weight() -> None:
    net, x = Net(), inputs()
    for weighting in WEIGHTINGS:
        optimizer = wrapped(net, weighting, objectives=NAMES)
        optimizer.zero_grad()
        for name in ("help", "truth"):
            optimizer.backward(shared_losses(net, x)[name], objective=name)
        report = optimizer.combine()
        assert report.weights[1] == 0
        assert report.absent.tolist() == [False, True, False]
        assert math.isnan(report.losses[1])
        torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, x))


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform", "group-dro"])
def test_raise_names_the_objective_and_leaves_the_parameters(weighting: str, how: str) -> None:
    net = Net()
    optimizer = wrapped(net, weighting, nonfinite="raise")
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.backward(poisoned(net, inputs(), "honesty", how))
    with pytest.raises(RuntimeError, match="'honesty'.*not finite"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    optimizer.backward(shared_losses(net, inputs()))
    assert_direction(net, optimizer.combine(), gradient_rows(net, inputs()))


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform", "group-dro"])
def test_propagate_reaches_p_grad(weighting: str, how: str) -> None:
    net = Net()
    optimizer = wrapped(net, weighting, nonfinite="propagate")
    optimizer.backward(poisoned(net, inputs(), "honesty", how))
    report = optimizer.combine()
    assert not flat_grad(net).isfinite().all()
    assert report.skipped != ()


# --------------------------------------------------------------------------------------------------------------------
# Clipping, custom backward, custom weightings


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_clip_grad_norm(weighting: str, max_norm: float) -> None:
    net, other = Net(), Net()
    clipped, plain = wrapped(net, weighting, max_grad_norm=max_norm), wrapped(other, weighting)
    clipped.backward(shared_losses(net, inputs()))
    report = clipped.combine()
    plain.backward(shared_losses(other, inputs()))
    plain.combine()
    norm = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    torch.testing.assert_close(report.direction_norm, norm)
    torch.testing.assert_close(flat_grad(net), flat_grad(other), rtol=1e-4, atol=1e-9)


def test_clipping_hides_no_overflow_from_a_grad_scaler() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = MultiObjectiveOptimizer(
        torch.optim.SGD([parameter], lr=0.1), "uniform", max_grad_norm=1.0, nonfinite="propagate"
    )
    optimizer.backward([(parameter.float() * 9e4).sum() + 1] * 2)
    optimizer.combine()
    assert parameter.grad is not None
    assert not parameter.grad.isfinite().any()


def test_constant_weights_are_applied_once_whatever_came_before() -> None:
    """A callable is weighted as it is captured, tensors as they are summed: one way must not leak into the other."""
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), "linear(0.75, 0.25)")
    for callables_ in (False, True, False):
        optimizer.zero_grad()
        losses = [lambda: parameter.sum() + 1, lambda: parameter.sum() + 2]
        optimizer.backward(losses if callables_ else [loss() for loss in losses])
        optimizer.combine()
        assert torch.equal(parameter.grad, torch.ones(2, dtype=torch.float64))  # type: ignore[arg-type]


def test_a_report_belongs_to_its_reader() -> None:
    net = Net()
    optimizer = wrapped(net)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, inputs()))
        report = optimizer.combine()
        assert not report.absent.any()
        report.absent.logical_not_()


def test_backward_function_of_the_user() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    optimizer.backward(callables(net, x), backward=lambda loss: (loss * 3).backward())
    assert_direction(net, optimizer.combine(), 3 * gradient_rows(net, x))
    with pytest.raises(TypeError, match=r"shares its graph with a later loss.*\*\*kwargs"):
        optimizer.backward(shared_losses(net, x), backward=lambda loss: loss.backward())
    optimizer.zero_grad()
    optimizer.backward(shared_losses(net, x), backward=lambda loss, **options: loss.backward(**options))
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


def test_weighting_of_the_user() -> None:
    net, x = Net(), inputs()
    seen: list[tuple[Tensor, Tensor]] = []

    def mine(gram: Tensor, losses: Tensor) -> list[float]:
        seen.append((gram, losses))
        return [0.2, 0.0, -0.5]

    optimizer = wrapped(net, mine)
    optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    assert_direction(net, report, gradient_rows(net, x))
    assert report.optimality_gap is None
    assert report.status is None
    assert torch.equal(seen[0][0], report.gram)  # type: ignore[arg-type]


def test_create_graph_leaves_no_graph_in_the_rows() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.backward(callables(net, x), backward=lambda loss: loss.backward(create_graph=True))
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))
    assert not flat_grad(net).requires_grad


def test_reentrant_checkpointing_that_visits_a_parameter_twice() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    linear = nn.Linear(4, 4, dtype=torch.float64)
    x = inputs().requires_grad_()
    optimizer = wrapped(linear)

    def losses(reentrant: bool | None) -> list[Tensor]:
        def twice(scale: float) -> Tensor:
            hidden = x * scale
            for _ in range(2):
                hidden = linear(hidden) if reentrant is None else checkpoint(linear, hidden, use_reentrant=reentrant)
            return hidden.square().mean()

        return [twice(1.0), twice(-2.0)]

    expected = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(linear.parameters()))]) for loss in losses(None)
    ]
    for reentrant in (True, False):
        optimizer.zero_grad()
        optimizer.backward(losses(reentrant))
        report = optimizer.combine()
        torch.testing.assert_close(flat_grad(linear), report.weights @ torch.stack(expected))


# --------------------------------------------------------------------------------------------------------------------
# Precision and odd circumstances


def nearly_opposed(seed: int) -> tuple[nn.Parameter, Callable[[], list[Tensor]], Tensor]:
    """Two fp32 gradients u + v and −1.3 u + v: their hull passes within 1e-5 of zero."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(100_000, generator=generator)
    v = 2e-5 * torch.randn(100_000, generator=generator)
    rows = torch.stack([u + v, -1.3 * u + v])
    parameter = nn.Parameter(torch.zeros(100_000))
    return parameter, lambda: [row @ parameter + 1 for row in rows], rows


@pytest.mark.parametrize("seed", slow_but(range(6), 0))
def test_clipping_holds_where_the_gradients_cancel(seed: int) -> None:
    """‖d‖² = wᵀMw is then the rounding of an fp32 Gram, and may even be negative."""
    parameter, losses, rows = nearly_opposed(seed)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), "mgda", max_grad_norm=1e-3)
    optimizer.backward(losses())
    report = optimizer.combine()
    assert parameter.grad is not None
    assert parameter.grad.norm().item() == pytest.approx(1e-3, rel=1e-4)
    direction = report.weights @ rows.double()
    assert report.direction_norm.item() == pytest.approx(direction.norm().item(), rel=1e-2)
    assert report.alignment is not None
    assert report.alignment.isnan().all()  # it cannot be told from this Gram, and is not


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform"])
def test_autocast_around_combine_changes_nothing(weighting: str) -> None:
    reports = []
    for enabled in (False, True):
        net, x = Net(torch.float32), inputs(dtype=torch.float32)
        optimizer = wrapped(net, weighting)
        optimizer.backward(shared_losses(net, x))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            reports.append(optimizer.combine())
    assert torch.equal(reports[0].weights, reports[1].weights)
    assert torch.equal(reports[0].direction_norm, reports[1].direction_norm)


@pytest.mark.parametrize("weighting", ["linear(1, 2, 3)", "mgda"])
def test_weights_are_not_rounded_to_the_dtype_of_the_losses(weighting: str) -> None:
    net, x = Net(torch.float32), inputs(dtype=torch.float32)
    rows = torch.stack(
        [
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(
                        net.parameters(),
                        torch.autograd.grad(loss.bfloat16(), net.parameters(), allow_unused=True),
                        strict=True,
                    )
                ]
            )
            for loss in separate_losses(net, x).values()
        ]
    )
    optimizer = wrapped(net, weighting)
    with torch.no_grad():
        optimizer.backward({name: loss.bfloat16() for name, loss in with_grad(lambda: separate_losses(net, x)).items()})
    report = optimizer.combine()
    torch.testing.assert_close(flat_grad(net), (report.weights @ rows.double()).float(), rtol=1e-5, atol=1e-6)


def with_grad(make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    with torch.enable_grad():
        return {name: loss.bfloat16() for name, loss in make().items()}


def test_a_backward_inside_a_callable_belongs_to_its_objective() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)

    def in_two_halves() -> Tensor:
        (shared_losses(net, x)["honesty"] / 2).backward()
        return shared_losses(net, x)["honesty"] / 2

    optimizer.backward({**callables(net, x), "honesty": in_two_halves})
    rows = gradient_rows(net, x)
    report = optimizer.combine()
    torch.testing.assert_close(report.gram, rows @ rows.T)


def test_the_weighting_changes_between_steps_only() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, "mgda")
    optimizer.backward(shared_losses(net, x))
    with pytest.raises(RuntimeError, match=r"gradients captured for mgda do not suit uniform.*after step\(\)"):
        optimizer.weighting = "uniform"
    optimizer.weighting = "mgda-normalized"  # needs the same rows
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))
    optimizer.zero_grad()
    optimizer.weighting = "uniform"
    optimizer.backward(shared_losses(net, x))
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


def test_a_weighting_may_spoil_its_arguments() -> None:
    net, x = Net(), inputs()

    def careless(gram: Tensor, losses: Tensor) -> Tensor:
        gram.zero_()
        losses.zero_()
        return torch.ones(3)

    optimizer = wrapped(net, careless)
    optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    assert_direction(net, report, gradient_rows(net, x))
    assert (report.losses > 0).all()


def test_a_parameter_frozen_within_a_window_keeps_what_it_has(decider: str) -> None:
    if decider in ("sketched", "replayed"):
        pytest.skip("sketches cannot move to other parameters: gradients/test_sketches.py")
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    optimizer.backward(shared_losses(net, x))
    rows = gradient_rows(net, x)
    net.trunk.requires_grad_(False)
    frozen = shared_losses(net, inputs(1))
    for p in net.trunk.parameters():
        assert p.grad is None
    optimizer.backward(frozen)
    report = optimizer.combine()
    net.trunk.requires_grad_(True)
    later = gradient_rows(net, inputs(1))
    later[:, : sum(p.numel() for p in net.trunk.parameters())] = 0
    assert_direction(net, report, rows + later)


def test_a_parameter_listed_twice() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.optim.SGD([parameter, parameter], lr=0.1)
    optimizer = MultiObjectiveOptimizer(base, "uniform")
    parameter.grad = torch.ones(3)
    optimizer.backward([parameter.sum()])
    optimizer.combine()
    assert parameter.grad.tolist() == [2.0, 2.0, 2.0]


def test_gradients_in_a_dtype_of_their_own() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    if not hasattr(parameter, "grad_dtype"):
        pytest.skip(reason="torch has grad_dtype from 2.10 on")
    parameter.grad_dtype = torch.float32
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), "uniform")
    optimizer.backward([parameter.float().square().sum() / 3])
    optimizer.combine()
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32
    torch.testing.assert_close(parameter.grad, torch.full((3,), 2 / 3), rtol=1e-2, atol=0)


def test_losses_of_another_model_are_an_error() -> None:
    net, x = Net(), inputs()
    for weighting in ("mgda", "uniform"):
        optimizer = wrapped(net, weighting)
        with pytest.raises(ValueError, match="no loss reached a parameter of the base optimizer"):
            optimizer.backward(shared_losses(Net(), x))


def test_a_first_call_that_fails_fixes_no_objectives() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    with pytest.raises(ZeroDivisionError):
        optimizer.backward({"typo": lambda: torch.tensor(1 / 0)})
    optimizer.backward(shared_losses(net, x))
    assert optimizer.objectives == NAMES


def test_an_interrupt_while_capture_is_set_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_LEAST", 0)  # every parameter gets a hook
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    held = [p.grad for p in net.parameters()]
    register = Tensor.register_post_accumulate_grad_hook
    calls = iter(range(3))

    def interrupted(tensor: Tensor, hook: Callable[[Tensor], None]) -> object:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return register(tensor, hook)

    monkeypatch.setattr(nn.Parameter, "register_post_accumulate_grad_hook", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        optimizer.backward(shared_losses(net, x))
    monkeypatch.undo()
    assert all(p.grad is grad for p, grad in zip(net.parameters(), held, strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    shared_losses(net, x)["help"].backward()
    torch.testing.assert_close(flat_grad(net), 1 + gradient_rows(net, x)[0])


# --------------------------------------------------------------------------------------------------------------------
# Errors: the culprit, the cure, and nothing lost


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        ({"help": 1.0}, {}, TypeError, r"objective 'help' has a loss of type float"),
        (None, {}, TypeError, "losses is None"),
        ("stacked", {}, TypeError, r"one tensor of shape \(3,\).*list\(losses\)"),
        ({}, {}, ValueError, "losses is empty|missing"),
        ([], {}, ValueError, "got 0 losses"),
        ("tensor", {}, ValueError, "a single loss needs objective=name"),
        ("tensor", {"objective": "hope"}, ValueError, r"unknown objectives \['hope'\]"),
        ("mapping", {"objective": "help"}, ValueError, "goes with a single loss"),
        ("sequence", {"objective": "help"}, ValueError, "goes with a single loss"),
        ("float", {}, TypeError, "objective 'honesty' has a loss of type float"),
        ("vector", {}, ValueError, r"objective 'honesty' has a loss of shape \(2,\).*loss.mean"),
        ("integer", {}, ValueError, "objective 'honesty'.*torch.int64"),
        ("detached", {}, ValueError, "objective 'honesty' has a loss that requires no grad"),
        ("callable detached", {}, ValueError, "objective 'honesty' has a loss that requires no grad"),
        ("callable float", {}, TypeError, "objective 'honesty' has a loss of type float"),
    ],
)
def test_bad_losses(losses: object, options: dict, error: type[Exception], message: str) -> None:
    net, x = Net(), inputs()
    good = separate_losses(net, x)
    replacement = {
        "float": 1.0,
        "vector": torch.ones(2, requires_grad=True) * 1,
        "integer": torch.tensor(3),
        "detached": good["honesty"].detach(),
        "callable detached": lambda: good["honesty"].detach(),
        "callable float": lambda: 1.0,
    }
    if losses == "tensor":
        losses = good["help"]
    elif losses == "mapping":
        losses = good
    elif losses == "stacked":
        losses = torch.stack(list(good.values()))
    elif losses == "sequence":
        losses = list(good.values())
    elif isinstance(losses, str):
        losses = {**good, "honesty": replacement[losses]}
    optimizer = wrapped(net, objectives=NAMES)
    held = torch.ones_like(net.trunk.weight)
    net.trunk.weight.grad = held
    with pytest.raises(error, match=message):
        optimizer.backward(losses, **options)  # type: ignore[arg-type]
    assert net.trunk.weight.grad is held
    net.trunk.weight.grad = None
    optimizer.backward(separate_losses(net, x))
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


def test_a_first_call_with_one_objective_asks_for_the_names() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"objectives=\[\.\.\.\]"):
        wrapped(net).backward(shared_losses(net, inputs())["help"], objective="help")


def test_a_graph_freed_by_an_earlier_call_says_what_to_do(decider: str) -> None:
    if decider == "replayed":
        pytest.skip("graphs of loss tensors are kept until the weights are known: gradients/test_sketches.py")
    net, x = Net(), inputs()
    optimizer = wrapped(net, objectives=NAMES)
    losses = shared_losses(net, x)
    optimizer.backward(losses["help"], objective="help")
    with pytest.raises(RuntimeError, match="graph of objective 'honesty' was freed.*retain_graph=True"):
        optimizer.backward(losses["honesty"], objective="honesty")


def test_an_exception_in_a_callable_drops_the_window_and_restores_p_grad() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    net.trunk.weight.grad = held = torch.ones_like(net.trunk.weight)

    def broken() -> Tensor:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        optimizer.backward({**callables(net, x), "truth": broken})
    assert net.trunk.weight.grad is held
    assert all(p.grad is None for p in net.heads.parameters())
    net.trunk.weight.grad = None
    optimizer.backward(shared_losses(net, x))
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


def test_combine_with_nothing_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call backward\(losses\) first"):
        wrapped(Net()).combine()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "ignore"}, "nonfinite='ignore': choose"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: pass a positive norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan"),
        ({"objectives": []}, "at least one name"),
        ({"objectives": "help"}, "as a list of strings"),
        ({"objectives": ["a", "a"]}, "names must differ"),
        ({"objectives": {"a", "b"}}, "as a list of strings"),
        ({"weighting": "best"}, "unknown weighting 'best'"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(Net(), **options)


def test_parameters_that_cannot_be_flattened_with_the_rest() -> None:
    complex_parameter = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([complex_parameter], lr=0.1))
    with pytest.raises(TypeError, match="complex64.*view a complex parameter as real"):
        optimizer.backward([complex_parameter.abs().sum()])
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([frozen], lr=0.1))
    with pytest.raises(ValueError, match="no parameter of the base optimizer requires grad"):
        optimizer.backward([torch.ones((), requires_grad=True)])


@pytest.mark.filterwarnings("ignore")
def test_frozen_parameters_may_be_of_any_kind() -> None:
    """Sparse, nested, or without a shape yet: nothing is asked of them."""
    for odd in (
        nn.Parameter(torch.eye(3).to_sparse_csr(), requires_grad=False),
        nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), requires_grad=False),
        nn.UninitializedParameter(requires_grad=False),
    ):
        weight = nn.Parameter(torch.ones(3))
        optimizer = MultiObjectiveOptimizer(torch.optim.SGD([weight, odd], lr=0.1))
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward([(weight * 2).square().sum(), (weight * 3 - 1).square().sum()])
            optimizer.step()
        assert not torch.equal(weight, torch.ones(3))


def test_what_is_frozen_within_a_window_is_let_go_after_it(decider: str) -> None:
    if decider in ("sketched", "replayed"):
        pytest.skip("a parameter may not be frozen between backward and step: gradients/test_sketches.py")
    kept, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1000))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([kept, frozen], lr=0.0), "mgda")

    def losses() -> list[Tensor]:
        return [(kept.sum() + frozen.sum()).square(), (kept * 3).square().sum()]

    optimizer.backward(losses())
    frozen.requires_grad_(False)
    optimizer.backward(losses())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(losses())
    assert optimizer._captures.buffers is not None
    assert optimizer._captures.buffers.parameters == [kept]


def test_nothing_to_train_is_said_every_time() -> None:
    frozen, other = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([frozen], lr=0.1))
    for _ in range(2):
        with pytest.raises(ValueError, match="no parameter of the base optimizer requires grad"):
            optimizer.backward([(frozen * other).sum(), (frozen * other * 2).sum()])
