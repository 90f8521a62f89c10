"""Who decides a step: the host, or the device that holds the gradients, without the host waiting for it."""

from __future__ import annotations

from types import ModuleType

from mogeo.decide import on_device, on_host
from mogeo.decide.rules import Rules
from mogeo.gradients.store import GradientStore
from mogeo.gradients.stores import Captures
from mogeo.steps.step import decided_on_device


def decider_for(store: GradientStore, captures: Captures, rules: Rules, absent: tuple[bool, ...]) -> ModuleType:
    """`mogeo.decide.on_device` or `on_host`. If every objective is absent, the host decides that there is no step."""
    return on_device if decided_on_device(store, captures, rules) and not all(absent) else on_host
