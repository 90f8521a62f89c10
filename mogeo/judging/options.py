"""The judges that the command line can make: their options, cheap checks, and the judge itself.

Must not import torch at the top. What is wrong with a judge is found by `check`, before anything is generated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogeo.errors import InputError
from mogeo.judging.endpoint_client import DEFAULT_OPTIONS, OPENAI_KEY, OPENAI_URL, EndpointConfig
from mogeo.judging.golden import Question
from mogeo.judging.judge import OVERALL, WORST, Judge, RatingJudge

if TYPE_CHECKING:
    from mogeo.judging.endpoint_judge import EndpointJudge
    from mogeo.judging.reward_judge import RewardSource

JUDGES = ("endpoint", "reward", "world")

_OWNERS = {
    "world": ("world_seed",),
    "reward": ("reward_model", "reward_label", "tie_margin"),
    "endpoint": (
        "judge_model", "base_url", "api_key_env", "rubric", "judge_option", "concurrency", "timeout", "retries",
        "cache", "price_in", "price_out", "yes",
    ),
}  # fmt: skip


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the judges. Defaults are None, so that an option of another judge than the one is seen."""
    config = EndpointConfig("")
    endpoint = parser.add_argument_group("judge: a model behind an OpenAI-compatible endpoint (--judge endpoint)")
    endpoint.add_argument("--judge-model", metavar="M", help="its name there")
    endpoint.add_argument("--base-url", metavar="URL", help=f"(default: {OPENAI_URL})")
    endpoint.add_argument(
        "--api-key-env", metavar="NAME",
        help=f"environment variable with the key (default: {OPENAI_KEY} for OpenAI's own address, no key for others)",
    )  # fmt: skip
    endpoint.add_argument(
        "--rubric", action="append", metavar="NAME=FILE",
        help="what to compare under an objective, or under 'overall': a text file, instead of ours; may be repeated",
    )  # fmt: skip
    endpoint.add_argument(
        "--judge-option", action="append", metavar="KEY=JSON",
        help="a further field of each request, or null to leave one out; may be repeated "
        f"(default: {', '.join(f'{k}={v}' for k, v in DEFAULT_OPTIONS.items())})",
    )  # fmt: skip
    endpoint.add_argument(
        "--concurrency", type=int, metavar="N", help=f"requests at the same time (default: {config.concurrency})"
    )
    endpoint.add_argument(
        "--timeout", type=float, metavar="S", help=f"seconds for a whole reply (default: {config.timeout:g})"
    )
    endpoint.add_argument(
        "--retries", type=int, metavar="N", help=f"attempts after a failed one (default: {config.retries})"
    )
    endpoint.add_argument(
        "--cache", type=Path, metavar="FILE", help="replies that are paid for (default: judge_cache.sqlite in --output)"
    )
    endpoint.add_argument(
        "--price-in", type=float, metavar="P", help="price of a million prompt tokens, for the estimate"
    )
    endpoint.add_argument("--price-out", type=float, metavar="P", help="price of a million tokens of replies")
    endpoint.add_argument("--yes", action="store_true", default=None, help="send the requests without asking first")

    reward = parser.add_argument_group("judge: reward models, sequence classifiers of transformers (--judge reward)")
    reward.add_argument(
        "--reward-model", action="append", metavar="[NAME=]M",
        help="hub name or folder; NAME: the objective it rewards, or 'overall' (the default for one with a single "
        "logit); may be repeated",
    )  # fmt: skip
    reward.add_argument(
        "--reward-label", action="append", metavar="NAME=LABEL",
        help="an objective, and the label (index or name) that is its reward, of a model with several; may be repeated",
    )  # fmt: skip
    reward.add_argument(
        "--tie-margin", type=float, metavar="R", help="rewards that differ by at most this are a tie (default: 0)"
    )

    world = parser.add_argument_group("judge: the raters of the demo's world (--judge world)")
    world.add_argument("--world-seed", type=int, metavar="N", help="of the world (default: 0)")


def check_judge(args: argparse.Namespace, objectives: Sequence[str], asked: Sequence[Question]) -> None:
    """Raise InputError for whatever a judge would stumble over, as far as that can be known without loading a model."""
    for owner, options in _OWNERS.items():
        for option in options:
            if owner != args.judge and getattr(args, option) is not None:
                raise InputError(
                    f"--{option.replace('_', '-')} is for --judge {owner}, and this is --judge {args.judge}"
                )
    if reserved := {OVERALL, WORST} & set(objectives):
        raise InputError(f"an objective is named '{reserved.pop()}', which the table uses; leave it out (--objectives)")
    if args.judge == "world":
        _check_world(objectives, asked)
    elif args.judge == "reward":
        from mogeo.judging.reward_judge import check_classifier_source

        for source in reward_sources(args.reward_model or [], args.reward_label or []).values():
            check_classifier_source(source.model)
    else:
        endpoint_config(args).check()
        if not objectives:
            raise InputError("the data rates no objective: name those to judge by with --objectives")
        read_rubrics(args.rubric or [], objectives)


def world_judge(args: argparse.Namespace, objectives: Sequence[str]) -> Judge:
    """The raters of the demo's world."""
    from mogeo.demo.world import OBJECTIVES, World

    return RatingJudge(World(args.world_seed or 0).rate, objectives or OBJECTIVES)


def reward_judge(args: argparse.Namespace) -> Judge:
    """The reward models."""
    import torch

    from mogeo.dpo.train import resolve_device
    from mogeo.judging.reward_judge import RewardJudge

    return RewardJudge(
        reward_sources(args.reward_model or [], args.reward_label or []),
        margin=args.tie_margin or 0.0,
        batch_size=args.batch_size,
        device=resolve_device(args.device),
        dtype=getattr(torch, args.dtype),
    )


def endpoint_judge(args: argparse.Namespace, objectives: Sequence[str]) -> EndpointJudge:
    """The model behind the endpoint."""
    from mogeo.judging.endpoint_cache import ReplyCache
    from mogeo.judging.endpoint_client import Endpoint
    from mogeo.judging.endpoint_judge import EndpointJudge

    cache = ReplyCache(args.cache or args.output / "judge_cache.sqlite")
    return EndpointJudge(
        Endpoint(endpoint_config(args), cache), objectives, read_rubrics(args.rubric or [], objectives)
    )


# ---- reading options -------------------------------------------------------------------------------------------------


def endpoint_config(args: argparse.Namespace) -> EndpointConfig:
    """The settings of the endpoint; what was not given has EndpointConfig's defaults."""
    if not args.judge_model:
        raise InputError("--judge endpoint needs the judging model's name: --judge-model gpt-4o")
    names = ("base_url", "api_key_env", "concurrency", "timeout", "retries")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return EndpointConfig(args.judge_model, options=_request_options(args.judge_option or []), **given)


def reward_sources(models: Sequence[str], labels: Sequence[str]) -> dict[str, RewardSource]:
    """Question -> where its reward comes from.

    One model without a name and labels: each label's objective; without labels: overall. Models with names: each for
    its objective; a label of the same name says which of the model's logits.
    """
    from mogeo.judging.reward_judge import RewardSource

    if not models:
        raise InputError("--judge reward needs a reward model: --reward-model HUB/NAME")
    of_label = dict(_named(text, "--reward-label") for text in labels)
    named: dict[str, str] = {}
    unnamed = []
    for text in models:
        name, mark, source = text.partition("=")
        if not mark or "/" in name or Path(text).exists():
            unnamed.append(text)
        elif name in named or not name or not source:
            raise InputError(f"--reward-model '{text}': each objective has one, as NAME=MODEL")
        else:
            named[name] = source
    if len(unnamed) > 1 or (unnamed and OVERALL in named):
        raise InputError(f"several reward models need names: --reward-model NAME={unnamed[-1]}")
    if not unnamed and (extra := set(of_label) - set(named)):
        raise InputError(f"--reward-label names {', '.join(sorted(extra))}, and no --reward-model does")
    found = {name: RewardSource(source, of_label.pop(name, None)) for name, source in named.items()}
    for source in unnamed:
        found.update({name: RewardSource(source, label) for name, label in of_label.items()})
        if not of_label:
            found[OVERALL] = RewardSource(source)
    return found


def read_rubrics(given: Sequence[str], objectives: Sequence[str]) -> dict[str, str]:
    """Question -> the text of its file."""
    found = {}
    for text in given:
        name, file = _named(text, "--rubric")
        if name not in (OVERALL, *objectives):
            raise InputError(f"--rubric {name}: no such objective; there are {OVERALL}, {', '.join(objectives)}")
        try:
            found[name] = Path(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--rubric {name}: '{file}' cannot be read ({error})") from None
        if not found[name]:
            raise InputError(f"--rubric {name}: '{file}' is empty")
    return found


def _request_options(given: Sequence[str]) -> dict[str, Any]:
    options = dict(DEFAULT_OPTIONS)
    for text in given:
        key, value = _named(text, "--judge-option")
        try:
            options[key] = json.loads(value)
        except ValueError:
            raise InputError(f"--judge-option {key}: {value} is not JSON (a text needs double quotes)") from None
    return {key: value for key, value in options.items() if value is not None}


def _named(text: str, option: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark or not name or not value:
        raise InputError(f"{option} '{text}' has to be NAME=VALUE")
    return name, value


def _check_world(objectives: Sequence[str], asked: Sequence[Question]) -> None:
    from mogeo.demo.world import OBJECTIVES, TownQuestion

    if unknown := set(objectives) - set(OBJECTIVES):
        raise InputError(f"the world's raters know no {', '.join(sorted(unknown))}; they rate {', '.join(OBJECTIVES)}")
    try:
        for question in asked:
            TownQuestion.parse(question.prompt)
    except ValueError as error:
        raise InputError(f"--judge world: {error}") from None
