"""Saved on one topology, resumed on another: training goes on as if nothing had happened."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mogeo import MultiObjectiveOptimizer
from tests.distributed.engines import NAMES, Net, Spread, alone, batches, ddp, fsdp, full, loss_of, make_net, share_of
from tests.distributed.runner import run

TOPOLOGIES: dict[str, tuple[int, Callable[[Net], Spread]]] = {
    "1 process": (1, alone),
    "2, DDP": (2, ddp),
    "2, FSDP": (2, fsdp),
    "3, FSDP": (3, fsdp),
}
MOVES = {  # target: sources
    "1 process": ("2, DDP", "3, FSDP"),
    "2, DDP": ("1 process", "3, FSDP"),
    "2, FSDP": ("2, DDP", "3, FSDP"),
    "3, FSDP": ("1 process", "2, FSDP"),
}
SAVED: dict[str, dict[str, bool]] = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "full and flattened": {"full_state_dict": True, "cpu_offload": True, "flatten_optimizer_state_dict": True},
}
# How: (form it was saved in, options to load it with). flatten_optimizer_state_dict is left out where a full state is
# loaded: together they are a KeyError in torch, for any optimizer, and a flattened state is recognised without.
LOADED: dict[str, tuple[str, dict[str, bool]]] = {
    "sharded": ("sharded", {}),
    "flattened": ("flattened", {"flatten_optimizer_state_dict": True}),
    "full": ("full", {"full_state_dict": True}),
    "full and flattened": ("full and flattened", {"full_state_dict": True}),
    "broadcast": ("full", {"full_state_dict": True, "broadcast_from_rank0": True}),
}
SAVED_AFTER, STEPS = 2, 4


class Training:
    """A model spread over ranks, two groups of parameters, a loss that is once not finite, and group-dro's weights.

    The groups belong to one AdamW, or to an SGD with momentum and an AdamW.
    """

    def __init__(
        self,
        engine: Callable[[Net], Spread],
        weighting: str = "group-dro(0.5)",
        several: bool = False,
        **options: Any,
    ) -> None:
        self.model, self.replicas, self.replica = engine(make_net(torch.float64))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1, "lr": 2e-2},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        base: Any = torch.optim.AdamW(groups, lr=1e-2)
        if several:
            base = [torch.optim.SGD(groups[:1], momentum=0.9), torch.optim.AdamW(groups[1:], lr=1e-2)]
        self.optimizer = MultiObjectiveOptimizer(base, weighting, max_grad_norm=0.7, **options)

    def run(self, steps: range) -> dict[str, Any]:
        """Train; what the steps left behind."""
        weights = []
        for step in steps:
            data = {name: share_of(batch, self.replicas, self.replica) for name, batch in batches(step).items()}
            self.optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "left objective 'truth' out")
                self.optimizer.backward({name: self.loss(step, name, data[name]) for name in NAMES})
                self.optimizer.step()
            assert self.optimizer.report is not None
            weights.append(self.optimizer.report.weights)
        return {
            "weights": torch.stack(weights),
            "parameters": {n.removeprefix("module."): full(p) for n, p in self.model.named_parameters()},
            "state": {
                n.removeprefix("module."): {key: full(value) for key, value in self.optimizer.state[p].items()}
                for n, p in self.model.named_parameters()
                if p.requires_grad
            },
            "own": self.optimizer.own_state(),
        }

    def loss(self, step: int, name: str, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
        factor = torch.nan if (step, name) == (1, "truth") else 1.0
        return lambda: loss_of(self.model, tokens, NAMES.index(name)) * factor

    def get(self, **options: bool) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions(**options))
        return {"model": model, "optimizer": optimizer}

    def set(self, state: dict[str, Any], **options: bool) -> None:
        # Not set_state_dict: it takes an empty model state, as ranks that receive a broadcast have, for "no model".
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(**options))
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=StateDictOptions(**options))


def save(training: Training, folder: Path) -> None:
    """In every form, below `folder`: full ones in a file of torch.save, written by the first rank."""
    for form, options in SAVED.items():
        state = training.get(**options)
        if "full_state_dict" not in options:
            dcp.save(state, checkpoint_id=folder / form)
        elif dist.get_rank() == 0:  # the others got nothing
            torch.save(state, folder / form)


def load(training: Training, folder: Path, how: str) -> None:
    form, options = LOADED[how]
    if "full_state_dict" not in options:
        state = training.get(**options)
        dcp.load(state, checkpoint_id=folder / form)
    elif "broadcast_from_rank0" in options and dist.get_rank() > 0:
        state = {"model": {}, "optimizer": {}}
    else:
        state = torch.load(folder / form, weights_only=True)
    training.set(state, **options)


def saving(engine: Any, folder: Path, several: bool = False) -> None:
    training = Training(engine, several=several)
    training.run(range(SAVED_AFTER))
    save(training, folder)


def resuming(engine: Any, folders: dict[str, Path], several: bool = False) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for source, folder in folders.items():
        results[source] = {}
        for how in LOADED:
            training = Training(engine, several=several)
            load(training, folder, how)
            results[source][how] = training.run(range(SAVED_AFTER, STEPS))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints of every topology."""
    made = {}
    for topology, (ranks, engine) in TOPOLOGIES.items():
        made[topology] = tmp_path_factory.mktemp("saved")
        run(ranks, saving, engine, made[topology])
    return made


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return Training(alone).run(range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("target", TOPOLOGIES)
def test_resumes_from_other_topologies_in_every_form(
    folders: dict[str, Path], uninterrupted: dict[str, Any], target: str
) -> None:
    assert uninterrupted["own"]["nonfinite_counts"] == [0, 0, 1]
    ranks, engine = TOPOLOGIES[target]
    results = run(ranks, resuming, engine, {source: folders[source] for source in MOVES[target]})
    for source in MOVES[target]:
        for how in LOADED:
            first, *others = [result[source][how] for result in results]
            assert_resumed(first, uninterrupted)
            for other in others:
                assert torch.equal(other["weights"], first["weights"])
                assert other["own"] == first["own"]
                torch.testing.assert_close(other["parameters"], first["parameters"], rtol=0, atol=0)
                torch.testing.assert_close(other["state"], first["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_several_bases_resume_from_another_topology_in_every_form(tmp_path: Path) -> None:
    run(2, saving, ddp, tmp_path, True)
    expected = Training(alone, several=True).run(range(STEPS))
    for result in run(2, resuming, fsdp, {"2, DDP": tmp_path}, True):
        for how in LOADED:
            assert_resumed(result["2, DDP"][how], expected)


def assert_resumed(result: dict[str, Any], expected: dict[str, Any]) -> None:
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(result["weights"], expected["weights"][SAVED_AFTER:], **close)
    torch.testing.assert_close(result["parameters"], expected["parameters"], **close)
    torch.testing.assert_close(result["state"], expected["state"], **close)
    torch.testing.assert_close(result["own"]["weighting"], expected["own"]["weighting"], **close)
    for key in ("objectives", "nonfinite_counts", "weighting_kind"):
        assert result["own"][key] == expected["own"][key]
