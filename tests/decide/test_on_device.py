"""Directions that the device decides: nothing waits for it, and what the host must hear arrives later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mogeo
from mogeo import MultiObjectiveOptimizer
from mogeo.decide.late_news import Mailbox
from mogeo.geometry import ops
from mogeo.gradients import row_sketches
from mogeo.weightings import GroupDRO, Weighting
from tests.deciders import let_decide
from tests.nets import (
    NAMES,
    WEIGHTINGS,
    Net,
    assert_direction,
    assert_left_out,
    callables,
    flat_grad,
    gradient_rows,
    inputs,
    poisoned,
    separate_losses,
    shared_losses,
    wrapped,
)
from tests.profiles import slow_but


@pytest.fixture(autouse=True)
def device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide("device", monkeypatch)


# --------------------------------------------------------------------------------------------------------------------
# Nothing waits


class Waits(RuntimeError):
    """On a GPU, this call would have waited for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses the operators whose result the host must know."""

    names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in self.names or by_mask:
            raise Waits(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where a tensor is read by the host: `.item()`, `bool(tensor)`, `.cpu()`, a copy from the host, …"""

    def refuse(name: str) -> Callable[..., None]:
        def method(*args: object, **kwargs: object) -> None:
            raise Waits(name)

        return method

    with monkeypatch.context() as patch, NoWaiting():
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            patch.setattr(Tensor, name, refuse(name))
        patch.setattr(torch, "tensor", refuse("torch.tensor"))  # copies from pageable memory, and waits for that
        yield


def test_the_detector_detects(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    calls: list[Callable[[], object]] = [
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: bool(x.sum() > 0),
        lambda: float(x.sum()),
        lambda: x[x > 0],
        lambda: torch.equal(x, x),
        lambda: torch.tensor(1.0),
    ]
    with nothing_waits(monkeypatch):
        for call in calls:
            with pytest.raises(Waits):
                call()
    assert x.tolist() == [1, 1, 1]


@contextmanager
def kernels_unwatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter reads tensors to run a kernel; a GPU does not. So a launch is exempt, and only a launch."""
    import triton

    interpreted = type(mogeo_kernel())
    launch = interpreted.run
    originals = {
        name: getattr(Tensor, name)
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")
    }
    tensor = torch.tensor

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes(), monkeypatch.context() as patch:
            for name, original in originals.items():
                patch.setattr(Tensor, name, original)
            patch.setattr(torch, "tensor", tensor)
            return launch(self, *args, **kwargs)

    assert triton.knobs.runtime.interpret
    with monkeypatch.context() as patch:
        patch.setattr(interpreted, "run", run)
        yield


def mogeo_kernel() -> Any:
    from mogeo.kernels import gram

    return gram._gram_rows


STEPS: dict[str, dict[str, Any]] = {
    **{weighting: {"weighting": weighting} for weighting in WEIGHTINGS},
    "a callable": {"weighting": lambda gram, losses: losses / losses.sum()},
    "clipped": {"weighting": "mgda-decoupled", "max_grad_norm": 1e-3},
    "uniform, clipped": {"weighting": "uniform", "max_grad_norm": 1e-3},
    "propagating": {"weighting": "mgda-normalized", "nonfinite": "propagate"},
    "uniform, propagating": {"weighting": "uniform", "nonfinite": "propagate"},
}


@pytest.mark.parametrize("form", slow_but([shared_losses, separate_losses, callables], callables))
@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS.keys())
def test_a_step_never_waits(options: dict[str, Any], form: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on; the first one makes constants. With all objectives, and with one absent."""
    net, x = Net(torch.float32), inputs(dtype=torch.float32)
    optimizer = wrapped(net, objectives=NAMES, **options)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(form(net, x))
        optimizer.step()
        optimizer.zero_grad()
        for name in ("help", "truth"):
            optimizer.backward(form(net, x)[name], objective=name)
        optimizer.step()

    step()
    optimizer._state.news.warned = True  # else the test itself would have to let letters be read
    monkeypatch.setattr(optimizer._state.news, "read", lambda: None)
    with kernels_unwatched(monkeypatch), nothing_waits(monkeypatch):
        step()
    assert optimizer.report is not None
    assert optimizer.report.direction_norm > 0
    alignment = optimizer.report.alignment
    assert alignment is None or bool((alignment[[0, 2]].isfinite()).all())


TRACKED: dict[str, dict[str, Any]] = {
    "mgda-decoupled": {"weighting": "mgda-decoupled"},
    "uniform, guarded": {"weighting": "uniform", "guarantee_descent": True},
    "normalised, steered": {
        "weighting": "mgda-normalized",
        "preference": (1.0, 2.0, 3.0),
        "min_weight": 0.1,
        "smoothing": 0.5,
        "max_grad_norm": 1e-3,
    },
    "a callable, propagating": {"weighting": lambda gram, losses: losses / losses.sum(), "nonfinite": "propagate"},
    "mgda-decoupled, reported only": {"weighting": "mgda-decoupled", "weigh_by": "mini-batch", "max_grad_norm": 1e-3},
    "uniform, reported only": {"weighting": "uniform", "weigh_by": "mini-batch", "nonfinite": "propagate"},
}


@pytest.mark.parametrize(
    ("options", "track", "dimension"),
    [
        pytest.param(TRACKED["mgda-decoupled"], 0.9, None, id="exact"),
        pytest.param(TRACKED["uniform, guarded"], "auto", 32, id="sketched"),
        *(pytest.param(each, "auto", None, id=name, marks=pytest.mark.slow) for name, each in TRACKED.items()),
    ],
)
def test_a_tracked_step_never_waits(
    options: dict[str, Any], track: Any, dimension: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, and neither does what is read from its report. On a GPU the operators are the kernels', as here."""
    from mogeo.geometry import triton_backend

    for operator in ("gram", "min_norm", "descent", "psd_part", "sketch_"):
        monkeypatch.setattr(torch.ops.mogeo, operator, getattr(triton_backend, operator))
    monkeypatch.setattr(ops, "sketch_tables", triton_backend.sketch_tables)
    monkeypatch.setattr(row_sketches, "DIMENSION", dimension or row_sketches.DIMENSION)
    net, x = Net(torch.float32), inputs(dtype=torch.float32)
    optimizer = wrapped(net, objectives=NAMES, track=track, **options)

    def step(*names: str) -> mogeo.StepReport:
        optimizer.zero_grad()
        for name in names:
            optimizer.backward(shared_losses(net, x)[name], objective=name)
        optimizer.step()
        assert optimizer.report is not None
        return optimizer.report

    for _ in range(6):  # until something is known
        step(*NAMES)
    step("help", "truth")
    optimizer._state.news.warned = True
    monkeypatch.setattr(optimizer._state.news, "read", lambda: None)
    with kernels_unwatched(monkeypatch), nothing_waits(monkeypatch):
        step("help", "truth")
        report = step(*NAMES)
        read = (report.alignment, report.alignment_error, report.hurt, report.noise_scale_interval, report.mean_cosines)
    assert all(value is not None for value in read)
    assert report.evidence is not None
    assert dimension is not None or bool((report.evidence > 0).all())
    assert report.direction_norm > 0


def test_averages_advance_in_place() -> None:
    """A replayed CUDA graph writes where it wrote."""
    net, x = Net(), inputs()
    optimizer = wrapped(net, track=0.9)
    addresses = []
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, x))
        optimizer.combine()
        assert optimizer._state.tracked is not None
        kept = optimizer._state.tracked.state_dict()
        addresses.append([value.data_ptr() for value in kept.values() if isinstance(value, Tensor)])
    assert addresses[0] == addresses[-1]
    assert len(addresses[0]) > 10


# --------------------------------------------------------------------------------------------------------------------
# What is not finite


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("weighting", ["mgda", "mgda-normalized", "mgda-decoupled", "gapo(0.5)"])
def test_skip_leaves_out_what_is_not_finite(weighting: str, how: str, recwarn: pytest.WarningsRecorder) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting)
    optimizer.backward(poisoned(net, x, "honesty", how))
    report = optimizer.combine()
    assert_left_out(net, x, report)
    assert not recwarn.list  # the host has not heard of it yet
    optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="left objective 'honesty' out of a step"):
        optimizer.backward(poisoned(net, x, "honesty", how))
    assert optimizer.combine().nonfinite_counts.tolist() == [0, 2, 0]
    optimizer.zero_grad()
    optimizer.backward(shared_losses(net, x))  # no second warning, and the row recovers
    assert_direction(net, optimizer.combine(), gradient_rows(net, x))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_where_nothing_is_finite_the_direction_is_zero(weighting: str, how: str) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting)
    losses: dict[str, Tensor] = {}
    for name in NAMES:
        losses[name] = poisoned(net, x, name, how)[name]
    optimizer.backward(losses)
    report = optimizer.combine()
    assert report.skipped == NAMES
    assert torch.equal(flat_grad(net), torch.zeros_like(flat_grad(net)))
    optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="left objective 'help', 'honesty', 'truth' out"):
        optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    assert_direction(net, report, gradient_rows(net, x))
    assert report.weights.isfinite().all()
    assert report.weights.sum() > 0


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("weighting", ["uniform", "linear(1, 2, 3)"])
def test_under_constant_weights_the_whole_step_is_left_out(weighting: str, how: str) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting)
    optimizer.backward(shared_losses(net, x))
    optimizer.backward(poisoned(net, x, "honesty", how))
    report = optimizer.combine()
    assert report.skipped == NAMES
    assert flat_grad(net).abs().max() == 0


def test_group_dro_leaves_out_losses_one_by_one_and_gradients_all_at_once() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, "group-dro")
    optimizer.backward(poisoned(net, x, "honesty", "loss"))
    report = optimizer.combine()
    assert report.skipped == ("honesty",)
    torch.testing.assert_close(flat_grad(net), report.weights[[0, 2]] @ gradient_rows(net, x)[[0, 2]])
    optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="left objective 'honesty'"):
        optimizer.backward(poisoned(net, x, "honesty", "gradient"))
    assert optimizer.combine().skipped == NAMES
    assert flat_grad(net).abs().max() == 0


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "uniform", "group-dro", lambda gram, losses: [1.0, 1.0, 1.0]])
def test_propagate_leaves_no_trace_in_the_rows(weighting: object) -> None:
    """NaN must not outlast its step in what lies between the parameters."""
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting, nonfinite="propagate")
    optimizer.backward(poisoned(net, x, "honesty", "loss"))
    report = optimizer.combine()
    assert flat_grad(net).isnan().any()
    assert not report.weights.isfinite().all() or report.gram is None
    optimizer.zero_grad()
    optimizer.backward(shared_losses(net, x))
    report = optimizer.combine()
    assert report.skipped == ()
    assert flat_grad(net).isfinite().all()
    torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, x))


def test_a_direction_that_overflows_fp16_is_made_zero() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), lambda gram, losses: [1.0, 1.0])
    optimizer.backward([(parameter.float() * 5e4).sum() + 1, (parameter.float() * 4e4).sum() + 1])
    report = optimizer.combine()
    assert report.skipped == ("0", "1")
    assert report.clip_factor == 0
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_raise_asks_the_host() -> None:
    net = Net()
    optimizer = wrapped(net, nonfinite="raise")
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.backward(poisoned(net, inputs(), "honesty", "gradient"))
    with pytest.raises(RuntimeError, match=r"'honesty'.*not finite"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# What raises, one step later


@pytest.mark.parametrize("where", ["backward", "combine"])
def test_a_nonpositive_loss_is_left_out_and_then_named(where: str) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    losses = shared_losses(net, x)
    losses["honesty"] = losses["honesty"] - 100
    optimizer.backward(losses)
    report = optimizer.combine()
    assert report.status == mogeo.Status.NONPOSITIVE_LOSS
    assert report.weights[1] == 0
    rows = gradient_rows(net, x)
    torch.testing.assert_close(flat_grad(net), report.weights @ rows)
    kept = mogeo.weightings.resolve("mgda-decoupled")((rows @ rows.T)[::2, ::2], report.losses[::2])
    torch.testing.assert_close(report.weights[::2], kept)
    optimizer.zero_grad()
    if where == "combine":
        news = optimizer._state.news
        held, news.mailbox = news.mailbox, Mailbox()
        optimizer.backward(shared_losses(net, x))
        news.mailbox = held
    with pytest.raises(ValueError, match=r"objective 'honesty' has loss -.*; mgda-decoupled divides by the loss"):
        optimizer.backward(shared_losses(net, x)) if where == "backward" else optimizer.combine()
    if where == "backward":
        optimizer.backward(shared_losses(net, x))
    assert_direction(net, optimizer.combine(), rows)  # what was captured is still there


def test_weights_that_are_not_finite_are_discarded_and_then_named() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, lambda gram, losses: [math.nan, 0.0, 0.0])
    optimizer.backward(shared_losses(net, x))
    optimizer.combine()
    assert flat_grad(net).abs().max() == 0
    with pytest.raises(RuntimeError, match="must return one finite weight per objective"):
        optimizer.backward(shared_losses(net, x))


def test_a_wrong_number_of_weights_needs_no_device_to_be_seen() -> None:
    net = Net()
    optimizer = wrapped(net, lambda gram, losses: [1.0, 2.0])
    optimizer.backward(shared_losses(net, inputs()))
    with pytest.raises(RuntimeError, match="must return one finite weight per objective"):
        optimizer.combine()


# --------------------------------------------------------------------------------------------------------------------
# State


def test_counters_and_group_dro_advance_in_place() -> None:
    """A replayed CUDA graph writes where it wrote: a state in new tensors would stand still."""
    net, x = Net(), inputs()
    weighting = GroupDRO(0.5)
    optimizer = wrapped(net, weighting)
    addresses = []
    for _ in range(3):
        optimizer.backward(shared_losses(net, x))
        optimizer.combine()
        optimizer.zero_grad()
        assert weighting._log_weights is not None
        addresses.append((weighting._log_weights.data_ptr(), optimizer._state.nonfinite_counts.data_ptr()))
    assert len(set(addresses)) == 1
    assert isinstance(weighting, Weighting)
    saved = optimizer.own_state()
    assert saved["nonfinite_counts"] == [0, 0, 0]
    assert len(saved["weighting"]["log_weights"]) == 3
