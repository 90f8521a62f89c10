"""One program of a launch under Triton's interpreter, which would take hours over all of a long row.

Knows nothing of what is launched.
"""

from __future__ import annotations

import pytest
from triton.runtime import interpreter

from mogeo.kernels.target import Launch


def run_program(launch: Launch, program: int) -> None:
    """Run program (`program`, 0, 0); to it, the grid is as large as it is."""
    builder = interpreter.interpreter_builder
    sizes = (*launch.grid, 1, 1)[:3]
    assert program < sizes[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", lambda *_: type(builder).set_grid_dim(builder, *sizes))
        patch.setattr(builder, "set_grid_idx", lambda *_: type(builder).set_grid_idx(builder, program, 0, 0))
        launch._replace(grid=(1,)).run()
