"""Replies of an endpoint on disk, so that none is paid for twice. Knows nothing of judging, nor of the network.

One SQLite file. Each reply is committed as it comes in: a run that is killed loses what was under way, and no more.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mogeo.errors import InputError


class Reply(NamedTuple):
    """What a model said, and the tokens that the server counted for it (None: it did not say)."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


def request_key(base_url: str, model: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
    """SHA-256 over all that the reply depends on. A key for access is no part of it."""
    request = json.dumps([base_url.rstrip("/"), model, list(messages), dict(options)], sort_keys=True)
    return hashlib.sha256(request.encode()).hexdigest()


class ReplyCache:
    """Replies by `request_key`; several processes may use one file.

    Raises InputError where the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit; a second process that writes is waited for.
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies "
                "(request TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER)"
            )
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"cache '{path}' cannot be used ({error}); name another file with --cache") from None

    def get(self, key: str) -> Reply | None:
        """The reply to a request, or None."""
        query = "SELECT text, prompt_tokens, completion_tokens FROM replies WHERE request = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None else Reply(*row)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on disk when this returns."""
        self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", (key, *reply))

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()
