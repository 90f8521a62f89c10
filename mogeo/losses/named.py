"""What a user hands to `backward`: objective names and their losses, checked before anything runs.

Knows no gradients and no weighting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Loss = Tensor | Callable[[], Tensor]
Losses = Mapping[str, Loss | None] | Sequence[Loss | None] | Loss


class Term(NamedTuple):
    """The loss of one objective in one call."""

    #: Position among the objectives.
    position: int
    name: str
    loss: Loss


class Call(NamedTuple):
    """One call of `backward`."""

    terms: list[Term]
    backward: Callable[..., object] | None
    retain_graph: bool


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """The objectives' names, or ValueError."""
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"objectives={names!r}: pass at least one name, as a list of strings")
    if len(set(names)) != len(names):
        raise ValueError(f"objectives={list(names)!r}: names must differ")
    return tuple(names)


def by_name(losses: Losses, objective: str | None, names: tuple[str, ...] | None) -> dict[str, Loss | None]:
    """Losses by objective, in whichever of its forms `backward` got them; None for an objective without examples.

    Args:
        losses: as `backward` got them. A mapping may leave objectives out once `names` are known.
        objective: the name that a single loss belongs to.
        names: those fixed so far, if any.

    Raises:
        ValueError: the form does not tell which loss belongs to which objective, or a name is unknown.
        TypeError: a loss is neither a tensor, nor a callable, nor None.
    """
    named: dict[str, Loss | None]
    if isinstance(losses, (str, bytes)) or not (isinstance(losses, (Mapping, Sequence, Tensor)) or callable(losses)):
        raise TypeError(
            f"losses is {losses!r}: pass a mapping {{name: loss}}, a list in the order of the objectives, or one loss "
            "with objective=name"
        )
    if isinstance(losses, Tensor) and losses.ndim > 0 and objective is None:
        raise TypeError(
            f"losses is one tensor of shape {tuple(losses.shape)}: pass a mapping {{name: loss}} or a list of scalars, "
            "such as list(losses)"
        )
    if isinstance(losses, Tensor) or callable(losses):
        named = {**_single(losses, objective, names)}
    elif objective is not None:
        raise ValueError(f"objective={objective!r} goes with a single loss, but losses holds several: drop one of them")
    elif isinstance(losses, Mapping):
        named = dict(losses)
    else:
        order = names or tuple(str(k) for k in range(len(losses)))
        if len(losses) != len(order):
            raise ValueError(f"got {len(losses)} losses for the objectives {list(order)}: pass one each, in order")
        named = dict(zip(order, losses, strict=True))
    if not named:
        raise ValueError("losses is empty: pass one loss per objective")
    unknown = [name for name in named if names is not None and name not in names]
    if unknown:
        raise ValueError(
            f"losses name unknown objectives {unknown}: this optimizer has {list(names or ())}. Name all objectives "
            "once, MultiObjectiveOptimizer(..., objectives=[...]), or in the first call; map those without examples to "
            "None"
        )
    for name, loss in named.items():
        if isinstance(loss, Tensor):
            checked_loss(name, loss)
        elif loss is not None and not callable(loss):
            raise TypeError(
                f"objective {name!r} has a loss of type {type(loss).__name__}: pass a tensor or a callable, or None "
                "where it has no examples"
            )
    return named


def _single(loss: Loss, objective: str | None, names: tuple[str, ...] | None) -> dict[str, Loss]:
    if objective is None and names is not None and len(names) == 1:
        objective = names[0]
    if objective is None:
        raise ValueError("a single loss needs objective=name; or pass a mapping {name: loss} with every objective")
    if names is None:
        raise ValueError(
            f"objective={objective!r} alone does not tell how many objectives there are: name them all once, "
            "MultiObjectiveOptimizer(..., objectives=[...])"
        )
    return {objective: loss}


def checked_loss(name: str, loss: object) -> Tensor:
    """`loss`, if it is one real number that depends on a parameter; else TypeError or ValueError."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"objective {name!r} has a loss of type {type(loss).__name__}: pass a scalar tensor")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"objective {name!r} has a loss of shape {tuple(loss.shape)} and {loss.dtype}: reduce it to one real "
            "number, such as loss.mean()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"objective {name!r} has a loss that requires no grad: it depends on no trainable parameter, or was "
            "detached, or computed under no_grad"
        )
    return loss


def evaluate(name: str, term: Loss) -> Tensor:
    """The loss tensor itself, or what the callable returns, checked."""
    if isinstance(term, Tensor):
        return term
    with torch.enable_grad():
        return checked_loss(name, term())


def run_backward(name: str, loss: Tensor, backward: Callable[..., object] | None, retain_graph: bool) -> None:
    """One backward, by the user's function if there is one.

    Raises:
        TypeError: the graph must be retained, and the user's function takes no `retain_graph`.
        RuntimeError: the graph was freed already, or is of compiled code that cannot keep it.
    """
    if backward is not None and retain_graph:
        try:
            inspect.signature(backward).bind(loss, retain_graph=True)
        except TypeError:
            raise TypeError(
                f"objective {name!r} shares its graph with a later loss, or with the backward that sketch= takes once "
                "more, but backward= takes no retain_graph: pass it on, as in "
                "backward=lambda loss, **kwargs: scaler.scale(loss).backward(**kwargs)"
            ) from None
    options = {"retain_graph": True} if retain_graph else {}
    try:
        loss.backward(**options) if backward is None else backward(loss, **options)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise RuntimeError(
                f"objective {name!r} shares a compiled forward with a later loss, and torch.compile lets the first "
                "backward overwrite what the forward saved: set torch._functorch.config.donated_buffer = False before "
                "the model is compiled, or hand over callables that each run a forward of their own"
            ) from error
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"the graph of objective {name!r} was freed by an earlier backward. Losses that share a graph must be "
            f"handed over "
            "as tensors in one call; across calls, or with callables over a common forward, pass retain_graph=True"
        ) from error


def in_order(values: Mapping[str, float] | Sequence[float], names: tuple[str, ...] | None) -> tuple[float, ...]:
    """One value per objective, in the order of the objectives; as given, as long as that is not known.

    Raises:
        ValueError: a mapping does not name each objective once.
    """
    if not isinstance(values, Mapping):
        return tuple(values)
    if names is None:
        return tuple(values.values())
    unknown = [name for name in values if name not in names]
    missing = [name for name in names if name not in values]
    if unknown or missing:
        raise ValueError(
            f"preference does not match the objectives {list(names)}: missing {missing}, unknown {unknown}. Give each "
            "objective a number"
        )
    return tuple(values[name] for name in names)
