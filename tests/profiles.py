"""How many examples a property test tries: `full` is all, `ci` two in ten, `quick` one in ten, for `make test`.

`pytest --hypothesis-profile=quick`, or HYPOTHESIS_PROFILE=quick in the environment, chooses. None has a deadline
nor minds slow strategies, so that a busy machine fails no test, and all try the same examples every time: a red run
must be red again. To search further, raise `max_examples` here and set derandomize=False.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

#: Examples of a property that does not say how many it wants.
FULL, CI, QUICK = 100, 20, 10
PATIENT = (HealthCheck.too_slow,)


def register() -> None:
    """Let properties defined from now on follow the environment's profile."""
    for name, examples in (("full", FULL), ("ci", CI), ("quick", QUICK)):
        settings.register_profile(
            name,
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=PATIENT,
        )
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full"))


def share(n: int) -> int:
    """How many of n examples, or seeds, the profile tries."""
    return math.ceil(n * settings().max_examples / FULL)


def examples(n: int, **options: Any) -> settings:
    """Decorates a property that tries n examples in full; `options` are those of hypothesis's settings."""
    return settings(max_examples=share(n), **options)


def check(name: str, test: Any) -> None:
    """Refuse a property with a deadline, or whose examples change from run to run.

    Raises:
        pytest.UsageError: it has one, or they do.
    """
    if not getattr(test, "is_hypothesis_test", False):
        return
    its = getattr(test, "_hypothesis_internal_use_settings", None) or settings()
    if its.deadline is not None or not its.derandomize or its.database is not None:
        raise pytest.UsageError(f"{name} has settings of its own: use examples(n) of tests/profiles.py")


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters that are all slow but some: for a test whose cases take long, where a few are enough for a quick run.

    A tuple is a case of several parameters, as pytest's `parametrize` has it.
    """

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]
