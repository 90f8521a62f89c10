"""Two processes train as one does on the same global batches: under DDP, under FSDP2, and started by Accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("trl")


from mogeo.integrations.trl import MultiObjectiveDPOTrainer
from tests.distributed.engines import full
from tests.distributed.runner import run
from tests.integrations.test_trl import MIXED
from tests.integrations.tiny import make_pairs, make_trainer, parameters, with_labels

pytestmark = pytest.mark.slow

# "brief" has two pairs of twelve: most micro-batches, and one of the two ranks, do without it.
ROWS = with_labels(make_pairs(12), MIXED)
SETS = {name: [pair for pair, label in zip(make_pairs(12), MIXED[name], strict=True) if label] for name in MIXED}


@dataclass(frozen=True)
class Plan:
    """How to train: on batches of `size` pairs in all, taken apart into micro-batches and ranks.

    With `precomputed`, the reference is; rows are sets that the trainer merges, since TRL needs rows in a file then.
    """

    engine: str = "DDP"
    weighting: str = "mgda-decoupled"
    micro_batches: int = 1
    size: int = 12
    precomputed: bool = False

    def __str__(self) -> str:
        return ", ".join([self.engine, self.weighting, f"{self.micro_batches} × {self.size // self.micro_batches}"])


PLANS = [
    Plan(),
    Plan(weighting="uniform", micro_batches=2),
    Plan(weighting="group-dro(0.5)", micro_batches=6),
    Plan(size=4, micro_batches=2),  # steps that do without "brief"
    Plan(size=4, precomputed=True),
    Plan("FSDP2"),
    Plan("FSDP2", micro_batches=3),
    Plan("FSDP2", weighting="uniform", size=4, micro_batches=2),
]


def trained(plan: Plan, folder: Path, ranks: int) -> dict[str, Any]:
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        folder,
        SETS if plan.precomputed else ROWS,
        reference=not plan.precomputed,
        options={
            "precompute_ref_log_probs": plan.precomputed,
            "per_device_train_batch_size": plan.size // plan.micro_batches // ranks,
            "gradient_accumulation_steps": plan.micro_batches,
            "per_device_eval_batch_size": 6,
            "max_grad_norm": 0.5,
            "adam_epsilon": 1e-3,  # near 0, Adam makes a sign of what is rounding
        },
        objectives=[*MIXED],
        weighting=plan.weighting,
        eval_dataset=SETS if plan.precomputed else with_labels(make_pairs(12, seed=1), MIXED),
    )
    if ranks > 1 and plan.engine == "FSDP2":
        shard_on_cpu(trainer)
    trainer.train()
    if ranks > 1:
        assert isinstance(trainer.model_wrapped, FSDPModule if plan.engine == "FSDP2" else DistributedDataParallel)
    return {
        "parameters": {name: full(p).clone() for name, p in trainer.model.named_parameters()},
        "logged": [
            {n: v for n, v in entry.items() if n == "loss" or n.rpartition("/")[2] in MIXED}
            for entry in trainer.state.log_history
        ],
        "evaluated": {n: v for n, v in trainer.evaluate().items() if n == "eval_loss" or n.rpartition("/")[2] in MIXED},
    }


def shard_on_cpu(trainer: Any) -> None:
    """Accelerate takes FSDP for accelerators only, and ignores its plugin on CPUs. Its code runs there, though."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True
    trainer._fit_to_engine()


def on_a_rank(plans: list[Plan], folder: Path) -> list[Any]:
    """Results of the plans, and at the end those of a run as a whole, and resumed."""
    results: list[Any] = []
    for plan in plans:
        forget_accelerate()
        results.append(trained(plan, folder, ranks=2))
    return [*results, [saved_and_resumed(folder, checkpoint) for checkpoint in (None, str(folder / "checkpoint-2"))]]


def saved_and_resumed(folder: Path, checkpoint: str | None) -> Any:
    forget_accelerate()
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    trainer = make_trainer(
        MultiObjectiveDPOTrainer, folder, ROWS, options=options, objectives=[*MIXED], weighting="group-dro(0.5)"
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return parameters(trainer)


def forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """By rank and plan: in one run, because processes take longer to start than to train."""
    return run(2, on_a_rank, PLANS, tmp_path_factory.mktemp("ranks"))


def decided(logged: dict[str, float], expected: dict[str, float]) -> dict[str, float]:
    """Without accuracies whose margins are rounding: at the first step, policy and reference are one model."""
    margins = {name: abs(expected.get(name.replace("accuracies", "margins"), 1.0)) for name in logged}
    return {name: value for name, value in logged.items() if "accuracies" not in name or margins[name] > 1e-5}


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("number", range(len(PLANS)), ids=lambda number: str(PLANS[number]))
def test_two_processes_are_one(results: list[list[Any]], tmp_path: Path, number: int) -> None:
    expected = trained(PLANS[number], tmp_path, ranks=1)
    first, second = results[0][number], results[1][number]
    torch.testing.assert_close(first["parameters"], second["parameters"], rtol=0, atol=0)
    torch.testing.assert_close(first["parameters"], expected["parameters"], rtol=1e-4, atol=1e-5)
    assert first["logged"] == second["logged"]
    for mine, theirs in zip(first["logged"], expected["logged"], strict=True):
        assert decided(mine, theirs) == pytest.approx(decided(theirs, theirs), rel=1e-3, abs=1e-5)
    assert first["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-3, abs=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(results: list[list[Any]]) -> None:
    (whole, resumed), others = results[0][-1], results[1][-1]
    assert torch.equal(whole, resumed)
    assert all(torch.equal(whole, other) for other in others)
