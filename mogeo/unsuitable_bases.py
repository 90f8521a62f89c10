"""Optimizers that cannot follow a direction: what they need of gradients, one combined gradient does not have.

A base reads `p.grad` when it steps, and the direction is all that it finds there: dense, without a graph behind it, and
complete only after every objective's backward. It is better to say so when the optimizer is made than at its first
step, or never. Optimizers that need a closure (SAM, AliG) are no such case: hand the closure to `step`, as without
mogeo.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch.optim import Optimizer


def refuse_unsuitable(base: Optimizer) -> None:
    """Raise TypeError if `base`, or an optimizer inside it, cannot follow a direction."""
    for optimizer in _with_inner(base):
        reason = _reason_against(optimizer)
        if reason is not None:
            raise TypeError(f"{type(optimizer).__name__} cannot be wrapped: {reason}. Use a base such as AdamW")


def _with_inner(base: Optimizer) -> Iterator[Optimizer]:
    """`base`, and the optimizers that it wraps, as Accelerate's and Lookahead do."""
    seen: list[Optimizer] = []
    optimizer: object = base
    while isinstance(optimizer, Optimizer) and not any(optimizer is other for other in seen):
        seen.append(optimizer)
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _reason_against(optimizer: Optimizer) -> str | None:
    if isinstance(optimizer, torch.optim.LBFGS):
        return (
            "it builds curvature from differences of one function's gradients, and the shared direction follows "
            "another weighted sum at every evaluation"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        return "it takes sparse gradients only, and the direction, a sum over objectives, is dense"
    if _estimates_hessian(optimizer):
        return (
            "it differentiates the gradients once more (loss.backward(create_graph=True)), and the direction has no "
            "graph behind it"
        )
    if hasattr(optimizer, "fused_backward"):
        return (
            "it steps while backward runs, so it would follow each objective's gradient before the direction is known"
        )
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in parameters):
        return (
            "its parameters are stepped while backward runs (apply_optimizer_in_backward), each objective's gradient "
            "by itself and before the direction is known"
        )
    return None


def _estimates_hessian(optimizer: Optimizer) -> bool:
    """AdaHessian and SophiaH, by their name or because `step` takes an estimate of the Hessian."""
    names = (kind.__name__.lower() for kind in type(optimizer).__mro__)
    return any("hessian" in name for name in names) or "hessian" in inspect.signature(optimizer.step).parameters
