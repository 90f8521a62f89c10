"""A server on loopback that speaks OpenAI's chat format, and misbehaves as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Say:
    """One response of the server."""

    body: bytes | str | dict[str, Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    missing: int = 0  # bytes that are announced and never come
    delay: float = 0.0  # seconds


def chat(text: str | None, prompt_tokens: int = 10, completion_tokens: int = 5) -> Say:
    """A well-formed completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return Say(
        {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    )


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Say:
    """An error in OpenAI's format."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Say({"error": {"message": message, "code": code, "type": "t", "param": None}}, status, named)


@dataclass
class Stub:
    """What tests see of the server."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    most_at_once: int = 0


Behaviour = Callable[[dict[str, Any], int], Say]
"""(request, its number from 0) -> response."""


@contextmanager
def serving(behave: Behaviour) -> Iterator[Stub]:
    """The server, for the length of the block."""
    lock = threading.Lock()
    at_once = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal at_once
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(stub.requests)
                stub.requests.append(request)
                stub.authorizations.append(self.headers.get("Authorization"))
                at_once += 1
                stub.most_at_once = max(stub.most_at_once, at_once)
            said = behave(request, number)
            time.sleep(said.delay)
            with lock:
                at_once -= 1
            body = said.body if isinstance(said.body, bytes) else (
                said.body if isinstance(said.body, str) else json.dumps(said.body)
            ).encode()  # fmt: skip
            try:
                self.send_response(said.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body) + said.missing))
                self.send_header("Connection", "close")
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the client has given up waiting
                pass
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
