"""A plugin of pytest that writes down what the tests for a GPU would launch there, on a machine that has none.

Loaded by `gpu_cache.py plan --tests` with `-p gpu_launches`; GPU_LAUNCHES names the file. Tests of the kernels
themselves run under the interpreter, and their launches are noted as they are made. Properties of the backend "cuda"
are held against mogeo's CPU code instead, so that they pass and try all their examples, and each call is made once more
on tensors without data, whose launches are noted. Nobody is to take such a run for a test of anything.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_cache
import pytest
import torch
from torch import Tensor


def bare(value: Any) -> Any:
    """The same without data: shape, strides and offset."""
    if isinstance(value, list):
        return [bare(part) for part in value]
    if not isinstance(value, Tensor):
        return value
    length = value.untyped_storage().nbytes() // value.element_size()
    whole = torch.empty(length, dtype=value.dtype, device="meta")
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


class Launches:
    """What was launched so far, each once."""

    def __init__(self) -> None:
        self.noted: list[gpu_cache.Launched] = []

    def beside(self, real: Callable[..., Any], launching: Callable[..., Any]) -> Callable[..., Any]:
        """`real`, whose calls are made without data as well."""

        def call(*arguments: Any, **options: Any) -> Any:
            given = [bare(argument) for argument in arguments]
            kept = {name: bare(option) for name, option in options.items()}
            # What asks for values has none to give: what had been launched by then is noted.
            with (
                gpu_cache.noted(self.noted, "tests"),
                contextlib.suppress(NotImplementedError, RuntimeError, ValueError),
            ):
                launching(*given, **kept)
            return real(*arguments, **options)

        return call

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Let properties of the backend "cuda" run here, against the CPU's code."""
        from tests import backends

        for name in (
            "gram", "gram_by_segment", "combine", "min_norm_weights", "descent_weights", "conflict_averse_weights",
        ):  # fmt: skip
            launching = getattr(backends, f"_{name}")
            object.__setattr__(backends.CUDA, name, self.beside(getattr(backends.CPU, name), launching))
        for item in items:
            callspec = getattr(item, "callspec", None)
            if callspec is not None and callspec.params.get("backend") is backends.CUDA:
                item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "gpu"]

    def pytest_sessionfinish(self) -> None:
        """Write them down."""
        each = {gpu_cache.identity(launch): launch for launch in self.noted}
        path = Path(os.environ["GPU_LAUNCHES"])
        path.write_text("".join(json.dumps(launch) + "\n" for launch in each.values()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Note what a test launches itself."""
    launches = item.config.pluginmanager.get_plugin("gpu-launches")
    callspec = getattr(item, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend is not None:  # noted call by call, or by the interpreter at sizes of its own
        return (yield)
    with gpu_cache.noted(launches.noted, "tests", launch=True):
        return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Take part."""
    config.pluginmanager.register(Launches(), "gpu-launches")
