"""Ctrl-C in any part of a step: what was captured is gone, `p.grad` is as it was or complete, the next is right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

import mogeo
from tests.deciders import let_decide
from tests.nets import Net, callables, gradient_rows, inputs, shared_losses, wrapped
from tests.profiles import slow_but

_ROOT = Path(mogeo.__file__).parent
#: Where lines count: geometry and weightings only compute, and leave nothing behind.
_LINES_OF = [
    str(_ROOT / name) for name in ("optimizer.py", "state.py", "steps", "gradients", "losses", "decide/on_host")
]


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Run `call` up to the line number `at` that it reaches, and interrupt it there; whether it came that far."""
    reached = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal reached
        if not frame.f_code.co_filename.startswith(tuple(_LINES_OF)):
            return None
        if event == "line":
            reached += 1
            if reached == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def grads(net: Net) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.allclose(a, b, rtol=1e-9))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("every", slow_but([61, 9], 61))
@pytest.mark.parametrize("what", ["backward", "combine"])
@pytest.mark.parametrize("had_gradients", [False, True])
@pytest.mark.parametrize(
    ("weighting", "way", "form"),
    [
        ("mgda", "host", shared_losses),
        ("uniform", "host", shared_losses),
        ("mgda", "rows apart", shared_losses),
        ("mgda", "sketched", callables),
        ("mgda", "replayed", callables),
    ],
)
def test_an_interrupt_leaves_nothing_behind(
    weighting: str,
    way: str,
    form: Callable[..., Any],
    had_gradients: bool,
    what: str,
    every: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_decide(way, monkeypatch)
    net = Net()
    optimizer = wrapped(net, weighting)
    optimizer.backward(form(net, inputs(7)))  # a step before, so that rows hold something
    optimizer.combine()
    at, came_far = every // 2 if had_gradients else 0, True  # other lines than without gradients
    while came_far:
        at += every
        optimizer.zero_grad()
        if had_gradients:
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
        before = grads(net)
        if what == "combine":
            optimizer.backward(form(net, inputs(1)))
            came_far = interrupted(optimizer.combine, at)
        else:
            losses = form(net, inputs(1))
            came_far = interrupted(lambda losses=losses: optimizer.backward(losses), at)
        assert not _has_any_global_hook(), at
        if not came_far and what == "backward":
            optimizer.combine()
        if came_far and not same(grads(net), before):
            rows = gradient_rows(net, inputs(1))
            weights = optimizer.weighting(rows @ rows.T, torch.ones(3))
            direction = torch.split(weights @ rows, [p.numel() for p in net.parameters()])
            complete = [
                None if b is None and not d.any() else d.view_as(p) + (0 if b is None else b)
                for d, p, b in zip(direction, net.parameters(), before, strict=True)
            ]
            assert same(grads(net), complete), at
        optimizer.zero_grad()
        optimizer.backward(form(net, inputs(2)))
        report = optimizer.combine()
        rows = gradient_rows(net, inputs(2))
        found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()])
        torch.testing.assert_close(found, report.weights @ rows, msg=lambda text, at=at: f"line {at}: {text}")
        torch.testing.assert_close(
            report.weights, optimizer.weighting(rows @ rows.T, torch.ones(3)), rtol=1e-6, atol=1e-9
        )
    assert at > 20
