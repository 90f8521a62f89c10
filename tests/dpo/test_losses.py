"""DPO losses against independent float64 numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogeo.dpo.loss_names import LOSSES, resolve_loss
from mogeo.dpo.losses import DPO, KINDS, dpo_loss
from tests.profiles import examples


def numpy_loss(margins, beta, kind, smoothing):
    """The formulas once more, by another route: softplus through logaddexp in float64."""
    h = np.asarray(margins, dtype=np.float64)
    if kind == "sigmoid":
        return (1 - smoothing) * np.logaddexp(0, -beta * h) + smoothing * np.logaddexp(0, beta * h)
    if kind == "ipo":
        return np.square(h - 0.5 / beta)
    return np.maximum(0, 1 - beta * h)


CASES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.49), ("ipo", 0.0), ("hinge", 0.0)]


@pytest.mark.parametrize(("kind", "smoothing"), CASES)
@given(
    margins=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    beta=st.sampled_from([0.01, 0.1, 0.5, 2.0]),
)
@examples(50)
def test_loss_equals_its_formula(kind, smoothing, margins, beta):
    ours = dpo_loss(torch.tensor(margins, dtype=torch.float64), beta, kind, smoothing)
    np.testing.assert_allclose(ours.numpy(), numpy_loss(margins, beta, kind, smoothing), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(("kind", "smoothing"), CASES)
def test_loss_and_slope_are_right_in_fp32_at_margins_of_ten_thousand(kind, smoothing):
    margins = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], requires_grad=True)
    loss = dpo_loss(margins, 0.5, kind, smoothing)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), numpy_loss(margins.detach(), 0.5, kind, smoothing), rtol=1e-5)
    h = margins.detach().double().numpy()
    s = 1 / (1 + np.exp(np.clip(0.5 * h, -500, 500)))  # σ(−βh)
    slope = {
        "sigmoid": 0.5 * (-(1 - smoothing) * s + smoothing * (1 - s)),
        "ipo": 2 * (h - 1),
        "hinge": np.where(h < 2, -0.5, 0),
    }[kind]
    np.testing.assert_allclose(margins.grad.numpy(), slope, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_every_loss_pulls_towards_the_chosen_completion(kind):
    margins = torch.zeros(3, requires_grad=True)
    dpo_loss(margins, 0.1, kind).sum().backward()
    assert (margins.grad < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": 0.1, "kind": "dpo"}, "unknown loss 'dpo'.*sigmoid, ipo, hinge"),
        ({"beta": 0.1, "label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"beta": 0.1, "kind": "ipo", "label_smoothing": 0.1}, "sigmoid loss only"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(torch.zeros(1), **arguments)


@pytest.mark.parametrize(("name", "numbers"), [("sigmoid", ()), ("sigmoid", (0.1,)), ("ipo", ()), ("hinge", ())])
def test_a_loss_by_name_is_the_function(name, numbers):
    text = f"{name}({numbers[0]})" if numbers else name
    loss = resolve_loss(text)
    assert repr(loss) == text
    margins = torch.linspace(-4, 4, 9)
    assert torch.equal(loss("helpfulness", margins, 0.3, None), dpo_loss(margins, 0.3, name, *numbers))
    assert loss.reaches_zero == bool((dpo_loss(torch.tensor([1e3]), 0.3, name) == 0).all() and name == "hinge")


def test_every_name_makes_a_loss_that_names_itself():
    for name in LOSSES:
        assert repr(resolve_loss(name)).startswith(name)


def test_a_loss_needs_nothing_beforehand_unless_it_says_so():
    assert DPO().prepare(None) == {}
    assert not DPO().one_process
