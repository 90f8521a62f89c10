"""What the demo compares, and its sizes. Must not import torch: `mogeo demo --help` needs this."""

from __future__ import annotations

from dataclasses import dataclass, field

from mogeo.dpo.config import AlignConfig

BEFORE = "before alignment"
"""The model that every method starts from."""

BASELINE = "uniform"
"""The usual method, which the others are compared with."""

ADAPTIVE = "mgda-decoupled"
"""The method that finds its weights anew at every step."""

STATIC = "static"
"""Weights fixed at the means of ADAPTIVE's: shows what it adds to adapt them at every step."""


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
        watch: how methods with fixed weights are tracked, see `AlignConfig.track`. It changes nothing in them but
            rounding, and tells whom their steps hurt in expectation.
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
    watch: float | None = 0.95
