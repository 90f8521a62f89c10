"""RowStore and SharedDirection: what only they decide. Most of it shows through the optimizer, in test_optimizer.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mogeo.gradients.direction import SharedDirection
from mogeo.gradients.memory import Rows, Sketch
from mogeo.gradients.rows import RowStore
from mogeo.gradients.stores import Captures, Wanted


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(5).bfloat16())]


def fill(buffers: RowStore, row: int, *grads: tuple[nn.Parameter, float]) -> None:
    with buffers.capturing():
        buffers.select(row)
        sum((p.sum() * value for p, value in grads), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        buffers.collect()


def test_one_block_per_dtype() -> None:
    buffers = RowStore(parameters(), 2)
    assert [block.dtype for block in buffers.blocks] == [torch.float32, torch.bfloat16]
    assert [tuple(block.shape) for block in buffers.blocks] == [(2, 16), (2, 16)]


def test_gram_sums_over_blocks_and_ignores_what_is_stale() -> None:
    a, b, c = params = parameters()
    buffers = RowStore(params, 2)
    fill(buffers, 0, (a, 1.0), (c, 2.0))
    fill(buffers, 1, (b, 3.0), (c, 1.0))
    buffers.complete()
    assert buffers.gram().tolist() == [[3 + 20, 10], [10, 36 + 5]]
    buffers.combine(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert buffers.direction.squared_norm().tolist() == 23
    buffers.combine(torch.tensor([1.0, 1.0]))
    buffers.drop()  # the direction in row 0 is stale from here on, for every parameter
    fill(buffers, 0, (a, 1.0))
    buffers.complete()
    assert buffers.gram().tolist() == [[3, 0], [0, 0]]


@pytest.mark.parametrize("poison_first", [False, True])
def test_publish_hands_out_what_was_written_and_nothing_else(poison_first: bool) -> None:
    a, b, c = params = parameters()
    buffers = RowStore(params, 2)
    if poison_first:  # NaN of one window never reaches the next
        fill(buffers, 1, (b, 1.0))
        buffers.complete()
        buffers.poison()
        buffers.direction.publish()
        buffers.drop()
        assert b.grad is not None
        assert b.grad.isnan().all()
        b.grad = None
    fill(buffers, 0, (a, 1.0))
    buffers.complete()
    buffers.combine(torch.tensor([2.0, 5.0]))
    buffers.direction.publish()
    assert a.grad is not None
    assert a.grad.tolist() == [2.0, 2.0, 2.0]
    assert b.grad is None
    assert c.grad is None


def test_gradients_are_captured_only_while_capturing() -> None:
    a, *_ = params = parameters()
    buffers = RowStore(params, 1)
    fill(buffers, 0, (a, 1.0))
    a.sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(KeyError), buffers.capturing():
        raise KeyError
    a.sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad.tolist() == [2.0, 2.0, 2.0]


def test_migration_keeps_an_open_window() -> None:
    a, b, c = params = parameters()
    old = RowStore(params, 2)
    fill(old, 0, (a, 1.0), (b, 1.0))
    fill(old, 1, (c, 1.0))
    late = nn.Parameter(torch.zeros(2))
    new = RowStore([c, late, a], 2)
    new.migrate(old)
    new.complete()
    assert new.gram().tolist() == [[3, 0], [0, 5]]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p[:2],
        lambda p: [*p, nn.Parameter(torch.ones(1))],
        lambda p: [p[1], p[0], p[2]],
        lambda p: [nn.Parameter(q.double()) for q in p],
    ],
)
def test_buffers_tell_when_they_no_longer_suit_the_parameters(change: object) -> None:
    params = parameters()
    changed: list[Tensor] = change(params)  # type: ignore[operator]
    captures = Captures()

    def fitted(parameters: list[Tensor], names: str = "ab", memory: Rows | Sketch = Rows()) -> object:  # noqa: B008
        captures.fit(Wanted(lambda: [{"params": parameters}], tuple(names), memory, None), "rows", is_open=False)
        return captures.buffers

    first = fitted(list(params))
    assert fitted(list(params)) is first
    assert fitted(changed) is not first
    first = fitted(list(params))
    assert fitted(list(params), "abc") is not first
    first = fitted(list(params))
    assert fitted(list(params), memory=Rows(torch.bfloat16)) is not first
    assert isinstance(fitted(list(params), memory=Sketch(9)), SharedDirection)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 6).t(),
        lambda: torch.randn(()),
        lambda: torch.empty(0, 3),
    ],
)
def test_views_have_the_parameters_strides(make: object) -> None:
    parameter = nn.Parameter(make())  # type: ignore[operator]
    buffers = RowStore([parameter], 1)
    fill(buffers, 0, (parameter, 1.0))
    buffers.combine(torch.ones(1, dtype=torch.float64))
    buffers.direction.publish()
    assert parameter.grad is not None
    assert parameter.grad.stride() == parameter.stride()
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_a_parameter_with_holes_gets_a_contiguous_gradient() -> None:
    parameter = nn.Parameter(torch.randn(4, 6)[:, ::2])
    buffers = RowStore([parameter], 1)
    fill(buffers, 0, (parameter, 1.0))
    buffers.combine(torch.ones(1, dtype=torch.float64))
    buffers.direction.publish()
    assert parameter.grad is not None
    assert parameter.grad.is_contiguous()


def test_a_gradient_of_weight_zero_goes_nowhere() -> None:
    a, b, _ = params = parameters()
    direction = SharedDirection(params)
    for parameter, value, weight in ((a, 2.0, 0.5), (a, torch.nan, 0.0), (b, torch.nan, 0.0)):
        with direction.capturing():
            direction.weigh(weight)
            (parameter.sum() * value).backward()  # type: ignore[no-untyped-call]
            direction.collect()
    direction.complete()
    direction.publish()
    assert a.grad is not None
    assert a.grad.tolist() == [1.0, 1.0, 1.0]
    assert b.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weighted_gradients_are_rounded_once_an_addition_whatever_their_size(dtype: torch.dtype) -> None:
    """Small ones are written in one call, large ones one by one. Weights keep all their digits, also in bf16."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (3, 1 << 14, (1 << 14) + 1)]
    grads = [[torch.randn(p.shape, dtype=dtype) for p in params] for _ in range(2)]
    direction = RowStore(params, 2).direction
    for window in range(2):  # the second finds what the first left
        for each, weight in zip(grads, (0.3, 1.7), strict=True):
            with direction.capturing():
                direction.weigh(weight)
                torch.autograd.backward(params, each)
                direction.collect()
        direction.complete()
        direction.publish()
        for p, first, second in zip(params, *grads, strict=True):
            assert p.grad is not None
            written = (first.double() * 0.3).to(dtype)
            summed = (written.double() + second.double() * 1.7).to(dtype)
            torch.testing.assert_close(p.grad, summed)
            # In half precision, to the last bit, but where rounding to fp32 on the way makes a tie of it.
            if dtype == torch.bfloat16:
                assert (p.grad != summed).double().mean() < 0.02, window
            p.grad = None
