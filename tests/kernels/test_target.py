"""A launch happens on the GPU of its tensors, whichever is current. Told with tensors that only say where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mogeo.kernels.target import Launch


def on_gpu(index: int) -> Tensor:
    class OnGpu(Tensor):
        is_cuda = True
        device = torch.device("cuda", index)

    return torch.zeros(2).as_subclass(OnGpu)


class Gpus:
    """Two GPUs that note what is launched: on which, with what."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.changes = 0
        self.launches: list[tuple[int, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        self.changes += 1
        yield
        self.current = before

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """As a jitted function."""
        return lambda *arguments, **options: self.launches.append((self.current, grid, arguments, options))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("before", [[], [None], [7, None]], ids=str)
def test_a_launch_goes_to_the_gpu_of_its_tensors(gpus: Gpus, before: list[Any], index: int) -> None:
    arguments = [*before, on_gpu(index), 3, on_gpu(index)]
    Launch(gpus, (5, 2), arguments, {"K": 4}).run()
    assert gpus.launches == [(index, (5, 2), tuple(arguments), {"K": 4})]
    assert gpus.current == 0
    assert gpus.changes == (index != 0)  # no change costs host time that is not needed


def test_tensors_on_a_cpu_ask_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As interpreted kernels have them; a build without CUDA raises if it is asked for a device."""
    gpus = Gpus(monkeypatch)
    monkeypatch.delattr(torch.cuda, "current_device")
    Launch(gpus, (1,), [torch.zeros(2), None, 1.0], {}).run()
    assert len(gpus.launches) == 1
    assert not gpus.changes
