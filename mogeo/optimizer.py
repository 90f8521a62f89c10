"""MultiObjectiveOptimizer: capture → gram → weigh → combine → base.step().

Knows the order of things and no mathematics: rows are filled by `mogeo.buffers`, multiplied by `mogeo.ops`, weighed by
`mogeo.weightings`; the manners of torch.optim are `mogeo.wrapper`'s.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mogeo import deferred, direction
from mogeo.buffers import GradientBuffers, signature
from mogeo.constants import constant_tensor
from mogeo.direction import Direction, NonFiniteError, Rules, bad_weights
from mogeo.distributed import Group, ranks_of, value_of
from mogeo.graphs import shared_with_later
from mogeo.mailbox import Mailbox
from mogeo.min_norm import Status
from mogeo.objectives import Loss, Losses, by_name, checked_names, evaluate, run_backward
from mogeo.report import StepReport
from mogeo.weightings import MGDA, WeightingLike, require_positive_losses, resolve
from mogeo.wrapper import OptimizerWrapper


class MultiObjectiveOptimizer(OptimizerWrapper):
    """Wraps a torch optimizer so that each step follows one direction shared by several objectives.

    ```python
    optimizer = MultiObjectiveOptimizer(torch.optim.AdamW(model.parameters(), lr=5e-7))
    optimizer.backward({"helpfulness": loss_h, "honesty": loss_o})  # in place of loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ```

    `backward` adds each objective's gradient to a row of its own; `combine` solves for the weights and writes the
    shared direction d = Σ_k w_k g_k into `p.grad`; `step` calls `combine` if that is still due. Whoever reads or
    changes gradients in between (clipping, `GradScaler.unscale_`, logging) calls `combine` first; clipping alone is
    free with `max_grad_norm`. The guarantees of a weighting are about d: Adam or Lion then precondition it.

    The rows take K·N elements in the parameters' dtypes, N of which serve as `p.grad`: a `p.grad` is a view that lasts
    until the next `backward`. Weightings whose weights are constant (uniform, linear) take N, like plain training.

    Args:
        base: any `torch.optim.Optimizer` but LBFGS, whose curvature pairs belong to one fixed function.
        weighting: a name (`mogeo.weightings.NAMES`), or a callable (gram fp64 [K, K], losses fp64 [K]) → weights [K].
            An objective left out of a step has a zero row in the Gram it sees, and the mean of the other losses.
        objectives: names, fixing their order; by default those of the first `backward`.
        max_grad_norm: scale d down to this norm if it is longer, from ‖d‖² = wᵀ M w, without another pass over the
            gradients. Under a `GradScaler` use `unscale_` and `clip_grad_norm_` instead: here the gradients are still
            scaled.
        nonfinite: what to do with an objective whose loss or gradient is not finite. "skip" leaves it out of the step,
            counts it in the report and warns once; "raise" raises; "propagate" makes the whole direction NaN (for
            `GradScaler`, which then skips the step and lowers its scale). Weightings that need no Gram (uniform,
            linear, group-dro) see losses one by one but gradients only summed: there "skip" leaves out the whole step
            where a gradient is not finite.
        process_group: with several processes, those that hold this model between them; by default all of them.
        guarantee_descent: take the direction nearest to d that hurts no objective to first order, ⟨v, g_k⟩ ≥ 0 for all
            k: v = Σ_k (w_k + μ_k) g_k, exact, from the same Gram matrix (`mogeo.descent_weights`). It is d itself where
            d hurts nobody, as MGDA's never does. Fixed weights and GroupDRO then need K rows and a Gram matrix as well.
        shard_rows: with several processes and plain (replicated) parameters, average each gradient over ranks as soon
            as it is complete, and keep a piece of it per rank: rows of N + K·N/ranks elements instead of K·N. For use
            inside DDP's `no_sync()`, or without DDP.

    With several processes, losses and gradients are averaged over ranks, and every rank decides the same from the same
    numbers: docs/distributed.md has a recipe per engine. All ranks must hand over the same objectives.

    On a GPU with Triton (one process and one device, K ≤ 32) a step is decided on the device, and the host never waits
    for it: not to see what is finite, nor how long d is. So with "skip" and "propagate"

    - what would raise or warn does so at the next `backward` or `combine` after the news has arrived; until then the
      objective at fault (a loss ≤ 0 that divides) is left out, and a direction that is not finite is made zero;
    - where no objective is finite, d is zero and the base steps on it (momentum and weight decay act), since only the
      host could skip its step; and a non-finite loss under uniform or linear weights leaves out the whole step.

    "raise" must know before the base steps: the host decides then, and waits for the device several times per step.

    Attributes:
        base: the wrapped optimizer.
        weighting: the resolved weighting.
        objectives: names in order, or None before the first `backward`.
        report: `StepReport` of the last `combine`, or None.

    Raises:
        TypeError: `base` is no `torch.optim.Optimizer`, or one that cannot be wrapped.
        ValueError: an argument does not fit.
    """

    _transient = ("_buffers", "_mailbox", "_loss_sums", "_contributed", "_due")

    def __init__(
        self,
        base: Optimizer,
        weighting: WeightingLike = "mgda-decoupled",
        *,
        objectives: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        guarantee_descent: bool = False,
        process_group: Group | None = None,
        shard_rows: bool = False,
    ) -> None:
        super().__init__(base)
        if nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"nonfinite={nonfinite!r}: choose 'skip', 'raise' or 'propagate'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: pass a positive norm, or None for no clipping")
        self._weighting: Callable[..., Any] = resolve(weighting)
        self.objectives = None if objectives is None else checked_names(objectives)
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.guarantee_descent = guarantee_descent
        self.process_group = process_group
        self.shard_rows = shard_rows
        self.report: StepReport | None = None
        self._nonfinite_counts = torch.zeros(len(self.objectives or ()), dtype=torch.int64)
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        """Forget buffers and window: they are rebuilt by the next `backward`."""
        self._buffers: GradientBuffers | None = None
        self._mailbox = Mailbox()
        self._drop_window()

    @property
    def weighting(self) -> Callable[..., Any]:
        """The resolved weighting. Assign a name or callable to change it, between steps."""
        return self._weighting

    @weighting.setter
    def weighting(self, weighting: WeightingLike) -> None:
        resolved = resolve(weighting)
        if self._due and self._one_row(resolved) != self._one_row(self._weighting):
            raise RuntimeError(
                f"gradients captured for {self._weighting!r} do not suit {resolved!r}: one of them sums them during "
                "backward. Change the weighting after step() or zero_grad()"
            )
        self._weighting = resolved

    def _one_row(self, weighting: Callable[..., Any]) -> bool:
        return self._rules(weighting).constant() is not None

    def _rules(self, weighting: Callable[..., Any]) -> Rules:
        return Rules(self._names, weighting, self.nonfinite, self.max_grad_norm, self.guarantee_descent)

    def backward(
        self,
        losses: Losses,
        *,
        objective: str | None = None,
        backward: Callable[..., object] | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        """Run backward for every objective, each gradient into its own row. Replaces `loss.backward()`.

        Several calls before a step accumulate, per objective; the step then solves once. Losses may share a graph or
        not: a shared one is kept for as long as a later loss needs it, others are freed as they are used.

        Args:
            losses: one scalar loss per objective: a mapping by name, a sequence in the order of `objectives` (named
                "0", "1", … if nobody named them), or a single loss together with `objective`. A loss is a tensor, or a
                zero-argument callable that returns one; callables run one at a time, so that one graph is alive at
                once.
            objective: the name that a single loss belongs to.
            backward: what to call instead of `loss.backward()`, such as `accelerator.backward`. It is passed
                `retain_graph=True` where losses share a graph.
            retain_graph: True keeps every graph beyond this call. By default, what no loss of this call needs is freed.

        Raises:
            ValueError: names do not match the objectives, or a loss is not a scalar that depends on a parameter.
            TypeError: a loss is neither tensor nor callable, or `backward` takes no `retain_graph` although one is
                needed.

        If anything raises while gradients are captured, the window is dropped: `p.grad` and the parameters stay as they
        were. On a GPU this may raise for an earlier step as well, as `combine` does, before anything is captured.
        """
        self._read_mail()
        known = self.objectives
        try:
            terms = self._terms(losses, objective)
            constant = self._rules(self.weighting).constant()
            buffers = self._current_buffers(1 if constant is not None else len(self._names))
            with buffers.capturing():
                if constant is not None and all(_adds_exactly(term) for _, _, term in terms):
                    self._backward_sum(terms, constant, backward, bool(retain_graph))
                    buffers.collect()
                else:
                    self._backward_each(buffers, terms, constant, backward, bool(retain_graph))
            if not buffers.touched() and (constant is None or self._contributed):
                raise ValueError(
                    "no loss reached a parameter of the base optimizer: was the model copied, or its parameters "
                    "replaced, after the optimizer was made?" + buffers.ranks_hint()
                )
        except BaseException:
            self._drop_window()
            self.objectives = known
            raise
        self._due = True

    def _backward_each(
        self,
        buffers: GradientBuffers,
        terms: Sequence[tuple[int, str, Loss]],
        constant: tuple[float, ...] | None,
        backward: Callable[..., object] | None,
        retain_graph: bool,
    ) -> None:
        """One backward per objective, into its own row; with constant weights, weighted into the one row there is."""
        tensors = [term for _, _, term in terms if isinstance(term, Tensor)]
        shared = iter(shared_with_later(tensors))
        for index, name, term in terms:
            needed_later = isinstance(term, Tensor) and next(shared)
            if constant is None:
                buffers.select(index)
            else:
                buffers.select(0, constant[index])
            loss = evaluate(name, term)
            value = self._add_loss(index, loss)
            if constant is None or self._can_be_summed(index, value, constant[index]):
                run_backward(name, loss, backward, retain_graph or needed_later)
            buffers.collect()
            del loss  # or the next callable runs while this graph is still alive

    def _backward_sum(
        self,
        terms: Sequence[tuple[int, str, Loss]],
        constant: tuple[float, ...],
        backward: Callable[..., object] | None,
        retain_graph: bool,
    ) -> None:
        """Constant weights and loss tensors: one backward of the weighted sum, as in plain training."""
        assert self._buffers is not None
        self._buffers.select(0)  # the weights are in the sum
        summands: dict[str, Tensor] = {}
        with torch.enable_grad():
            for index, name, term in terms:
                loss = evaluate(name, term)
                if self._can_be_summed(index, self._add_loss(index, loss), constant[index]):
                    summands[name] = loss.reshape(()) * constant[index]
            if summands:
                total = torch.stack([summand.double() for summand in summands.values()]).sum()
        if summands:
            run_backward(" + ".join(summands), total, backward, retain_graph)

    def _can_be_summed(self, index: int, value: Tensor, weight: float) -> bool:
        """Note that an objective contributes to the one row; not if its loss is not finite, for it would stay in."""
        assert self._buffers is not None
        # Nor where other ranks would wait for this one's backward.
        asks = self.nonfinite != "propagate" and not (self._decided_on_device(self._buffers) or self._buffers.ranks)
        if weight == 0 or (asks and not bool(value.isfinite())):
            return False
        self._contributed.add(index)
        return True

    def _add_loss(self, index: int, loss: Tensor) -> Tensor:
        value = value_of(loss.detach()).to(torch.float64).reshape(())
        self._loss_sums[index] = self._loss_sums[index] + value if index in self._loss_sums else value
        return value

    @torch.no_grad()
    def combine(self) -> StepReport:
        """Solve for the weights and write the shared direction into `p.grad`, adding to what is there.

        This closes the window: the next `backward` starts a new sum. With nothing new, returns the last report again.

        Raises:
            RuntimeError: nothing was ever handed to `backward`; a gradient is not finite under `nonfinite="raise"`; or
                the weighting did not return one finite weight per objective.
            ValueError: a loss ≤ 0 under a weighting that divides by it. The window stays open.

        On a GPU the last two are raised for an earlier step, once the host hears of it.
        """
        if not self._due:
            if self.report is None:
                raise RuntimeError("nothing to combine: call backward(losses) first")
            return self.report
        buffers = self._buffers
        assert buffers is not None
        self._read_mail()
        buffers.settle()
        buffers.average_replicas()
        count, device = len(self._names), buffers.device
        nan = constant_tensor((torch.nan,), torch.float64, device)[0]
        losses = torch.stack([self._loss_sums.get(k, nan).to(device, non_blocking=True) for k in range(count)])
        absent = tuple(k not in self._loss_sums for k in range(count))
        rules = self._rules(self.weighting)
        on_device = self._decided_on_device(buffers)
        decide = deferred.find_direction if on_device else direction.find_direction
        try:
            found = decide(buffers, losses, absent, rules, self._contributed)
        except NonFiniteError:
            self._drop_window()
            raise
        if found.usable:
            buffers.publish()
        self._drop_window()
        if self._nonfinite_counts.device != device:
            self._nonfinite_counts = self._nonfinite_counts.to(device)
        self._nonfinite_counts += found.nonfinite
        self.report = StepReport(
            objectives=self._names,
            losses=found.losses,
            weights=found.weights,
            gram=found.gram,
            squared_norm=found.squared_norm,
            clip_factor=found.clip_factor,
            nonfinite=found.nonfinite,
            absent=constant_tensor(absent, torch.bool, device).clone(),  # a report is the user's, a constant everyone's
            nonfinite_counts=self._nonfinite_counts.clone(),
            optimality_gap=found.gap,
            status=found.status,
            correction=found.correction,
            correction_status=found.correction_status,
        )
        self._tell(found, on_device)
        return self.report

    def _decided_on_device(self, buffers: GradientBuffers) -> bool:
        """Whether the device decides this step, and the host hears of it later."""
        return buffers.device_code is not None and self.nonfinite != "raise"

    def _tell(self, found: Direction, on_device: bool) -> None:
        """Warn of objectives left out: at once, or by a letter that `_read_mail` reads once it is here."""
        if on_device:
            verdict = found.status if found.bad_weights is None else found.bad_weights
            numbers = [found.nonfinite] if verdict is None else [found.nonfinite, verdict.reshape(1)]
            if verdict is not None or not self._warned:
                self._mailbox.post(numbers, (self._names, self.weighting, found.losses, found.gram))
        elif not self._warned and self.nonfinite == "skip":
            self._warn(found.nonfinite.tolist(), self._names)

    def _read_mail(self) -> None:
        """Warn, or raise, over what the device decided in earlier steps."""
        for (nonfinite, *verdict), (names, weighting, losses, gram) in self._mailbox.arrived():
            if not self._warned and self.nonfinite == "skip":
                self._warn(nonfinite, names)
            if verdict == [[True]] and type(weighting) is not MGDA:
                raise bad_weights(weighting, "values that are not finite", len(names))
            if verdict == [[Status.NONPOSITIVE_LOSS]]:
                require_positive_losses(gram, losses, names, weighting)

    def _warn(self, nonfinite: list[bool], names: tuple[str, ...]) -> None:
        if any(nonfinite):
            self._warned = True
            left_out = ", ".join(repr(name) for name, bad in zip(names, nonfinite, strict=True) if bad)
            warnings.warn(
                f"left objective {left_out} out of a step: its loss or gradient is not finite. Further cases are only "
                "counted, in report.nonfinite_counts. With a GradScaler use nonfinite='propagate'",
                RuntimeWarning,
                stacklevel=4,
            )

    @property
    def _names(self) -> tuple[str, ...]:
        assert self.objectives is not None
        return self.objectives

    def _terms(self, losses: Losses, objective: str | None) -> list[tuple[int, str, Loss]]:
        """(index, name, loss) in the order of the objectives; the first call fixes them."""
        named = by_name(losses, objective, self.objectives)
        if self.objectives is None:
            self.objectives = checked_names(list(named))
            self._nonfinite_counts = torch.zeros(len(named), dtype=torch.int64)
        return [(k, name, named[name]) for k, name in enumerate(self.objectives) if name in named]

    def _current_buffers(self, n_rows: int) -> GradientBuffers:
        """Buffers that fit the parameters as they are now; an open window moves over to new ones."""
        listed = dict.fromkeys(
            p for group in self.base.param_groups for p in group["params"]
        )  # torch allows repetition
        captured = self._buffers.touched() if self._buffers is not None and self._due else set()
        parameters = [p for p in listed if p.requires_grad or p in captured]  # frozen within a window: still part of it
        if not parameters:
            raise ValueError("no parameter of the base optimizer requires grad: nothing to optimize")
        if self._buffers is None or self._buffers.signature != signature(parameters, n_rows):
            ranks = ranks_of(self.process_group)
            if ranks is not None:
                ranks.agreed("the names or the order of the objectives", self._names)
            old, self._buffers = self._buffers if self._due else None, None  # freed first, unless it holds a window
            self._buffers = GradientBuffers(parameters, n_rows, ranks, shard_rows=self.shard_rows)
            if old is not None:
                self._buffers.migrate(old)
        return self._buffers

    def _drop_window(self) -> None:
        """Start a new window: nothing captured, nothing due."""
        if self._buffers is not None:
            self._buffers.drop()
        self._loss_sums: dict[int, Tensor] = {}  # objective index → sum of its losses in this window
        self._contributed: set[int] = set()  # objectives whose gradients the one row of constant weights holds
        self._due = False

    # what mogeo.wrapper asks for

    def prepare_step(self) -> None:
        """Combine, if that is still due."""
        if self._due:
            self.combine()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `p.grad`, and gradients that `backward` captured but no `combine` has used."""
        if not self.waiting:
            self._drop_window()
        self.base.zero_grad(set_to_none=set_to_none)

    def own_state(self) -> dict[str, Any]:
        """Objectives, counters, and the weighting's kind and state."""
        return {
            "objectives": list(self.objectives or ()),
            "nonfinite_counts": self._nonfinite_counts.tolist(),
            "weighting_kind": type(self.weighting).__name__,
            "weighting": getattr(self.weighting, "state_dict", dict)(),
        }

    def check_own_state(self, own: dict[str, Any]) -> None:
        """Raise ValueError if the state was saved for other objectives."""
        saved = tuple(own.get("objectives", ()))
        if saved and self.objectives is not None and saved != self.objectives:
            raise ValueError(
                f"the state was saved for the objectives {list(saved)}, but this one has {list(self.objectives)}. "
                f"Make it with objectives={list(saved)}, or load into its base to drop the weighting's state"
            )

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Restore objectives, counters and the weighting's state, and drop gradients captured so far."""
        self._reset()
        if not own.get("objectives"):
            return
        self.objectives = tuple(own["objectives"])
        self._nonfinite_counts = torch.tensor([int(count) for count in own["nonfinite_counts"]], dtype=torch.int64)
        kind = type(self.weighting).__name__
        if own["weighting_kind"] == kind:
            getattr(self.weighting, "load_state_dict", lambda state: None)(own["weighting"])
        elif own["weighting"]:
            warnings.warn(
                f"the state of a {own['weighting_kind']} was saved, and is not loaded into a {kind}", stacklevel=3
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> MultiObjectiveOptimizer:
        """A copy that shares the process group, which cannot be copied (nor pickled)."""
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weighting={self.weighting!r}, base={self.base!r})"


def _adds_exactly(term: Loss) -> bool:
    """Whether a weighted sum of such losses has exact enough gradients: a weight in bf16 is off by 0.2 %."""
    return isinstance(term, Tensor) and term.dtype in (torch.float32, torch.float64)
