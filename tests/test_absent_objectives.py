"""A batch without examples of an objective: left out of the mapping, or None. Absent is absent, and counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.deciders import QUICK_WAYS, WAYS, let_decide
from tests.nets import NAMES, Net, callables, flat_grad, gradient_rows, inputs, shared_losses, wrapped
from tests.profiles import slow_but


@pytest.fixture(autouse=True, params=slow_but(WAYS, *QUICK_WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file holds however a step is made."""
    let_decide(request.param, monkeypatch)
    return str(request.param)


def without(losses: dict[str, Any], name: str, how: str) -> Any:
    if how == "omitted":
        return {other: loss for other, loss in losses.items() if other != name}
    named = {other: None if other == name else loss for other, loss in losses.items()}
    return named if how == "None" else list(named.values())


@pytest.mark.parametrize("how", ["omitted", "None", "None in a list"])
@pytest.mark.parametrize("form", [shared_losses, callables])
@pytest.mark.parametrize("weighting", ["mgda", "mgda-decoupled", "uniform", "group-dro"])
def test_weight_zero_in_this_step_and_counted(weighting: str, form: Any, how: str) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, weighting, objectives=NAMES)
    optimizer.backward(without(form(net, x), "honesty", how))
    report = optimizer.combine()
    assert report.weights[1] == 0
    assert report.absent.tolist() == [False, True, False]
    assert report.losses[1].isnan()
    torch.testing.assert_close(flat_grad(net), report.weights[[0, 2]] @ gradient_rows(net, x)[[0, 2]])
    optimizer.zero_grad()
    optimizer.backward(form(net, x))
    report = optimizer.combine()
    assert report.weights[1] != 0
    plain = report.to_dict()
    assert plain["absent"] == []
    assert plain["absent_counts"] == {"help": 0, "honesty": 1, "truth": 0}
    twin = wrapped(net, weighting, objectives=NAMES)
    twin.load_state_dict(optimizer.state_dict())
    assert json.loads(json.dumps(twin.own_state()))["absent_counts"] == [0, 1, 0]


def test_absent_from_one_micro_batch_is_not_absent_from_the_step() -> None:
    net = Net()
    optimizer = wrapped(net, "mgda", objectives=NAMES)
    optimizer.backward(without(shared_losses(net, inputs(0)), "honesty", "omitted"))
    optimizer.backward(shared_losses(net, inputs(1)))
    report = optimizer.combine()
    rows = gradient_rows(net, inputs(0), inputs(1))
    rows[1] = gradient_rows(net, inputs(1))[1]
    assert not report.absent.any()
    assert report.absent_counts.tolist() == [0, 0, 0]
    torch.testing.assert_close(flat_grad(net), report.weights @ rows)


def test_a_batch_without_any_example_is_no_step() -> None:
    net = Net()
    base = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    from mogeo import MultiObjectiveOptimizer

    optimizer = MultiObjectiveOptimizer(base, objectives=NAMES)
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.backward(dict.fromkeys(NAMES))
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.absent.all()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_the_first_call_names_all_and_may_map_to_none() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    optimizer.backward(without(shared_losses(net, x), "truth", "None"))
    assert optimizer.objectives == NAMES
    assert optimizer.combine().absent.tolist() == [False, False, True]


def test_a_name_that_nobody_knows_is_told() -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net)
    optimizer.backward(without(shared_losses(net, x), "truth", "omitted"))  # two objectives, for good
    optimizer.step()
    with pytest.raises(ValueError, match=r"unknown objectives \['truth'\].*map those without examples to None"):
        optimizer.backward(shared_losses(net, x))
    with pytest.raises(TypeError, match="objective 'help' has a loss of type float"):
        optimizer.backward({"help": 1.0})  # type: ignore[dict-item]
