"""Arrivals: how many gradients wait at a time, who else sees them, and what is left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mogeo import MultiObjectiveOptimizer
from mogeo.gradients import arrivals
from mogeo.gradients.arrivals import Arrivals, may_wait
from tests.profiles import examples

LARGE = 1 << 19  # fp32 elements: twice the least that may wait
NAMES = ("help", "honesty")


def hooks_on(*parameters: Tensor) -> list[int]:
    return [len(parameter._post_accumulate_grad_hooks or ()) for parameter in parameters]


def wrapped(*parameters: nn.Parameter, **options: Any) -> MultiObjectiveOptimizer:
    return MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.0), "mgda", objectives=NAMES, **options)


def losses_of(*parameters: nn.Parameter) -> dict[str, Tensor]:
    return {name: sum((p * (k + 1)).square().sum() for p in parameters) for k, name in enumerate(NAMES)}  # type: ignore[misc]


@examples(30)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(0, 3000))
def test_never_more_waits_than_may(sizes: list[int], least: int) -> None:
    """At each gradient's arrival, those that lie in `p.grad`, in bytes: what may wait, and the one that came last."""
    parameters = [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in sizes]
    n_bytes = [8 * size for size in sizes]
    taken: list[int] = []

    def take(indices: Any) -> None:
        assert list(indices) == sorted(indices)
        for i in indices:
            if parameters[i].grad is not None:
                taken.append(i)
                parameters[i].grad = None

    most: list[int] = []

    def look(_: Tensor) -> None:
        most.append(sum(size for p, size in zip(parameters, n_bytes, strict=True) if p.grad is not None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "_LEAST", least)
        watched = Arrivals(parameters, n_bytes)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
        with watched.taking(take):
            torch.stack([(parameter * 2).sum() for parameter in parameters]).sum().backward()  # type: ignore[no-untyped-call]
        left = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        assert sorted(taken + left) == list(range(len(sizes)))
        assert max(most) <= may_wait(sum(n_bytes)) + max(n_bytes)


def test_hooks_are_registered_once_on_large_parameters_and_go_with_the_optimizer() -> None:
    small, large = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(LARGE))
    optimizer = wrapped(small, large)
    for _ in range(3):
        optimizer.backward(losses_of(small, large))
        assert hooks_on(small, large) == [0, 1]
        optimizer.step()
        optimizer.zero_grad()
    twin = copy.deepcopy(optimizer)
    pickled = twin.__getstate__()
    del twin, pickled
    late = nn.Parameter(torch.ones(LARGE))
    optimizer.add_param_group({"params": [late]})
    optimizer.backward(losses_of(small, large, late))
    assert hooks_on(small, large, late) == [0, 1, 1]
    second = wrapped(small, large)
    second.backward(losses_of(small, large))
    assert hooks_on(small, large) == [0, 2]
    gone = weakref.ref(optimizer._captures.buffers)
    del optimizer
    gc.collect()
    assert gone() is None
    assert hooks_on(small, large, late) == [0, 1, 0]
    del second
    gc.collect()
    assert hooks_on(small, large, late) == [0, 0, 0]


@pytest.mark.parametrize("size", [3, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("sketch", [None, 1 << 12])
def test_users_hooks_see_each_gradient_whenever_they_were_registered(size: int, sketch: int | None) -> None:
    parameter, other = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(LARGE))
    optimizer = wrapped(parameter, other, sketch=sketch)
    seen: list[float] = []

    def look(p: Tensor) -> None:
        assert p.grad is not None
        seen.append(p.grad[0].item())
        p.grad.mul_(10)  # what a hook changes, counts

    parameter.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    optimizer.backward(losses_of(parameter, other))
    parameter.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    optimizer.backward(losses_of(parameter, other))
    assert seen == [2.0, 8.0, 2.0, 20.0, 8.0, 80.0]


@pytest.mark.parametrize("least", [0, 1 << 20])
def test_plain_backwards_are_left_alone(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(arrivals, "_LEAST", least)
    parameter = nn.Parameter(torch.ones(5))
    optimizer = wrapped(parameter)
    optimizer.backward(losses_of(parameter))
    optimizer.zero_grad()
    for _ in range(2):
        parameter.sum().backward()  # type: ignore[no-untyped-call]
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2.0] * 5


@pytest.mark.parametrize("least", [0, 1 << 20])
@pytest.mark.parametrize("sketch", [None, 1 << 12])
def test_a_parameter_whose_gradient_comes_in_pieces(
    monkeypatch: pytest.MonkeyPatch, least: int, sketch: int | None
) -> None:
    """Reentrant checkpoints run backwards inside the backward: a shared parameter's gradient arrives once for each."""
    monkeypatch.setattr(arrivals, "_LEAST", least)
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def loss(scale: float, use_reentrant: bool) -> Tensor:
        value: Tensor = x
        for layer in [*layers, *layers]:
            value = checkpoint(lambda v, layer=layer: layer(v).tanh(), value, use_reentrant=use_reentrant)
        return (value * scale).square().sum()

    grads = []
    for use_reentrant in (False, True):
        optimizer = MultiObjectiveOptimizer(torch.optim.SGD(layers.parameters(), lr=0.0), "mgda", sketch=sketch)
        optimizer.backward([lambda s=s, r=use_reentrant: loss(s, r) for s in (1.0, 3.0)])
        report = optimizer.combine()
        grads.append(([p.grad.clone() for p in layers.parameters() if p.grad is not None], report.gram))
        optimizer.zero_grad()
    torch.testing.assert_close(*grads)


def test_hooks_come_back_to_what_was_frozen_within_a_window() -> None:
    parameters = [nn.Parameter(torch.ones(LARGE)) for _ in range(3)]
    optimizer = wrapped(*parameters)
    optimizer.backward(losses_of(*parameters))
    for parameter in parameters[1:]:
        parameter.requires_grad_(False)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})  # buffers are made anew, while two parameters are frozen
    optimizer.backward(losses_of(*parameters, late))
    optimizer.step()
    optimizer.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer.backward(losses_of(*parameters, late))
    assert hooks_on(*parameters, late) == [1, 1, 1, 0]


def test_a_gradient_that_cannot_be_kept_ends_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook raises inside the backward, as it would where memory runs out."""
    monkeypatch.setattr(arrivals, "_LEAST", 0)
    parameters = [nn.Parameter(torch.ones(5)) for _ in range(4)]
    optimizer = wrapped(*parameters)
    optimizer.backward(losses_of(*parameters))
    optimizer.zero_grad()
    held = [torch.ones(5) for _ in parameters]
    for parameter, grad in zip(parameters, held, strict=True):
        parameter.grad = grad
    losses = losses_of(*parameters)

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mogeo.gradients.rows.write", exhausted)
        with pytest.raises(MemoryError):
            optimizer.backward(losses)
    assert all(parameter.grad is grad for parameter, grad in zip(parameters, held, strict=True))
    for parameter in parameters:
        parameter.grad = None
    optimizer.backward(losses_of(*parameters))
    report = optimizer.combine()
    assert report.grad_norms is not None
    torch.testing.assert_close(report.grad_norms, torch.tensor([2.0, 8.0], dtype=torch.float64) * 20**0.5)


def test_streams_of_a_gpu_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient may be read on the stream that made it, and on no other before the backward is done."""
    streams = iter([7, 9, 7, 9, 7])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    on_gpu: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), get_device=lambda: 0)
    waiting = arrivals._Waiting(most=10)
    taken: list[list[int]] = []
    waiting.take = lambda indices: taken.append(list(indices))
    for index in range(5):
        waiting.arrived(index, 6, on_gpu)
    assert taken == [[0], [1], [2]]  # 0 when 2 came on stream 7, 1 when 3 came on 9, 2 when 4 came


def test_nothing_waits_where_no_one_takes() -> None:
    waiting = arrivals._Waiting(most=10)
    waiting.arrived(0, 6, torch.ones(1))
    assert not waiting.batches
