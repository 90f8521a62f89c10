"""The Trainer recipe of docs/guide.md, on a real transformers.Trainer: it trains, clips, and resumes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mogeo import MultiObjectiveOptimizer
from tests.tiny import tiny_llama

GUIDE = Path(__file__).parent.parent / "docs" / "guide.md"


def trainer_of_the_guide() -> type:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "from transformers" in b]
    names: dict[str, Any] = {}
    exec(block, names)
    trainer: type = names["MultiObjectiveTrainer"]
    return trainer


def make_model() -> Any:
    return tiny_llama(16, hidden_size=8, intermediate_size=16)


def losses_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = model(input_ids=inputs["input_ids"]).logits
    return {
        "low": -logits[..., :8].log_softmax(-1).mean(),
        "high": -logits[..., 8:].log_softmax(-1).mean(),
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_recipe_clips_and_resumes(tmp_path: Path, accumulation: int) -> None:
    from transformers import TrainingArguments

    kind = trainer_of_the_guide()
    data = [{"input_ids": torch.arange(i, i + 4) % 16} for i in range(24)]
    finals, reports = [], []
    for resume in (False, True):
        model = make_model()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = MultiObjectiveOptimizer(base)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e-4,
            logging_steps=1,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = kind(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.losses_of = losses_of
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        reports.append(optimizer.report)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert norms
        assert all(norm > 1e-4 for norm in norms)  # Trainer saw the direction before it clipped it
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(reports[0].weights, reports[1].weights)  # type: ignore[union-attr]
