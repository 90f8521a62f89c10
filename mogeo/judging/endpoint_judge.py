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
"""What an answer means in the first order (candidate as A) and in the second (candidate as B)."""
BYTES_PER_TOKEN = (
    4  # of UTF-8: what tokenizers of today come to for English, and close enough elsewhere for an estimate
)


@dataclass(frozen=True)
class Forecast:
    """What judging will take, before it begins."""

    comparisons: int
    requests: int
    """To be sent: two orders for each question on each comparison, less those in the cache."""
    cached: int
    prompt_tokens: int
    """Of these requests, estimated as UTF-8 bytes / 4."""
    completion_tokens: int
    """At most, from the limit on a reply; 0 where there is none."""


class EndpointJudge:
    """Asks a model which of two responses is better: overall, and by objective, one question at a time.

    Each question is asked in both orders, since models favour a position. The candidate wins (or loses) where both
    answers say so; a tie in one, or answers that contradict each other, is a tie. An answer in another form than was
    asked for is asked for once more; if that fails as well, or if there is no reply, the question is not judged: None.

    Args:
        endpoint: whom to ask.
        objectives: in the order in which they are reported.
        rubrics: question (an objective, or "overall") -> what is compared, instead of ours.
        on_answer: called with 1 for each question answered in one order, for a progress bar.
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
        """What `compare` would ask for, without asking. Answers that have to be asked for again come on top."""
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
        """One verdict a prompt, in order; raises InputError where the endpoint refuses, or fails again and again."""
        return _run(self._compare(list(zip(prompts, candidates, references, strict=True))))

    def close(self) -> None:
        """Let go of the cache's file."""
        self.endpoint.cache.close()

    def report(self) -> dict[str, Any]:
        """Usage, and how the judge answered, in plain values.

        `answers` counts A (the response shown first), B and tie by question; `contradictions` are pairs of which it
        preferred the same position in both orders: there it judged the position, and not the text.
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
            finally:  # where one has failed for good, the others are not to be paid for
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        # zip takes turns: the first order's answer, the second's.
        pairs = zip(answers, answers, strict=True)
        return [self._verdict({name: next(pairs) for name in self.rubrics}) for _ in triples]

    def _verdict(self, pairs: Mapping[str, tuple[str | None, str | None]]) -> Verdict:
        """Of one comparison: question -> answers in the two orders."""
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
    if candidate_first is None or reference_first is None:
        return None
    said = {_MEANING[0][candidate_first], _MEANING[1][reference_first]}
    return {_CANDIDATE: 1, _REFERENCE: -1, TIE: 0}[said.pop()] if len(said) == 1 else 0


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; in a thread of its own where this one has an event loop already, as in a notebook."""
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
