"""What the optimizer does with its settings: checks them, names what does not fit, and hands steering on."""

from __future__ import annotations

import gc
import json
from typing import Any

import numpy
import pytest
import torch

from mogeo import MultiObjectiveOptimizer, Rows, Sketch
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
        ({"track": 0.0}, "track=0.0: pass a decay β, 0.5 < β < 1"),
        ({"track": 0.5}, "track=0.5: pass a decay"),
        ({"track": 1}, "track=1: pass a decay"),
        ({"track": -0.5}, "track=-0.5"),
        ({"track": float("nan")}, "track=nan"),
        ({"track": float("inf")}, "track=inf"),
        ({"weigh_by": "batch"}, "weigh_by='batch': choose 'mean' or 'mini-batch'"),
        (
            {"weigh_by": "mini-batch"},
            "weigh_by='mini-batch' says what becomes of track=, which is None: pass track=0.95",
        ),
        ({"weigh_by": None}, "weigh_by=None: choose 'mean' or 'mini-batch'"),
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
@pytest.mark.parametrize("weighting", ["mgda", "mgda-decoupled", "uniform", "group-dro", "upgrad", "raco(0.4)"])
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sketch": True}, "sketch=True: pass how many numbers"),
        ({"sketch": 64.0}, "sketch=64.0"),
        ({"host_rows": "no"}, "host_rows='no': pass True or False"),
        ({"shard_rows": 1}, "shard_rows=1: pass True or False"),
        ({"row_dtype": "bf16"}, "row_dtype='bf16': pass a torch.dtype"),
        ({"guarantee_descent": "yes"}, "guarantee_descent='yes': pass True or False"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1': pass a positive norm"),
        ({"max_grad_norm": True}, "max_grad_norm=True"),
        ({"refresh_every": float("inf")}, "refresh_every=inf"),
        ({"refresh_every": float("nan")}, "refresh_every=nan"),
        ({"process_group": "all"}, "process_group='all': pass what torch.distributed.new_group"),
        ({"refresh_every": "2"}, "refresh_every='2': pass a whole number"),
        ({"refresh_every": True}, "refresh_every=True"),
        ({"preference": 3.0}, "preference=3.0: pass positive numbers"),
        ({"preference": "abc"}, "preference='abc'"),
        ({"preference": ["a", "b", "c"]}, "preference='a'"),
        ({"min_weight": "0.1"}, "min_weight='0.1'"),
        ({"smoothing": None}, "smoothing=None"),
        ({"memory": "cpu"}, "memory='cpu': pass mogeo.Rows"),
        ({"memory": 64}, "memory=64"),
        ({"objectives": "abc"}, "objectives='abc'"),
        ({"weighting": 3}, "weighting=3"),
        ({"track": True}, "track=True: pass a decay β"),
        ({"track": "0.95"}, "track='0.95': pass a decay β, 0.5 < β < 1, such as 0.95; \"auto\"; or None"),
        ({"track": "Auto"}, "track='Auto'"),
        ({"track": [0.9]}, r"track=\[0.9\]"),
        ({"track": torch.tensor(0.9)}, "track=tensor"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        wrapped(Net(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_dtype": torch.float8_e4m3fn}, "row_dtype=torch.float8_e4m3fn: choose"),
        ({"row_dtype": torch.complex64}, "row_dtype=torch.complex64"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore': choose"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"memory": Rows(), "sketch": 64}, "says how gradients are kept: leave out sketch"),
        ({"sketch": 64, "shard_rows": True}, "sketch=64 with shard_rows"),
        ({"min_weight": 0.4, "objectives": ["help", "honesty", "truth"]}, "min_weight=0.4 for K = 3"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(Net(), **options)
    with pytest.raises(ValueError, match="choose 'cpu'"):
        Rows(device="cuda")


@pytest.mark.parametrize(
    ("keywords", "memory"),
    [
        ({}, Rows()),
        ({"row_dtype": torch.bfloat16}, Rows(dtype=torch.bfloat16)),
        ({"host_rows": True}, Rows(device="cpu")),
        ({"shard_rows": True, "row_dtype": torch.float16}, Rows(dtype=torch.float16, scatter=True)),
        ({"sketch": 64}, Sketch(64)),
    ],
)
def test_keywords_are_another_way_to_say_memory(keywords: dict[str, Any], memory: Rows | Sketch) -> None:
    spelled, said = wrapped(Net(), **keywords), wrapped(Net(), memory=memory)
    assert spelled.memory == said.memory == memory
    for name in ("row_dtype", "host_rows", "shard_rows", "sketch"):
        assert getattr(spelled, name) == getattr(said, name) == keywords.get(name, getattr(wrapped(Net()), name))


CHANGES: list[tuple[str, Any, Any]] = [
    ("preference", (1.0, 2.0, 3.0), (9.0, 1.0, 1.0)),
    ("preference", None, {"help": 9.0, "honesty": 1.0, "truth": 1.0}),
    ("preference", (1.0, 2.0, 3.0), None),
    ("min_weight", 0.05, 0.3),
    ("min_weight", 0.0, 0.3),
    ("guarantee_descent", False, True),
    ("max_grad_norm", None, 1e-3),
    ("weighting", "mgda", "upgrad"),
    ("weighting", "mgda", "uniform"),
    ("weighting", "uniform", "mgda"),
    ("sketch", None, 4096),
    ("sketch", 4096, 64),
    ("sketch", 64, None),
    ("row_dtype", None, torch.float32),
    ("row_dtype", torch.float32, None),
    ("host_rows", False, True),
    ("memory", Sketch(64), Rows(dtype=torch.bfloat16)),
    ("refresh_every", 9, 1),
    ("track", None, 0.9),
    ("track", 0.9, None),
    ("track", 0.9, "auto"),
    ("track", "auto", 0.6),
]


@pytest.mark.parametrize(("name", "before", "after"), CHANGES)
@pytest.mark.parametrize("refresh_every", [1, 5])
def test_what_is_assigned_acts_at_the_next_step(name: str, before: Any, after: Any, refresh_every: int) -> None:
    """As if the optimizer had been made so; and a checkpoint says what was in force."""
    options = {"weighting": "mgda", "refresh_every": refresh_every}
    net, x = Net(), inputs(1)
    optimizer = wrapped(net, **{**options, name: before})
    optimizer.backward(shared_losses(net, inputs(0)))
    optimizer.combine()
    setattr(optimizer, name, after)
    twin_net = Net()
    twin = wrapped(twin_net, **{**options, name: after})
    results = []
    for each, model in ((optimizer, net), (twin, twin_net)):
        each.zero_grad()
        each.backward(shared_losses(model, x))
        results.append((each.combine(), flat_grad(model)))
    (report, grad), (expected, expected_grad) = results
    if refresh_every > 1 and name in ("max_grad_norm", "sketch", "row_dtype", "host_rows", "memory"):
        assert report.age == 1  # weights hold: these change nothing about them
    else:
        torch.testing.assert_close(report.weights, expected.weights, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9)
    assert optimizer.own_state()["settings"] == twin.own_state()["settings"]


def test_smoothing_goes_on_from_what_it_remembers_and_begins_anew_after_none() -> None:
    net = Net()
    optimizer = wrapped(net, "mgda", smoothing=0.5)

    def weights(seed: int) -> torch.Tensor:
        optimizer.zero_grad()
        optimizer.backward(shared_losses(net, inputs(seed)))
        return optimizer.combine().weights

    def raw(seed: int) -> torch.Tensor:
        rows = gradient_rows(net, inputs(seed))
        return resolve("mgda")(rows @ rows.T, torch.ones(3))

    first = weights(0)
    torch.testing.assert_close(first, raw(0))
    optimizer.preference = (1.0, 1.0, 1.0)
    optimizer.smoothing = 0.25
    torch.testing.assert_close(weights(1), 0.25 * first + 0.75 * raw(1))
    optimizer.smoothing = 0.0
    torch.testing.assert_close(weights(2), raw(2))
    optimizer.smoothing = 0.5
    torch.testing.assert_close(weights(3), raw(3))


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"weighting": "uniform"}, "preference", (1.0, 2.0, 3.0)),
        ({"weighting": "uniform"}, "min_weight", 0.1),
        ({"weighting": "uniform"}, "guarantee_descent", True),
        ({"weighting": "uniform"}, "track", 0.9),
        ({"weighting": "uniform", "track": 0.9}, "track", None),
        ({"weighting": "mgda"}, "weighting", "uniform"),
        ({"weighting": "mgda"}, "memory", Sketch(64)),
        ({"weighting": "mgda"}, "sketch", 64),
    ],
)
def test_what_comes_too_late_for_a_step_is_refused_and_changes_nothing(
    options: dict[str, Any], name: str, value: Any
) -> None:
    net, x = Net(), inputs()
    optimizer = wrapped(net, **options)
    before = getattr(optimizer, name)
    optimizer.backward(shared_losses(net, x))
    if name == "min_weight":  # a floor under equal weights changes nothing
        optimizer.min_weight = value
    else:
        with pytest.raises(RuntimeError, match=r"after step\(\) or zero_grad\(\)"):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) == before
    report = optimizer.combine()
    torch.testing.assert_close(flat_grad(net), report.weights @ gradient_rows(net, x))


def test_a_value_that_does_not_fit_leaves_the_old_one() -> None:
    net = Net()
    optimizer = wrapped(net, min_weight=0.1)
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()
    for name, value in (
        ("min_weight", 0.9),
        ("preference", (1.0, 2.0)),
        ("smoothing", 1.0),
        ("refresh_every", 0),
        ("track", 1.5),
        ("weigh_by", "batch"),
    ):
        before = getattr(optimizer, name)
        with pytest.raises(ValueError, match=name):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) == before
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()


def test_what_belongs_to_the_run_cannot_be_assigned() -> None:
    optimizer = wrapped(Net())
    for name in ("objectives", "report", "process_group"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, None)


def test_a_first_call_that_fails_leaves_no_order_behind() -> None:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([p], lr=1.0), "uniform", preference={"a": 1.0, "b": 9.0})

    def exhausted(loss: torch.Tensor) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.backward({"b": p.sum(), "a": p.sum()}, backward=exhausted)
    optimizer.backward({"a": p.sum(), "b": p.square().sum()})
    assert optimizer.combine().weights.tolist() == pytest.approx([0.1, 0.9])


def test_the_same_value_again_changes_nothing() -> None:
    net = Net()
    optimizer = wrapped(net, "mgda", refresh_every=9, smoothing=0.5, track=0.9)
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.memory, optimizer.smoothing, optimizer.weighting = Rows(), 0.5, optimizer.weighting
    optimizer.track = 0.9
    assert optimizer.combine().age == 1


@pytest.mark.parametrize("other", ["mgda-normalized", "gapo(0.5)", "linear(1, 2, 3)"])
def test_held_weights_of_another_weighting_are_not_taken(other: str) -> None:
    net = Net()
    optimizer = wrapped(net, "mgda", refresh_every=9)
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()
    twin = wrapped(net, other, refresh_every=9, guarantee_descent=True)
    with pytest.warns(UserWarning, match="saved under mgda|saved with guarantee_descent"):
        twin.load_state_dict(optimizer.state_dict())
    twin.backward(shared_losses(net, inputs()))
    assert twin.combine().age == 0


def test_a_state_that_does_not_fit_the_settings_loads_nothing() -> None:
    net = Net()
    optimizer = wrapped(net)
    optimizer.backward(shared_losses(net, inputs()))
    optimizer.step()
    for options in ({"preference": {"x": 1.0, "y": 2.0}}, {"weighting": "linear(1, 2)"}, {"min_weight": 0.4}):
        other = wrapped(net, **options)
        other.param_groups[0]["lr"] = 0.5
        with pytest.raises(ValueError, match="objectives"):
            other.load_state_dict(optimizer.state_dict())
        assert other.objectives is None
        assert other.param_groups[0]["lr"] == 0.5


def test_leaving_sketches_gives_back_their_memory_and_hooks() -> None:
    parameter = torch.nn.Parameter(torch.randn(500_000))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), "mgda", sketch=4096)

    def step() -> None:
        optimizer.backward([parameter.square().mean() + 1, (parameter - 1).square().mean()])
        optimizer.step()

    step()
    optimizer.memory = Rows()
    step()
    assert optimizer._captures.sketches is None
    optimizer.weighting = "uniform"
    step()
    gc.collect()
    assert len(parameter._post_accumulate_grad_hooks) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("track", [0.95, "auto", None])
def test_a_decay_of_averages_is_kept_as_given_and_saved(track: Any) -> None:

    optimizer = wrapped(Net(), track=numpy.float64(track) if isinstance(track, float) else track)
    assert optimizer.track == track
    assert type(optimizer.track) is type(track)
    assert json.loads(json.dumps(optimizer.own_state()))["settings"]["track"] == track
