"""Accelerate on two processes trains as one process does, wherever mogeo wraps and whichever backwards are synced."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mogeo import MultiObjectiveOptimizer
from tests.distributed.engines import NAMES, batches, full, loss_of, make_net, share_of
from tests.distributed.runner import run
from tests.profiles import slow_but

STEPS, MICRO_BATCHES = 3, 2
MAX_NORM = 0.3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        wrapped: "before" or "after" `accelerator.prepare`.
        micro_batches: what surrounds them: "accumulate", or which of the two are in "no_sync": "first", "both", "none".
        form: of the losses: "callables" are evaluated one at a time, "tensors" are K forwards before K backwards.
        clip: None, "max_grad_norm", or "clip_grad_norm_": Accelerate's, after `combine`.
        fsdp: with FSDP2 in place of DDP.
    """

    wrapped: str = "before"
    micro_batches: str = "accumulate"
    form: str = "callables"
    clip: str | None = None
    weighting: str = "mgda-decoupled"
    dtype: torch.dtype = torch.float64
    fsdp: bool = False

    def __str__(self) -> str:
        engine = "FSDP2" if self.fsdp else "DDP"
        return ", ".join([engine, *(str(value) for value in vars(self).values() if value and value is not True)])


PLANS = [
    *(Plan(wrapped, micro_batches) for wrapped in ("before", "after") for micro_batches in ("accumulate", "first")),
    *(Plan(micro_batches=micro_batches, form="tensors") for micro_batches in ("accumulate", "first", "both", "none")),
    Plan(micro_batches="both"),
    Plan("after", "none"),
    *(Plan(wrapped, clip=clip) for wrapped in ("before", "after") for clip in ("max_grad_norm", "clip_grad_norm_")),
    Plan(weighting="uniform", form="tensors", clip="max_grad_norm"),
    Plan(weighting="uniform", micro_batches="first"),
    Plan(weighting="group-dro(0.5)", form="tensors"),
    *(Plan(form=form, clip="clip_grad_norm_", dtype=torch.float32) for form in ("callables", "tensors")),
    *(Plan(wrapped, clip=clip, fsdp=True) for wrapped in ("before", "after") for clip in (None, "clip_grad_norm_")),
    Plan(form="tensors", clip="max_grad_norm", fsdp=True),
    Plan(weighting="uniform", form="tensors", fsdp=True),
    Plan(clip="max_grad_norm", dtype=torch.float32, fsdp=True),
]


class Plain:
    """What a loop asks of Accelerate, in one process without it: the reference."""

    sync_gradients, replicas, replica = True, 1, 0

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return net, optimizer

    def around(self, micro_batch: int) -> AbstractContextManager[None]:
        self.sync_gradients = micro_batch == MICRO_BATCHES - 1
        return nullcontext()

    def backward(self, loss: Tensor, **options: Any) -> None:
        (loss / MICRO_BATCHES).backward(**options)

    def clip(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


class Accelerated:
    """The same of an Accelerator.

    Args:
        plan: see there.
        sync_each_batch: reduce gradients after every micro-batch, as mogeo needs it from FSDP2.
    """

    def __init__(self, plan: Plan, sync_each_batch: bool) -> None:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import DistributedType, GradientAccumulationPlugin

        AcceleratorState._reset_state(True)  # singletons: what an accelerator before this one was made with
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        plugin = GradientAccumulationPlugin(num_steps=MICRO_BATCHES, sync_each_batch=sync_each_batch)
        if plan.fsdp:
            sharding = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
            self.accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin, fsdp_plugin=sharding)
            # Accelerate takes FSDP for accelerators only, and ignores the plugin on CPUs. Its code runs there, though.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = sharding
        else:
            self.accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        self.micro_batches = plan.micro_batches
        self.replicas, self.replica = self.accelerator.num_processes, self.accelerator.process_index
        self.backward = self.accelerator.backward

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        self.model, optimizer = self.accelerator.prepare(net, optimizer)
        assert self.replicas == 2
        assert isinstance(self.model, FSDPModule if self.accelerator.is_fsdp2 else DistributedDataParallel)
        return self.model, optimizer

    def around(self, micro_batch: int) -> AbstractContextManager[None]:
        if self.micro_batches == "accumulate":
            context: AbstractContextManager[None] = self.accelerator.accumulate(self.model)
            return context
        self.accelerator.sync_gradients = micro_batch == MICRO_BATCHES - 1
        unsynced = {"first": micro_batch == 0, "both": True, "none": False}[self.micro_batches]
        return self.accelerator.no_sync(self.model) if unsynced else nullcontext()

    @property
    def sync_gradients(self) -> bool:
        return bool(self.accelerator.sync_gradients)

    def clip(self, model: nn.Module) -> None:
        self.accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)


class Training:
    """A loop as Accelerate's guide writes it, with `optimizer.backward` in it."""

    def __init__(self, engine: Plain | Accelerated, plan: Plan) -> None:
        self.engine, self.plan = engine, plan
        net = make_net(plan.dtype)
        base = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        options = {"max_grad_norm": MAX_NORM if plan.clip == "max_grad_norm" else None}
        if plan.wrapped == "before":
            self.optimizer = MultiObjectiveOptimizer(base, plan.weighting, **options)
            self.model, self.stepping = engine.prepare(net, self.optimizer)
        else:
            self.model, prepared = engine.prepare(net, base)
            self.stepping = self.optimizer = MultiObjectiveOptimizer(prepared, plan.weighting, **options)

    def run(self, steps: range) -> dict[str, Any]:
        weights = []
        for step in steps:
            for micro_batch in range(MICRO_BATCHES):
                with self.engine.around(micro_batch):
                    self.micro_step(step * MICRO_BATCHES + micro_batch)
            assert self.optimizer.report is not None
            weights.append(self.optimizer.report.weights)
        return {
            "weights": torch.stack(weights),
            "losses": self.optimizer.report.losses,
            "parameters": {n.removeprefix("module."): full(p) for n, p in self.model.named_parameters()},
        }

    def micro_step(self, seed: int) -> None:
        data = {name: share_of(b, self.engine.replicas, self.engine.replica) for name, b in batches(seed).items()}
        terms: dict[str, Any] = {n: (lambda n=n, k=k: loss_of(self.model, data[n], k)) for k, n in enumerate(NAMES)}
        if self.plan.form == "tensors":
            terms = {name: term() for name, term in terms.items()}
        self.optimizer.backward(terms, backward=self.engine.backward)
        if self.engine.sync_gradients and self.plan.clip == "clip_grad_norm_":
            self.optimizer.combine()
            self.engine.clip(self.model)
        if self.engine.sync_gradients or isinstance(self.engine, Accelerated):  # which waits for the last by itself
            self.stepping.step()
            self.stepping.zero_grad()


def assert_same(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)  # bit for bit
    torch.testing.assert_close(results[0], expected, rtol=tolerance, atol=tolerance)


@lru_cache
def reference(plan: Plan) -> dict[str, Any]:
    return Training(Plain(), plan).run(range(STEPS))


@pytest.fixture(scope="module")
def results() -> list[dict[Plan, Any]]:
    """Of every plan, by rank: in one run, because processes take longer to start than to train."""
    return run(2, every_plan, PLANS)


def every_plan(plans: list[Plan]) -> dict[Plan, Any]:
    return {plan: Training(Accelerated(plan, sync_each_batch=plan.fsdp), plan).run(range(STEPS)) for plan in plans}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_two_processes_are_one_on_the_same_batches(results: list[dict[Plan, Any]], plan: Plan) -> None:
    assert_same([result[plan] for result in results], reference(plan), TOLERANCE[plan.dtype])


@pytest.mark.slow
def test_fsdp2_without_sync_each_batch_is_refused() -> None:
    """Accelerate then tells FSDP2 to keep gradients to itself, which has no place for one per objective."""
    for message in run(2, accumulating_unsynced):
        assert "set_requires_gradient_sync(False)" in message


def accumulating_unsynced() -> str:
    plan = Plan(fsdp=True)
    training = Training(Accelerated(plan, sync_each_batch=False), plan)
    with pytest.raises(ValueError, match="no loss reached a parameter") as error:
        training.run(range(1))
    return str(error.value)


SAVED_AFTER = 2


@pytest.mark.parametrize(
    ("wrapped", "fsdp"), slow_but([("before", False), ("after", False), ("before", True)], ("before", False))
)
def test_save_state_and_load_state(tmp_path: Path, wrapped: str, fsdp: bool) -> None:
    plan = Plan(wrapped, weighting="group-dro(0.5)", fsdp=fsdp)
    expected = reference(plan)
    results = run(2, saving_and_resuming, plan, tmp_path)
    assert_same(results, {**expected, "weights": expected["weights"][SAVED_AFTER:]}, 1e-12)


def saving_and_resuming(plan: Plan, folder: Path) -> dict[str, Any]:
    def training() -> Training:
        engine = Accelerated(plan, sync_each_batch=plan.fsdp)
        made = Training(engine, plan)
        if plan.wrapped == "after":  # what Accelerate has seen is the base only
            engine.accelerator.register_for_checkpointing(made.optimizer)
        return made

    first = training()
    first.run(range(SAVED_AFTER))
    first.engine.accelerator.save_state(str(folder))
    second = training()
    second.engine.accelerator.load_state(str(folder))
    assert second.optimizer.own_state() == first.optimizer.own_state()
    return second.run(range(SAVED_AFTER, STEPS))
