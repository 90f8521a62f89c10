"""A model of the demo's world on its way, and the gradients of its objectives: of mini-batches, and of all pairs.

What is measured on gradients starts here: how well weights are estimated, and whom a step hurts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignment.generated_world import Setting
from mogeo import MultiObjectiveOptimizer
from mogeo.demo.recipe import Recipe
from mogeo.dpo.log_probs import sequence_log_probs
from mogeo.dpo.losses import dpo_loss
from mogeo.dpo.scoring import score_sequences
from mogeo.dpo.tokens import ShuffledEpochs, collate, tokenize_preferences

Losses = dict[str, Callable[[], Tensor]]
"""Objective → a function that computes its loss on the pairs of one mini-batch."""


class Gradients(NamedTuple):
    """Of K objectives: rows [K, N], and losses fp64 [K]."""

    rows: Tensor
    losses: Tensor


class Run:
    """One seed's model, the pairs that it is aligned with, and AdamW as the demo has it.

    Args:
        seed: of the world, the model and the order of the pairs.
        recipe: sizes and settings.
        scratch: folder in which supervised models are kept.
        regime: see `mogeo.demo.world.REGIMES`.
    """

    def __init__(self, seed: int, recipe: Recipe, scratch: Path, regime: str = "noisehelp") -> None:
        self.seed, self.setting = seed, Setting(seed, regime, recipe, scratch)
        self.config = self.setting.config(recipe.align.learning_rate)
        self.steps = self.config.steps(0)
        self.model = self.setting.start()
        self.pad = self.setting.tokenizer.pad_token_id
        self.tokens = tokenize_preferences(self.setting.train, self.setting.tokenizer, self.config.prompt_format, None)
        self.before = score_sequences(
            self.model, self.tokens.sequences, batch_size=64, pad=self.pad, precision=nullcontext()
        )
        self.parameters = list(self.model.parameters())

    # ---- training ----------------------------------------------------------------------------------------------------

    def adam(self) -> torch.optim.Optimizer:
        """The base optimizer."""
        config = self.config
        return torch.optim.AdamW(
            self.parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True
        )

    def training(self) -> Iterator[tuple[int, Losses]]:
        """(step, its mini-batch) from step 1, the mini-batches in the order in which `align` takes them."""
        yield from zip(range(1, self.steps + 1), self.losses(""), strict=False)

    def at_step(self, step: int, optimizer: Any) -> None:
        """Set the learning rate of a step, as `align` does."""
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step, self.steps)

    def train(self, optimizer: MultiObjectiveOptimizer, steps: int | None = None) -> None:
        """Take the first steps of the run, as `align` does; None: all."""
        self.model.train()
        for step, losses in self.training():
            if steps is not None and step > steps:
                break
            self.at_step(step, optimizer)
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()

    # ---- gradients at the parameters of now --------------------------------------------------------------------------

    def losses(self, order: str) -> Iterator[Losses]:
        """The objectives' losses on mini-batch after mini-batch; an order by another name draws others."""
        for drawn in self.drawn(order):
            yield {name: partial(self.loss, name, pairs) for name, pairs in drawn.items()}

    def drawn(self, order: str) -> Iterator[dict[str, Tensor]]:
        """Indices of the pairs of mini-batch after mini-batch, without end."""
        per_step = self.config.pairs_per_objective
        orders = {n: ShuffledEpochs(len(p), per_step, self.seed, n + order) for n, p in self.tokens.pairs.items()}
        step = 0
        while step := step + 1:
            yield {name: order_of(step) for name, order_of in orders.items()}

    def loss(self, objective: str, pairs: Tensor) -> Tensor:
        """The mean DPO loss of some pairs."""
        flat = self.tokens.pairs[objective][pairs].T.flatten()
        batch = collate([self.tokens.sequences[i] for i in flat.tolist()], self.pad)
        chosen, rejected = (sequence_log_probs(self.model, *batch) - self.before[flat]).chunk(2)
        return dpo_loss(chosen - rejected, self.config.beta).mean()

    def gradients(self, losses: Losses) -> Gradients:
        """Of one mini-batch; rows fp32."""
        found = [self._gradient(loss()) for loss in losses.values()]
        return Gradients(torch.stack([row for row, _ in found]), torch.stack([value for _, value in found]))

    def micro_batches(self, drawn: dict[str, Tensor], parts: int) -> list[Gradients]:
        """Of the equal parts of one mini-batch, whose mean is the mini-batch's."""
        split = {name: pairs.chunk(parts) for name, pairs in drawn.items()}
        return [
            self.gradients({name: partial(self.loss, name, pieces[part]) for name, pieces in split.items()})
            for part in range(parts)
        ]

    def of_all_pairs(self, at_once: int = 64) -> Gradients:
        """Of all training pairs: what mini-batches estimate. fp64.

        Pairs of similar length go through the model together, since they are padded little.
        """
        rows, losses = [], []
        lengths = torch.tensor([len(sequence.ids) for sequence in self.tokens.sequences])
        for name, pairs in self.tokens.pairs.items():
            row, total = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for some in lengths[pairs].amax(1).argsort().split(at_once):
                gradient, value = self._gradient(self.loss(name, some))
                share = len(some) / len(pairs)
                row, total = row + share * gradient.double(), total + share * value
            rows.append(row)
            losses.append(total)
        return Gradients(torch.stack(rows), torch.stack(losses))

    def _gradient(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [N], and the loss, fp64 []."""
        gradient = torch.autograd.grad(loss, self.parameters)
        return torch.cat([g.flatten() for g in gradient]), loss.detach().double()


def mean_of(parts: Sequence[Gradients]) -> Gradients:
    """The mean of micro-batches, or of mini-batches."""
    return Gradients(*(torch.stack(each).mean(0) for each in zip(*parts, strict=True)))


# ---- for other optimizers to see -------------------------------------------------------------------------------------


class _Replayed(torch.autograd.Function):
    """A loss whose value and gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(scale * gradient for gradient in ctx.gradients))


def replayed(parameters: Sequence[Tensor], seen: Gradients) -> list[Callable[[], Tensor]]:
    """Losses of these values with these gradients, to the bit, that cost next to nothing; in the order of the rows."""
    sizes = [parameter.numel() for parameter in parameters]

    def of(row: Tensor, value: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(row.split(sizes), parameters, strict=True)]
        loss: Tensor = _Replayed.apply(value, parts, *parameters)  # type: ignore[no-untyped-call]
        return loss

    return [partial(of, row, value) for row, value in zip(seen.rows, seen.losses.to(seen.rows.dtype), strict=True)]


@contextmanager
def kept_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Put `p.grad` aside, for somebody else to use."""
    mine = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, gradient in zip(parameters, mine, strict=True):
        parameter.grad = gradient


def watcher(parameters: Sequence[Tensor], **options: Any) -> MultiObjectiveOptimizer:
    """An optimizer that sees gradients and never moves a parameter, for `watched`; options as the optimizer's."""
    return MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.0), **options)


def watched(optimizer: MultiObjectiveOptimizer, parameters: Sequence[Tensor], seen: Gradients) -> Any:
    """The report of a step of a watcher that sees these gradients; `p.grad` is left as it was."""
    with kept_gradients(parameters):
        optimizer.backward(replayed(parameters, seen))
        report = optimizer.combine()
        optimizer.zero_grad()
    return report
