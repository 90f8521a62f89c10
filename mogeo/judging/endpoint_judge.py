"""A judge behind an OpenAI-compatible endpoint: each pair is shown in both orders, and wins count where both agree.

Knows what to ask (`endpoint_prompts`) and how to make a verdict of the answers; how to ask is the business of
`endpoint_client`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from mogeo.judging.endpoint_client import Answer, Ask, Endpoint
from mogeo.judging.endpoint_prompts import (
    ANSWERS,
    FIRST,
    SECOND,
    TIE,
    Messages,
    ask_again,
    pairwise_messages,
    read_answer,
    rubric,
)
from mogeo.judging.judge import OVERALL, Verdict

T = TypeVar("T")

_CANDIDATE, _REFERENCE = "candidate", "reference"
_MEANING = ({FIRST: _CANDIDATE, SECOND: _REFERENCE, TIE: TIE}, {FIRST: _REFERENCE, SECOND: _CANDIDATE, TIE: TIE})
"""What an answer means if the candidate is A (first), and if it is B (second)."""

BYTES_PER_TOKEN = 4
"""For the forecast: how many bytes of UTF-8 make a token, about, in English."""


@dataclass(frozen=True)
class Forecast:
    """What judging will take.

    Attributes:
        comparisons: pairs of responses to judge.
        requests: requests to send. Each question about each pair is asked in two orders; what is cached is not sent.
        cached: requests whose reply is in the cache.
        prompt_tokens: tokens of the requests to send, estimated from their length.
        completion_tokens: most tokens of their replies; 0 if replies have no limit.
    """

    comparisons: int
    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int


class EndpointJudge:
    """Asks a model which of two responses is better, overall and by objective, one question per request.

    Models favour the response that is shown first, or second. So each question is asked in both orders: the candidate
    wins or loses if both answers say so, and everything else is a tie. If an answer is not in the form that was asked
    for, it is asked for once more. If that does not help, or there is no reply, the verdict is None.

    Args:
        endpoint: the model.
        objectives: names, in the order of the tables.
        rubrics: question (an objective, or "overall") -> what the model is told to compare, in place of our text.
        on_answer: called with 1 after each question in one order, for a progress bar.

    Attributes:
        answers: question -> answer ("A", "B", "tie", "unparsable", "no reply") -> how often it was given.
        contradictions: question -> pairs for which the model named the same position in both orders.
        asked_again: how often an answer was not in the form asked for.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        objectives: Sequence[str],
        rubrics: Mapping[str, str] | None = None,
        on_answer: Callable[[int], object] | None = None,
    ) -> None:
        self.endpoint, self.objectives, self.on_answer = endpoint, tuple(objectives), on_answer
        self.rubrics = {name: rubric(name, rubrics) for name in (OVERALL, *self.objectives)}
        self.asked_again = 0
        self.answers = {name: dict.fromkeys((*ANSWERS, "unparsable", "no reply"), 0) for name in self.rubrics}
        self.contradictions = dict.fromkeys(self.rubrics, 0)

    def forecast(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> Forecast:
        """What `compare` would take, without asking. Answers that have to be asked for twice are not counted."""
        requests = cached = size = 0
        for texts in zip(prompts, candidates, references, strict=True):
            for name in self.rubrics:
                for messages in self._both_orders(name, *texts):
                    if self.endpoint.cache.get(self.endpoint.key_of(messages)) is not None:
                        cached += 1
                    else:
                        requests += 1
                        size += sum(len(m["content"].encode("utf-8", "surrogatepass")) for m in messages)
        options = self.endpoint.config.options
        limit = options.get("max_completion_tokens") or options.get("max_tokens") or 0
        return Forecast(len(prompts), requests, cached, size // BYTES_PER_TOKEN, requests * limit)

    def compare(self, prompts: Sequence[str], candidates: Sequence[str], references: Sequence[str]) -> list[Verdict]:
        """One verdict per prompt, in order.

        Raises:
            InputError: the endpoint refuses every request, or has failed too often in a row.
        """
        return _run(self._compare(list(zip(prompts, candidates, references, strict=True))))

    def close(self) -> None:
        """Close the cache's file."""
        self.endpoint.cache.close()

    def report(self) -> dict[str, Any]:
        """Usage and answers as plain values, for `evaluation.json`.

        "A" is the response that was shown first. Where `contradictions` are many, the model judged positions and not
        texts.
        """
        return {
            "usage": asdict(self.endpoint.usage),
            "asked_again": self.asked_again,
            "answers": self.answers,
            "contradictions": self.contradictions,
        }

    def _both_orders(self, name: str, prompt: str, candidate: str, reference: str) -> tuple[Messages, Messages]:
        text = self.rubrics[name]
        return (
            pairwise_messages(text, prompt, candidate, reference),
            pairwise_messages(text, prompt, reference, candidate),
        )

    async def _compare(self, triples: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        async with self.endpoint.opened() as ask:
            tasks = [
                asyncio.ensure_future(self._answer(ask, name, messages))
                for triple in triples
                for name in self.rubrics
                for messages in self._both_orders(name, *triple)
            ]
            try:
                answers = iter(await asyncio.gather(*tasks))
            finally:  # if one has failed for good, do not pay for the others
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        # The iterator is given to zip twice, so it yields pairs: the answer in the first order, and in the second.
        pairs = zip(answers, answers, strict=True)
        return [self._verdict({name: next(pairs) for name in self.rubrics}) for _ in triples]

    def _verdict(self, pairs: Mapping[str, tuple[str | None, str | None]]) -> Verdict:
        """The verdict on one comparison, from the answers in the two orders by question."""
        for name, (first, second) in pairs.items():
            self.contradictions[name] += first == second and first in (FIRST, SECOND)
        verdicts = {name: _agreement(*pair) for name, pair in pairs.items()}
        details = {name: {"candidate_first": pair[0], "reference_first": pair[1]} for name, pair in pairs.items()}
        return Verdict({name: verdicts[name] for name in self.objectives}, verdicts[OVERALL], details)

    async def _answer(self, ask: Ask, name: str, messages: Messages) -> str | None:
        reply: Answer = await ask(messages)
        answer = None if reply.text is None else read_answer(reply.text)
        if answer is None and reply.text is not None:
            self.asked_again += 1
            reply = await ask(ask_again(messages, reply.text))
            answer = None if reply.text is None else read_answer(reply.text)
        self.answers[name][answer or ("no reply" if reply.text is None else "unparsable")] += 1
        if self.on_answer is not None:
            self.on_answer(1)
        return answer


def _agreement(candidate_first: str | None, reference_first: str | None) -> int | None:
    """+1 or -1 if both answers name the candidate or the reference, 0 if they do not agree, None if one is missing."""
    if candidate_first is None or reference_first is None:
        return None
    said = {_MEANING[0][candidate_first], _MEANING[1][reference_first]}
    return {_CANDIDATE: 1, _REFERENCE: -1, TIE: 0}[said.pop()] if len(said) == 1 else 0


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Uses a new thread if this one runs an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
