"""An endpoint's replies on disk, so that none is paid for twice. Knows nothing of judging, nor of the network.

They are in a single SQLite file. Each reply is written as soon as it has come, so a run that is killed loses only the
requests that were under way.
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
    """What a model replied.

    Attributes:
        text: the reply.
        prompt_tokens: tokens of the request, as the server counted them; None if it did not say.
        completion_tokens: tokens of the reply, likewise.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


def request_key(base_url: str, model: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
    """A SHA-256 hash of all that the reply depends on. The key for access is not part of it.

    Args:
        base_url: address of the endpoint.
        model: its name there.
        messages: the conversation.
        options: further fields of the request.
    """
    request = json.dumps([base_url.rstrip("/"), model, list(messages), dict(options)], sort_keys=True)
    return hashlib.sha256(request.encode()).hexdigest()


class ReplyCache:
    """Replies by `request_key`. Several processes may use the same file at the same time.

    Args:
        path: of the file; it is made if it does not exist.

    Raises:
        InputError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Commit each reply at once (isolation_level=None), and wait while another process writes (timeout).
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies "
                "(request TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER)"
            )
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"cache '{path}' cannot be used ({error}); name another file with --cache") from None

    def get(self, key: str) -> Reply | None:
        """The reply under a key, or None if there is none."""
        query = "SELECT text, prompt_tokens, completion_tokens FROM replies WHERE request = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None else Reply(*row)

    def put(self, key: str, reply: Reply) -> None:
        """Write a reply to disk."""
        self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", (key, *reply))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
