"""Settings: what is refused, and the learning rate over a run."""

import argparse
import dataclasses
import inspect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogeo import MultiObjectiveOptimizer
from mogeo.dpo.config import OPTIMIZER_OPTIONS, SCHEDULES, AlignConfig, decay_or_auto
from mogeo.errors import InputError
from tests.profiles import examples


def test_the_defaults_pass():
    AlignConfig().check()


@pytest.mark.parametrize(
    "bad",
    [
        {"beta": 0},
        {"beta": float("nan")},
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
        {"eval_every": -1},
        {"save_every": -1},
        {"autocast": "fp16"},
        {"max_length": 1},
        {"prompt_format": "raw"},
        {"row_dtype": "int8"},
        {"track": 0.5},
        {"track": 1.0},
        {"track": float("nan")},
        {"track": "often"},
        {"weigh_by": "batch"},
    ],
)
def test_a_bad_setting_is_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        dataclasses.replace(AlignConfig(), **bad).check()


def test_the_optimizer_takes_its_settings_under_their_names_and_with_their_defaults():
    keywords = inspect.signature(MultiObjectiveOptimizer).parameters
    for name in OPTIMIZER_OPTIONS:
        assert getattr(AlignConfig(), name) == keywords[name].default


def test_one_objective_has_nothing_to_balance():
    balancing = {
        "weighting": "mgda", "guarantee_descent": True, "preference": {"a": 1.0, "b": 2.0}, "min_weight": 0.1,
        "smoothing": 0.5, "refresh_every": 2, "row_dtype": "bf16", "host_rows": True, "sketch": 9, "track": 0.9,
        "weigh_by": "mini-batch",
    }  # fmt: skip
    assert set(balancing) == {"weighting", *OPTIMIZER_OPTIONS}
    config = AlignConfig(beta=0.3, loss="modpo", **balancing)
    assert config.of_one_objective() == AlignConfig(beta=0.3, weighting="uniform")


def test_settings_that_are_objects_are_written_as_their_repr():
    class Odd:
        def __repr__(self):
            return "odd(3)"

    written = AlignConfig(weighting=Odd(), loss=Odd(), betas=(0.8, 0.9)).to_dict()
    assert (written["weighting"], written["loss"], written["betas"]) == ("odd(3)", "odd(3)", [0.8, 0.9])
    assert set(written) == set(AlignConfig.__dataclass_fields__)


@given(st.floats(0.5, 1, exclude_min=True, exclude_max=True))
@examples(50)
def test_every_decay_can_be_typed_and_is_written_as_it_is(decay):
    assert decay_or_auto(repr(decay)) == decay
    for track in (decay, "auto", None):
        config = AlignConfig(track=track)
        config.check()
        assert config.to_dict()["track"] == track
    assert decay_or_auto("auto") == "auto"
    with pytest.raises(argparse.ArgumentTypeError, match="such as 0.95, or auto"):
        decay_or_auto(f"{decay} steps")


@given(st.integers(1, 60), st.integers(0, 80), st.sampled_from(SCHEDULES))
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
