"""Names that matplotlib or HTML would trip over, and the size of a PNG file."""

from __future__ import annotations

from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"
AWKWARD = ("_hidden", "$5 & <b>up</b>", "\"quoted\" 'n' \\slashed", "100 %")


def size(png: Path) -> tuple[int, int]:
    """Width and height of a PNG file, in pixels."""
    data = png.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
