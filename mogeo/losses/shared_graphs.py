"""What the autograd graphs of losses tell: which must be kept for a later one, and which parameters they reach.

Knows autograd nodes, nothing else.

Losses may share a graph (one forward, K losses) or not (K forwards). A shared graph must survive until its last loss
has run backward; a private one should be freed at once, for it holds the activations. So the graphs are walked once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mogeo.losses.reachable import held_by

# What autograd's graph ends in at a parameter. Half of the nodes of a model are of this type, and tell nothing.
with torch.inference_mode(False), torch.enable_grad():  # whatever surrounds the import
    _LEAF = type((torch.ones((), requires_grad=True, device="cpu") * 1).grad_fn.next_functions[0][0])  # type: ignore[union-attr]


def shared_with_later(losses: Sequence[Tensor]) -> list[bool]:
    """For each loss, in the order of their backwards, whether its graph has a node in common with a later loss.

    Leaves (`AccumulateGrad`) do not count: they hold no activations. Every node is visited once.
    """
    shared = [False] * len(losses)
    visited: set[Any] = set()  # holds the node wrappers themselves: their identity lasts only as long as they live
    for index in reversed(range(len(losses))):
        own: set[Any] = set()
        pending = [losses[index].grad_fn]
        while pending:
            node = pending.pop()
            if node is None or node in own:
                continue
            if node in visited:
                shared[index] = True
                continue
            edges = node.next_functions
            if edges:  # else the loss is a leaf itself, or a function without inputs
                own.add(node)
                pending.extend([parent for parent, _ in edges if type(parent) is not _LEAF])
        visited |= own
    return shared


def leaves_reached(losses: Sequence[Tensor], belongs: Callable[[Tensor], bool]) -> list[Tensor]:
    """Leaves that gradients of these losses reach and that do not belong, each once, in no particular order.

    A reentrant checkpoint keeps its parameters out of the graph: those count that its function holds
    (`mogeo.losses.reachable`).

    Args:
        losses: with their graphs.
        belongs: tells whether a leaf is one of those to leave out.
    """
    found: list[Tensor] = []
    hidden: dict[Tensor, None] = {}
    visited: set[Any] = {None}
    pending: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    while pending:
        for parent, _ in pending.pop().next_functions:
            if parent in visited:
                continue
            visited.add(parent)
            if type(parent) is not _LEAF:
                pending.append(parent)
                if hasattr(parent, "run_function"):
                    hidden.update(dict.fromkeys(_parameters_held_by(parent.run_function)))
                continue
            leaf = parent.variable  # type: ignore[union-attr]
            if not belongs(leaf):
                found.append(leaf)
    known = set(map(id, found))
    return found + [leaf for leaf in hidden if leaf.requires_grad and not belongs(leaf) and id(leaf) not in known]


def _parameters_held_by(function: Any) -> list[Tensor]:
    held: list[Tensor] = []
    for each in held_by(function):
        held.extend(each.parameters() if isinstance(each, torch.nn.Module) else [each])
    return held
