"""`mogeo evaluate --judge endpoint`: the options of a judging model behind an endpoint, its price, and consent to it.

Must not import torch: the options are declared before it is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogeo.errors import InputError
from mogeo.judging.endpoint_client import DEFAULT_OPTIONS, OPENAI_KEY, OPENAI_URL, EndpointConfig
from mogeo.judging.golden import Question
from mogeo.judging.judge import OVERALL
from mogeo.judging.judge_kinds import JudgeKind, Session
from mogeo.judging.named_values import named_value
from mogeo.judging.progress import progress_bar

if TYPE_CHECKING:
    from mogeo.judging.comparison import Comparisons
    from mogeo.judging.endpoint_judge import EndpointJudge, Forecast


class EndpointKind(JudgeKind):
    """Makes an `EndpointJudge`. Before it sends anything, it says what that will cost and asks for consent."""

    title = "judge: a model behind an OpenAI-compatible endpoint"

    def add_arguments(self, group: argparse._ArgumentGroup) -> None:
        default = EndpointConfig("")
        group.add_argument("--judge-model", metavar="M", help="its name there")
        group.add_argument("--base-url", default=default.base_url, metavar="URL", help="(default: %(default)s)")
        group.add_argument(
            "--api-key-env", metavar="NAME",
            help=f"environment variable with the key (default: {OPENAI_KEY} for {OPENAI_URL}, no key for others)",
        )  # fmt: skip
        group.add_argument(
            "--rubric", action="append", default=[], metavar="NAME=FILE",
            help="what to compare under an objective, or 'overall': a text file, instead of ours; may be repeated",
        )  # fmt: skip
        group.add_argument(
            "--judge-option", action="append", default=[], metavar="KEY=JSON",
            help="a further field of each request, or null to leave one out; may be repeated "
            f"(default: {', '.join(f'{k}={v}' for k, v in DEFAULT_OPTIONS.items())})",
        )  # fmt: skip
        group.add_argument(
            "--concurrency", type=int, default=default.concurrency, metavar="N",
            help="requests at the same time (default: %(default)s)",
        )  # fmt: skip
        group.add_argument(
            "--timeout", type=float, default=default.timeout, metavar="S",
            help="seconds for a whole reply (default: %(default)g)",
        )  # fmt: skip
        group.add_argument(
            "--retries", type=int, default=default.retries, metavar="N",
            help="attempts after a failed one (default: %(default)s)",
        )  # fmt: skip
        group.add_argument(
            "--cache", type=Path, metavar="FILE",
            help="replies that are paid for (default: judge_cache.sqlite in --output)",
        )  # fmt: skip
        group.add_argument(
            "--price-in", type=float, metavar="P", help="price of a million prompt tokens, for the estimate"
        )
        group.add_argument("--price-out", type=float, metavar="P", help="price of a million tokens of replies")
        group.add_argument("--yes", action="store_true", help="send the requests without asking first")

    def check(self, args: argparse.Namespace, objectives: Sequence[str], questions: Sequence[Question]) -> None:
        endpoint_config(args).check()
        if not objectives:
            raise InputError("the data rates no objective: name those to judge by with --objectives")
        read_rubrics(args.rubric, objectives)

    def make(self, args: argparse.Namespace, objectives: Sequence[str]) -> EndpointJudge:
        from mogeo.judging.endpoint_cache import ReplyCache
        from mogeo.judging.endpoint_client import Endpoint
        from mogeo.judging.endpoint_judge import EndpointJudge

        cache = ReplyCache(args.cache or args.output / "judge_cache.sqlite")
        return EndpointJudge(Endpoint(endpoint_config(args), cache), objectives, read_rubrics(args.rubric, objectives))

    @contextmanager
    def session(
        self, args: argparse.Namespace, objectives: Sequence[str], comparisons: Comparisons
    ) -> Iterator[Session]:
        """Say what judging will take, ask for consent, and then judge.

        Raises:
            InputError: there is no consent.
        """
        with closing(self.make(args, objectives)) as judge:
            forecast = judge.forecast(comparisons.prompts, comparisons.candidates, comparisons.references)
            print(_forecast_text(args, forecast), flush=True)
            if forecast.requests:
                _ask_consent(args)
            session = Session(judge)
            total = forecast.requests + forecast.cached
            with progress_bar("judging", total, "answer", quiet=args.quiet) as bar:
                judge.on_answer = bar
                yield session
            session.record = {"forecast": asdict(forecast), **judge.report()}
            session.summary = _usage_text(args, judge)


# ---- reading options -------------------------------------------------------------------------------------------------


def endpoint_config(args: argparse.Namespace) -> EndpointConfig:
    """The settings of the endpoint, from the options of the command line.

    Raises:
        InputError: the judging model has no name, or a field of requests is not JSON.
    """
    if not args.judge_model:
        raise InputError("--judge endpoint needs the judging model's name: --judge-model gpt-4o")
    return EndpointConfig(
        args.judge_model,
        base_url=args.base_url,
        options=_request_fields(args.judge_option),
        api_key_env=args.api_key_env,
        concurrency=args.concurrency,
        timeout=args.timeout,
        retries=args.retries,
    )


def read_rubrics(given: Sequence[str], objectives: Sequence[str]) -> dict[str, str]:
    """Read the files that say what is compared under a question.

    Args:
        given: values of `--rubric`, each "NAME=FILE".
        objectives: the names that may be given, besides "overall".

    Returns:
        Question -> the text of its file.

    Raises:
        InputError: there is no such objective, or a file cannot be read or is empty.
    """
    found = {}
    for text in given:
        name, file = named_value(text, "--rubric")
        if name not in (OVERALL, *objectives):
            raise InputError(f"--rubric {name}: no such objective; there are {OVERALL}, {', '.join(objectives)}")
        try:
            found[name] = Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--rubric {name}: '{file}' cannot be read ({error})") from None
        if not found[name]:
            raise InputError(f"--rubric {name}: '{file}' is empty")
    return found


def _request_fields(given: Sequence[str]) -> dict[str, Any]:
    """The fields of every request: the defaults, changed by the values of `--judge-option`; null takes one away."""
    fields = dict(DEFAULT_OPTIONS)
    for text in given:
        key, value = named_value(text, "--judge-option")
        try:
            fields[key] = json.loads(value)
        except ValueError:
            raise InputError(f"--judge-option {key}: {value} is not JSON (a text needs double quotes)") from None
    return {key: value for key, value in fields.items() if value is not None}


# ---- price and consent -----------------------------------------------------------------------------------------------


def _ask_consent(args: argparse.Namespace) -> None:
    """Return if the requests may be sent.

    Raises:
        InputError: they may not.
    """
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise InputError("the requests above are not sent without consent: add --yes (the responses are kept)")
    if input("send them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("nothing was sent; the responses are kept")


def _cost(args: argparse.Namespace, prompt_tokens: int, completion_tokens: int) -> float | None:
    """What these tokens cost, in the unit of the prices; None if the prices are not known."""
    if args.price_in is None or args.price_out is None:
        return None
    return float(args.price_in * prompt_tokens + args.price_out * completion_tokens) / 1e6


def _forecast_text(args: argparse.Namespace, forecast: Forecast) -> str:
    """What judging will take, as a sentence."""
    cost = _cost(args, forecast.prompt_tokens, forecast.completion_tokens)
    limit = f", at most {forecast.completion_tokens:,} of replies" if forecast.completion_tokens else ""
    return (
        f"{forecast.comparisons:,} comparisons: {forecast.requests:,} requests to {args.judge_model} "
        f"({forecast.cached:,} more are in the cache), about {forecast.prompt_tokens:,} prompt tokens (bytes / 4)"
        f"{limit}" + (f": at most {cost:,.2f}" if cost is not None else "; --price-in and --price-out tell the cost")
    )


def _usage_text(args: argparse.Namespace, judge: EndpointJudge) -> str:
    """What was sent and answered, in a few lines."""
    usage = judge.endpoint.usage
    cost = _cost(args, usage.prompt_tokens, usage.completion_tokens)
    lines = [
        f"{usage.requests:,} requests answered ({usage.cached:,} from the cache, {usage.retries:,} retries, "
        f"{judge.asked_again:,} asked again), {usage.prompt_tokens:,} prompt tokens and {usage.completion_tokens:,} of "
        "replies, as the server counts" + (f": {cost:,.2f}" if cost is not None else "")
    ]
    if usage.uncounted:
        lines.append(f"{usage.uncounted:,} replies came without a count of tokens")
    total = sum(sum(counts.values()) for counts in judge.answers.values()) // 2
    contradictions = sum(judge.contradictions.values())
    first, second = (sum(counts[position] for counts in judge.answers.values()) for position in "AB")
    lines.append(
        f"in {contradictions:,} of {total:,} pairs of orders it preferred the same position both times (counted as "
        f"ties); it named the first response {first:,} times, the second {second:,} times"
    )
    for reason, count in usage.failures.items():
        lines.append(f"{count:,} without a reply: {reason}")
    unparsable = sum(counts["unparsable"] for counts in judge.answers.values())
    if unparsable:
        lines.append(f"{unparsable:,} replies were not in the form asked for, also when asked again: not judged")
    return "\n".join(lines)
