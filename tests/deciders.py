"""How a step is made: by host or device, from rows under the direction, rows apart from it, or sketches. For tests.

The host decides on a CPU, the device on a GPU; its way runs the Triton kernels under their interpreter, on CPU tensors.
Rows lie apart from the direction where they have another dtype or device; here they do without any rounding, and every
parameter counts as large, so that its gradient is taken by a hook. A sketch longer than the gradient holds it whole; as
a projection that is much longer it loses nothing either, and every loss is run twice. So what holds for rows must hold
for sketches.
Knows nothing of what is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
import triton
from torch import Tensor

from mogeo import MultiObjectiveOptimizer
from mogeo.geometry import ops
from mogeo.gradients import arrivals, blocks, sketches

DECIDERS = ("host", "device")
WAYS = (*DECIDERS, "rows apart", "sketched", "replayed")
# Enough for a quick run: the kernels under their interpreter take four times as long, and have quick tests of their own
# (tests/decide/test_on_device.py); the others share most of their code with one of these.
QUICK_WAYS = ("host", "replayed")

SKETCH = 1 << 16


def let_decide(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make optimizers step this way until the test ends."""
    if who in ("sketched", "replayed"):
        if who == "replayed":
            monkeypatch.setattr(sketches, "_holds", lambda dimension, elements: False)
        monkeypatch.setitem(MultiObjectiveOptimizer.__init__.__kwdefaults__, "sketch", SKETCH)  # type: ignore[arg-type]
        return
    if who == "rows apart":
        elsewhere = torch.device("cpu", 0)  # is not torch.device("cpu"), and names the same
        place = blocks.place_of_rows
        monkeypatch.setattr(arrivals, "_LEAST", 0)
        monkeypatch.setattr(blocks, "place_of_rows", lambda *them: (place(*them)[0], elsewhere))
    if who in ("host", "rows apart"):
        return
    if not triton.knobs.runtime.interpret:
        pytest.skip("on a machine with a GPU the kernels run there, not under the interpreter")
    from mogeo.geometry import triton_backend

    def device_code(blocks: Sequence[Tensor]) -> ModuleType | None:
        return triton_backend if len(blocks[0]) <= triton_backend.MOST_ROWS else None

    monkeypatch.setattr(ops, "device_code", device_code)
