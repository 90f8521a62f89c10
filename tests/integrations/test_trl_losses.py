"""The loss of an objective is what TRL makes of its pairs alone, for every loss type that TRL has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOTrainer

from mogeo.integrations.trl_losses import ScoredPairs
from tests.integrations.tiny import make_model, make_pairs, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

LABELS = [1, -1, 0, 1, -1, 0]
TYPES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"loss_types": [name]} for name in TYPES},
    "two types": {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    "length-desensitized": {"ld_alpha": 0.5},
    "WPO weights": {"use_weighting": True},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "alpha divergence": {"f_divergence_type": "alpha_divergence"},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a policy that has moved away from its reference, and outputs for WPO."""
    rows = Dataset.from_list(make_pairs(len(LABELS)))
    made = make_trainer(DPOTrainer, tmp_path_factory.mktemp("run"), rows, options={"use_weighting": True})
    made.model.load_state_dict(make_model(seed=1).state_dict())
    made.model.train()
    return made


def loss_and_gradient(trainer: Any, loss: Tensor) -> tuple[Tensor, Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_the_table_holds_every_type_that_trl_knows(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "loss_types", ["no such"])
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(ValueError, match="Should be one of") as error:
        trainer._compute_loss(trainer.model, batch, False)
    assert set(str(error.value).partition("one of")[2].replace("'", "").strip(" []").split(", ")) == set(TYPES)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_trls_loss_of_the_labelled_pairs(trainer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "use_weighting": False, "label_smoothing": 0.1}
    for setting, value in {**settings, **OPTIONS[name]}.items():
        monkeypatch.setattr(trainer, setting, value)
    rows = list(trainer.train_dataset)
    own = [
        row if label > 0 else {**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}
        for row, label in zip(rows, LABELS, strict=True)
        if label
    ]
    expected = loss_and_gradient(trainer, trainer._compute_loss(trainer.model, trainer.data_collator(own), False))
    metrics = {metric: values[-1] for metric, values in trainer._metrics["train"].items()}

    pairs = ScoredPairs(trainer, trainer._compute_loss, trainer.model, trainer.data_collator(rows))
    found = pairs.under(LABELS)
    torch.testing.assert_close(loss_and_gradient(trainer, found.loss), expected, rtol=1e-4, atol=1e-5)
    assert found.accuracy.item() == pytest.approx(metrics["rewards/accuracies"])
    assert found.margin.item() == pytest.approx(metrics["rewards/margins"], rel=1e-4)


def test_nothing_reaches_every_parameter_with_zeros(trainer: Any) -> None:
    batch = trainer.data_collator(list(trainer.train_dataset))
    pairs = ScoredPairs(trainer, trainer._compute_loss, trainer.model, batch)
    loss, gradient = loss_and_gradient(trainer, pairs.nothing())
    assert loss == 0
    assert gradient.numel() == sum(p.numel() for p in trainer.model.parameters())
    assert not gradient.any()
