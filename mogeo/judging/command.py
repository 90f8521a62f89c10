"""`mogeo evaluate`: generate on held-out prompts, judge against golden responses. Arguments, order, consent, files.

Must not import torch at the top: `mogeo evaluate --help` has to answer at once, and bad input before a model is loaded.
Who is judged on what is found by `entrants`, the judges come from `options`, the numbers from `comparison`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogeo.dpo.config import PROMPT_FORMATS, share_or_number
from mogeo.errors import InputError
from mogeo.judging.entrants import Entrant, Prompts, entrants, questions, speakers
from mogeo.judging.golden import Question
from mogeo.judging.options import JUDGES, add_judge_arguments, check_judge, endpoint_judge, reward_judge, world_judge
from mogeo.judging.responses import DTYPES, Generation, ResponseFile, Said, Speaker, read_responses, respond

if TYPE_CHECKING:
    from mogeo.judging.comparison import Judged
    from mogeo.judging.endpoint_judge import EndpointJudge, Plan
    from mogeo.judging.judge import Judge

logger = logging.getLogger("mogeo")

_DESCRIPTION = """\
Judge what models say: each answers the held-out prompts, a judge compares each answer with the golden response of its
prompt, by objective and overall, and a table tells the net win rates (wins minus losses), with 95 % intervals.
"""

_EPILOG = """\
prompts and golden responses
  A run of `mogeo align` knows its data and which prompts it held out: name its folder, and nothing else is needed.
  Prompts that one of the runs was trained on are never judged. The golden response is the row's "golden", or else its
  completion with the largest sum of ratings.

examples
  mogeo evaluate --model runs/qwen --judge endpoint --judge-model gpt-4o --output runs/judged
  mogeo evaluate --model Qwen/Qwen2.5-0.5B-Instruct --model runs/uniform --model decoupled=runs/qwen \\
                 --judge reward --reward-model hub/reward-model --output runs/judged
  mogeo evaluate --model runs/qwen --judge endpoint --judge-model local --base-url http://127.0.0.1:8000/v1 \\
                 --prompts 50 --output runs/judged
  mogeo evaluate --model M --data goldens.jsonl --all-prompts --objectives helpfulness,honesty --judge endpoint ...

written to --output
  evaluation.json (settings, counts, rates, intervals)   judgements.jsonl (every verdict, with its texts)
  responses.jsonl (generated once, and used again)       judge_cache.sqlite (the endpoint's replies: none is paid twice)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    how = Generation()
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG

    who = parser.add_argument_group("whom to judge, and where to put it")
    who.add_argument(
        "--model", action="append", default=[], metavar="[LABEL=]M",
        help="folder of a run of `mogeo align`, or hub name, folder or .gguf file of a model; may be repeated: all "
        "answer the same prompts, and differences from the first are told",
    )  # fmt: skip
    who.add_argument(
        "--responses", type=Path, metavar="FILE",
        help='judge responses that exist: lines of {"model": "...", "prompt": "...", "responses": ["..."]}',
    )  # fmt: skip
    who.add_argument("--judge", required=True, choices=JUDGES, help="who compares; the options of each are below")
    who.add_argument("--output", required=True, metavar="O", type=Path, help="folder for everything that is written")

    prompts = parser.add_argument_group("prompts (default: those that the first run held out)")
    prompts.add_argument("--data", metavar="D", help="hub name, or .jsonl, .json, .parquet file")
    prompts.add_argument(
        "--held-out", type=share_or_number, metavar="H", help="share or number that was held out of it"
    )
    prompts.add_argument("--seed", type=int, metavar="N", help="of that split")
    prompts.add_argument("--all-prompts", action="store_true", help="do not split: the data is for judging only")
    prompts.add_argument(
        "--prompts", type=int, metavar="N", help="judge on N of them, drawn at random (the same each time)"
    )
    prompts.add_argument(
        "--objectives", metavar="A,B", help="names and their order (default: the run's, or the data's)"
    )

    speech = parser.add_argument_group("generation")
    speech.add_argument(
        "--temperature", type=float, default=how.temperature, metavar="T", help="0: greedy (default: %(default)s)"
    )
    speech.add_argument(
        "--samples-per-prompt", type=int, default=how.samples_per_prompt, metavar="N", help="(default: %(default)s)"
    )
    speech.add_argument(
        "--max-new-tokens", type=int, default=how.max_new_tokens, metavar="N",
        help="where a response that has not ended is cut (default: %(default)s)",
    )  # fmt: skip
    speech.add_argument("--generation-seed", type=int, default=how.seed, metavar="N", help="(default: %(default)s)")
    speech.add_argument(
        "--batch-size", type=int, default=how.batch_size, metavar="N", help="texts at once (default: %(default)s)"
    )
    speech.add_argument(
        "--prompt-format", choices=PROMPT_FORMATS, help="(default: what the run was trained with, or chat)"
    )
    speech.add_argument(
        "--dtype",
        choices=DTYPES,
        default=how.dtype,
        help="of the weights of models and reward models (default: %(default)s)",
    )
    speech.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: CUDA if there is one)")
    speech.add_argument("--quiet", action="store_true", help="no progress bars")
    add_judge_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; raises InputError for what the user can mend."""
    # Everything that can be wrong is found before a model is loaded, the cheapest first.
    how = Generation(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        samples_per_prompt=args.samples_per_prompt,
        seed=args.generation_seed,
        batch_size=args.batch_size,
        dtype=args.dtype,
    )
    how.check()
    if bool(args.model) == bool(args.responses):
        raise InputError("name either models (--model) or a file of their responses (--responses)")
    found = entrants(args.model)
    _check_sources(found)
    asked, objectives = questions(_prompts(args), found)
    check_judge(args, objectives, asked)
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"output '{args.output}' is a file; name a folder")

    said = _given(args, asked) if args.responses else None
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        if said is None:
            said = _generate(args, speakers(found, args.prompt_format), asked, how)
        asked, responses = _answered(asked, said)
        return _judge(args, asked, objectives, responses, how)
    except KeyboardInterrupt:
        print(
            "mogeo: interrupted; what was generated and answered is kept: run the same command to go on",
            file=sys.stderr,
        )
        return 130


def _prompts(args: argparse.Namespace) -> Prompts:
    names = None if args.objectives is None else tuple(name.strip() for name in args.objectives.split(","))
    return Prompts(args.data, args.held_out, args.seed, names, args.all_prompts, args.prompts)


def _check_sources(found: Sequence[Entrant]) -> None:
    # models.py needs torch; a path that does not exist can be told without.
    from mogeo.dpo.models import check_model_source

    for entrant in found:
        check_model_source(entrant.source)


# ---- responses -------------------------------------------------------------------------------------------------------


def _given(args: argparse.Namespace, asked: Sequence[Question]) -> dict[str, Said]:
    if not args.responses.is_file():
        raise InputError(f"--responses: file '{args.responses}' does not exist")
    return read_responses(args.responses, [question.prompt for question in asked])


def _generate(
    args: argparse.Namespace, models: Sequence[Speaker], asked: Sequence[Question], how: Generation
) -> dict[str, Said]:
    """The responses of each model, generated unless --output holds them."""
    import transformers

    from mogeo.dpo.train import resolve_device

    device = resolve_device(args.device)
    transformers.utils.logging.disable_progress_bar()  # its bars would be drawn across ours
    file = ResponseFile(args.output / "responses.jsonl")
    prompts = [question.prompt for question in asked]
    said = {}
    for model in models:
        key = model.key(prompts, how)
        known = file.get(key, prompts)
        if known is None:
            with _bar(args, model.label, len(prompts) * how.samples_per_prompt, "response") as bar:
                known = respond(model, prompts, how, device, bar)
            file.put(model.label, key, prompts, known)
        else:
            logger.info("%s: responses are in %s", model.label, file.path)
        said[model.label] = known
    return said


def _answered(asked: Sequence[Question], said: dict[str, Said]) -> tuple[list[Question], dict[str, list[list[str]]]]:
    """The questions that every model has answered: on others, models could not be compared."""
    unanswered = {label: {i for i, of_prompt in enumerate(of) if of_prompt is None} for label, of in said.items()}
    left_out = set().union(*unanswered.values())
    for label, of_model in unanswered.items():
        if of_model:
            logger.warning("%d prompts left out: with --max-new-tokens, too long for %s", len(of_model), label)
    kept = [i for i in range(len(asked)) if i not in left_out]
    if not kept:
        raise InputError("no prompt fits the context of the models; lower --max-new-tokens")
    responses = {label: [texts for i in kept if (texts := of[i]) is not None] for label, of in said.items()}
    return [asked[i] for i in kept], responses


# ---- judging ---------------------------------------------------------------------------------------------------------


def _judge(
    args: argparse.Namespace,
    asked: Sequence[Question],
    objectives: Sequence[str],
    responses: dict[str, list[list[str]]],
    how: Generation,
) -> int:
    from mogeo.judging.comparison import Comparisons, judge_models

    comparisons = Comparisons.of(asked, responses)
    told: dict[str, Any] = {"judge": args.judge}
    last_words = ""
    if args.judge == "endpoint":
        with closing(endpoint_judge(args, objectives)) as judge:
            plan = judge.plan(comparisons.prompts, comparisons.candidates, comparisons.references)
            print(_plan_text(args, plan), flush=True)
            if plan.requests:
                _ask_consent(args)
            with _bar(args, "judging", plan.requests + plan.cached, "answer") as bar:
                judge.on_answer = bar
                judged = judge_models(judge, asked, responses, comparisons=comparisons)
        told.update(plan=asdict(plan), **judge.report())
        last_words = f"\n{_endpoint_text(args, judge)}\n"
    else:
        rater: Judge = world_judge(args, objectives) if args.judge == "world" else reward_judge(args)
        judged = judge_models(rater, asked, responses, comparisons=comparisons)
    _write(args, judged, told, how)
    print("\n" + "\n\n".join(table.text() for table in judged.tables()))
    print(f"{last_words}\nnumbers, verdicts and responses are in {args.output}")
    return 0


def _ask_consent(args: argparse.Namespace) -> None:
    """Return if the requests may be sent; raises InputError if not."""
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise InputError("the requests above are not sent without consent: add --yes (the responses are kept)")
    if input("send them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("nothing was sent; the responses are kept")


# ---- what is shown and written ---------------------------------------------------------------------------------------


def _plan_text(args: argparse.Namespace, plan: Plan) -> str:
    cost = _cost(args, plan.prompt_tokens, plan.completion_tokens)
    limit = f", at most {plan.completion_tokens:,} of replies" if plan.completion_tokens else ""
    return (
        f"{plan.comparisons:,} comparisons: {plan.requests:,} requests to {args.judge_model} "
        f"({plan.cached:,} more are in the cache), about {plan.prompt_tokens:,} prompt tokens (bytes / 4){limit}"
        + (f": at most {cost:,.2f}" if cost is not None else "; with --price-in and --price-out, the cost is told")
    )


def _endpoint_text(args: argparse.Namespace, judge: EndpointJudge) -> str:
    """What was sent and answered."""
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


def _cost(args: argparse.Namespace, prompt_tokens: int, completion_tokens: int) -> float | None:
    if args.price_in is None or args.price_out is None:
        return None
    return float(args.price_in * prompt_tokens + args.price_out * completion_tokens) / 1e6


def _write(args: argparse.Namespace, judged: Judged, told: dict[str, Any], how: Generation) -> None:
    import torch
    import transformers

    from mogeo import __version__

    record = {
        **judged.to_dict(),
        "judged_by": told,
        "generation": None if args.responses else asdict(how),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in _options(args)},
        "command": shlex.join(["mogeo", *args.argv]),
        "versions": {"mogeo": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    lines = "".join(json.dumps(line) + "\n" for line in judged.records())
    (args.output / "judgements.jsonl").write_text(lines, "utf-8")
    text = json.dumps(record, indent=2, allow_nan=False)
    (args.output / "evaluation.json").write_text(text + "\n", "utf-8")


def _options(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for name, value in vars(args).items():
        if name not in ("argv", "command", "quiet", "yes") and value is not None:
            yield name, value


class _Bar:
    """A progress bar that can be called with what was done."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, done: int) -> None:
        self._bar.update(done)


@contextmanager
def _bar(args: argparse.Namespace, label: str, total: int, unit: str) -> Iterator[_Bar]:
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=unit, disable=args.quiet) as bar:
        yield _Bar(bar)
