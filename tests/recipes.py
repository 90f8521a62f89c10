"""The demo's recipe, and one small enough for tests: it runs through every stage and teaches nothing."""

from __future__ import annotations

from dataclasses import replace

from mogeo.demo.recipe import Recipe

FULL = Recipe()
SMALL = replace(
    FULL,
    train_prompts=40,
    held_out_prompts=20,
    sft_steps=12,
    sft_batch=16,
    align=replace(FULL.align, max_steps=4, pairs_per_objective=4, eval_every=2, learning_rate=1e-3),
)
