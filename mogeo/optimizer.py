"""MultiObjectiveOptimizer: capture → gram → weigh → combine → base.step().

Knows the order of things and no mathematics. How a step is made is the business of `mogeo.steps`, what lasts from step
to step lies in `mogeo.state`, the manners of torch.optim are those of `mogeo.optimizer_wrapper`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from mogeo import settings
from mogeo.compiled_code import outside_compiled_code
from mogeo.decide.rules import NonFiniteError
from mogeo.gradients.memory import Memory
from mogeo.gradients.ranks import Group
from mogeo.gradients.stores import Captures, Wanted
from mogeo.losses.named import Call, Losses, Term, by_name, checked_names
from mogeo.optimizer_wrapper import OptimizerWrapper
from mogeo.report import StepReport
from mogeo.settings import MemoryKeyword, Setting, memory_of
from mogeo.state import State
from mogeo.steps.choice import opened_step
from mogeo.weightings import WeightingLike, resolve


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

    A `p.grad` is a view of the first row, which lasts until the next `backward`, and keeps all K rows in memory for as
    long as anything refers to it. To keep or save a gradient, clone it.

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
            where a gradient is not finite, unless `track` or `guarantee_descent` keeps them apart. A step in which
            nobody is left is no step: the base does not take one.
        memory: how gradients are kept: `mogeo.Rows(dtype=…, device=…, scatter=…)` or `mogeo.Sketch(d)`. Rows take K·N
            elements in the parameters' dtypes. Weightings whose weights are constant (uniform, linear) take N.
        guarantee_descent: take the direction nearest to d that hurts no objective to first order, ⟨v, g_k⟩ ≥ 0 for all
            k (`mogeo.descent_weights`). Fixed weights and GroupDRO then need K rows and a Gram matrix as well.
        track: β, 0.5 < β < 1: weights, guarantee and report follow the Gram matrix of *mean* gradients, in place of
            that of this step's mini-batch, which is mostly noise (docs/geometry.md). Per objective, an exponential
            average of sketches of its gradients is kept, and the noise that is left in it is taken out. Losses are
            averaged alike. What cannot be told from noise moves no weights: they are those of the preference then, or
            equal; fixed weights stay as they are. Gradients are kept apart, whatever the weighting. "auto": each
            objective's window follows its noise scale. None: this step's mini-batch decides, as in the papers.
        weigh_by: which gradients decide where there is `track`. "mean": as said there. "mini-batch": weights and
            guarantee are those without `track`, and the report alone tells of mean gradients, such as whom a method of
            the papers hurts in expectation. Gradients are kept apart all the same, so that one that is not finite is
            left out alone.
        refresh_every: T: solve for the weights at every T-th step only. In between, gradients are weighed by what the
            last solve found while autograd brings them: one backward of the weighted sum where losses are tensors. A
            guarantee of descent then is one for the steps that solve. A GPU is waited for once per solve.
        preference: which objectives should gain more: positive numbers, by name or in the order of the objectives;
            only their ratios count, and equal ones change nothing. `mogeo.decide.steering.Steering` says how each
            weighting takes it.
        min_weight: a floor m < 1/K under the coefficients, which sum to one, so that no objective starves.
        smoothing: s < 1: weights are averaged over solves, λ ← sλ + (1 − s)w.
        gram_by_parameter: report each parameter's own Gram matrix as well, to see where objectives conflict
            (`report.cosines_by_parameter`): one more pass over the rows of a step that solves.
        process_group: with several processes, those that hold this model between them; by default all of them.
        row_dtype, host_rows, shard_rows, sketch: other ways to write `memory=Rows(dtype=…)`, `Rows(device="cpu")`,
            `Rows(scatter=True)` and `Sketch(d)`.

    All but `base`, `objectives` and `process_group` can be assigned between steps, as attributes. They act from the
    next step on, and `state_dict` records them.

    Parameters in groups with an entry `"multi_objective": False` (heads of single tasks, value heads) stay out of the
    Gram matrix and take the mean of all objectives' gradients, 1/K Σ_k g_k, unweighted. `max_grad_norm` then clips
    direction and mean together. Parameters that no group has get the plain sum of the gradients of all losses, as
    autograd gives it.

    With several processes, losses and gradients are averaged over ranks, and every rank decides the same from the same
    numbers (docs/distributed.md). On a GPU the host never waits for a step, and hears of what went wrong at the next
    `backward` or `combine` (docs/guide.md, "On a GPU").

    Raises:
        TypeError: `base` is no `torch.optim.Optimizer`, or one that cannot follow a direction; an argument has another
            type.
        ValueError: an argument does not fit, two do not fit each other, or a parameter is in two bases.
    """

    max_grad_norm = Setting(settings.norm_or_none, "Norm to which the direction is clipped, or None.")
    nonfinite = Setting(settings.reaction, "'skip', 'raise' or 'propagate'.")
    guarantee_descent = Setting(settings.true_or_false, "Whether the direction must hurt no objective.")
    track = Setting(settings.decay_or_none, "Decay of averages over steps, 'auto', or None.")
    weigh_by = Setting(settings.mean_or_mini_batch, "Which gradients decide with `track`: 'mean' or 'mini-batch'.")
    refresh_every = Setting(settings.whole_number, "T: the weights are solved at every T-th step.")
    preference = Setting(settings.preference, "Positive numbers by name or in order, or None.")
    min_weight = Setting(settings.floor, "A floor under the coefficients.")
    smoothing = Setting(settings.share, "Share of the past in the weights.")
    gram_by_parameter = Setting(settings.true_or_false, "Whether reports tell each parameter's own Gram matrix.")
    memory = Setting(settings.memory, "How gradients are kept: `mogeo.Rows` or `mogeo.Sketch`.")
    row_dtype, host_rows, shard_rows, sketch = MemoryKeyword(), MemoryKeyword(), MemoryKeyword(), MemoryKeyword()

    def __init__(
        self,
        base: Optimizer | Sequence[Optimizer],
        weighting: WeightingLike = "mgda-decoupled",
        *,
        objectives: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        memory: Memory | None = None,
        guarantee_descent: bool = False,
        track: float | Literal["auto"] | None = None,
        weigh_by: Literal["mean", "mini-batch"] = "mean",
        refresh_every: int = 1,
        preference: Mapping[str, float] | Sequence[float] | None = None,
        min_weight: float = 0.0,
        smoothing: float = 0.0,
        gram_by_parameter: bool = False,
        process_group: Group | None = None,
        row_dtype: torch.dtype | None = None,
        host_rows: bool = False,
        shard_rows: bool = False,
        sketch: int | None = None,
    ) -> None:
        super().__init__(base)
        given = {
            "max_grad_norm": max_grad_norm,
            "nonfinite": nonfinite,
            "memory": memory_of(memory, row_dtype=row_dtype, host_rows=host_rows, shard_rows=shard_rows, sketch=sketch),
            "guarantee_descent": guarantee_descent,
            "track": track,
            "weigh_by": weigh_by,
            "refresh_every": refresh_every,
            "preference": preference,
            "min_weight": min_weight,
            "smoothing": smoothing,
            "gram_by_parameter": gram_by_parameter,
        }
        checked = {name: getattr(type(self), name).check(name, value) for name, value in given.items()}
        if weigh_by != "mean" and track is None:
            raise ValueError(
                f"weigh_by={weigh_by!r} says what becomes of track=, which is None: pass track=0.95 as well"
            )
        names = None if objectives is None else checked_names(objectives)
        self._state = State(resolve(weighting), names, checked, settings.group_or_none(process_group))
        if names is not None:
            self._state.rules().constant()  # tells what does not fit these objectives

    def setting(self, name: str) -> Any:
        """A setting by its name."""
        return self._state.settings[name]

    def change_setting(self, name: str, value: Any) -> None:
        """Change a setting to a value that was checked; the same as to assign it."""
        self._state.change(name, value)

    @property
    def weighting(self) -> Callable[..., Any]:
        """The resolved weighting. Assign a name or callable to change it, between steps; the next step then solves."""
        return self._state.weighting

    @weighting.setter
    def weighting(self, weighting: WeightingLike) -> None:
        self._state.change("weighting", resolve(weighting))

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """Names in order, or None before the first `backward`."""
        return self._state.objectives

    @property
    def process_group(self) -> Group | None:
        """The processes that hold this model between them; None for all."""
        return self._state.process_group

    @property
    def report(self) -> StepReport | None:
        """Of the last `combine`."""
        return self._state.report

    @property
    def _captures(self) -> Captures:
        return self._state.captures

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
                once. None, or a name left out of a mapping, stands for an objective that this batch has no examples
                of: absent from all calls of a step, it has weight 0 there, and the report counts it.
            objective: the name that a single loss belongs to.
            backward: what to call instead of `loss.backward()`, such as `accelerator.backward`. It is passed
                `retain_graph=True` where losses share a graph. It must leave `p.grad` alone: large gradients are moved
                to their rows while it runs, small ones afterwards.
            retain_graph: True keeps every graph beyond this call. By default, what no loss of this call needs is freed.

        Raises:
            ValueError: a name is unknown, or a loss is not a scalar that depends on a parameter.
            TypeError: a loss is neither tensor nor callable, or `backward` takes no `retain_graph` although one is
                needed.

        If anything raises while gradients are captured, those of this step are dropped, and the base's parameters keep
        the `p.grad` that they had.
        On a GPU this may raise for an earlier step as well, as `combine` does, before anything is captured.
        """
        state = self._state
        state.news.read()
        known = state.objectives
        try:
            call = Call(self._terms(losses, objective), backward, bool(retain_graph))
            rules, memory = state.rules(), state.settings["memory"]
            step = state.step or opened_step(rules, state.held, memory)
            wanted = Wanted(lambda: self.base.param_groups, state.names, memory, state.process_group)
            step.take(call, state.captures, wanted, rules, is_open=state.step is not None)
        except BaseException:
            state.drop_step()
            if known is None:
                state.forget_objectives()
            raise
        state.step, state.unusable = step, False

    def _terms(self, losses: Losses, objective: str | None) -> list[Term]:
        """The losses that there are, in the order of the objectives; the first call fixes that."""
        state = self._state
        named = by_name(losses, objective, state.objectives)
        if state.objectives is None:
            state.objectives = checked_names(list(named))
            state.begin_counting()
        losses_in_order = [(k, name, named.get(name)) for k, name in enumerate(state.names)]
        return [Term(k, name, loss) for k, name, loss in losses_in_order if loss is not None]

    @outside_compiled_code
    @torch.no_grad()
    def combine(self) -> StepReport:
        """Solve for the weights and write the shared direction into `p.grad`, adding to what is there.

        The next `backward` then starts a new sum. With nothing new, returns the last report again.

        Raises:
            RuntimeError: nothing was ever handed to `backward`; a gradient is not finite under `nonfinite="raise"`; or
                the weighting did not return one finite weight per objective.
            ValueError: a loss ≤ 0 under a weighting that divides by it.

        Where the weights are at fault, nothing is lost: set another `weighting`, and combine again. If anything else
        raises, or interrupts, what was captured is dropped, and `p.grad` stays as it was. On a GPU the weighting's
        faults are raised for an earlier step, once the host hears of it.
        """
        state = self._state
        step = state.step
        if step is None:
            if state.report is None:
                raise RuntimeError("nothing to combine: call backward(losses) first")
            return state.report
        state.news.read()
        rules = state.rules()
        try:
            found = step.finish(state.captures, rules)
            if found.decision.usable:
                state.captures.publish()
        except BaseException as error:
            if not step.intact or isinstance(error, NonFiniteError) or not isinstance(error, Exception):
                state.drop_step()
            raise
        state.drop_step()
        report = state.report = state.reported(step, found, self.base.param_groups)
        state.unusable = not found.decision.usable
        state.news.tell(found.decision, rules, on_device=found.by_device)
        return report

    # What mogeo.optimizer_wrapper asks for.

    def prepare_step(self) -> bool:
        """Combine, if that is still due; whether the base optimizer is to step."""
        state = self._state
        if state.step is not None:
            self.combine()
        unusable, state.unusable = state.unusable, False
        return not unusable

    @property
    def has_prepared(self) -> bool:
        """Whether anything was ever combined."""
        return self._state.report is not None

    @outside_compiled_code
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `p.grad`, and gradients that `backward` captured but no `combine` has used."""
        if not self.waiting:
            self._state.drop_step()
        self.base.zero_grad(set_to_none=set_to_none)

    def own_state(self) -> dict[str, Any]:
        """Objectives, counters, settings, and the weighting's kind and state."""
        return self._state.state_dict()

    def check_own_state(self, own: dict[str, Any]) -> None:
        """Raise ValueError if the state was saved for other objectives."""
        self._state.check(own)

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Restore what `own_state` returned; drop gradients captured so far."""
        self._state.load_state_dict(own)

    def __deepcopy__(self, memo: dict[int, Any]) -> MultiObjectiveOptimizer:
        """A copy that shares the process group, which cannot be copied (nor pickled)."""
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weighting={self.weighting!r}, base={self.base!r})"
