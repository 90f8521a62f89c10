"""HeldWeights: when a step solves, and with which weights the others go on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from mogeo.decide.refresh import HeldWeights


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ALL = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_nth_step_solves(every: int) -> None:
    held = HeldWeights(every)
    solved = []
    for _ in range(2 * every + 1):
        solved.append(held.known() is None)
        if solved[-1]:
            held.solved(weights(1, 2, 3), ALL)
        else:
            held.used()
    assert solved == ([True] + [False] * (every - 1)) * 2 + [True]


def test_who_took_no_part_keeps_its_weight_or_has_the_mean_of_the_others() -> None:
    held = HeldWeights(9)
    held.solved(weights(1, 0, 3), torch.tensor([True, False, True]))
    assert held.known() == (1, 2, 3)
    held.solved(weights(0, 5, 4), torch.tensor([False, True, True]))
    assert held.known() == (1, 5, 4)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_there_must_be_something_to_hold(value: float) -> None:
    held = HeldWeights(9)
    held.solved(weights(value, value, value), ALL)
    assert held.known() is None


def test_what_is_forgotten_is_solved_again() -> None:
    held = HeldWeights(9)
    held.solved(weights(1, 1, 1), ALL)
    held.used()
    held.forget()
    assert held.known() is None
    assert held.age == 0


def test_state_goes_through_json() -> None:
    held, twin = HeldWeights(4), HeldWeights(4)
    held.solved(weights(1, 7, 3), torch.tensor([True, False, True]))
    held.used()
    twin.load_state_dict(json.loads(json.dumps(held.state_dict())))
    assert twin.known() == held.known() == (1, 2, 3)
    assert twin.age == 1
    twin.solved(weights(0, 5, 0), torch.tensor([False, True, False]))
    assert twin.known() == (1, 5, 3)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_an_interval_is_a_whole_number_of_steps(every: float) -> None:
    with pytest.raises(ValueError, match="refresh_every"):
        HeldWeights(every)  # type: ignore[arg-type]


def test_solves_at_every_step_leave_nothing_to_hold_later() -> None:
    """T = 9, then 1, then 9: what was held in between is too old."""
    held = HeldWeights(9)
    held.solved(weights(1, 2, 3), ALL)
    held.refresh_every = 1
    assert held.known() is None
    held.solved(weights(4, 5, 6), ALL)
    held.refresh_every = 9
    assert held.known() is None
    held.solved(weights(7, 8, 9), ALL)
    assert held.known() == (7, 8, 9)
