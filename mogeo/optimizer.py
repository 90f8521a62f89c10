"""MultiObjectiveOptimizer: capture → gram → weigh → combine → base.step(), with the manners of torch.optim.

Knows the order of things and no mathematics: rows are filled by `mogeo.buffers`, multiplied by `mogeo.ops`, weighed by
`mogeo.weightings`. Parameters, their groups, state and learning rates belong to the base optimizer alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mogeo import ops
from mogeo.buffers import GradientBuffers, signature
from mogeo.graphs import shared_with_later
from mogeo.objectives import Loss, Losses, by_name, checked_names, evaluate, run_backward
from mogeo.report import StepReport
from mogeo.weightings import WeightingLike, require_positive_losses, resolve

_STATE_KEY = "mogeo"  # inside param_groups[0]: the one place of a state_dict that distributed checkpoints carry along


class MultiObjectiveOptimizer(Optimizer):
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

    Attributes:
        base: the wrapped optimizer.
        weighting: the resolved weighting.
        objectives: names in order, or None before the first `backward`.
        report: `StepReport` of the last `combine`, or None.

    Raises:
        TypeError: `base` is no `torch.optim.Optimizer`, or one that cannot be wrapped.
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        base: Optimizer,
        weighting: WeightingLike = "mgda-decoupled",
        *,
        objectives: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
    ) -> None:
        _check_base(base)
        if nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"nonfinite={nonfinite!r}: choose 'skip', 'raise' or 'propagate'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: pass a positive norm, or None for no clipping")
        # Optimizer.__init__ installs the hook tables; what it writes about parameters goes to a stand-in and is
        # forgotten.
        self.base = cast(Optimizer, SimpleNamespace(add_param_group=lambda group: None))
        super().__init__([torch.empty(0)], {})
        self.base = base
        self.weighting = resolve(weighting)
        self.objectives = None if objectives is None else checked_names(objectives)
        self.max_grad_norm = max_grad_norm
        self.nonfinite = nonfinite
        self.report: StepReport | None = None
        self._nonfinite_counts: list[int] = [0] * len(self.objectives or ())
        self._warned = False
        self._reset()

    def _reset(self) -> None:
        """Forget buffers and window: they are rebuilt by the next `backward`."""
        self._buffers: GradientBuffers | None = None
        self._loss_sums: dict[int, Tensor] = {}  # objective index → sum of its losses in this window
        self._due = False

    # ------------------------------------------------------------------------------------------------ gradients

    def backward(
        self,
        losses: Losses,
        *,
        objective: str | None = None,
        backward: Callable[..., object] | None = None,
        retain_graph: bool | None = None,
    ) -> None:
        """Run backward for every objective, adding each gradient to the objective's own row. Replaces
        `loss.backward()`.

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
        were.
        """
        _refuse_distributed()
        terms = self._terms(losses, objective)
        tensors = [term for _, _, term in terms if isinstance(term, Tensor)]
        keep = iter([True] * len(tensors) if retain_graph else shared_with_later(tensors))
        constant = self._constant_weights()
        buffers = self._current_buffers(1 if constant is not None else len(self._names))
        try:
            with buffers.capturing():
                for index, name, term in terms:
                    retain = next(keep) if isinstance(term, Tensor) else bool(retain_graph)
                    loss = evaluate(name, term)
                    value = loss.detach().to(torch.float64).reshape(())
                    if constant is None:
                        buffers.select(index)
                        run_backward(name, loss, backward, retain)
                    elif self.nonfinite == "propagate" or bool(value.isfinite()):
                        run_backward(name, loss * constant[index].item(), backward, retain)
                    previous = self._loss_sums.get(index)
                    self._loss_sums[index] = value if previous is None else previous + value
        except BaseException:
            self._drop_window()
            raise
        self._due = True

    @torch.no_grad()
    def combine(self) -> StepReport:
        """Solve for the weights and write the shared direction into `p.grad`, adding to what is there; close the
        window.

        With nothing new since the last `combine`, returns its report again.

        Raises:
            RuntimeError: nothing was ever handed to `backward`; a gradient is not finite under `nonfinite="raise"`; or
                the weighting returned weights that are not finite.
            ValueError: a loss ≤ 0 under a weighting that divides by it. The window stays open.
        """
        if not self._due:
            if self.report is None:
                raise RuntimeError("nothing to combine: call backward(losses) first")
            return self.report
        buffers = self._buffers
        assert buffers is not None
        buffers.settle()
        device = buffers.blocks[0].device if buffers.blocks else torch.device("cpu")
        nan = torch.tensor(torch.nan, dtype=torch.float64)
        losses = torch.stack([self._loss_sums.get(k, nan).to(device) for k in range(len(self._names))])
        absent = torch.tensor([k not in self._loss_sums for k in range(len(self._names))], device=device)
        if self._constant_weights() is None and getattr(self.weighting, "needs_gram", True):
            report = self._combine_by_gram(buffers, losses, absent)
        else:
            report = self._combine_by_losses(buffers, losses, absent)
        self._due = False
        self._loss_sums = {}
        self.report = report
        return report

    def _combine_by_gram(self, buffers: GradientBuffers, losses: Tensor, absent: Tensor) -> StepReport:
        gram = torch.stack([ops.gram(block).to(losses.device) for block in buffers.blocks]).sum(0)
        nonfinite = ~absent & ~(losses.isfinite() & gram.diagonal().isfinite())
        left_out = absent | nonfinite
        self._note_nonfinite(nonfinite)
        gap = status = None
        if bool(nonfinite.any()) and self.nonfinite == "propagate":
            weights = torch.full_like(losses, torch.nan)
        elif bool(left_out.all()):
            weights = torch.zeros_like(losses)
        else:
            seen_gram, seen_losses = gram, losses
            if bool(left_out.any()):
                seen_gram = gram.masked_fill(left_out[:, None] | left_out[None, :], 0.0)
                seen_losses = losses.masked_fill(left_out, losses[~left_out].mean().item())
            weights, gap, status = self._weigh(seen_gram, seen_losses)
            weights = weights.masked_fill(left_out, 0.0)
        used = weights != 0
        squared_norm = weights[used] @ gram[used][:, used] @ weights[used]
        clip = self._clip_factor(squared_norm)
        if bool(left_out.all()) and not bool(weights.isnan().any()):
            buffers.drop()
        else:
            for block in buffers.blocks:
                ops.combine(block, weights * clip, out=block[0])
            buffers.publish()
        return self._make_report(losses, weights, gram, squared_norm, clip, nonfinite, absent, gap, status)

    def _combine_by_losses(self, buffers: GradientBuffers, losses: Tensor, absent: Tensor) -> StepReport:
        """For weightings that need no Gram. Constant ones were applied during backward: row 0 is the direction."""
        nonfinite = ~absent & ~losses.isfinite()
        left_out = absent | nonfinite
        weights = self._constant_weights()
        if weights is not None:
            weights = weights.to(losses.device).masked_fill(left_out, 0.0)
        elif bool(left_out.all()):
            weights = torch.zeros_like(losses)
        else:
            seen = losses.masked_fill(left_out, losses[~left_out].mean().item()) if bool(left_out.any()) else losses
            weights, _, _ = self._weigh(None, seen)
            weights = weights.masked_fill(left_out, 0.0)
            for block in buffers.blocks:
                ops.combine(block, weights, out=block[0])
        squared_norm = torch.stack([ops.gram(block[:1]).to(losses.device) for block in buffers.blocks]).sum()
        if not bool(squared_norm.isfinite()):  # some gradient is not finite, and they are summed already
            nonfinite = ~absent
        self._note_nonfinite(nonfinite)
        clip = self._clip_factor(squared_norm)
        if bool((absent | nonfinite).all()) and self.nonfinite != "propagate":
            weights = torch.zeros_like(weights)
            buffers.drop()
        else:
            if clip < 1:
                for block in buffers.blocks:
                    block[0].mul_(clip.item())
            buffers.publish()
        return self._make_report(losses, weights, None, squared_norm, clip, nonfinite, absent, None, None)

    def _weigh(self, gram: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if gram is not None and getattr(self.weighting, "needs_positive_losses", False):
            require_positive_losses(gram, losses, self._names, self.weighting)
        solve = getattr(self.weighting, "solve", None)
        if solve is not None:
            point: ops.MinNorm = solve(gram, losses)
            return point.weights, point.gap, point.status
        weights = torch.as_tensor(self.weighting(gram, losses), dtype=torch.float64, device=losses.device)
        if weights.shape != losses.shape or not bool(weights.isfinite().all()):
            raise RuntimeError(
                f"weighting {self.weighting!r} returned {weights.tolist()} for {len(self._names)} objectives: it must "
                f"return "
                "one finite weight per objective"
            )
        return weights, None, None

    def _clip_factor(self, squared_norm: Tensor) -> Tensor:
        if self.max_grad_norm is None:
            return torch.ones_like(squared_norm)
        norm = squared_norm.clamp(min=0).sqrt()
        return (self.max_grad_norm / norm).clamp(max=1.0).nan_to_num(nan=1.0)

    def _note_nonfinite(self, nonfinite: Tensor) -> None:
        bad = [k for k, value in enumerate(nonfinite.tolist()) if value]
        if not bad:
            return
        for k in bad:
            self._nonfinite_counts[k] += 1
        names = ", ".join(repr(self._names[k]) for k in bad)
        if self.nonfinite == "raise":
            self._drop_window()
            raise RuntimeError(f"objective {names}: loss or gradient not finite; nonfinite='skip' would leave it out")
        if self.nonfinite == "skip" and not self._warned:
            self._warned = True
            warnings.warn(
                f"left objective {names} out of this step: its loss or gradient is not finite. report.nonfinite_counts "
                f"counts "
                "further cases in silence; with a GradScaler use nonfinite='propagate', so that it lowers its scale",
                RuntimeWarning,
                stacklevel=4,
            )

    def _make_report(
        self,
        losses: Tensor,
        weights: Tensor,
        gram: Tensor | None,
        squared_norm: Tensor,
        clip: Tensor,
        nonfinite: Tensor,
        absent: Tensor,
        gap: Tensor | None,
        status: Tensor | None,
    ) -> StepReport:
        counts = torch.tensor(self._nonfinite_counts, device=losses.device)
        return StepReport(
            self._names, losses, weights, gram, squared_norm, clip, nonfinite, absent, counts, gap, status
        )

    # ------------------------------------------------------------------------------------------ losses and buffers

    @property
    def _names(self) -> tuple[str, ...]:
        assert self.objectives is not None
        return self.objectives

    def _terms(self, losses: Losses, objective: str | None) -> list[tuple[int, str, Loss]]:
        """(index, name, loss) in the order of the objectives; the first call fixes them."""
        named = by_name(losses, objective, self.objectives)
        if self.objectives is None:
            self.objectives = checked_names(list(named))
            self._nonfinite_counts = [0] * len(named)
        return [(k, name, named[name]) for k, name in enumerate(self.objectives) if name in named]

    def _constant_weights(self) -> Tensor | None:
        constant = getattr(self.weighting, "constant", None)
        return None if constant is None else cast("Tensor | None", constant(len(self._names)))

    def _current_buffers(self, n_rows: int) -> GradientBuffers:
        """Buffers that fit the parameters as they are now; an open window moves over to new ones."""
        parameters = [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]
        old = self._buffers
        if old is None or old.n_rows != n_rows or old.signature != signature(parameters):
            for parameter in parameters:
                if not parameter.is_floating_point():
                    raise TypeError(
                        f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}: gradients must be real "
                        f"floating "
                        "point (view a complex parameter as real)"
                    )
            self._buffers = GradientBuffers(parameters, n_rows)
            if old is not None and self._due:
                self._buffers.migrate(old)
        assert self._buffers is not None
        return self._buffers

    def _drop_window(self) -> None:
        if self._buffers is not None:
            self._buffers.drop()
        self._loss_sums = {}
        self._due = False

    # --------------------------------------------------------------------------------------- manners of torch.optim

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine if that is still due, then let the base optimizer step.

        Args:
            closure: re-evaluates the losses, calls `backward` of this optimizer, and returns a loss.

        Returns:
            What the base optimizer's `step` returns: the closure's value, or None.
        """
        arguments: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        options: dict[str, Any] = {}
        for hook in list(self._optimizer_step_pre_hooks.values()):
            changed = hook(self, arguments, options)
            if changed is not None:
                arguments, options = changed
        closure = arguments[1] if len(arguments) > 1 else options.get("closure")
        if closure is None:
            if self._due:
                self.combine()
            result: Any = self.base.step()
        else:
            result = self.base.step(self._combining(closure))
        for post_hook in list(self._optimizer_step_post_hooks.values()):
            post_hook(self, arguments, options)
        return result

    # Optimizer wraps the step of every subclass to run hooks, the global ones among them. They run inside base.step()
    # already and would fire twice; so this step counts as wrapped, and runs the hooks of this instance itself.
    step.hooked = True  # type: ignore[attr-defined]

    def _combining(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            value = closure()
            if self._due:
                self.combine()
            return value

        return evaluate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `p.grad`, and gradients that `backward` captured but no `combine` has used."""
        self._drop_window()
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its gradients count from the next `backward` on."""
        self.base.add_param_group(param_group)

    # `Optimizer.load_state_dict` and Accelerate's `prepare` replace these objects in the base: hold no second
    # reference.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, themselves."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's state, itself."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, themselves."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict, with the objectives, counters and weighting state under
        `param_groups[0]["mogeo"]`.

        The bare base optimizer can load it, and `load_state_dict` accepts one of the bare base. Gradients are not part
        of it: save after a step, not in the middle of gradient accumulation.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base.state_dict()
        own: dict[str, Any] = {
            "objectives": list(self.objectives or ()),
            "nonfinite_counts": list(self._nonfinite_counts),
            "weighting": getattr(self.weighting, "state_dict", dict)(),
        }
        groups = state_dict["param_groups"]
        state_dict = {**state_dict, "param_groups": [{**groups[0], _STATE_KEY: own}, *groups[1:]]}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or in the bare base optimizer.

        Raises:
            ValueError: it was saved for other objectives. Nothing is loaded then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = [dict(group) for group in state_dict["param_groups"]]
        own = groups[0].pop(_STATE_KEY, None) if groups else None
        own = own or {"objectives": []}
        saved = tuple(own["objectives"])
        if saved and self.objectives is not None and saved != self.objectives:
            raise ValueError(
                f"the state was saved for the objectives {list(saved)}, but this optimizer has "
                f"{list(self.objectives)}: construct "
                f"it with objectives={list(saved)}, or load it into the base optimizer to drop the weighting's state"
            )
        self.base.load_state_dict({**state_dict, "param_groups": groups})
        self._reset()
        if saved:
            self.objectives = saved
            self._nonfinite_counts = [int(count) for count in own["nonfinite_counts"]]
            if hasattr(self.weighting, "load_state_dict"):
                self.weighting.load_state_dict(own["weighting"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Like torch.optim: no hooks. And no gradients: rows are rebuilt by the next backward.
        # Schedulers put a wrapper of theirs over `step`.
        lost = ("_buffers", "_loss_sums", "_due", "step")
        return {name: value for name, value in vars(self).items() if name not in lost and "_hook" not in name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weighting={self.weighting!r}, base={self.base!r})"


# ------------------------------------------------------------------------------------------------ checks and one backwa


def _check_base(base: object) -> None:
    if isinstance(base, MultiObjectiveOptimizer):
        raise TypeError("base is a MultiObjectiveOptimizer already: wrap the optimizer inside it, base.base")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base is a {type(base).__name__}: pass a torch.optim.Optimizer, such as AdamW(...)")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS cannot be wrapped: it builds curvature from differences of one function's gradients, and the shared "
            "direction follows another weighted sum at every evaluation. Use a first-order base, such as AdamW"
        )


def _refuse_distributed() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotImplementedError(
            "this version of mogeo runs in one process: with several, each would solve for its own weights and the "
            "replicas "
            "would drift apart in silence"
        )
