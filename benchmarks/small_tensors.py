"""What a step costs a host that has many small tensors to look after: a case of benchmarks/step_overhead.py.

1,000 parameters of 4 elements each, AdamW with foreach=True, K losses. There is next to nothing to compute, so what
remains is what every tensor costs: in autograd, in AdamW, and in between. Two graphs:

- chain: x ← x · p_1 · … · p_1000, a thousand operations one behind the other;
- flat: all parameters in one operation, so that autograd has little to do, and what comes on top counts most.

Losses are callables, evaluated one at a time, or tensors, evaluated all at first. Plain training takes K backwards into
`p.grad` in both. Seconds of CPU of one thread, so that what others run on the machine counts little; every round runs
one step of each contestant in rotating order, and a ratio is taken within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import cpu_clock, rounds_of, spread
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer

TENSORS, ELEMENTS = 1000, 4
GRAPHS = ("chain", "flat")
FORMS = ("callables", "tensors")
BUCKETS = 1 << 12
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "mogeo": {},
    "mogeo uniform": {"weighting": "uniform"},
    "mogeo sketch": {"sketch": BUCKETS},
}


def losses_of(graph: str, parameters: list[nn.Parameter], objectives: int) -> list[Callable[[], Tensor]]:
    """K losses, all positive, each of its own input."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(objectives, ELEMENTS, generator=generator)

    def chain(x: Tensor) -> Tensor:
        for parameter in parameters:
            x = x * parameter
        return (x - 1).square().sum() + 1

    def flat(x: Tensor) -> Tensor:
        return (torch.stack(parameters) * x).square().sum() + 1

    loss = chain if graph == "chain" else flat
    return [lambda x=x: loss(x) for x in inputs]


def step_of(keywords: dict[str, Any] | None, graph: str, form: str, objectives: int) -> Callable[[], None]:
    """One training step of a contestant: of `MultiObjectiveOptimizer` with these keywords, or (None) of plain AdamW."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(1 + 0.01 * torch.randn(ELEMENTS)) for _ in range(TENSORS)]
    base = torch.optim.AdamW(parameters, lr=1e-6, foreach=True)
    losses = losses_of(graph, parameters, objectives)

    def handed_over() -> list[Any]:
        return list(losses) if form == "callables" else [loss() for loss in losses]

    if keywords is None:

        def step() -> None:
            base.zero_grad()
            for loss in handed_over():
                (loss() if form == "callables" else loss).backward()
            base.step()

    else:
        optimizer = MultiObjectiveOptimizer(base, **keywords)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.backward(handed_over())
            optimizer.step()

    return step


def measure(objectives: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A record per graph, form of losses and contestant, and a line of each in print."""
    for graph in GRAPHS:
        for form in FORMS:
            steps = {name: step_of(keywords, graph, form, objectives) for name, keywords in CONTESTANTS.items()}
            found = list(rounds_of(steps, rounds, cpu_clock))
            print(f"\n{graph}, {form}, K = {objectives}       ms of CPU a step     ratio to plain (quartiles)")
            for name in steps:
                low, middle, high = statistics.quantiles((seconds[name] / seconds["plain"] for seconds in found), n=4)
                ms = spread([1e3 * seconds[name] for seconds in found])
                print(f"  {name:24s} {ms['p50']:9.1f}     {middle:6.3f}  ({low:.3f} … {high:.3f})")
                yield {
                    "contestant": name, "graph": graph, "losses": form, "objectives": objectives, "ms": ms,
                    "ratio": [low, middle, high],
                }  # fmt: skip
