"""MultiObjectiveOptimizer: capture → gram → weigh → combine → base.step().

Knows the order of things and no mathematics: rows are filled in `mogeo.gradients.stores`, multiplied by
`mogeo.geometry.ops`, weighed by `mogeo.weightings`; the manners of torch.optim are `mogeo.optimizer_wrapper`'s.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mogeo.compiled_code import outside_compiled_code
from mogeo.decide import on_device as deferred
from mogeo.decide import on_host as direction
from mogeo.decide.late_news import Mailbox
from mogeo.decide.on_host import Direction, NonFiniteError, Rules
from mogeo.decide.refresh import HeldWeights
from mogeo.decide.steering import Steering
from mogeo.geometry.constants import constant_tensor
from mogeo.geometry.exact_min_norm import Status
from mogeo.geometry.projection import MOST_BUCKETS
from mogeo.gradients.ranks import Group
from mogeo.gradients.store import Capture
from mogeo.gradients.stores import Captures, Holding
from mogeo.losses.named import Loss, Losses, by_name, checked_names, evaluate, in_order, run_backward
from mogeo.losses.pending import Call, Term, Window
from mogeo.losses.repeatable import Repeatable, without_autocast
from mogeo.losses.shared_graphs import shared_with_later
from mogeo.optimizer_wrapper import OptimizerWrapper
from mogeo.report import StepReport
from mogeo.weightings import MGDA, WeightingLike, bad_weights, require_positive_losses, resolve

# What is saved so that a run that goes on otherwise is told of it.
_SETTINGS = (
    "max_grad_norm", "nonfinite", "guarantee_descent", "refresh_every", "preference", "min_weight", "smoothing",
    "row_dtype", "host_rows", "release_rows", "sketch", "shard_rows",
)  # fmt: skip


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
        base: a `torch.optim.Optimizer`, or a list of several, each with parameters of its own (Muon for matrices and
            AdamW for the rest); these then are `base.bases`. Refused are those that need of gradients what a combined
            direction does not have (LBFGS, SparseAdam, AdaHessian, LOMO).
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
        refresh_every: solve for the weights at every T-th step only. In between, gradients are weighed by what the last
            solve found while autograd brings them: one backward of the weighted sum where losses are tensors. A
            guarantee of descent then is one for the steps that solve. Read once per solve from a GPU, which waits.
        preference: which objectives should gain more: positive numbers, by name or in the order of the objectives;
            only their ratios count, and equal ones change nothing. `mogeo.decide.steering.Steering` says how each
            weighting takes it.
        min_weight: a floor m < 1/K under the coefficients, which sum to one, so that no objective starves.
        smoothing: s < 1: weights are averaged over solves, λ ← sλ + (1 − s)w.
        row_dtype: keep rows in this dtype where gradients are wider, such as torch.bfloat16 for fp32. The direction
            keeps the gradients' dtype, in N elements of its own.
        host_rows: keep rows in pinned host memory, moved there while autograd goes on: K·N elements of the host's
            memory, and N of the GPU's for the direction. The host multiplies and combines them.
        release_rows: with `refresh_every`, give the memory of rows back after each solve.
        sketch: keep d numbers per objective in place of N: a random projection, from which the Gram matrix is
            estimated to ‖g_i‖‖g_j‖·√(2/d), and after the solve one weighted backward for the direction, of exact
            gradients. Losses that are callables are evaluated once more for it, with the same random numbers; of
            tensors the graph is kept until then. Best with `refresh_every`.
        shard_rows: with several processes and plain (replicated) parameters, average each gradient over ranks as soon
            as it is complete, and keep a piece of it per rank: rows of N + K·N/ranks elements instead of K·N. For use
            inside DDP's `no_sync()`, or without DDP.

    Parameters in groups with an entry `"multi_objective": False` (heads of single tasks, value heads) stay out of the
    Gram matrix and take the mean of all objectives' gradients, 1/K Σ_k g_k, unweighted. `max_grad_norm` then clips
    direction and mean together. The host decides such steps.

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
        TypeError: `base` is no `torch.optim.Optimizer`, or one that cannot follow a direction.
        ValueError: an argument does not fit, or a parameter is in two bases.
    """

    _transient = ("_captures", "_mailbox", "_window")

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        weighting: WeightingLike = "mgda-decoupled",
        *,
        objectives: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        guarantee_descent: bool = False,
        refresh_every: int = 1,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        min_weight: float = 0.0,
        smoothing: float = 0.0,
        row_dtype: torch.dtype | None = None,
        host_rows: bool = False,
        release_rows: bool = False,
        sketch: int | None = None,
        process_group: Group | None = None,
        shard_rows: bool = False,
    ) -> None:
        super().__init__(base)
        if nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"nonfinite={nonfinite!r}: choose 'skip', 'raise' or 'propagate'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: pass a positive norm, or None for no clipping")
        if row_dtype is not None and not row_dtype.is_floating_point:
            raise ValueError(f"row_dtype={row_dtype}: choose a floating dtype, such as torch.bfloat16")
        if sketch is not None and not 1 <= sketch <= MOST_BUCKETS:
            raise ValueError(
                f"sketch={sketch}: pass how many numbers to keep per objective, such as 262144, {MOST_BUCKETS} at most"
            )
        if sketch is not None and (row_dtype is not None or host_rows or shard_rows):
            raise ValueError(
                f"sketch={sketch} with row_dtype, host_rows or shard_rows: there are no rows then, leave out one"
            )
        self._weighting: Callable[..., Any] = resolve(weighting)
        self.objectives = None if objectives is None else checked_names(objectives)
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.guarantee_descent = guarantee_descent
        self.preference = dict(preference) if isinstance(preference, Mapping) else preference
        self.min_weight = min_weight
        self.smoothing = smoothing
        self.row_dtype = row_dtype
        self.host_rows = host_rows
        self.release_rows = release_rows
        self.sketch = sketch
        self.process_group = process_group
        self.shard_rows = shard_rows
        self._held = HeldWeights(refresh_every)
        self._steering: Steering | None = None  # once objectives have an order
        Steering(None if preference is None else in_order(preference, None), min_weight, smoothing)  # checks them
        self.report: StepReport | None = None
        self._nonfinite_counts = torch.zeros(len(self.objectives or ()), dtype=torch.int64)
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        """Forget rows, window and memory: they are rebuilt by the next `backward`."""
        self._captures = Captures()
        self._mailbox = Mailbox()
        self._window: Window | None = None

    @property
    def weighting(self) -> Callable[..., Any]:
        """The resolved weighting. Assign a name or callable to change it, between steps; the next step then solves."""
        return self._weighting

    @weighting.setter
    def weighting(self, weighting: WeightingLike) -> None:
        resolved = resolve(weighting)
        if self._window is not None and self._window.weights != self._rules(resolved).constant():
            raise RuntimeError(
                f"gradients captured for {self._weighting!r} do not suit {resolved!r}: one of them sums them during "
                "backward. Change the weighting after step() or zero_grad()"
            )
        self._weighting = resolved
        self._held.forget()
        self._steering = None

    @property
    def refresh_every(self) -> int:
        """T: the weights are solved at every T-th step. Assign another number at any time."""
        return self._held.refresh_every

    @refresh_every.setter
    def refresh_every(self, refresh_every: int) -> None:
        self._held.refresh_every = HeldWeights(refresh_every).refresh_every

    def _rules(self, weighting: Callable[..., Any], held: tuple[float, ...] | None = None) -> Rules:
        if self._steering is None and (self.preference is not None or self.min_weight or self.smoothing):
            preference = None if self.preference is None else in_order(self.preference, self._names)
            self._steering = Steering(preference, self.min_weight, self.smoothing)
        return Rules(
            self._names, weighting, self.nonfinite, self.max_grad_norm, self.guarantee_descent, self._steering, held
        )

    @outside_compiled_code
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
                `retain_graph=True` where losses share a graph. It must leave `p.grad` alone: large gradients are moved
                to their rows while it runs, small ones afterwards.
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
            window = self._window or self._opened()
            rows = self._captures.fit(
                self.base.param_groups, self._names, window, self._holding, is_open=self._window is not None
            )
            if window.calls is not None:
                terms = [(k, name, t if isinstance(t, Tensor) else Repeatable(t)) for k, name, t in terms]
            call = Call(terms, backward, bool(retain_graph))
            if window.calls is not None:
                window.calls.append(call)
            self._run(call, rows, window)
            plain = self._captures.plain
            touched = any(rows.flags()) or (plain is not None and any(plain.flags()))
            if not touched and (window.weights is None or window.contributed):
                raise ValueError(
                    "no loss reached a parameter of the base optimizer: was the model copied, or its parameters "
                    "replaced, after the optimizer was made?" + rows.ranks_hint()
                )
        except BaseException:
            self._drop_window()
            self.objectives = known
            raise
        self._window = window

    @property
    def _holding(self) -> Holding:
        return Holding(
            self.process_group, self.shard_rows, self.row_dtype, self.host_rows, self.release_rows, self.sketch
        )

    def _opened(self) -> Window:
        """A new window, with the weights that are known for it."""
        weights = self._rules(self.weighting).constant()
        held = self._held.known() if weights is None else None
        solves = weights is None and held is None
        return Window(weights or held, held is not None, [] if solves and self.sketch is not None else None)

    def _run(self, call: Call, rows: Capture, window: Window) -> None:
        """Forward and backward of every loss of a call, gradients into rows, or weighed into the direction."""
        with self._captures.capturing(rows, len(self._names)):
            exactly = self._captures.plain is None and all(_adds_exactly(term) for _, _, term in call.terms)
            if window.weights is not None and exactly:
                self._backward_sum(call, rows, window)
            else:
                self._backward_each(call, rows, window)

    def _backward_each(self, call: Call, rows: Capture, window: Window) -> None:
        """One backward per objective, into its own row, or weighed into the direction."""
        tensors = [term for _, _, term in call.terms if isinstance(term, Tensor)]
        kept = call.retain_graph or window.calls is not None
        shared = iter([True] * len(tensors) if kept else shared_with_later(tensors))
        for index, name, term in call.terms:
            needed_later = isinstance(term, Tensor) and next(shared)
            if window.weights is None:
                rows.select(index)
            else:
                rows.select(None, window.weights[index])
            loss = evaluate(name, term)
            # FSDP gathers parameters for a forward, and lets go of them in its backward. One of weight 0 leads nowhere.
            if self._wanted(index, window.add_loss(index, loss), rows, window) or rows.sharded:
                run_backward(name, loss, call.backward, call.retain_graph or needed_later)
            self._captures.collect(rows)
            del loss  # or the next callable runs while this graph is still alive

    def _backward_sum(self, call: Call, rows: Capture, window: Window) -> None:
        """Known weights and loss tensors: one backward of the weighted sum, as in plain training."""
        assert window.weights is not None
        rows.select(None)  # the weights are in the sum
        losses: dict[str, Tensor] = {}
        summands: dict[str, Tensor] = {}
        with torch.enable_grad():
            for index, name, term in call.terms:
                losses[name] = evaluate(name, term).reshape(())
                if self._wanted(index, window.add_loss(index, losses[name]), rows, window):
                    summands[name] = losses[name] * window.weights[index]
            if not summands and rows.sharded:  # as in `_backward_each`
                rows.select(None, 0.0)
                summands = losses
            if summands:
                total = torch.stack([summand.double() for summand in summands.values()]).sum()
        if summands:
            run_backward(" + ".join(summands), total, call.backward, call.retain_graph)
        self._captures.collect(rows)

    def _wanted(self, index: int, value: Tensor, rows: Capture, window: Window) -> bool:
        """Whether a loss is differentiated: not if it is not finite and its gradient would be summed with others'."""
        plain = self._captures.plain
        if window.weights is None and plain is None:
            return True
        if window.weights is not None and window.weights[index] == 0 and plain is None:
            return False
        # Not where other ranks, or FSDP, would wait for this one's backward.
        asks = self.nonfinite != "propagate" and not (self._decided_on_device(rows) or rows.ranks or rows.sharded)
        if asks and not bool(value.isfinite()):
            return False
        if window.weights is not None and window.weights[index] != 0:
            window.contributed.add(index)
        return True

    @outside_compiled_code
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
        window = self._window
        if window is None:
            if self.report is None:
                raise RuntimeError("nothing to combine: call backward(losses) first")
            return self.report
        self._read_mail()
        try:
            found = self._find_direction(window)
        except NonFiniteError:
            self._drop_window()
            raise
        decided = found.decision
        buffers = self._captures.buffers
        assert buffers is not None
        if decided.usable:
            self._captures.publish()
        on_device = window.calls is None and self._decided_on_device(buffers)
        self._drop_window()
        absent = constant_tensor(window.absent(len(self._names)), torch.bool, buffers.device)
        if window.held:
            self._held.used()
        elif self.refresh_every > 1 and decided.usable and not decided.poisoned:
            self._held.solved(decided.weights, ~(absent | decided.nonfinite))
        if self.release_rows:
            self._captures.release_rows()
        if self._nonfinite_counts.device != buffers.device:
            self._nonfinite_counts = self._nonfinite_counts.to(buffers.device)
        self._nonfinite_counts += decided.nonfinite
        self.report = StepReport(
            objectives=self._names,
            losses=decided.losses,
            weights=decided.weights,
            gram=decided.gram,
            squared_norm=found.squared_norm,
            clip_factor=found.clip_factor,
            nonfinite=decided.nonfinite,
            absent=absent.clone(),  # a report is the user's, a constant everyone's
            nonfinite_counts=self._nonfinite_counts.clone(),
            optimality_gap=decided.gap,
            status=decided.status,
            correction=decided.correction,
            correction_status=decided.correction_status,
            age=self._held.age if window.held else 0,
        )
        self._tell(decided, on_device)
        return self.report

    def _find_direction(self, window: Window) -> Direction:
        """Weights, if they are not known, and the direction in the buffers."""
        buffers, plain = self._captures.buffers, self._captures.plain
        assert buffers is not None
        losses, absent = window.losses(len(self._names), buffers.device), window.absent(len(self._names))
        rules = self._rules(self.weighting, window.weights if window.held else None)
        if window.calls is not None:
            return self._find_by_sketches(window, losses, absent, rules)
        self._captures.complete()
        if self._decided_on_device(buffers):
            return deferred.find_direction(buffers, losses, absent, rules, window.contributed)
        return direction.find_direction(buffers, losses, absent, rules, window.contributed, plain)

    def _find_by_sketches(self, window: Window, losses: Tensor, absent: tuple[bool, ...], rules: Rules) -> Direction:
        """Weights from the sketches; then every call once more, its gradients weighed into the direction."""
        buffers, plain, sketches = self._captures.buffers, self._captures.plain, self._captures.sketches
        assert buffers is not None
        assert sketches is not None
        assert window.calls is not None
        if not all(parameter.requires_grad for parameter in sketches.touched()):
            raise RuntimeError(
                "a parameter was frozen between backward() and step(), and the backward that sketch= takes once more "
                "would miss it: freeze it after step() or zero_grad()"
            )
        sketches.average_replicas()
        decided = direction.decide(sketches, losses, absent, rules)
        again = Window(None, held=False, calls=None)
        if decided.usable:
            # What is not finite gets there by itself.
            weights = torch.ones_like(decided.weights) if decided.poisoned else decided.weights
            again.weights = tuple(weights.tolist())
            if plain is not None:
                plain.drop()
            try:
                with torch.enable_grad(), without_autocast():
                    while window.calls:
                        self._run(window.calls.pop(0), buffers, again)
            except BaseException:
                self._drop_window()  # as in backward: half a sum is no direction
                raise
            self._captures.complete()
        return direction.summed(buffers, decided, absent, rules, plain)

    def _decided_on_device(self, rows: Capture) -> bool:
        """Whether the device decides this step, and the host hears of it later."""
        return rows.device_code is not None and self.nonfinite != "raise" and self._captures.plain is None

    def _tell(self, found: direction.Decision, on_device: bool) -> None:
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
            if verdict == [[Status.NONPOSITIVE_LOSS]] or (verdict == [[True]] and isinstance(weighting, MGDA)):
                require_positive_losses(gram, losses, names, weighting)
            elif verdict == [[True]]:
                raise bad_weights(weighting, "values that are not finite", len(names))

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

    def _terms(self, losses: Losses, objective: str | None) -> list[Term]:
        """(index, name, loss) in the order of the objectives; the first call fixes them."""
        named = by_name(losses, objective, self.objectives)
        if self.objectives is None:
            self.objectives = checked_names(list(named))
            self._nonfinite_counts = torch.zeros(len(named), dtype=torch.int64)
        return [(k, name, named[name]) for k, name in enumerate(self.objectives) if name in named]

    def _drop_window(self) -> None:
        """Start a new window: nothing captured, nothing due."""
        self._captures.drop()
        self._window = None

    # what mogeo.optimizer_wrapper asks for

    def prepare_step(self) -> None:
        """Combine, if that is still due."""
        if self._window is not None:
            self.combine()

    @property
    def has_prepared(self) -> bool:
        """Whether anything was ever combined."""
        return self.report is not None

    @outside_compiled_code
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
            "held": self._held.state_dict(),
            "steering": None if self._steering is None else self._steering.state_dict(),
            "settings": {name: _plain_value(getattr(self, name)) for name in _SETTINGS},
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
        """Restore objectives, counters, held weights and the weighting's state; drop gradients captured so far.

        Settings stay as they are here; where others were saved, a warning says so.
        """
        self._reset()
        self._held.forget()
        self._steering = None
        if not own.get("objectives"):
            return
        self.objectives = tuple(own["objectives"])
        self._nonfinite_counts = torch.tensor([int(count) for count in own["nonfinite_counts"]], dtype=torch.int64)
        kind = type(self.weighting).__name__
        if own["weighting_kind"] == kind:
            getattr(self.weighting, "load_state_dict", lambda state: None)(own["weighting"])
            if own.get("held"):
                self._held.load_state_dict(own["held"])
            steering = self._rules(self.weighting).steering
            if own.get("steering") and steering is not None:
                steering.load_state_dict(own["steering"])
        elif own["weighting"]:
            warnings.warn(
                f"the state of a {own['weighting_kind']} was saved, and is not loaded into a {kind}", stacklevel=3
            )
        here = {name: _plain_value(getattr(self, name)) for name in _SETTINGS}
        others = {name: value for name, value in own.get("settings", here).items() if here.get(name, value) != value}
        if others:
            saved = ", ".join(f"{name}={value!r}" for name, value in others.items())
            warnings.warn(f"the state was saved with {saved}; this optimizer keeps its own settings", stacklevel=3)

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


def _plain_value(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value
