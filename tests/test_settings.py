"""What the optimizer does with its settings: checks them, names what does not fit, and hands steering on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mogeo.decide.steering import Steering
from mogeo.weightings import resolve
from tests.deciders import DECIDERS, let_decide
from tests.nets import Net, flat_grad, gradient_rows, inputs, separate_losses, shared_losses, wrapped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_dtype": torch.int8}, "row_dtype=torch.int8: choose a floating dtype"),
        ({"sketch": 0}, "sketch=0"),
        ({"sketch": 2**31}, "1073741824 at most"),
        ({"sketch": 64, "row_dtype": torch.bfloat16}, "sketch=64 with row_dtype"),
        ({"sketch": 64, "host_rows": True}, "host_rows"),
        ({"preference": {"help": 1.0, "honesty": -1.0, "truth": 1.0}}, "preference"),
        ({"min_weight": -0.1}, "min_weight"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"refresh_every": 0}, "refresh_every=0"),
    ],
)
def test_settings_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(Net(), **options)


@pytest.mark.parametrize("preference", [{"help": 1.0, "honesty": 1.0}, {"help": 1.0, "honesty": 1.0, "trust": 2.0}])
def test_a_preference_names_every_objective(preference: dict[str, float]) -> None:
    net = Net()
    optimizer = wrapped(net, preference=preference)
    with pytest.raises(ValueError, match=r"missing \['truth'\]"):
        optimizer.backward(shared_losses(net, inputs()))


@pytest.mark.parametrize("decider", DECIDERS)
@pytest.mark.parametrize("weighting", ["mgda", "mgda-decoupled", "uniform", "group-dro", "upgrad"])
def test_steering_reaches_the_weights(weighting: str, decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name or in order; what it makes of weights is tests/decide/test_steering.py's."""
    let_decide(decider, monkeypatch)
    for preference in ({"truth": 1.0, "help": 4.0, "honesty": 2.0}, (4.0, 2.0, 1.0)):
        net = Net()
        optimizer = wrapped(net, weighting, preference=preference, min_weight=0.05, smoothing=0.5)
        steering = Steering((4.0, 2.0, 1.0), 0.05, 0.5)
        mine = resolve(weighting)
        for step in range(2):
            x = inputs(step)
            rows, losses = gradient_rows(net, x), torch.stack(list(separate_losses(net, x).values())).detach()
            optimizer.zero_grad()
            optimizer.backward(shared_losses(net, x))
            report = optimizer.combine()
            gram = report.gram if report.gram is not None else None
            expected = steering.weigh(mine, gram, losses).weights
            torch.testing.assert_close(report.weights, expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(flat_grad(net), report.weights @ rows)


@pytest.mark.parametrize("decider", DECIDERS)
def test_a_loss_that_cannot_divide_is_named_with_steering_too(decider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(decider, monkeypatch)
    net, x = Net(), inputs()
    optimizer = wrapped(net, min_weight=0.1)
    losses = shared_losses(net, x)
    losses["honesty"] = losses["honesty"] - 100
    optimizer.backward(losses)
    if decider == "host":
        with pytest.raises(ValueError, match="objective 'honesty' has loss -9"):
            optimizer.combine()
    else:
        optimizer.combine()
        assert not flat_grad(net).any()  # made zero, and told afterwards
        with pytest.raises(ValueError, match="objective 'honesty' has loss -9"):
            optimizer.backward(shared_losses(net, x))
