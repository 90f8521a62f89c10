"""Settings: what is refused, and the learning rate over a run."""

import dataclasses
import inspect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogeo import MultiObjectiveOptimizer
from mogeo.dpo import config as module
from mogeo.dpo import losses
from mogeo.dpo.config import AlignConfig
from mogeo.errors import InputError
from tests.profiles import examples


def test_the_defaults_pass_and_the_loss_names_are_those_of_the_losses():
    AlignConfig().check()
    assert module.LOSSES == losses.LOSSES


@pytest.mark.parametrize(
    "bad",
    [
        {"beta": 0},
        {"beta": float("nan")},
        {"loss": "dpo"},
        {"label_smoothing": 0.5},
        {"modpo_weights": (0.5, 0.6)},
        {"modpo_weights": (1.0, 0.0)},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"betas": (0.9, 1.0)},
        {"weight_decay": -0.1},
        {"warmup_steps": -1},
        {"schedule": "step"},
        {"max_steps": 0},
        {"epochs": 0.0},
        {"pairs_per_objective": 0},
        {"micro_batch": 0},
        {"max_grad_norm": 0.0},
        {"eval_every": -1},
        {"save_every": -1},
        {"autocast": "fp16"},
        {"max_length": 1},
        {"prompt_format": "raw"},
        {"preference": {"honesty": 0.0}},
        {"min_weight": -0.1},
        {"smoothing": 1.0},
        {"refresh_every": 0},
        {"row_dtype": "int8"},
        {"sketch": 0},
    ],
)
def test_a_bad_setting_is_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        dataclasses.replace(AlignConfig(), **bad).check()


def test_label_smoothing_belongs_to_the_sigmoid_loss():
    AlignConfig(label_smoothing=0.1).check()
    with pytest.raises(InputError, match="not for loss 'ipo'"):
        AlignConfig(label_smoothing=0.1, loss="ipo").check()


@pytest.mark.parametrize("rows", [{"row_dtype": "bf16"}, {"host_rows": True}])
def test_a_sketch_has_no_rows_to_say_anything_about(rows):
    AlignConfig(**rows).check()
    with pytest.raises(InputError, match=f"sketch keeps no gradient rows, and {next(iter(rows))}"):
        AlignConfig(sketch=64, **rows).check()


def test_the_optimizer_takes_its_settings_under_their_names_and_with_their_defaults():
    keywords = inspect.signature(MultiObjectiveOptimizer).parameters
    for name in module.OPTIMIZER_OPTIONS:
        assert getattr(AlignConfig(), name) == keywords[name].default


def test_one_objective_has_nothing_to_balance():
    balancing = {
        "weighting": "mgda", "guarantee_descent": True, "preference": {"a": 1.0, "b": 2.0}, "min_weight": 0.1,
        "smoothing": 0.5, "refresh_every": 2, "release_rows": True, "row_dtype": "bf16", "host_rows": True, "sketch": 9,
    }  # fmt: skip
    assert set(balancing) == {"weighting", *module.OPTIMIZER_OPTIONS}
    assert AlignConfig(beta=0.3, **balancing).of_one_objective() == AlignConfig(beta=0.3, weighting="uniform")


@pytest.mark.parametrize("other", [{"loss": "ipo"}, {"label_smoothing": 0.1}])
def test_modpo_belongs_to_the_sigmoid_loss(other):
    AlignConfig(modpo_weights=(0.25, 0.75)).check()
    with pytest.raises(InputError, match="MODPO is defined for the sigmoid loss"):
        AlignConfig(modpo_weights=(0.25, 0.75), **other).check()


@given(st.integers(1, 60), st.integers(0, 80), st.sampled_from(module.SCHEDULES))
@examples(80)
def test_the_learning_rate_rises_to_its_peak_then_never_rises_and_every_step_counts(steps, warmup, schedule):
    config = AlignConfig(learning_rate=2.0, warmup_steps=warmup, schedule=schedule)
    rates = [config.learning_rate_at(step, steps) for step in range(1, steps + 1)]
    rising, rest = rates[:warmup], rates[warmup:]
    assert rising == pytest.approx([2.0 * step / warmup for step in range(1, len(rising) + 1)])
    assert all(0 < rate <= 2.0 for rate in rest)
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(rest))
    if rest and schedule == "linear":
        assert rest[-1] == pytest.approx(2.0 / (steps + 1 - warmup))


def test_steps_are_given_or_follow_from_epochs_over_the_largest_objective():
    assert AlignConfig(max_steps=7).steps(1000) == 7
    assert AlignConfig(epochs=1.0, pairs_per_objective=8).steps(100) == 13
    assert AlignConfig(epochs=2.5, pairs_per_objective=10).steps(100) == 25
