"""MultiObjectiveOptimizer: capture → gram → weigh → combine → base.step().

Knows the order of things and no mathematics: rows are filled by `mogeo.buffers`, multiplied by `mogeo.ops`, weighed by
`mogeo.weightings`; the manners of torch.optim are `mogeo.wrapper`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mogeo.buffers import GradientBuffers, signature
from mogeo.graphs import shared_with_later
from mogeo.objectives import Loss, Losses, by_name, checked_names, evaluate, run_backward
from mogeo.report import StepReport
from mogeo.weightings import WeightingLike, require_positive_losses, resolve
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
        super().__init__(base)
        if nonfinite not in ("skip", "raise", "propagate"):
            raise ValueError(f"nonfinite={nonfinite!r}: choose 'skip', 'raise' or 'propagate'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm}: pass a positive norm, or None for no clipping")
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
        constant = self._constant_weights()
        buffers = self._current_buffers(1 if constant is not None else len(self._names))
        try:
            with buffers.capturing():
                if constant is not None:
                    self._backward_weighted(terms, constant, backward, bool(retain_graph))
                else:
                    self._backward_rows(buffers, terms, backward, bool(retain_graph))
        except BaseException:
            self._drop_window()
            raise
        self._due = True

    def _backward_rows(
        self,
        buffers: GradientBuffers,
        terms: Sequence[tuple[int, str, Loss]],
        backward: Callable[..., object] | None,
        retain_graph: bool,
    ) -> None:
        """One backward per objective, each into its own row."""
        tensors = [term for _, _, term in terms if isinstance(term, Tensor)]
        shared = iter(shared_with_later(tensors))
        for index, name, term in terms:
            needed_later = isinstance(term, Tensor) and next(shared)
            loss = evaluate(name, term)
            buffers.select(index)
            self._add_loss(index, loss)
            run_backward(name, loss, backward, retain_graph or needed_later)
            del loss  # or the next callable runs while this graph is still alive

    def _backward_weighted(
        self,
        terms: Sequence[tuple[int, str, Loss]],
        weights: Tensor,
        backward: Callable[..., object] | None,
        retain_graph: bool,
    ) -> None:
        """Constant weights: tensors need one backward of their weighted sum; callables one each, as their graphs do."""
        pending: list[tuple[str, Tensor]] = []
        for index, name, term in terms:
            loss = evaluate(name, term)
            value = self._add_loss(index, loss)
            weight = weights[index].item()
            # A loss that is not finite cannot be left out once it is summed.
            if weight == 0 or not (self.nonfinite == "propagate" or bool(value.isfinite())):
                continue
            pending.append((name, loss * weight))
            if not isinstance(term, Tensor):
                run_backward(*pending.pop(), backward, retain_graph)
            del loss
        if pending:
            total = torch.stack([loss.reshape(()).to(pending[0][1]) for _, loss in pending]).sum()
            run_backward(" + ".join(name for name, _ in pending), total, backward, retain_graph)

    def _add_loss(self, index: int, loss: Tensor) -> Tensor:
        value = loss.detach().to(torch.float64).reshape(())
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
        """
        if not self._due:
            if self.report is None:
                raise RuntimeError("nothing to combine: call backward(losses) first")
            return self.report
        buffers = self._buffers
        assert buffers is not None
        buffers.settle()
        constant = self._constant_weights()
        device = buffers.blocks[0].device
        nan = torch.tensor(torch.nan, dtype=torch.float64)
        losses = torch.stack([self._loss_sums.get(k, nan).to(device) for k in range(len(self._names))])
        absent = torch.tensor([k not in self._loss_sums for k in range(len(self._names))], device=device)
        nonfinite = ~absent & ~losses.isfinite()

        gram = gap = status = None
        if constant is None and getattr(self.weighting, "needs_gram", True):
            gram = buffers.gram()
            nonfinite |= ~absent & ~gram.diagonal().isfinite()
            self._note_nonfinite(nonfinite)
        left_out = absent | nonfinite
        poisoned = self.nonfinite == "propagate" and bool(nonfinite.any())
        if poisoned:
            weights = torch.full_like(losses, torch.nan)
        elif bool(left_out.all()):
            weights = torch.zeros_like(losses)
        elif constant is not None:
            weights = constant.to(device).masked_fill(left_out, 0.0)
        else:
            weights, gap, status = self._weigh(gram, losses, left_out)

        if gram is not None:
            used = weights != 0  # rows left out may hold NaN
            squared_norm = weights[used] @ gram[used][:, used] @ weights[used]
            clip = self._clip_factor(squared_norm)
            if not poisoned:
                buffers.combine(weights * clip)
        else:
            if constant is None and not poisoned:
                buffers.combine(weights)
            # Row 0 now is the direction (constant weights were applied during backward). Gradients are summed in it:
            # where one is not finite, it is all or nothing.
            squared_norm = buffers.gram(1).squeeze()
            if not bool(squared_norm.isfinite()):
                nonfinite = ~absent
                left_out = left_out | (nonfinite if self.nonfinite != "propagate" else absent)
            self._note_nonfinite(nonfinite)
            clip = self._clip_factor(squared_norm)
            if clip < 1:
                buffers.combine(clip[None])
        if poisoned:
            buffers.poison()
        if bool(left_out.all()) and not poisoned:
            weights = torch.zeros_like(weights)
            buffers.drop()
        else:
            buffers.publish()
        self._due = False
        self._loss_sums = {}
        counts = torch.tensor(self._nonfinite_counts, device=device)
        self.report = StepReport(
            self._names, losses, weights, gram, squared_norm, clip, nonfinite, absent, counts, gap, status
        )
        return self.report

    def _weigh(
        self, gram: Tensor | None, losses: Tensor, left_out: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weights, gap and status. To the weighting, an objective left out looks solved: no gradient, average loss."""
        if bool(left_out.any()):
            losses = losses.masked_fill(left_out, losses[~left_out].mean().item())
            gram = None if gram is None else gram.masked_fill(left_out[:, None] | left_out[None, :], 0.0)
        if gram is not None and getattr(self.weighting, "needs_positive_losses", False):
            require_positive_losses(gram, losses, self._names, self.weighting)
        gap = status = None
        if hasattr(self.weighting, "solve"):
            weights, gap, status = self.weighting.solve(gram, losses)
        else:
            weights = torch.as_tensor(self.weighting(gram, losses), dtype=torch.float64, device=losses.device)
        if weights.shape != losses.shape or not bool(weights.isfinite().all()):
            raise RuntimeError(
                f"weighting {self.weighting!r} returned {weights.tolist()} for {len(self._names)} objectives: it must "
                "return one finite weight per objective"
            )
        return weights.masked_fill(left_out, 0.0), gap, status

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
                f"left objective {names} out of this step: its loss or gradient is not finite. Further cases are "
                f"counted "
                "in report.nonfinite_counts, silently. With a GradScaler use nonfinite='propagate'",
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
            self._nonfinite_counts = [0] * len(named)
        return [(k, name, named[name]) for k, name in enumerate(self.objectives) if name in named]

    def _constant_weights(self) -> Tensor | None:
        constant = getattr(self.weighting, "constant", None)
        return None if constant is None else cast("Tensor | None", constant(len(self._names)))

    def _current_buffers(self, n_rows: int) -> GradientBuffers:
        """Buffers that fit the parameters as they are now; an open window moves over to new ones."""
        parameters = [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]
        old = self._buffers
        if not parameters:
            raise ValueError("no parameter of the base optimizer requires grad: nothing to optimize")
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

    # what mogeo.wrapper asks for

    def prepare_step(self) -> None:
        """Combine, if that is still due."""
        if self._due:
            self.combine()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `p.grad`, and gradients that `backward` captured but no `combine` has used."""
        self._drop_window()
        self.base.zero_grad(set_to_none=set_to_none)

    def own_state(self) -> dict[str, Any]:
        """Objectives, counters, and the weighting's state."""
        return {
            "objectives": list(self.objectives or ()),
            "nonfinite_counts": list(self._nonfinite_counts),
            "weighting": getattr(self.weighting, "state_dict", dict)(),
        }

    def check_own_state(self, own: dict[str, Any]) -> None:
        """Raise ValueError if the state was saved for other objectives."""
        saved = tuple(own.get("objectives", ()))
        if saved and self.objectives is not None and saved != self.objectives:
            raise ValueError(
                f"the state was saved for the objectives {list(saved)}, but this optimizer has "
                f"{list(self.objectives)}: "
                f"construct it with objectives={list(saved)}, or load into its base to drop the weighting's state"
            )

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Restore objectives, counters and the weighting's state, and drop gradients captured so far."""
        self._reset()
        if not own.get("objectives"):
            return
        self.objectives = tuple(own["objectives"])
        self._nonfinite_counts = [int(count) for count in own["nonfinite_counts"]]
        if hasattr(self.weighting, "load_state_dict"):
            self.weighting.load_state_dict(own["weighting"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weighting={self.weighting!r}, base={self.base!r})"


def _refuse_distributed() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise NotImplementedError(
            "this version of mogeo runs in one process: with several, each would solve for its own weights and the "
            "replicas "
            "would drift apart in silence"
        )
