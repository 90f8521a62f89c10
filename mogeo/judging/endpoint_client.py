"""Ask an OpenAI-compatible endpoint: retries, a limit on concurrency, a cache on disk, usage. Knows nothing of judging.

The key for access comes from the environment, is sent in the header of requests, and goes nowhere else: whatever the
server says is cleared of it before it is kept or shown.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mogeo.errors import InputError
from mogeo.judging.endpoint_cache import Reply, ReplyCache, request_key
from mogeo.judging.endpoint_prompts import Messages

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
DEFAULT_OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 64}
"""Sent with every request. The answer takes about 8 tokens; what takes more than 64 is no answer."""

_GIVE_UP_AFTER = 5  # requests that failed in a row, each after all its retries: the server is down, or refuses us
_LONGEST_WAIT = 300.0  # seconds; a server that wants us to wait longer is asked again in another run


@dataclass(frozen=True)
class EndpointConfig:
    """Where to ask, whom, and how hard to try."""

    model: str
    base_url: str = OPENAI_URL
    options: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_OPTIONS))
    """Further fields of a request: sampling settings and what else the server knows."""
    api_key_env: str | None = None
    """Environment variable that holds the key. None: OPENAI_API_KEY for OpenAI's own server, and no key for others, so
    that a key never goes to a server that it was not meant for."""
    concurrency: int = 8
    """Requests under way at the same time."""
    timeout: float = 60.0
    """Seconds for a whole reply."""
    retries: int = 6
    """Further attempts after 408, 409, 429, 5xx, a broken connection, a timeout or a reply that is no JSON."""
    first_wait: float = 1.0
    """Seconds before the first of them (times 0.5 to 1, at random); each next wait is twice as long, and none is
    shorter than what the server asks for (Retry-After)."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be, a missing key among them."""
        try:
            import openai  # noqa: F401
        except ImportError:
            raise InputError("an endpoint needs the openai client: pip install 'mogeo[judge]'") from None
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(f"--base-url '{self.base_url}' is no address; one reads http://127.0.0.1:8000/v1")
        if url.username or url.password or url.query:
            raise InputError("--base-url holds a user, a password or a query; secrets come from --api-key-env alone")
        for name, value, least in (("--concurrency", self.concurrency, 1), ("--retries", self.retries, 0)):
            if value < least:
                raise InputError(f"{name} has to be at least {least}, got {value}")
        if not self.timeout > 0:
            raise InputError(f"--timeout has to be a positive number of seconds, got {self.timeout}")
        self.api_key()

    def api_key(self) -> str | None:
        """The key, or None where none is needed. Raises InputError if the environment lacks it."""
        name = self.api_key_env
        if name is None:
            if urlsplit(self.base_url).hostname != urlsplit(OPENAI_URL).hostname:
                return None
            name = OPENAI_KEY
        key = os.environ.get(name, "").strip()
        if not key:
            raise InputError(f"the environment variable {name} with the key for {self.base_url} is not set")
        return key


@dataclass
class Usage:
    """What the asking came to."""

    requests: int = 0
    """Answered by the server."""
    cached: int = 0
    """Answered from the disk."""
    retries: int = 0
    failed: int = 0
    """Not answered, after all retries."""
    prompt_tokens: int = 0
    """As the server counted them, of `requests`."""
    completion_tokens: int = 0
    uncounted: int = 0
    """Of `requests`, those for which the server told no usage."""
    failures: dict[str, int] = field(default_factory=dict)
    """Why, and how often."""


class Answer(NamedTuple):
    """A reply's text, or why there is none."""

    text: str | None
    failure: str | None = None


Ask = Callable[[Messages], Any]  # async: -> Answer


class Endpoint:
    """Asks one model at one address.

    Args:
        config: checked by the caller.
        cache: replies that are known.
    """

    def __init__(self, config: EndpointConfig, cache: ReplyCache) -> None:
        self.config, self.cache, self.usage = config, cache, Usage()
        self._key = config.api_key()
        self._failed_in_row = 0
        self._over: str | None = None  # why nothing more is sent
        self._jitter = random.Random(0)

    def key_of(self, messages: Messages) -> str:
        """Where the cache keeps the reply."""
        return request_key(self.config.base_url, self.config.model, messages, self.config.options)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Ask]:
        """A connection, as a function: await ask(messages) -> Answer. As many may wait for it as want to."""
        import openai

        self._failed_in_row, self._over = 0, None
        room = asyncio.Semaphore(self.config.concurrency)
        client = openai.AsyncOpenAI(
            api_key=self._key or "none",  # the client insists on one; servers without keys ignore it
            base_url=self.config.base_url,
            timeout=self.config.timeout,
            max_retries=0,  # ours below, which also covers replies that cannot be read
        )

        async def ask(messages: Messages) -> Answer:
            key = self.key_of(messages)
            known = self.cache.get(key)
            if known is not None:
                self.usage.cached += 1
                return Answer(known.text)
            async with room:
                if self._over is not None:  # who waited for room must not send what the others were refused
                    raise InputError(self._over)
                return await self._ask(client, messages, key)

        async with client:
            yield ask

    async def _ask(self, client: Any, messages: Messages, key: str) -> Answer:
        for attempt in range(self.config.retries + 1):
            try:
                reply = await asyncio.wait_for(self._request(client, messages), self.config.timeout)
            except Exception as error:
                problem = _Problem.of(error)
            else:
                self.cache.put(key, reply)
                self.usage.requests += 1
                self.usage.prompt_tokens += reply.prompt_tokens or 0
                self.usage.completion_tokens += reply.completion_tokens or 0
                self.usage.uncounted += reply.prompt_tokens is None
                self._failed_in_row = 0
                return Answer(reply.text)
            reason = self._redact(problem.reason)
            if problem.hopeless:
                self._over = f"{self.config.base_url} refuses the request: {reason}"
                raise InputError(self._over)
            wait = self.config.first_wait * 2**attempt * self._jitter.uniform(0.5, 1)
            wait = max(min(wait, _LONGEST_WAIT), problem.wait)
            if not problem.passing or attempt == self.config.retries or wait > _LONGEST_WAIT:
                break
            self.usage.retries += 1
            await asyncio.sleep(wait)
        self.usage.failed += 1
        self.usage.failures[reason] = self.usage.failures.get(reason, 0) + 1
        self._failed_in_row += 1
        if self._failed_in_row >= _GIVE_UP_AFTER:
            self._over = (
                f"{self.config.base_url} failed {self._failed_in_row} requests in a row, the last with: {reason}. What "
                "was answered is kept: run the same command again to go on"
            )
            raise InputError(self._over)
        return Answer(None, reason)

    async def _request(self, client: Any, messages: Messages) -> Reply:
        """One attempt. Raises whatever goes wrong, ValueError for a reply in another shape than OpenAI's."""
        completion = await client.chat.completions.create(
            model=self.config.model, messages=messages, extra_body=dict(self.config.options)
        )
        try:
            text = completion.choices[0].message.content
            usage = completion.usage
            counted = [None, None] if usage is None else [usage.prompt_tokens, usage.completion_tokens]
        except (AttributeError, TypeError, IndexError):
            raise ValueError("a reply without choices[0].message.content") from None
        if text is not None and not isinstance(text, str):
            raise ValueError("a reply whose content is no text")
        numbers = [n if isinstance(n, int) else None for n in counted]
        return Reply(self._redact(text or ""), *numbers)  # no content: the model said nothing, which is an answer

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


@dataclass(frozen=True)
class _Problem:
    """What went wrong with a request, and whether it makes sense to try again."""

    reason: str
    passing: bool  # may be over in a moment
    hopeless: bool = False  # will be the same for every request
    wait: float = 0.0  # seconds that the server asks for

    @classmethod
    def of(cls, error: Exception) -> _Problem:
        import openai

        if isinstance(error, asyncio.TimeoutError | TimeoutError | openai.APITimeoutError):
            return cls("no reply within the time limit", passing=True)
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            reason = f"HTTP {status}: {_message(error):.200}"
            spent = status == 429 and getattr(error, "code", None) == "insufficient_quota"
            passing = status in (408, 409, 429) or status >= 500
            wait = _seconds(error.response.headers.get("retry-after"))
            return cls(reason, passing and not spent, hopeless=spent or status in (401, 403, 404), wait=wait)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return cls(f"no connection ({type(cause).__name__}: {cause!s:.100})", passing=True)
        if isinstance(error, openai.OpenAIError | ValueError | json.JSONDecodeError):
            return cls(f"a reply that cannot be read ({type(error).__name__}: {error!s:.100})", passing=True)
        raise error


def _message(error: Any) -> str:
    body = error.body
    inner = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(inner or error.message).split())


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date (RFC 9110, 10.2.3); 0 without one."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
