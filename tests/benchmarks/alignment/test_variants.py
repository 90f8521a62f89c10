"""The study's own loop against `align`, and its weightings against what they stand for."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from alignment import variants
from alignment.explain import Measured, explain

from mogeo.demo.world import OBJECTIVES, World, tiny_model, tokenizer
from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import build_preferences, split_rows
from mogeo.dpo.train import align
from tests.profiles import slow_but

CONFIG = AlignConfig(
    weighting="uniform", learning_rate=1e-3, max_steps=4, warmup_steps=1, pairs_per_objective=3, beta=0.2,
    autocast="none", eval_every=0, save_every=0, prompt_format="plain",
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    train, held_out = split_rows(World(0).rows(24), 4, 0)
    words = tokenizer()
    return [build_preferences(rows, OBJECTIVES, "all") for rows in (train, held_out)], words, tiny_model(words)


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("weighting", ["uniform", "mgda-decoupled"])
def test_without_any_variant_the_loop_is_aligns(world, weighting):
    (train, held_out), words, start = world
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    history = variants.train(ours, words, (train, train), CONFIG, weighting)
    result = align(theirs, words, train, held_out, replace(CONFIG, weighting=Measured(weighting)), progress=False)
    # AdamW divides by the gradient's own size, so that rounding counts for more in its first steps.
    torch.testing.assert_close(parameters_of(ours), parameters_of(theirs), rtol=0, atol=2e-5)
    for mine, other in zip(
        explain(history, OBJECTIVES)["weights"], explain(result.history, OBJECTIVES)["weights"], strict=True
    ):
        assert mine == pytest.approx(other, abs=2e-4)


@pytest.mark.parametrize(
    "name", slow_but(["gram of 2", "apart", "smoothed(0.5)", "smoothed gram(0.5)", "loss+", "loss^2"], "apart", "loss+")
)
def test_a_variant_moves_the_weights_and_leaves_the_pairs(world, name):
    (train, _), words, start = world
    model = copy.deepcopy(start)
    history = variants.train(model, words, (train, train), CONFIG, name)
    plain = variants.train(copy.deepcopy(start), words, (train, train), CONFIG, "mgda-decoupled")
    assert history[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-6)  # the same pairs of the same model
    different = [a["weight"] != pytest.approx(b["weight"], abs=1e-6) for a, b in zip(history, plain, strict=True)]
    # Averages begin with their first value, and losses that are equal cannot tell powers apart.
    begins_alike = name.startswith("smoothed") or name == "loss^2"
    assert different[0] is not begins_alike
    assert any(different)


def test_smoothed_weights_are_the_exponential_average():
    given = iter([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])])
    smoothed = variants.Smoothed(lambda gram, losses: next(given), 0.75)
    seen = [smoothed(torch.eye(2), torch.ones(2)).tolist() for _ in range(3)]
    assert seen == [[1.0, 0.0], [0.75, 0.25], [0.5625, 0.4375]]


def test_descent_hurts_nobody_and_changes_nothing_where_nobody_is_hurt():
    generator = torch.Generator().manual_seed(0)
    repaired = 0
    for _ in range(200):
        rows = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        gram, losses = rows @ rows.T, torch.rand(4, generator=generator, dtype=torch.float64) + 0.1
        plain = variants.resolve("mgda-decoupled")(gram, losses)
        ours = variants.Descent("mgda-decoupled")(gram, losses)
        assert (gram @ ours).min() > -1e-9
        if (gram @ plain).min() >= 0:
            torch.testing.assert_close(gram @ ours, gram @ plain, rtol=0, atol=1e-9)
        else:
            repaired += 1
    assert repaired > 5
