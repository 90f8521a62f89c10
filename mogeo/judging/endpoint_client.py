"""Ask an OpenAI-compatible endpoint: retries, a limit on concurrency, a cache on disk, usage. Knows nothing of judging.

The key for access is read from the environment and sent in the header of requests, and nowhere else. Should the server
repeat it in a reply or an error, it is removed before the text is kept or shown.
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
"""Fields of every request, unless others are set. A judge's answer takes about 8 tokens, so 64 are enough."""

_GIVE_UP_AFTER = 5  # requests in a row that failed, each after all its retries
_LONGEST_WAIT = 300.0  # seconds; if the server asks for more, the request counts as failed


@dataclass(frozen=True)
class EndpointConfig:
    """Which endpoint and model to ask, and how often to retry.

    Attributes:
        model: the model's name at the endpoint.
        base_url: the endpoint's address.
        options: further fields of each request: sampling settings, and whatever else the server knows.
        api_key_env: environment variable with the key. None: OPENAI_API_KEY for OpenAI's own server, and no key for any
            other, so that a key is never sent to a server that it was not meant for.
        concurrency: how many requests may be under way at the same time.
        timeout: seconds for a whole reply.
        retries: further attempts after status 408, 409, 429 or 5xx, a broken connection, a timeout, or a reply that is
            not JSON.
        first_wait: seconds before the first retry, times a random number between 0.5 and 1. Each further wait is twice
            as long, and none is shorter than what the server asks for (Retry-After).
    """

    model: str
    base_url: str = OPENAI_URL
    options: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_OPTIONS))
    api_key_env: str | None = None
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    first_wait: float = 1.0

    def check(self) -> None:
        """Check everything that can be checked without asking the server.

        Raises:
            InputError: a setting cannot be used, the key is missing, or the openai client is not installed.
        """
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
        """The key for access, or None if none is needed.

        Raises:
            InputError: the environment variable that should hold it is not set.
        """
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
    """What was asked and answered so far.

    Attributes:
        requests: requests that the server answered.
        cached: requests whose reply was on disk.
        retries: attempts after a failed one.
        failed: requests without a reply after all retries.
        prompt_tokens: tokens of the answered requests, as the server counted them.
        completion_tokens: tokens of their replies, likewise.
        uncounted: answered requests for which the server gave no count of tokens.
        failures: reason -> how many requests failed for it.
    """

    requests: int = 0
    cached: int = 0
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    failures: dict[str, int] = field(default_factory=dict)


class Answer(NamedTuple):
    """The text of a reply; or None, and the reason why there is none."""

    text: str | None
    failure: str | None = None


Ask = Callable[[Messages], Any]
"""An async function: await ask(messages) -> Answer."""


class Endpoint:
    """Asks one model at one endpoint.

    Args:
        config: which one; the caller has called its `check`.
        cache: replies that need not be asked for again.

    Attributes:
        usage: what was asked and answered so far.
    """

    def __init__(self, config: EndpointConfig, cache: ReplyCache) -> None:
        self.config, self.cache, self.usage = config, cache, Usage()
        self._key = config.api_key()
        self._failed_in_row = 0
        self._over: str | None = None  # the reason, once no more requests are to be sent
        self._jitter = random.Random(0)

    def key_of(self, messages: Messages) -> str:
        """The key under which the cache keeps the reply to these messages."""
        return request_key(self.config.base_url, self.config.model, messages, self.config.options)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Ask]:
        """Open a connection.

        Yields:
            The function to ask with. Any number of calls may be awaited at the same time; no more than
            `config.concurrency` of them are sent at once.

        Raises:
            InputError: raised by the function, if the server refuses every request or has failed too often in a row.
        """
        import openai

        self._failed_in_row, self._over = 0, None
        room = asyncio.Semaphore(self.config.concurrency)
        client = openai.AsyncOpenAI(
            api_key=self._key or "none",  # the client needs one; servers without keys ignore it
            base_url=self.config.base_url,
            timeout=self.config.timeout,
            max_retries=0,  # `_ask` retries, also after replies that cannot be read
        )

        async def ask(messages: Messages) -> Answer:
            key = self.key_of(messages)
            known = self.cache.get(key)
            if known is not None:
                self.usage.cached += 1
                return Answer(known.text)
            async with room:
                if self._over is not None:  # while this request waited, another one has found that all will fail
                    raise InputError(self._over)
                return await self._ask(client, messages, key)

        async with client:
            yield ask

    async def _ask(self, client: Any, messages: Messages, key: str) -> Answer:
        """Send a request until it is answered, or has failed for good; write the reply to the cache."""
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
        """Send a request once.

        Raises:
            Exception: whatever the client raises.
            ValueError: the reply does not have the shape of OpenAI's.
        """
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
        # A model that says nothing (text is None) has replied with an empty text.
        return Reply(self._redact(text or ""), *numbers)

    def _redact(self, text: str) -> str:
        """The text without the key for access."""
        return text.replace(self._key, "[key]") if self._key else text


@dataclass(frozen=True)
class _Problem:
    """What went wrong with a request.

    Attributes:
        reason: in words.
        passing: whether another attempt may succeed.
        hopeless: whether every other request will fail for the same reason.
        wait: seconds that the server asks to wait.
    """

    reason: str
    passing: bool
    hopeless: bool = False
    wait: float = 0.0

    @classmethod
    def of(cls, error: Exception) -> _Problem:
        """What an exception means. Raises it again if it has nothing to do with the request."""
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
    """The server's own words about an error, in one line."""
    body = error.body
    inner = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(inner or error.message).split())


def _seconds(retry_after: str | None) -> float:
    """Seconds to wait by a Retry-After header, which holds a number or a date (RFC 9110, 10.2.3); 0 without one."""
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
