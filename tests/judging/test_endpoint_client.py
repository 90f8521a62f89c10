"""Asking an endpoint: what fails is tried again while it may help, nothing is asked twice, the key is kept secret."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mogeo.errors import InputError
from mogeo.judging.endpoint_cache import Reply, ReplyCache, request_key
from mogeo.judging.endpoint_client import Answer, Endpoint, EndpointConfig, _seconds
from tests.openai_stub import Say, Stub, chat, error, serving

KEY = "sk-not-a-real-key-7f3a"


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Endpoints with one cache, closed at the end."""
    caches = []

    def endpoint(stub: Stub, **options: Any) -> Endpoint:
        caches.append(ReplyCache(tmp_path / "cache.sqlite"))
        config = EndpointConfig("m", stub.url, **{"first_wait": 0.001, "timeout": 5.0, **options})
        config.check()
        return Endpoint(config, caches[-1])

    yield endpoint
    for cache in caches:
        cache.close()


def ask(endpoint: Endpoint, *texts: str) -> list[Answer]:
    async def all_of_them() -> Sequence[Answer]:
        async with endpoint.opened() as one:
            return await asyncio.gather(*(one([{"role": "user", "content": text}]) for text in texts))

    return list(asyncio.run(all_of_them()))


def scripted(*script: Say) -> Callable[[dict[str, Any], int], Say]:
    return lambda _, number: script[min(number, len(script) - 1)]


# ---- replies ---------------------------------------------------------------------------------------------------------


def test_a_reply_is_asked_for_once_and_kept_on_disk(make: Any) -> None:
    with serving(scripted(chat("yes", 11, 3))) as stub:
        first = make(stub)
        assert ask(first, "a", "b") == [Answer("yes"), Answer("yes")]
        assert ask(first, "a") == ask(make(stub), "a") == [Answer("yes")]
        assert len(stub.requests) == 2
        usage = first.usage
        assert (usage.requests, usage.cached, usage.prompt_tokens, usage.completion_tokens) == (2, 1, 22, 6)
        assert stub.requests[0].keys() == {"model", "messages", "temperature", "max_tokens"}
        assert (stub.requests[0]["model"], stub.requests[0]["temperature"]) == ("m", 0)


def test_other_settings_are_other_requests(make: Any) -> None:
    with serving(scripted(chat("yes"))) as stub:
        ask(make(stub), "a")
        ask(make(stub, options={"temperature": 1, "seed": 3}), "a")
        assert stub.requests[1]["seed"] == 3
        assert "max_tokens" not in stub.requests[1]
    messages = [{"role": "user", "content": "a"}]
    keys = {request_key(url, model, messages, {}) for url in ("http://a/v1", "http://b/v1") for model in "mn"}
    assert len(keys) == 4
    assert request_key("http://a/v1/", "m", messages, {}) in keys


def test_a_reply_without_text_or_usage_is_a_reply(make: Any) -> None:
    silent = chat(None)
    assert isinstance(silent.body, dict)
    del silent.body["usage"]
    with serving(scripted(silent)) as stub:
        endpoint = make(stub)
        assert ask(endpoint, "a") == [Answer("")]
        assert (endpoint.usage.uncounted, endpoint.usage.prompt_tokens) == (1, 0)


def test_no_more_requests_at_once_than_allowed(make: Any) -> None:
    slow = chat("yes")
    slow.delay = 0.05
    with serving(scripted(slow)) as stub:
        ask(make(stub, concurrency=3), *map(str, range(12)))
        assert stub.most_at_once == 3


# ---- failures --------------------------------------------------------------------------------------------------------

WRONG_SHAPE: list[Any] = [{}, {"choices": []}, {"choices": [{"message": None}]}, [], "text", 3]

PASSING = [
    error(500),
    error(503),
    error(429, retry_after="0.01"),
    error(408),
    Say("{ not json"),
    Say(""),
    Say(b"\xff\xfe"),
    Say('{"choices": [', missing=500),
    *(Say(json.dumps(body)) for body in WRONG_SHAPE),
]


@pytest.mark.parametrize("failure", PASSING)
def test_what_may_pass_is_tried_again(make: Any, failure: Say) -> None:
    with serving(scripted(failure, chat("yes"))) as stub:
        endpoint = make(stub)
        assert ask(endpoint, "a") == [Answer("yes")]
        assert len(stub.requests) == 2
        assert (endpoint.usage.retries, endpoint.usage.failed) == (1, 0)


def test_a_reply_that_does_not_come_is_tried_again(make: Any) -> None:
    late = chat("late")
    late.delay = 0.6
    with serving(scripted(late, chat("yes"))) as stub:
        assert ask(make(stub, timeout=0.2), "a") == [Answer("yes")]


def test_a_server_that_is_not_there(make: Any) -> None:
    with serving(scripted(chat("yes"))) as stub:
        pass
    endpoint = make(stub, retries=1)
    (answer,) = ask(endpoint, "a")
    assert answer.text is None
    assert answer.failure is not None
    assert "no connection" in answer.failure
    assert (endpoint.usage.retries, endpoint.usage.failed) == (1, 1)


def test_waits_double_and_are_as_long_as_the_server_asks_for(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    script = [error(500), error(500), error(500), error(429, retry_after="7"), chat("yes")]
    with serving(scripted(*script)) as stub:
        endpoint = make(stub, first_wait=1.0)
        monkeypatch.setattr("mogeo.judging.endpoint_client.asyncio.sleep", sleep)
        assert ask(endpoint, "a") == [Answer("yes")]
    waits = [wait for wait in waits if wait]
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits[:3]))
    assert waits[3] == pytest.approx(7, abs=1)


def test_a_wait_for_an_hour_is_not_waited_for(make: Any) -> None:
    with serving(scripted(error(429, "busy", retry_after="3600"))) as stub:
        (answer,) = ask(make(stub), "a")
        assert answer.failure == "HTTP 429: busy"
        assert len(stub.requests) == 1


def test_retry_after_is_a_number_or_a_date() -> None:
    assert _seconds(None) == _seconds("soon") == _seconds("-4") == 0
    assert _seconds("2.5") == 2.5
    assert 28 < _seconds(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30


def test_a_request_that_cannot_be_is_not_repeated_and_the_others_go_on(make: Any) -> None:
    def behave(request: dict[str, Any], number: int) -> Say:
        return error(400, "too long") if "bad" in request["messages"][0]["content"] else chat("yes")

    with serving(behave) as stub:
        endpoint = make(stub)
        answers = ask(endpoint, "a", "bad", "b")
        assert answers == [Answer("yes"), Answer(None, "HTTP 400: too long"), Answer("yes")]
        assert (len(stub.requests), endpoint.usage.failures) == (3, {"HTTP 400: too long": 1})
        ask(endpoint, "bad")
        assert len(stub.requests) == 4  # a failure is no reply: it is not kept


@pytest.mark.parametrize(
    "failure", [error(401, "who?"), error(403), error(404, "no such model"), error(429, code="insufficient_quota")]
)
def test_what_no_request_will_pass_ends_it_at_once(make: Any, failure: Say) -> None:
    with serving(scripted(failure)) as stub:
        with pytest.raises(InputError, match="refuses the request: HTTP 4"):
            ask(make(stub, concurrency=1), *"abcdef")
        assert len(stub.requests) == 1


def test_a_server_that_only_fails_is_given_up_and_what_it_said_before_is_kept(make: Any) -> None:
    def behave(_: dict[str, Any], number: int) -> Say:
        return chat("yes") if number < 3 else error(500)

    with serving(behave) as stub:
        with pytest.raises(InputError, match=r"failed 5 requests in a row, the last with: HTTP 500.*go on"):
            ask(make(stub, retries=0, concurrency=1), *map(str, range(30)))
        assert len(stub.requests) == 8
    with serving(scripted(chat("later"))) as again:
        endpoint = make(Stub(stub.url))
        assert ask(endpoint, "0", "1", "2") == [Answer("yes")] * 3
        assert again.requests == []


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_goes_nowhere_else(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    told = []
    # A server that repeats it wherever it can.
    with serving(scripted(chat(f"your key is {KEY}"), error(400, f"bad {KEY}"), error(401, f"bad {KEY}"))) as stub:
        endpoint = make(stub, api_key_env="MY_KEY", concurrency=1)
        told += [repr(ask(endpoint, "a")), repr(ask(endpoint, "b"))]
        with pytest.raises(InputError) as refusal:
            ask(endpoint, "c")
        told += [repr(refusal.getrepr(chain=True, showlocals=False)), repr(endpoint.config), repr(endpoint.usage)]
        assert stub.authorizations == [f"Bearer {KEY}"] * 3
    assert "your key is [key]" in told[0]
    told += [record.getMessage() for record in caplog.records]
    assert KEY not in "\n".join(told)
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()


def test_openais_key_goes_to_no_other_server(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(scripted(chat("yes"))) as stub:
        ask(make(stub), "a")
        assert stub.authorizations == ["Bearer none"]
    assert EndpointConfig("gpt-4o").api_key() == KEY


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "is no address"),
        ({"base_url": "http://me:secret@localhost/v1"}, "secrets come from --api-key-env alone"),
        ({"concurrency": 0}, "--concurrency has to be at least 1"),
        ({"retries": -1}, "--retries has to be at least 0"),
        ({"timeout": 0.0}, "--timeout has to be a positive number"),
        ({"api_key_env": "NOT_SET"}, "environment variable NOT_SET with the key for http://localhost/v1 is not set"),
    ],
)
def test_settings_that_cannot_be_are_named(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(InputError, match=message) as refusal:
        EndpointConfig("m", **{"base_url": "http://localhost/v1", **options}).check()
    assert "secret@" not in str(refusal.value)


def test_openai_without_a_key_says_which_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        EndpointConfig("gpt-4o").check()


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_two_writers_share_a_cache(tmp_path: Path) -> None:
    one, other = ReplyCache(tmp_path / "deep" / "c.sqlite"), ReplyCache(tmp_path / "deep" / "c.sqlite")
    one.put("k", Reply("text", 1, None))
    assert other.get("k") == Reply("text", 1, None)
    assert other.get("l") is None
    one.close()
    other.close()


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("not a data base, and long enough to be seen as none" * 20)
    with pytest.raises(InputError, match="cannot be used"):
        ReplyCache(tmp_path / "c")
