"""What `mogeo.integrations` leans on in TRL and Transformers, one by one: a version that breaks it fails here first.

Each test says in its name what has changed if it fails.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

pytest.importorskip("trl")

import trl
from datasets import Dataset
from trl import DPOTrainer

from mogeo.integrations.trl import MultiObjectiveDPOTrainer
from mogeo.integrations.trl_losses import ScoredPairs
from tests.integrations.tiny import NAMES, agreeing, make_pairs, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:trl"),
]


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_is_one_of_those_tested() -> None:
    assert Version("1.15") <= Version(trl.__version__) < Version("1.17")


def test_compute_loss_has_its_arguments() -> None:
    assert names(DPOTrainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]


def test_compute_ref_log_probs_has_its_arguments() -> None:
    assert names(DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]


def test_prepare_dataset_has_its_arguments() -> None:
    assert names(DPOTrainer._prepare_dataset) == ["self", "dataset", "processing_class", "args", "dataset_name"]


def test_transformers_has_the_steps_that_are_overridden() -> None:
    assert names(transformers.Trainer.get_batch_samples) == ["self", "epoch_iterator", "num_batches", "device"]
    assert names(DPOTrainer.training_step) == ["self", "args", "kwargs"]
    assert names(transformers.Trainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert "metric_key_prefix" in names(transformers.Trainer.evaluation_loop)
    assert names(transformers.Trainer._get_train_sampler) == ["self", "train_dataset"]
    assert names(transformers.Trainer.create_optimizer) == ["self", "model"]
    assert "current_gradient_accumulation_steps" in inspect.getsource(transformers.Trainer.training_step)


def test_training_step_still_does_no_more_than_we_do_in_its_place() -> None:
    """TRL's only adds activation offloading, which is refused."""
    body = "with self.maybe_activation_offload_context: return super().training_step(*args, **kwargs)"
    source = " ".join(inspect.getsource(DPOTrainer.training_step).split())
    assert source == f"def training_step(self, *args, **kwargs): {body}"


class Spy(dict[str, Any]):
    """Inputs that remember what was asked of them."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def scored(tmp_path: Path, **options: Any) -> tuple[Any, dict[str, Any], list[Any]]:
    """A trainer, a batch for it, and a list that grows with each output its model gives."""
    trainer = make_trainer(DPOTrainer, tmp_path, Dataset.from_list(make_pairs(4)), options=options)
    (batch,) = trainer.get_train_dataloader()
    outputs: list[Any] = []
    return trainer, batch, outputs


def test_compute_loss_calls_the_model_once_and_then_reads_the_reference_from_its_inputs(tmp_path: Path) -> None:
    trainer, batch, _ = scored(tmp_path)
    expected = trainer._compute_loss(trainer.model, batch, False)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    trainer.ref_model, trainer.precompute_ref_logps = None, True
    inputs, calls = Spy(batch), 0

    def model(**options: Any) -> Any:
        nonlocal calls
        calls += 1
        assert not {"ref_chosen_logps", "ref_rejected_logps"} & inputs.read
        dict.update(inputs, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
        return trainer.model(**options)

    assert torch.equal(trainer._compute_loss(model, inputs, False), expected)
    assert calls == 1
    assert inputs.read <= {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


def test_compute_loss_reads_log_probabilities_and_what_is_logged_from_the_output(tmp_path: Path) -> None:
    trainer, batch, _ = scored(tmp_path, use_weighting=True)
    read = set()

    class Output:
        def __init__(self, values: Any) -> None:
            self.values = values

        def __getattr__(self, name: str) -> Any:
            read.add(name)
            return getattr(self.values, name)

    trainer._compute_loss(lambda **options: Output(trainer.model(**options)), batch, False)
    assert read == {"log_probs", "log_sum_sq_probs", "entropy", "mean_logits", "is_top1"}


def test_metrics_of_pairs_have_their_names_and_are_gathered(tmp_path: Path) -> None:
    """A second reading gathers nothing, takes no number off the device, and leaves what is logged alone."""
    trainer, batch, _ = scored(tmp_path)
    trainer.model.train()
    pairs = ScoredPairs(trainer, trainer._compute_loss, trainer.model, batch)
    before = {name: list(values) for name, values in trainer._metrics["train"].items()}
    tokens = trainer._total_train_tokens
    read: list[torch.Tensor] = []
    item = torch.Tensor.item

    def spied(tensor: torch.Tensor) -> Any:
        read.append(tensor)
        return item(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", spied)
        found = pairs.under([1, 1, 1, 1])
    assert all(value.numel() == 1 and item(value) == 0 for value in read)  # the stand-in's own zeros, on the host
    assert isinstance(found.accuracy, torch.Tensor)
    assert found.accuracy.item() == before["rewards/accuracies"][0]
    assert found.margin.item() == before["rewards/margins"][0]
    assert dict(trainer._metrics["train"]) == before
    assert trainer._total_train_tokens == tokens


def test_columns_are_kept_by_name(tmp_path: Path) -> None:
    trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, agreeing(4, NAMES), objectives=NAMES)
    (batch,) = trainer.get_train_dataloader()
    assert batch["objective_labels"] == [[1] * 4] * 4
    assert trainer._is_vision_dataset is False
