"""Several bases in one wrapper: Muon for matrices and AdamW for the rest is the model for all of them."""

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
from torch import nn
from torch.optim import SGD, AdamW, Muon, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mogeo import MultiObjectiveOptimizer
from tests.test_optimizer_wrapper import SCHEDULERS, assert_equal_nets, losses_of, make_net, train


def muon_and_adamw(net: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    others = [p for p in net.parameters() if p.ndim != 2]
    return [Muon(matrices, lr=0.02), AdamW([{"params": others[:1]}, {"params": others[1:], "lr": 0.02}], lr=0.01)]


def make_optimizer(net: nn.Module, **options: Any) -> MultiObjectiveOptimizer:
    return MultiObjectiveOptimizer(muon_and_adamw(net), **options)


def test_a_step_is_each_bases_step_on_one_direction() -> None:
    """One Gram matrix over the parameters of all: the direction of one base over the whole model, to the last bit."""
    net, twin = make_net(), make_net()
    optimizer, bases = make_optimizer(net), muon_and_adamw(twin)
    whole = MultiObjectiveOptimizer(SGD([p for base in bases for g in base.param_groups for p in g["params"]], lr=0.1))
    for seed in range(4):
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, seed))
        optimizer.step()
        whole.zero_grad()
        whole.backward(losses_of(twin, seed))
        whole.combine()
        for base in bases:
            base.step()
        torch.testing.assert_close(optimizer.report.weights, whole.report.weights, rtol=0, atol=0)  # type: ignore[union-attr]
    assert_equal_nets(net, twin)


def test_groups_state_and_defaults_are_the_bases_own() -> None:
    net = make_net()
    optimizer = make_optimizer(net)
    muon, adamw = optimizer.base.bases
    train(net, optimizer, range(1))
    expected = [*muon.param_groups, *adamw.param_groups]
    assert all(a is b for a, b in zip(optimizer.param_groups, expected, strict=True))
    assert len(optimizer.state) == len(list(optimizer.state)) == 4
    first, bias = net[0].weight, net[0].bias
    assert optimizer.state[first] is muon.state[first]
    assert optimizer.state[bias] is adamw.state[bias]
    assert dict(optimizer.state.items())[bias] is adamw.state[bias]
    assert bias in optimizer.state
    del optimizer.state[bias]
    assert bias not in adamw.state
    assert optimizer.state.get(bias) is None
    assert bias not in optimizer.state
    optimizer.state[bias] = {"step": torch.zeros(())}
    assert adamw.state[bias] == {"step": torch.zeros(())}
    optimizer.state = {first: {"momentum_buffer": torch.ones_like(first)}}
    assert len(adamw.state) == 0
    assert list(muon.state) == [first]
    with pytest.raises(KeyError):
        optimizer.state[nn.Parameter(torch.ones(1))] = {}
    assert {"lr", "weight_decay"} <= optimizer.defaults.keys()
    assert "betas" not in optimizer.defaults
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    assert optimizer.param_groups[0] is muon.param_groups[0] is not expected[0]
    assert "Muon" in repr(optimizer)
    assert "AdamW" in repr(optimizer)


@pytest.mark.parametrize("on", ["wrapper", "each base"])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "OneCycleLR"])
def test_schedulers(name: str, on: str) -> None:
    """As on bare bases, be there one scheduler on the wrapper or one on each base."""
    net, twin = make_net(), make_net()
    optimizer, bare = make_optimizer(net), muon_and_adamw(twin)
    here = [optimizer] if on == "wrapper" else optimizer.base.bases
    schedulers, references = [SCHEDULERS[name](o) for o in here], [SCHEDULERS[name](o) for o in bare]
    for seed in range(4):
        train(net, optimizer, range(seed, seed + 1))
        twin(torch.ones(1, 4)).sum().backward()
        for base in bare:
            base.step()
        for scheduler in (*schedulers, *references):
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        rates = [group["lr"] for base in bare for group in base.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == rates


def test_momentum_is_cycled_only_if_every_base_has_it() -> None:
    """Muon has a momentum and AdamW betas: one name does not do for both."""
    net = make_net()
    with pytest.raises(ValueError, match="optimizer must support momentum or beta1"):
        lr_scheduler.OneCycleLR(make_optimizer(net), 0.1, total_steps=6)
    lr_scheduler.OneCycleLR(make_optimizer(net), 0.1, total_steps=6, cycle_momentum=False)
    first, *others = net.parameters()
    both = MultiObjectiveOptimizer([AdamW([first]), AdamW(others)])
    lr_scheduler.OneCycleLR(both, 0.1, total_steps=6)
    assert both.param_groups[0]["betas"] == both.param_groups[1]["betas"] == (0.95, 0.999)


def test_every_hook_fires_exactly_once() -> None:
    """Global ones as often as for the bases without a wrapper: once for each."""
    net = make_net()
    optimizer = make_optimizer(net)
    muon, adamw = optimizer.base.bases
    fired: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda one, *_: fired.append(f"{name} {type(one).__name__}")

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        *(one.register_step_pre_hook(note("pre")) for one in (optimizer, optimizer.base, muon, adamw)),
        *(one.register_step_post_hook(note("post")) for one in (optimizer, optimizer.base, muon, adamw)),
        *(one.register_state_dict_pre_hook(note("save")) for one in (optimizer, optimizer.base, muon, adamw)),
        *(one.register_load_state_dict_post_hook(note("loaded")) for one in (optimizer, optimizer.base, muon, adamw)),
    ]
    try:
        train(net, optimizer, range(1))
        inner = ["global pre Muon", "pre Muon", "post Muon", "global post Muon"]
        inner += [entry.replace("Muon", "AdamW") for entry in inner]
        outer = ["MultiObjectiveOptimizer", "SeveralBases"]
        assert fired == [*(f"pre {name}" for name in outer), *inner, *(f"post {name}" for name in reversed(outer))]
        fired.clear()
        optimizer.load_state_dict(optimizer.state_dict())
        assert fired == [
            *(f"save {name}" for name in [*outer, "Muon", "AdamW"]),
            *(f"loaded {name}" for name in ["Muon", "AdamW", *reversed(outer)]),
        ]
    finally:
        for handle in handles:
            handle.remove()


def test_a_closure_is_evaluated_once() -> None:
    net, twin = make_net(), make_net()
    optimizer, other = make_optimizer(net), make_optimizer(twin)
    values = iter([7.0])

    def closure() -> float:
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, 0))
        return next(values)

    assert optimizer.step(closure) == 7.0
    train(twin, other, range(1))
    assert_equal_nets(net, twin)


def test_grad_scaler() -> None:
    net, twin = make_net(), make_net()
    optimizer = make_optimizer(net, nonfinite="propagate")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses_of(net, seed), backward=lambda loss: scaler.scale(loss).backward())
        optimizer.combine()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(twin, make_optimizer(twin), range(3))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints and copies


@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_resumes_bit_identically(how: str) -> None:
    net = make_net()
    optimizer = make_optimizer(net, weighting="group-dro(0.5)")
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(net, optimizer, range(3))
    scheduler.step()
    if how == "deepcopy":
        other_net, other = copy.deepcopy((net, optimizer))
    elif how == "pickle":
        other_net, other = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        other_net = copy.deepcopy(net)
        other = make_optimizer(other_net, weighting="group-dro(0.5)")
        state = copy.deepcopy(optimizer.state_dict())
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other.load_state_dict(state)
    assert all(a is not b for a, b in zip(other.base.bases, optimizer.base.bases, strict=True))
    assert [type(base) for base in other.base.bases] == [Muon, AdamW]
    train(net, optimizer, range(3, 6))
    train(other_net, other, range(3, 6))
    assert_equal_nets(net, other_net)


def test_the_state_has_torchs_form_and_each_base_can_load_its_part() -> None:
    net = make_net()
    optimizer = make_optimizer(net)
    train(net, optimizer, range(1))
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2], [3]]
    assert list(state["state"]) == [0, 1, 2, 3]
    muon, adamw = muon_and_adamw(make_net())
    muon.load_state_dict({"state": {k: state["state"][k] for k in (0, 1)}, "param_groups": state["param_groups"][:1]})
    adamw.load_state_dict({"state": {k: state["state"][k] for k in (2, 3)}, "param_groups": state["param_groups"][1:]})
    for base in (muon, adamw):
        for group in base.param_groups:
            assert all(len(base.state[p]) > 0 for p in group["params"])


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_in_one_process(tmp_path: Path, flat: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, twin = make_net(), make_net()
    optimizer, other = (make_optimizer(one, weighting="group-dro(0.5)") for one in (net, twin))
    train(net, optimizer, range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
        model_state, optimizer_state = get_state_dict(twin, other, options=options)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(twin, other, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    assert other.own_state() == optimizer.own_state()
    train(net, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert_equal_nets(net, twin)


def other_order(net: nn.Module) -> list[torch.optim.Optimizer]:
    return muon_and_adamw(net)[::-1]


def other_kinds(net: nn.Module) -> list[torch.optim.Optimizer]:
    muon, adamw = muon_and_adamw(net)
    return [SGD(muon.param_groups[0]["params"], lr=0.1), adamw]


def fewer_parameters(net: nn.Module) -> list[torch.optim.Optimizer]:
    return muon_and_adamw(net[0])[:1]


@pytest.mark.parametrize(
    ("bases", "saved_as", "message"),
    [
        (other_kinds, "wrapper", r"saved for groups of \['Muon', 'AdamW', 'AdamW'\].*belong to \['SGD', 'AdamW'"),
        (other_order, "wrapper", r"saved for groups of \['Muon', 'AdamW', 'AdamW'\].*belong to \['AdamW', 'AdamW'"),
        (other_order, "bases", r"groups of \[2, 1, 1\] parameters.*AdamW with groups of \[1, 1\], Muon with"),
        (fewer_parameters, "bases", r"groups of \[2, 1, 1\] parameters.*Muon with groups of \[1\]"),
        (lambda net: AdamW(net.parameters()), "wrapper", r"belong to \['AdamW'\] here"),
    ],
)
def test_a_state_of_other_bases_is_refused_and_nothing_is_loaded(
    bases: Callable[[nn.Module], Any], saved_as: str, message: str
) -> None:
    net = make_net()
    optimizer = make_optimizer(net)
    train(net, optimizer, range(1))
    state = optimizer.state_dict() if saved_as == "wrapper" else optimizer.base.state_dict()
    other = MultiObjectiveOptimizer(bases(make_net()))
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert len(other.state) == 0


def test_bases_with_a_state_of_another_form() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

    def looking_ahead(net: nn.Module) -> MultiObjectiveOptimizer:
        muon, adamw = muon_and_adamw(net)
        return MultiObjectiveOptimizer([muon, pytorch_optimizer.Lookahead(adamw)], "group-dro")

    net, twin = make_net(), make_net()
    optimizer, other = looking_ahead(net), looking_ahead(twin)
    train(net, optimizer, range(2))
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(2, 8))
    train(twin, other, range(2, 8))
    assert_equal_nets(net, twin)
    with pytest.raises(ValueError, match="state of 1 bases was saved, and there are 2 here"):
        other.base.load_state_dict({"bases": [{}]})


class Counting(SGD):
    """Keeps something in its state that belongs to no parameter."""

    def step(self, closure: Any = None) -> Any:
        self.state["steps"] = self.state.get("steps", 0) + 1  # type: ignore[index, call-overload, operator]
        return super().step(closure)


def test_state_that_belongs_to_no_parameter_goes_back_to_its_base() -> None:
    net = make_net()
    first, *others = net.parameters()
    bases = [Counting([first], lr=0.1, momentum=0.9), Counting(others, lr=0.1)]
    bases[1].step()
    optimizer = MultiObjectiveOptimizer(bases)
    train(net, optimizer, range(2))
    twins = [Counting([first], lr=0.1, momentum=0.9), Counting(others, lr=0.1)]
    MultiObjectiveOptimizer(twins).load_state_dict(optimizer.state_dict())
    assert [twin.state["steps"] for twin in twins] == [2, 3]  # type: ignore[index, call-overload]


# --------------------------------------------------------------------------------------------------------------------
# Groups that are added; what is refused


def test_a_group_is_added_to_one_of_the_bases() -> None:
    net = make_net()
    extra = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(net)
    with pytest.raises(ValueError, match=r"bases\[0\] \(Muon\) or bases\[1\] \(AdamW\): optimizer.base.bases\[0\].add"):
        optimizer.add_param_group({"params": [extra]})
    optimizer.base.bases[1].add_param_group({"params": [extra]})
    losses = losses_of(net, 0)
    optimizer.backward({"left": lambda: losses["left"]() + extra.square().sum(), "right": losses["right"]})
    optimizer.step()
    assert optimizer.param_groups[-1]["params"] == [extra]
    assert not torch.equal(extra, torch.ones(3))
    optimizer.base.bases[0].add_param_group({"params": [net[0].weight.detach().requires_grad_()]})
    optimizer.base.bases[1].add_param_group({"params": [net[0].weight]})
    with pytest.raises(ValueError, match=r"shape \(6, 4\) is in two bases, Muon \(bases\[0\]\) and AdamW"):
        optimizer.backward(losses_of(net, 0))


def test_lists_that_cannot_be_a_base() -> None:
    net = make_net()
    muon, adamw = muon_and_adamw(net)
    with pytest.raises(ValueError, match="base is empty: pass at least one"):
        MultiObjectiveOptimizer([])
    with pytest.raises(TypeError, match=r"base\[0\] is a Parameter: pass torch.optim.Optimizers"):
        MultiObjectiveOptimizer(list(net.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS cannot be wrapped"):
        MultiObjectiveOptimizer([adamw, torch.optim.LBFGS(muon.param_groups[0]["params"])])
    with pytest.raises(TypeError, match="MultiObjectiveOptimizer already"):
        MultiObjectiveOptimizer([muon, MultiObjectiveOptimizer(adamw)])
    with pytest.raises(ValueError, match=r"shape \(6,\) is in two bases, AdamW \(bases\[1\]\) and SGD \(bases\[2\]\)"):
        MultiObjectiveOptimizer([muon, adamw, SGD([net[0].bias], lr=0.1)])


def test_what_one_base_can_do_is_asked_of_it() -> None:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    first, *others = make_net().parameters()
    optimizer = MultiObjectiveOptimizer([Muon([first]), pytorch_optimizer.ScheduleFreeSGD(others, lr=0.1)])
    with pytest.raises(AttributeError, match=r"no attribute 'train': ask the base.*optimizer.base.bases\[1\].train"):
        optimizer.train()
    with pytest.raises(AttributeError, match="no attribute 'fly'$"):
        optimizer.fly()


# --------------------------------------------------------------------------------------------------------------------
# Accelerate


@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_accelerate(wrapped: str) -> None:
    """Wrapped before `prepare` or after it, micro-batches accumulate and the last one steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, twin = make_net(), make_net()
    if wrapped == "before":
        optimizer = make_optimizer(net)
        model, prepared = accelerator.prepare(net, optimizer)
    else:
        model, *bases = accelerator.prepare(net, *muon_and_adamw(net))
        optimizer = prepared = MultiObjectiveOptimizer(bases)
    reference = make_optimizer(twin)
    for step in range(3):
        for seed in (2 * step, 2 * step + 1):
            with accelerator.accumulate(model):
                optimizer.backward(losses_of(net, seed), backward=accelerator.backward)
                prepared.step()
                prepared.zero_grad()
            reference.backward(losses_of(twin, seed), backward=lambda loss: (loss / 2).backward())
        reference.step()
        reference.zero_grad()
    assert_equal_nets(net, twin)
    make_optimizer(twin).load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(reference.state_dict())


def test_a_checkpoint_of_one_base_is_not_taken_for_several_of_other_kinds() -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))

    def stepped(base: Any) -> MultiObjectiveOptimizer:
        optimizer = MultiObjectiveOptimizer(base, "mgda")
        optimizer.backward([(p * q).sum(), (p + q).square().sum()])
        optimizer.step()
        return optimizer

    saved = stepped(torch.optim.Adam([{"params": [p]}, {"params": [q]}])).state_dict()
    others = stepped([torch.optim.Adam([p]), torch.optim.SGD([q], lr=0.1, momentum=0.9)])
    with pytest.raises(ValueError, match="make the same bases"):
        others.load_state_dict(saved)
    stepped([torch.optim.Adam([p]), torch.optim.Adam([q])]).load_state_dict(saved)
    stepped(torch.optim.AdamW([{"params": [p]}, {"params": [q]}])).load_state_dict(saved)  # torch's own rules
