"""Engines that run on one process, as in a trial run: gradients that they write back count once, not twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mogeo import MultiObjectiveOptimizer
from mogeo.gradients import arrivals
from tests.distributed.runner import run

ENGINES = ("ddp", "ddp, bucket views", "ddp, unused", "ddp, static graph", "fsdp2")


def grams_of_two_windows(least: int, options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """By engine, the Gram matrices of a window of two micro-batches and of one that follows; and the right ones."""
    arrivals._LEAST = least
    found = {}
    for engine in ENGINES:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        x = torch.randn(2, 4, 8, dtype=torch.float64)
        exact = []
        for micro_batches in (x, x[:1]):
            rows = []
            for k in range(3):
                loss = torch.stack([(net(part)[:, k] - k).square().mean() for part in micro_batches]).sum()
                rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(net.parameters()))]))
            exact.append(torch.stack(rows) @ torch.stack(rows).T)
        module: Any = net
        if engine == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(net)
        else:
            module = DistributedDataParallel(
                net,
                gradient_as_bucket_view=engine == "ddp, bucket views",
                find_unused_parameters=engine == "ddp, unused",
            )
        optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), "mgda", **options)
        grams = []
        for micro_batches in (x, x[:1]):
            for part in micro_batches:
                optimizer.backward(
                    [lambda k=k, x=part, module=module: (module(x)[:, k] - k).square().mean() for k in range(3)]
                )
            gram = optimizer.combine().gram
            assert gram is not None
            grams.append(gram)
            optimizer.zero_grad()
        found[engine] = (torch.stack(grams), torch.stack(exact))
    return found


@pytest.mark.parametrize("least", [0, 1 << 20], ids=["hooks on all", "hooks on none"])
@pytest.mark.parametrize("options", [{}, {"sketch": 1 << 16}], ids=str)
def test_what_an_engine_writes_back_is_not_added_again(least: int, options: dict[str, Any]) -> None:
    ((found),) = run(1, grams_of_two_windows, least, options)
    for engine, (grams, exact) in found.items():
        torch.testing.assert_close(grams, exact, msg=lambda text, engine=engine: f"{engine}: {text}")


def gram_of_two_backwards(least: int) -> tuple[Tensor, Tensor]:
    """Where `backward=` takes two backwards for a loss: the Gram matrix, and the right one."""
    arrivals._LEAST = least
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    rows = [torch.autograd.grad(net(x)[:, k].square().mean(), list(net.parameters())) for k in range(2)]
    exact = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    module = DistributedDataParallel(net)

    def in_halves(loss: Tensor, **options: Any) -> None:
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward(**options)

    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), "mgda")
    optimizer.backward([lambda k=k: module(x)[:, k].square().mean() for k in range(2)], backward=in_halves)
    gram = optimizer.combine().gram
    assert gram is not None
    return gram, exact @ exact.T


def factors_of_a_communication_hook(least: int) -> list[float]:
    """By parameter, what its gradient was multiplied with, where a hook of DDP's triples gradients."""
    arrivals._LEAST = least
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    exact = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    module = DistributedDataParallel(net)

    def triple(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and these are strings here
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer() * 3)
        return future

    module.register_comm_hook(None, triple)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), "uniform")
    optimizer.backward([lambda: module(x).square().mean()])
    optimizer.combine()
    return [
        float(p.grad.norm() / grad.norm())
        for p, grad in zip(net.parameters(), exact, strict=True)
        if p.grad is not None
    ]


@pytest.mark.parametrize("least", [0, 1 << 20], ids=["hooks on all", "hooks on none"])
def test_what_an_engine_does_to_gradients_it_does_to_all(least: int) -> None:
    ((gram, exact),) = run(1, gram_of_two_backwards, least)
    torch.testing.assert_close(gram, exact)
    (factors,) = run(1, factors_of_a_communication_hook, least)
    assert factors == pytest.approx([3.0] * 4)
