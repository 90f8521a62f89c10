"""Options of the form NAME=VALUE."""

from __future__ import annotations

from mogeo.errors import InputError


def named_value(text: str, option: str) -> tuple[str, str]:
    """Split "NAME=VALUE" at the first equals sign.

    Args:
        text: what was given.
        option: as it is typed, for the message.

    Raises:
        InputError: name, equals sign or value is missing.
    """
    name, mark, value = text.partition("=")
    if not mark or not name or not value:
        raise InputError(f"{option} '{text}' has to be NAME=VALUE")
    return name, value
