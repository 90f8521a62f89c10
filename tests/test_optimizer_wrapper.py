"""The manners of torch.optim, each held against a real user of the protocol."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
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


def bases() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    def foreign(package: str, name: str) -> Callable[..., torch.optim.Optimizer]:
        optimizer: Callable[..., torch.optim.Optimizer] = getattr(pytest.importorskip(package), name)
        return optimizer

    return {
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        "Lion": lambda p: foreign("lion_pytorch", "Lion")(p, lr=0.001, weight_decay=0.1),
        "AdaBelief": lambda p: foreign("pytorch_optimizer", "AdaBelief")(p, lr=0.01),
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
