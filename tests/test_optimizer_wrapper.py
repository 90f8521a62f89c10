"""The manners of torch.optim, each held against a real user of the protocol."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mogeo import MultiObjectiveOptimizer


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def losses_of(net: nn.Module, seed: int) -> dict[str, Callable[[], Tensor]]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    return {
        "left": lambda: (net(x)[:, 0] - 1).square().mean() + 0.1,
        "right": lambda: (net(x)[:, 1] + 2).square().mean() + 0.1,
    }


def train(net: nn.Module, optimizer: MultiObjectiveOptimizer, steps: range) -> None:
    for seed in steps:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, seed))
        optimizer.step()


def adamw(net: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=0.01, **options)


def assert_equal_nets(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# --------------------------------------------------------------------------------------------------------------------
# Bases


def foreign(name: str, package: str = "pytorch_optimizer") -> Any:
    return getattr(pytest.importorskip(package), name)


def bases() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    return {
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        "Lion": lambda p: foreign("Lion", "lion_pytorch")(p, lr=0.001, weight_decay=0.1),
        "AdaBelief": lambda p: foreign("AdaBelief")(p, lr=0.01),
    }


@pytest.mark.parametrize("name", list(bases()))
def test_a_step_is_the_base_optimizers_step_on_the_direction(name: str) -> None:
    """The same base, given the direction as p.grad by hand, takes the same steps to the last bit."""
    net, twin = make_net(), make_net()
    optimizer = MultiObjectiveOptimizer(bases()[name](list(net.parameters())))
    base = bases()[name](list(twin.parameters()))
    for seed in range(4):
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, seed))
        optimizer.combine()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        base.step()
    assert_equal_nets(net, twin)


def test_lbfgs_and_other_impossible_bases_are_refused() -> None:
    parameters = list(make_net().parameters())
    with pytest.raises(TypeError, match="LBFGS cannot be wrapped: it builds curvature"):
        MultiObjectiveOptimizer(torch.optim.LBFGS(parameters))
    with pytest.raises(TypeError, match="wrap the optimizer inside it, base.base"):
        MultiObjectiveOptimizer(MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.1)))
    with pytest.raises(TypeError, match="base is a Sequential: pass a torch.optim.Optimizer"):
        MultiObjectiveOptimizer(make_net())  # type: ignore[arg-type]


def stepped_in_backward(net: nn.Module) -> torch.optim.Optimizer:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, net[0].parameters(), {"lr": 0.1})  # type: ignore[index]
    return adamw(net)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # as torch.distributed.optim is imported
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda net: torch.optim.SparseAdam(net.parameters()),
            "SparseAdam cannot be wrapped: it takes sparse gradients",
        ),
        (lambda net: foreign("AdaHessian")(net.parameters()), "AdaHessian .*create_graph=True.*has no graph behind it"),
        (
            lambda net: foreign("SophiaH")(net.parameters()),
            "SophiaH cannot be wrapped: it differentiates the gradients",
        ),
        (lambda net: foreign("LOMO")(net), "LOMO cannot be wrapped: it steps while backward runs"),
        (lambda net: foreign("AdaLOMO")(net), "AdaLOMO cannot be wrapped: it steps while backward runs"),
        (lambda net: foreign("Lookahead")(foreign("SophiaH")(net.parameters())), "SophiaH cannot be wrapped"),
        (stepped_in_backward, "parameters are stepped while backward runs"),
    ],
)
def test_bases_that_cannot_follow_a_direction_are_refused(make: Callable[[nn.Module], Any], message: str) -> None:
    base = make(make_net())
    with pytest.raises(TypeError, match=message):
        MultiObjectiveOptimizer(base)


def test_a_base_that_needs_a_closure_gets_it() -> None:
    """AliG takes its step size from what the closure returns."""
    net = make_net()
    optimizer = MultiObjectiveOptimizer(foreign("AliG")(net.parameters(), max_lr=0.1))
    before = copy.deepcopy(net)

    def closure() -> float:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, 0))
        return 1.0

    optimizer.step(closure)
    assert not torch.equal(net[0].weight, before[0].weight)


# --------------------------------------------------------------------------------------------------------------------
# Learning-rate schedulers

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=2),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    known = {name for name in lr_scheduler.__all__ if name not in ("LRScheduler",)}
    assert known <= set(SCHEDULERS)


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers(name: str, on: str) -> None:
    """On the wrapper or on the base, a scheduler sets the learning rates that it sets on a bare optimizer."""
    net, twin = make_net(), make_net()
    optimizer, bare = MultiObjectiveOptimizer(adamw(net)), adamw(twin)
    scheduler = SCHEDULERS[name](optimizer if on == "wrapper" else optimizer.base)
    reference = SCHEDULERS[name](bare)
    for seed in range(5):
        train(net, optimizer, range(seed, seed + 1))
        bare.zero_grad()
        twin(torch.ones(1, 4)).sum().backward()
        bare.step()
        for one in (scheduler, reference):
            one.step(1.0) if name == "ReduceLROnPlateau" else one.step()
        assert optimizer.param_groups[0]["lr"] == bare.param_groups[0]["lr"]
    assert optimizer.base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


# --------------------------------------------------------------------------------------------------------------------
# GradScaler, closures, hooks


def scaled_step(
    net: nn.Module, optimizer: MultiObjectiveOptimizer, scaler: torch.amp.GradScaler, poison: float
) -> None:
    losses = {name: (lambda loss=loss: loss() * poison) for name, loss in losses_of(net, 0).items()}
    optimizer.zero_grad()
    optimizer.backward(losses, backward=lambda loss, **options: scaler.scale(loss).backward(**options))
    optimizer.combine()
    scaler.step(optimizer)
    scaler.update()


def sgd(net: nn.Module) -> torch.optim.SGD:
    """For what AdamW would hide: it is blind to the scale of gradients."""
    return torch.optim.SGD(net.parameters(), lr=0.1)


def test_grad_scaler_unscales_what_was_combined() -> None:
    net, twin = make_net(), make_net()
    optimizer = MultiObjectiveOptimizer(sgd(net), nonfinite="propagate")
    plain = MultiObjectiveOptimizer(sgd(twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(3):
        scaled_step(net, optimizer, scaler, 1.0)
        train(twin, plain, range(1))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_grad_scaler_skips_infinities_and_lowers_its_scale() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net), nonfinite="propagate")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = copy.deepcopy(net)
    scaled_step(net, optimizer, scaler, float("inf"))
    assert_equal_nets(net, before)
    assert scaler.get_scale() == 2.0**11
    scaled_step(net, optimizer, scaler, 1.0)
    assert not torch.equal(net[0].weight, before[0].weight)


def test_grad_scaler_and_clip_grad_norm() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), nonfinite="propagate")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(net)
    optimizer.backward(losses_of(net, 0), backward=lambda loss: scaler.scale(loss).backward())
    optimizer.combine()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    scaler.step(optimizer)
    moved = torch.cat([(p - q).flatten() for p, q in zip(net.parameters(), before.parameters(), strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_closure() -> None:
    net, twin = make_net(), make_net()
    optimizer, other = MultiObjectiveOptimizer(adamw(net)), MultiObjectiveOptimizer(adamw(twin))

    def closure() -> float:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, 0))
        return 7.0

    assert optimizer.step(closure) == 7.0
    train(twin, other, range(1))
    assert_equal_nets(net, twin)


def test_a_closure_optimizer_that_steps_on_what_is_there_first() -> None:
    """SAM ascends along p.grad before it calls the closure: what is due has to be there by then."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    weights = []
    for combine_first in (True, False):
        net = make_net()
        base = pytorch_optimizer.SAM(net.parameters(), base_optimizer=torch.optim.SGD, lr=0.1, rho=0.5)
        optimizer = MultiObjectiveOptimizer(base)

        def closure(net: nn.Module = net, optimizer: MultiObjectiveOptimizer = optimizer) -> Tensor:
            optimizer.backward(losses_of(net, 0))
            return torch.zeros(())

        closure()
        if combine_first:
            optimizer.combine()
        optimizer.step(closure)
        weights.append(net[0].weight.detach().clone())
    assert torch.equal(*weights)


class Verbose(MultiObjectiveOptimizer):
    """A user's subclass that adds to step()."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [MultiObjectiveOptimizer, Verbose])
def test_every_hook_fires_exactly_once(kind: type[MultiObjectiveOptimizer]) -> None:
    net = make_net()
    optimizer = kind(adamw(net))
    fired: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: fired.append(name)

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.base.register_step_pre_hook(note("base pre")),
        optimizer.base.register_step_post_hook(note("base post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_state_dict_pre_hook(note("state pre")),
        optimizer.register_state_dict_post_hook(note("state post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]
    try:
        train(net, optimizer, range(1))
        assert fired == ["pre", "global pre", "base pre", "base post", "global post", "post"]
        fired.clear()
        optimizer.load_state_dict(optimizer.state_dict())
        assert fired == ["state pre", "state post", "load pre", "load post"]
    finally:
        for handle in handles:
            handle.remove()


def test_a_step_pre_hook_may_replace_the_arguments() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 5.0), {}))
    optimizer.backward(losses_of(net, 0))
    assert optimizer.step() == 5.0


HOOKS: dict[str, Callable[[MultiObjectiveOptimizer, Any], Any]] = {
    "the wrapper's": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "the base's": lambda optimizer, hook: optimizer.base.register_step_pre_hook(hook),
    "global": lambda optimizer, hook: register_optimizer_step_pre_hook(hook),
}


@pytest.mark.parametrize("options", [{}, {"sketch": 64}, {"refresh_every": 2}], ids=str)
@pytest.mark.parametrize("whose", list(HOOKS))
def test_a_step_pre_hook_finds_the_direction_and_may_clip_it(whose: str, options: dict[str, Any]) -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), **options)
    norms = []

    def clip(one: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in one.param_groups for p in group["params"]]
        norms.append(nn.utils.clip_grad_norm_(parameters, 0.01).item())

    handle = HOOKS[whose](optimizer, clip)
    try:
        for seed in range(3):
            before = copy.deepcopy(net)
            train(net, optimizer, range(seed, seed + 1))
            moved = [(p - q).flatten() for p, q in zip(net.parameters(), before.parameters(), strict=True)]
            assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-3)
            if options != {"refresh_every": 2}:  # steps in between know no norm beforehand
                assert norms[-1] == pytest.approx(optimizer.report.direction_norm.item(), rel=1e-5)  # type: ignore[union-attr]
    finally:
        handle.remove()


def test_a_grad_scaler_says_so_if_nothing_was_combined() -> None:
    """It unscales p.grad before the step, so it has to be there: torch finds nothing to check."""
    net = make_net()
    optimizer = MultiObjectiveOptimizer(sgd(net), nonfinite="propagate")
    scaler = torch.amp.GradScaler("cpu")
    optimizer.backward(losses_of(net, 0), backward=lambda loss: scaler.scale(loss).backward())
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler.step(optimizer)


def test_step_without_backward_is_the_base_step() -> None:
    """torch.distributed.checkpoint initialises optimizer state that way."""
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net), "group-dro")
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    assert optimizer.report is None
    assert optimizer.own_state()["weighting"] == {"log_weights": []}
    assert len(optimizer.state) == 4


# --------------------------------------------------------------------------------------------------------------------
# Steps that train nothing, and proxies


def test_a_step_without_any_gradient_says_so_once() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    with pytest.warns(RuntimeWarning, match=r"no parameter moves. Call backward\(losses\).*after zero_grad") as told:
        optimizer.step()
    assert told[0].filename == __file__
    optimizer.step()
    optimizer.backward(losses_of(net, 0))
    optimizer.zero_grad()
    copy.deepcopy(optimizer).step()


def test_zero_grad_between_backward_and_step_is_not_silent() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    optimizer.backward(losses_of(net, 0))
    optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="no parameter moves"):
        optimizer.step()


def test_a_closure_that_goes_past_backward_says_so_once() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(loss() for loss in losses_of(net, 0).values())
        loss.backward()  # type: ignore[union-attr]
        return loss  # type: ignore[return-value]

    with pytest.warns(RuntimeWarning, match="the closure .*balances nothing"):
        optimizer.step(closure)
    optimizer.step(closure)


def test_steps_that_are_meant_say_nothing() -> None:
    """Warnings are errors here. After a plain backward; where every objective was left out; a second step in a row."""
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net), nonfinite="propagate")
    for closure in (None, lambda: None):  # the second is what Lightning passes in manual optimization
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step(closure)
        optimizer.zero_grad()
    optimizer.backward(losses_of(net, 0))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    unusable = MultiObjectiveOptimizer(adamw(net))
    with pytest.warns(RuntimeWarning, match="left objective 'left', 'right' out of a step") as told:
        unusable.backward({name: (lambda loss=loss: loss() * torch.nan) for name, loss in losses_of(net, 0).items()})
        unusable.step()
    assert len(told) == 1


class Reading:
    """A proxy that reads from an optimizer what it lacks, and inherits from its class, as Lightning's does."""

    def __init__(self, optimizer: MultiObjectiveOptimizer) -> None:
        self.inside = optimizer
        self.__class__ = type("Reading", (Reading, type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.inside.step() if closure is None else self.inside.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)


class Copying(Reading):
    """One that begins as a copy of the optimizer's attributes, as Lightning's did."""

    def __init__(self, optimizer: MultiObjectiveOptimizer) -> None:
        self.__dict__ = dict(vars(optimizer))
        super().__init__(optimizer)


def assert_proxy_trains(proxy: Any, optimizer: MultiObjectiveOptimizer, net: nn.Module) -> None:
    twin = make_net()
    reference = MultiObjectiveOptimizer(adamw(twin), max_grad_norm=0.5)
    proxy.max_grad_norm = 0.5
    proxy.note = "the proxy's own"
    for seed in range(3):
        proxy.zero_grad()
        proxy.backward(losses_of(net, seed))
        assert len(proxy.combine().weights) == 2
        proxy.step()
    train(twin, reference, range(3))
    assert_equal_nets(net, twin)
    assert optimizer.max_grad_norm == 0.5
    assert optimizer.objectives == ("left", "right")
    assert not hasattr(optimizer, "note")
    proxy.load_state_dict(proxy.state_dict())


def test_what_a_proxy_assigns_reaches_the_optimizer() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    proxy: Any = Reading(optimizer)
    assert_proxy_trains(proxy, optimizer, net)
    assert proxy.report is optimizer.report
    proxy.weighting = "mgda"
    proxy.refresh_every = 5
    assert repr(optimizer.weighting) == "mgda"
    assert optimizer.refresh_every == 5
    scheduler = lr_scheduler.ExponentialLR(proxy, 0.5)  # puts a step of its own in place of the proxy's
    proxy.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert "step" not in vars(optimizer)


def test_a_proxy_that_began_as_a_copy() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    assert_proxy_trains(Copying(optimizer), optimizer, net)


# --------------------------------------------------------------------------------------------------------------------
# Groups, state, copies


def test_groups_state_and_defaults_are_the_base_optimizers() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    train(net, optimizer, range(1))
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults is optimizer.base.defaults
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.base.param_groups[1]["params"] == [extra]
    assert "AdamW" in repr(optimizer)
    assert "mgda-decoupled" in repr(optimizer)


@pytest.mark.parametrize("weighting", ["mgda-decoupled", "group-dro(0.5)", "uniform"])
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_resumes_bit_identically(weighting: str, how: str) -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net), weighting)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)  # leaves a wrapper over optimizer.step
    train(net, optimizer, range(3))
    scheduler.step()
    if how == "deepcopy":
        other_net, other = copy.deepcopy((net, optimizer))
    elif how == "pickle":
        other_net, other = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        other_net = copy.deepcopy(net)
        other = MultiObjectiveOptimizer(adamw(other_net), weighting)
        state = copy.deepcopy(optimizer.state_dict())  # torch shares the tensors of a state_dict
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_state_dict(state_dict=state)
    assert other.objectives == ("left", "right")
    train(net, optimizer, range(3, 6))
    train(other_net, other, range(3, 6))
    assert_equal_nets(net, other_net)
    assert torch.equal(optimizer.report.weights, other.report.weights)  # type: ignore[union-attr]


def test_counters_are_saved() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    losses = losses_of(net, 0)
    optimizer.backward({"left": losses["left"], "right": lambda: losses["right"]() * float("nan")})
    with pytest.warns(RuntimeWarning, match="left objective 'right'"):
        optimizer.step()
    other = MultiObjectiveOptimizer(adamw(net))
    other.load_state_dict(optimizer.state_dict())
    other.backward(losses)
    assert other.combine().nonfinite_counts.tolist() == [0, 1]


def test_state_moves_between_wrapper_and_bare_base() -> None:
    net, bare_net = make_net(), make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    train(net, optimizer, range(2))
    bare = adamw(bare_net)
    bare.load_state_dict(optimizer.state_dict())
    first, second = next(iter(net.parameters())), next(iter(bare_net.parameters()))
    assert torch.equal(bare.state[second]["exp_avg"], optimizer.state[first]["exp_avg"])
    bare_net(torch.ones(1, 4)).sum().backward()
    bare.step()

    fresh = MultiObjectiveOptimizer(adamw(bare_net), "group-dro")
    fresh.load_state_dict(adamw(net).state_dict())
    fresh.load_state_dict(bare.state_dict())  # went through the bare base and back
    assert fresh.objectives == ("left", "right")


def test_a_state_of_other_objectives_is_refused_and_nothing_is_loaded() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    train(net, optimizer, range(1))
    other = MultiObjectiveOptimizer(adamw(net), objectives=["up", "down"])
    with pytest.raises(ValueError, match=r"saved for the objectives \['left', 'right'\].*has \['up', 'down'\]"):
        other.load_state_dict(optimizer.state_dict())
    assert len(other.state) == 0


def test_loading_drops_gradients_captured_before() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net))
    optimizer.backward(losses_of(net, 0))
    before = copy.deepcopy(net)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.warns(RuntimeWarning, match="no parameter moves"):
        optimizer.step()
    assert_equal_nets(net, before)


def test_pickles_hold_no_gradients() -> None:
    net = nn.Linear(200, 200)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1))
    before = len(pickle.dumps(optimizer))
    optimizer.backward([net(torch.ones(1, 200)).square().sum(), net(torch.ones(1, 200)).sum() ** 2])
    assert len(pickle.dumps(optimizer)) < before + 10_000
    optimizer.step()
    optimizer.zero_grad()
    assert len(pickle.dumps(optimizer)) < before + 10_000


def test_state_of_another_weighting_is_left_out_with_a_word() -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(adamw(net), "group-dro")
    train(net, optimizer, range(1))
    other = MultiObjectiveOptimizer(adamw(net), "mgda")
    with pytest.warns(UserWarning, match="state of a GroupDRO was saved, and is not loaded into a MGDA"):
        other.load_state_dict(optimizer.state_dict())


class Momentum:
    """A weighting that somebody wrote, with tensors in its state."""

    def __init__(self) -> None:
        self.mean = torch.zeros((), dtype=torch.bfloat16)
        self.seen: dict[str, Any] = {}

    def __call__(self, gram: Tensor, losses: Tensor) -> Tensor:
        self.mean = (0.9 * self.mean + losses.mean()).to(torch.bfloat16)
        self.seen = {"losses": losses * torch.tensor([1.0, torch.inf]), "gram": gram.float(), "note": None}
        return torch.full_like(losses, 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.seen = state["mean"], state["seen"]


def test_tensors_in_a_weightings_state_are_saved() -> None:
    net = make_net()
    optimizer, other = MultiObjectiveOptimizer(adamw(net), Momentum()), MultiObjectiveOptimizer(adamw(net), Momentum())
    train(net, optimizer, range(2))
    other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(other.weighting.state_dict(), optimizer.weighting.state_dict(), rtol=0, atol=0)
    optimizer.weighting.seen = {"net": net}
    with pytest.raises(TypeError, match="the weighting's state_dict holds a Sequential: return dicts, lists"):
        optimizer.state_dict()


def test_loads_the_form_that_was_saved_at_first() -> None:
    """There the entry was a dict, and only the first group had one."""
    net = make_net()
    optimizer, other = (MultiObjectiveOptimizer(two_groups(net), "group-dro(0.5)") for _ in range(2))
    train(net, optimizer, range(2))
    state = optimizer.state_dict()
    state["param_groups"][0]["mogeo"] = optimizer.own_state()
    del state["param_groups"][1]["mogeo"]
    other.load_state_dict(state)
    assert other.own_state() == optimizer.own_state()


class Elsewhere(torch.optim.SGD):
    """Saves its state in a form of its own: `form` of what torch.optim saves."""

    form: Callable[[dict[str, Any]], Any]
    back: Callable[[Any], dict[str, Any]]

    def state_dict(self) -> Any:
        return type(self).form(super().state_dict())

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(type(self).back(state_dict))


@dataclass
class Saved:
    state: dict[str, Any]


FORMS: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[Any], dict[str, Any]]]] = {
    "a dict without groups": (lambda s: {"inner": s}, lambda s: s["inner"]),
    "a dict with a name of ours": (lambda s: {"base": s}, lambda s: s["base"]),
    "empty groups": (lambda s: {"param_groups": [], "inner": s}, lambda s: s["inner"]),
    "a list": (lambda s: [s["state"], s["param_groups"]], lambda s: {"state": s[0], "param_groups": s[1]}),
    "a tuple": (lambda s: (s["state"], s["param_groups"]), lambda s: {"state": s[0], "param_groups": s[1]}),
    "an object": (Saved, lambda s: s.state),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_base_may_save_its_state_in_any_form(form: str) -> None:
    """Saved beside ours; both come back, from a file that only weights may be read from, too."""
    kind = type(
        "Kind", (Elsewhere,), {name: staticmethod(f) for name, f in zip(("form", "back"), FORMS[form], strict=True)}
    )
    net = make_net()
    optimizer = MultiObjectiveOptimizer(kind(net.parameters(), lr=0.1, momentum=0.9), "group-dro(0.5)")
    train(net, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=form != "an object")
    twin = copy.deepcopy(net)
    other = MultiObjectiveOptimizer(kind(twin.parameters(), lr=0.1, momentum=0.9), "group-dro(0.5)")
    other.load_state_dict(state)
    assert other.own_state() == optimizer.own_state()
    train(net, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert_equal_nets(net, twin)

    bare = kind(make_net().parameters(), lr=0.1, momentum=0.9)
    if isinstance(bare.state_dict(), dict):
        bare.load_state_dict(state)
        assert len(bare.state) == 4
    fresh = MultiObjectiveOptimizer(kind(make_net().parameters(), lr=0.1, momentum=0.9))
    fresh.load_state_dict(optimizer.base.state_dict())
    assert len(fresh.state) == 4
    assert fresh.objectives is None


@pytest.mark.parametrize("name", ["Lookahead", "Magma"])
def test_bases_around_bases_are_saved(name: str) -> None:
    net = make_net()
    optimizer = MultiObjectiveOptimizer(foreign(name)(adamw(net)), "group-dro(0.5)")
    train(net, optimizer, range(2))
    twin = copy.deepcopy(net)
    other = MultiObjectiveOptimizer(foreign(name)(adamw(twin)), "group-dro(0.5)")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.own_state() == optimizer.own_state()
    for one, its in ((net, optimizer), (twin, other)):
        torch.manual_seed(0)  # Magma leaves steps out at random
        train(one, its, range(2, 9))
    assert_equal_nets(net, twin)


def two_groups(net: nn.Module) -> torch.optim.AdamW:
    first, *others = net.parameters()
    return torch.optim.AdamW([{"params": [first]}, {"params": others, "lr": 0.02}], lr=0.01)


Side = Callable[[MultiObjectiveOptimizer], torch.optim.Optimizer]
WRAPPED: Side = lambda optimizer: optimizer  # noqa: E731
BARE: Side = lambda optimizer: optimizer.base  # noqa: E731


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(WRAPPED, WRAPPED), (WRAPPED, BARE), (BARE, BARE)],
    ids=["wrapper to wrapper", "wrapper to base", "base to base"],
)
def test_distributed_checkpoint_in_one_process(tmp_path: Path, flat: bool, saved: Side, loaded: Side) -> None:
    """torch.distributed.checkpoint brings back the weighting's state too, from wrapper to wrapper."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, twin = make_net(), make_net()
    optimizer = MultiObjectiveOptimizer(two_groups(net), "group-dro(0.5)")
    other = MultiObjectiveOptimizer(two_groups(twin), "group-dro(0.5)")
    train(net, optimizer, range(2))
    assert len(other.param_groups) == 2  # where its entries are made, which a checkpoint of a bare base lacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        model_state, optimizer_state = get_state_dict(net, saved(optimizer), options=options)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
        model_state, optimizer_state = get_state_dict(twin, loaded(other), options=options)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(twin, loaded(other), model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    assert_equal_nets(net, twin)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p], other.state[q], rtol=0, atol=0)
    if saved is loaded is WRAPPED:
        assert other.own_state() == optimizer.own_state()
        train(net, optimizer, range(2, 4))
        train(twin, other, range(2, 4))
        assert_equal_nets(net, twin)
    else:
        assert other.objectives is None


def test_what_else_the_base_can_do_is_reachable() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    net = make_net()
    optimizer = MultiObjectiveOptimizer(pytorch_optimizer.ScheduleFreeSGD(net.parameters(), lr=0.1))
    optimizer.train()
    train(net, optimizer, range(1))
    optimizer.eval()
    with pytest.raises(AttributeError, match="fly"):
        optimizer.fly()


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_accelerate_prepare(max_norm: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, twin = make_net(), make_net()
    optimizer = MultiObjectiveOptimizer(sgd(net))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    net, prepared, scheduler = accelerator.prepare(net, optimizer, scheduler)
    for seed in range(4):
        with accelerator.accumulate(net):
            optimizer.backward(losses_of(net, seed), backward=accelerator.backward)
            if accelerator.sync_gradients:
                optimizer.combine()
                accelerator.clip_grad_norm_(net.parameters(), max_norm)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
    reference = MultiObjectiveOptimizer(sgd(twin), max_grad_norm=max_norm)
    reference_scheduler = lr_scheduler.ExponentialLR(reference, 0.9)
    for step in range(2):
        for seed in (2 * step, 2 * step + 1):
            reference.backward(losses_of(twin, seed), backward=lambda loss: (loss / 2).backward())
        reference.step()
        reference_scheduler.step()
        reference.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
