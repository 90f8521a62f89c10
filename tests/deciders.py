"""Who decides a step: the host, as on a CPU, or the device, as on a GPU. For tests of both on CPU tensors.

The device's way runs the Triton kernels under their interpreter. Knows nothing of what is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import triton
from torch import Tensor

from mogeo import ops

DECIDERS = ("host", "device")


def let_decide(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make optimizers decide their steps this way until the test ends."""
    if who == "host":
        return
    if not triton.knobs.runtime.interpret:
        pytest.skip("on a machine with a GPU the kernels run there, not under the interpreter")
    from mogeo import cuda

    def device_code(blocks: Sequence[Tensor]) -> ModuleType | None:
        return cuda if len(blocks[0]) <= cuda.MOST_ROWS else None

    monkeypatch.setattr(ops, "device_code", device_code)
