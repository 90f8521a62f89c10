"""mogeo: multi-objective geometry for PyTorch. Balance several losses in any training loop, exactly, in two lines.

optimizer = mogeo.MultiObjectiveOptimizer(torch.optim.AdamW(model.parameters(), lr=5e-7))
optimizer.backward({"helpfulness": loss_h, "honesty": loss_o})  # in place of loss.backward()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mogeo import weightings as weightings
    from mogeo.geometry.exact_min_norm import Status as Status
    from mogeo.geometry.ops import Descent as Descent
    from mogeo.geometry.ops import MinNorm as MinNorm
    from mogeo.geometry.ops import combine as combine
    from mogeo.geometry.ops import descent_weights as descent_weights
    from mogeo.geometry.ops import gram as gram
    from mogeo.geometry.ops import gram_by_segment as gram_by_segment
    from mogeo.geometry.ops import min_norm_weights as min_norm_weights
    from mogeo.gradients.memory import Rows as Rows
    from mogeo.gradients.memory import Sketch as Sketch
    from mogeo.optimizer import MultiObjectiveOptimizer as MultiObjectiveOptimizer
    from mogeo.report import StepReport as StepReport

__version__ = "0.1.0"

# Imported on first use, so that the command line answers --help without waiting for torch.
_HOMES = {
    "Descent": "mogeo.geometry.ops",
    "MinNorm": "mogeo.geometry.ops",
    "MultiObjectiveOptimizer": "mogeo.optimizer",
    "Rows": "mogeo.gradients.memory",
    "Sketch": "mogeo.gradients.memory",
    "Status": "mogeo.geometry.exact_min_norm",
    "StepReport": "mogeo.report",
    "combine": "mogeo.geometry.ops",
    "descent_weights": "mogeo.geometry.ops",
    "gram": "mogeo.geometry.ops",
    "gram_by_segment": "mogeo.geometry.ops",
    "min_norm_weights": "mogeo.geometry.ops",
}
__all__ = [*_HOMES, "weightings"]


def __getattr__(name: str) -> Any:
    if name == "weightings":
        return importlib.import_module("mogeo.weightings")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mogeo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
