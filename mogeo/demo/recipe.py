"""What the demo compares, and its sizes. Must not import torch: the command's --help needs this."""

from __future__ import annotations

from dataclasses import dataclass, field

from mogeo.dpo.config import AlignConfig

BEFORE = "before alignment"
BASELINE = "uniform"
ADAPTIVE = "mgda-decoupled"
STATIC = "static"  # fixed at the means of ADAPTIVE's weights: shows what adapting them at every step adds


@dataclass(frozen=True)
class Recipe:
    """The sizes of the demo. Every method gets the same settings, and the same pairs in the same order."""

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
