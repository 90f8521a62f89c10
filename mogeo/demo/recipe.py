"""What the demo compares, and its sizes. Must not import torch: `mogeo demo --help` needs this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mogeo.dpo.config import AlignConfig

BEFORE = "before alignment"
"""The model that every method starts from."""

BASELINE = "uniform"
"""The usual method, which the others are compared with."""

PAPER = "mgda-decoupled"
"""The paper's method: weights from each step's mini-batch."""

TRACKED = "mgda-decoupled, tracked"
"""The same from mean gradients, tracked over the steps."""

GUARDED = "uniform, nobody hurt"
"""The weights of BASELINE, and the nearest direction that hurts no objective in expectation."""

DECAY = 0.95
"""Of averages over steps, see `AlignConfig.track`."""

REPORTED: dict[str, Any] = {"track": DECAY, "weigh_by": "mini-batch"}
"""What lets a method tell whom it hurts in expectation, and leaves its weights as they are."""

METHODS: dict[str, dict[str, Any]] = {
    BASELINE: {"weighting": "uniform", **REPORTED},
    PAPER: {"weighting": "mgda-decoupled", **REPORTED},
    TRACKED: {"weighting": "mgda-decoupled", "track": DECAY},
    GUARDED: {"weighting": "uniform", "guarantee_descent": True, "track": DECAY},
}
"""What is compared: label -> settings of the alignment."""


@dataclass(frozen=True)
class Recipe:
    """The sizes of the demo. Every method gets the same settings, and the same pairs in the same order.

    Attributes:
        train_prompts: prompts to learn from.
        held_out_prompts: prompts to judge on.
        samples_per_prompt: sampled answers to each of these, besides the greedy one.
        sft_steps: steps of supervised training, before alignment.
        sft_batch: answers in each of these steps.
        sft_learning_rate: their peak learning rate.
        pairing: how pairs are made of rated answers, see `mogeo.dpo.data.build_preferences`.
        align: settings of the alignment.
    """

    train_prompts: int = 1200
    held_out_prompts: int = 500
    samples_per_prompt: int = 2
    sft_steps: int = 500
    sft_batch: int = 64
    sft_learning_rate: float = 5e-3
    pairing: str = "all"
    align: AlignConfig = field(
        default_factory=lambda: AlignConfig(
            beta=0.2,
            learning_rate=1e-4,
            betas=(0.9, 0.95),
            schedule="constant",
            max_steps=100,
            pairs_per_objective=32,
            eval_every=25,
            autocast="none",  # bf16 would be slower for matrices of this size
            prompt_format="plain",
        )
    )
