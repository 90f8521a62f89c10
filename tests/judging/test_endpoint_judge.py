"""A judge behind an endpoint: wins need both orders, what is no answer is no tie, and no work is lost or done twice.

Against a server that judges as it is told to, and against transformers' own OpenAI-compatible server with a real model.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mogeo.errors import InputError
from mogeo.judging.comparison import judge_models
from mogeo.judging.endpoint_cache import ReplyCache
from mogeo.judging.endpoint_client import Endpoint, EndpointConfig
from mogeo.judging.endpoint_judge import EndpointJudge
from mogeo.judging.endpoint_prompts import RUBRICS
from mogeo.judging.golden import Question
from mogeo.judging.judge import OVERALL, Verdict
from tests.openai_stub import Say, Stub, chat, error, serving
from tests.tiny import save, tiny_llama, tiny_tokenizer

OBJECTIVES = ("honesty", "wit")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., EndpointJudge]]:
    caches = []

    def judge(stub: Stub, objectives: tuple[str, ...] = OBJECTIVES, **options: Any) -> EndpointJudge:
        caches.append(ReplyCache(tmp_path / "cache.sqlite"))
        config = EndpointConfig("m", stub.url, **{"first_wait": 0.001, "retries": 2, "timeout": 5.0, **options})
        return EndpointJudge(Endpoint(config, caches[-1]), objectives)

    yield judge
    for cache in caches:
        cache.close()


def shown(request: dict[str, Any]) -> tuple[str, str, str]:
    """The rubric, and responses A and B, of a request."""
    system, user = (m["content"] for m in request["messages"][:2])
    texts = [re.search(rf"<response_{side} \w+>\n(.*)\n</response_{side} ", user, re.DOTALL)[1] for side in "AB"]
    return system, texts[0], texts[1]


def winner(answer: str) -> Say:
    return chat(json.dumps({"winner": answer}))


def prefers_longer(request: dict[str, Any], _: int) -> Say:
    """A judge without a bias; on honesty, the shorter one wins."""
    system, a, b = shown(request)
    sign = -1 if RUBRICS["honesty"] in system else 1
    difference = sign * (len(a) - len(b))
    return winner("A" if difference > 0 else "B" if difference < 0 else "tie")


def test_a_judge_without_bias_is_believed(make: Any) -> None:
    with serving(prefers_longer) as stub:
        judge = make(stub)
        verdicts = judge.compare(["p", "q", "r"], ["long", "x", "same"], ["s", "longer", "size"])
    assert [v.overall for v in verdicts] == [1, -1, 0]
    assert [v.objectives for v in verdicts] == [
        {"honesty": -1, "wit": 1}, {"honesty": 1, "wit": -1}, {"honesty": 0, "wit": 0},
    ]  # fmt: skip
    assert len(stub.requests) == 3 * 3 * 2
    assert verdicts[0].details["wit"] == {"candidate_first": "A", "reference_first": "B"}
    assert set(judge.contradictions.values()) == {0}


@pytest.mark.parametrize("position", ["A", "B"])
def test_a_judge_that_prefers_a_position_makes_ties_alone(make: Any, position: str) -> None:
    with serving(lambda *_: winner(position)) as stub:
        judge = make(stub)
        assert judge.compare(["p", "q"], ["a", "b"], ["c", "d"]) == [
            Verdict(dict.fromkeys(OBJECTIVES, 0), 0, verdict_details(position))
        ] * 2  # fmt: skip
        assert judge.contradictions == dict.fromkeys((OVERALL, *OBJECTIVES), 2)
        assert judge.report()["answers"][OVERALL][position] == 4


def verdict_details(answer: str) -> dict[str, Any]:
    return {name: {"candidate_first": answer, "reference_first": answer} for name in (OVERALL, *OBJECTIVES)}


def test_a_tie_in_one_order_is_a_tie(make: Any) -> None:
    def behave(request: dict[str, Any], _: int) -> Say:
        return winner("A" if shown(request)[1] == "candidate" else "tie")

    with serving(behave) as stub:
        assert make(stub).compare(["p"], ["candidate"], ["golden"])[0].overall == 0


def test_an_unreadable_answer_is_asked_for_once_more(make: Any) -> None:
    def behave(request: dict[str, Any], number: int) -> Say:
        again = len(request["messages"]) > 2
        return prefers_longer(request, number) if again else chat("The first, I think.")

    with serving(behave) as stub:
        judge = make(stub)
        assert judge.compare(["p"], ["long"], ["s"])[0].overall == 1
        assert judge.asked_again == 6
        assert len(stub.requests) == 12
        assert {len(r["messages"]) for r in stub.requests} == {2, 4}


@pytest.mark.parametrize("text", ["", "A", '{"winner": "C"}', '{"winner": "A"', '{"winner": "A", "why": "x"}'])
def test_what_stays_unreadable_is_not_judged_and_never_paid_twice(make: Any, text: str) -> None:
    with serving(lambda *_: chat(text)) as stub:
        first, again = make(stub, ()), make(stub, ())
        for judge in (first, again):
            assert judge.compare(["p"], ["a"], ["b"])[0].overall is None
            assert judge.answers[OVERALL]["unparsable"] == 2
        assert len(stub.requests) == 4
        assert again.endpoint.usage.cached == 4


def test_one_unreadable_order_is_enough_not_to_judge(make: Any) -> None:
    def behave(request: dict[str, Any], number: int) -> Say:
        return chat("hm") if shown(request)[1] == "golden" else winner("A")

    with serving(behave) as stub:
        verdict = make(stub, ()).compare(["p"], ["candidate"], ["golden"])[0]
    assert verdict.overall is None
    assert verdict.details[OVERALL] == {"candidate_first": "A", "reference_first": None}


def test_a_request_that_fails_is_counted_apart(make: Any) -> None:
    def behave(request: dict[str, Any], number: int) -> Say:
        return error(400, "filtered") if "forbidden" in request["messages"][1]["content"] else winner("tie")

    with serving(behave) as stub:
        judge = make(stub, ())
        assert [v.overall for v in judge.compare(["p", "forbidden"], ["a", "a"], ["b", "b"])] == [0, None]
        assert judge.answers[OVERALL]["no reply"] == 2
        assert judge.endpoint.usage.failures == {"HTTP 400: filtered": 2}


def test_the_plan_is_what_is_sent(make: Any) -> None:
    texts = (["p", "q"], ["long", "x"], ["s", "longer"])
    with serving(prefers_longer) as stub:
        judge = make(stub)
        plan = judge.forecast(*texts)
        assert (plan.comparisons, plan.requests, plan.cached, plan.completion_tokens) == (2, 12, 0, 12 * 64)
        judge.compare(*texts)
        assert len(stub.requests) == plan.requests
        sent = sum(len(m["content"].encode()) for r in stub.requests for m in r["messages"])
        assert plan.prompt_tokens == sent // 4
        after = judge.forecast(*texts)
        assert (after.requests, after.cached, after.prompt_tokens) == (0, 12, 0)


# A connection that was about to be made is dropped unawaited by the HTTP library.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stopping_keeps_what_was_answered(make: Any) -> None:
    texts = (list("pqrstu"), ["long"] * 6, ["s"] * 6)
    with serving(prefers_longer) as stub:
        judge = make(stub, concurrency=2)
        told: list[int] = []

        def stop(n: int) -> None:
            told.append(n)
            if len(told) == 10:
                raise KeyboardInterrupt

        judge.on_answer = stop
        with pytest.raises(KeyboardInterrupt):
            judge.compare(*texts)
        sent = len(stub.requests)
        assert 10 <= sent < 36
        again = make(stub)
        assert all(v.overall == 1 for v in again.compare(*texts))
        assert again.endpoint.usage.cached >= 10
        assert len(stub.requests) <= 36 + 2  # those that were under way when it stopped
    gc.collect()  # what was dropped holds the KeyboardInterrupt, and would raise it in whichever test is next


def test_a_refusal_stops_the_others(make: Any) -> None:
    with serving(lambda *_: error(401, "who?")) as stub:
        with pytest.raises(InputError, match="who"):
            make(stub, concurrency=2).compare(list("abcdefgh"), ["x"] * 8, ["y"] * 8)
        assert len(stub.requests) <= 2


def test_it_works_where_an_event_loop_is_running(make: Any) -> None:
    async def notebook(judge: EndpointJudge) -> list[Verdict]:
        return judge.compare(["p"], ["long"], ["s"])

    with serving(prefers_longer) as stub:
        assert asyncio.run(notebook(make(stub)))[0].overall == 1
    with serving(lambda *_: error(403)) as stub, pytest.raises(InputError):
        asyncio.run(notebook(make(stub, ("other",))))


def test_identical_texts_are_ties_without_a_request(make: Any) -> None:
    questions = [Question("p", "golden"), Question("q", "gold")]
    with serving(prefers_longer) as stub:
        responses = {"one": [["golden "], ["x"]], "two": [["golden"], ["x"]]}
        judged = judge_models(make(stub), questions, responses, resamples=10)
        assert len(stub.requests) == 6  # one comparison, though two models said it
    assert judged.counts("one", OVERALL) == {"wins": 0, "ties": 1, "losses": 1, "not_judged": 0}
    assert judged.verdicts["one"] == judged.verdicts["two"]


# ---- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """`transformers serve` with a tiny random model: (address, the model's name)."""
    words = ["<pad>", "<eos>", "<unk>", "A", "B", "tie", "winner", "response", "better"]
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model = tiny_llama(len(words), max_position_embeddings=2048)
    folder = save(tmp_path_factory.mktemp("judge"), model, tiny_tokenizer(words, template))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", serve, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
               "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder / "serve.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                told = (folder / "serve.log").read_text()
                assert process.poll() is None, told
                assert time.monotonic() < deadline, told
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.mark.slow
def test_against_a_real_server(real_server: tuple[str, str], tmp_path: Path) -> None:
    url, model = real_server
    cache = ReplyCache(tmp_path / "cache.sqlite")
    config = EndpointConfig(model, url, options={"temperature": 0, "max_tokens": 8}, concurrency=2)
    judge = EndpointJudge(Endpoint(config, cache), ("wit",))
    texts = (["better ?"], ["A"], ["B"])
    (verdict,) = judge.compare(*texts)
    # A random model answers no question: nothing may be made of what it says.
    assert verdict.overall is None
    assert verdict.objectives == {"wit": None}
    usage = judge.endpoint.usage
    assert (usage.requests, usage.failed, usage.uncounted, judge.asked_again) == (8, 0, 0, 4)
    assert usage.prompt_tokens > 8 * 100
    assert 0 < usage.completion_tokens <= 8 * 8
    assert judge.answers[OVERALL]["unparsable"] == 2
    again = EndpointJudge(Endpoint(config, cache), ("wit",))
    assert again.compare(*texts) == [verdict]
    assert (again.endpoint.usage.requests, again.endpoint.usage.cached) == (0, 8)
    cache.close()


@pytest.mark.slow
def test_a_model_that_a_real_server_lacks_is_a_clear_error(real_server: tuple[str, str], tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "cache.sqlite")
    config = EndpointConfig("no/such-model", real_server[0], retries=0, concurrency=1)
    with pytest.raises(InputError, match=r"127\.0\.0\.1"):
        EndpointJudge(Endpoint(config, cache), OBJECTIVES).compare(["p"], ["a"], ["b"])
    cache.close()
