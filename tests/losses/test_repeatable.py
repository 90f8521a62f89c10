"""Repeatable: a second evaluation is the first one again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mogeo.losses.repeatable import Repeatable


def test_random_numbers_are_those_of_the_first_time() -> None:
    torch.manual_seed(1)
    torch.rand(3)
    loss = Repeatable("a", lambda: torch.rand(5))
    first = loss()
    between = torch.rand(2)
    torch.manual_seed(1)
    torch.rand(8)
    assert torch.equal(torch.rand(2), between)  # what the first evaluation left to others
    torch.rand(4)
    state = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(loss(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_is_that_of_the_first_time() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    inside, outside = Repeatable("a", lambda: layer(x)), Repeatable("a", lambda: layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert inside().dtype == torch.bfloat16
    assert outside().dtype == torch.float32
    assert inside().dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert outside().dtype == torch.float32
        with torch.autocast("cpu", torch.float16):
            assert inside().dtype == torch.bfloat16
        assert layer(x).dtype == torch.bfloat16


def test_dropout_repeats_its_mask() -> None:
    dropout = nn.Dropout(0.5)
    x = torch.ones(64, requires_grad=True)

    def gradient(loss: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, x)
        return grad

    loss = Repeatable("a", lambda: dropout(x).sum())
    first = gradient(loss())
    assert 0 < int((first == 0).sum()) < 64
    assert torch.equal(gradient(loss()), first)
