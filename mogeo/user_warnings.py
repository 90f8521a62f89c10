"""Warnings that point at the user's line, however many calls of mogeo and torch lie between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

# `skip_file_prefixes` of `warnings.warn` does this from Python 3.12 on.
_PASSED_OVER = tuple(f"{Path(file).parent}/" for file in (__file__, str(torch.__file__)))


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither mogeo's nor torch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and Path(frame.f_code.co_filename).as_posix().startswith(_PASSED_OVER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
