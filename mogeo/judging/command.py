"""`mogeo evaluate`: options, the order of the work, and the files that it writes.

Must not import torch at the top: `mogeo evaluate --help` has to answer at once, and what is wrong has to be found
before a model is loaded. Which models are judged is found by `candidates`, on which prompts by `prompts`; answers come
from `responses`, judges from `judge_kinds`, numbers from `comparison`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mogeo.dpo.config import PROMPT_FORMATS, share_or_number
from mogeo.errors import InputError
from mogeo.judging.candidates import CandidateModel, find_candidates, responders
from mogeo.judging.golden import Question
from mogeo.judging.judge import OVERALL, WORST
from mogeo.judging.judge_kinds import add_judge_arguments, foreign_options, refuse_foreign_options
from mogeo.judging.progress import progress_bar
from mogeo.judging.prompts import PromptChoice, choose_questions
from mogeo.judging.responses import (
    DTYPES,
    Generation,
    ModelResponses,
    Responder,
    ResponseFile,
    read_responses,
    respond,
)

if TYPE_CHECKING:
    from mogeo.judging.comparison import Judged

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
  mogeo evaluate --model runs/qwen --judge my_package.judges:LengthJudge --output runs/judged

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
    add_judge_arguments(parser, parser.get_default("argv") or [])


def run(args: argparse.Namespace) -> int:
    """Carry out the command.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        InputError: something that the user can mend.
    """
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
    refuse_foreign_options(args)
    if bool(args.model) == bool(args.responses):
        raise InputError("name either models (--model) or a file of their responses (--responses)")
    candidates = find_candidates(args.model)
    _check_sources(candidates)
    asked, objectives = choose_questions(_prompt_choice(args), candidates)
    if reserved := {OVERALL, WORST} & set(objectives):
        raise InputError(f"an objective is named '{reserved.pop()}', which the table uses; leave it out (--objectives)")
    args.judge_kind.check(args, objectives, asked)
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"output '{args.output}' is a file; name a folder")

    given = _given(args, asked) if args.responses else None
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        said = _generate(args, responders(candidates, args.prompt_format), asked, how) if given is None else given
        answered, responses = _answered(asked, said)
        _judge(args, answered, objectives, responses, how)
    except KeyboardInterrupt:
        print(
            "mogeo: interrupted; what was generated and answered is kept: run the same command to go on",
            file=sys.stderr,
        )
        return 130
    return 0


def _prompt_choice(args: argparse.Namespace) -> PromptChoice:
    names = None if args.objectives is None else tuple(name.strip() for name in args.objectives.split(","))
    return PromptChoice(args.data, args.held_out, args.seed, names, args.all_prompts, args.prompts)


def _check_sources(candidates: Sequence[CandidateModel]) -> None:
    """Raise InputError for a model at whose path nothing lies. Loads no model."""
    from mogeo.dpo.models import check_model_source

    for candidate in candidates:
        check_model_source(candidate.source)


# ---- responses -------------------------------------------------------------------------------------------------------


def _given(args: argparse.Namespace, asked: Sequence[Question]) -> dict[str, ModelResponses]:
    """The responses in the file that `--responses` names, by model."""
    if not args.responses.is_file():
        raise InputError(f"--responses: file '{args.responses}' does not exist")
    return read_responses(args.responses, [question.prompt for question in asked])


def _generate(
    args: argparse.Namespace, models: Sequence[Responder], asked: Sequence[Question], how: Generation
) -> dict[str, ModelResponses]:
    """The responses of each model: read from `--output` where they were generated before, else generated."""
    import transformers

    from mogeo.dpo.processes import resolve_device

    device = resolve_device(args.device)
    transformers.utils.logging.disable_progress_bar()  # its bars would be drawn across ours
    file = ResponseFile(args.output / "responses.jsonl")
    prompts = [question.prompt for question in asked]
    said = {}
    for model in models:
        key = model.key(prompts, how)
        known = file.get(key, prompts)
        if known is None:
            total = len(prompts) * how.samples_per_prompt
            with progress_bar(model.label, total, "response", quiet=args.quiet) as bar:
                known = respond(model, prompts, how, device, bar)
            file.put(model.label, key, prompts, known)
        else:
            logger.info("%s: responses are in %s", model.label, file.path)
        said[model.label] = known
    return said


def _answered(
    asked: Sequence[Question], said: dict[str, ModelResponses]
) -> tuple[list[Question], dict[str, list[list[str]]]]:
    """The questions that every model has answered, and the answers. Models can be compared on these only.

    Raises:
        InputError: there is none.
    """
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
) -> None:
    """Judge the responses, write what came of it, and print the tables."""
    from mogeo.judging.comparison import Comparisons, judge_models

    comparisons = Comparisons.of(asked, responses)
    with args.judge_kind.session(args, objectives, comparisons) as session:
        judged = judge_models(session.judge, asked, responses, comparisons=comparisons)
    _write(args, judged, {"judge": args.judge, **session.record}, how)
    print("\n" + "\n\n".join(table.text() for table in judged.tables()))
    summary = f"\n{session.summary}\n" if session.summary else ""
    print(f"{summary}\nnumbers, verdicts and responses are in {args.output}")


# ---- what is written -------------------------------------------------------------------------------------------------


def _write(args: argparse.Namespace, judged: Judged, judged_by: dict[str, Any], how: Generation) -> None:
    """Write evaluation.json and judgements.jsonl."""
    import torch
    import transformers

    from mogeo import __version__

    record = {
        **judged.to_dict(),
        "judged_by": judged_by,
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
    """The options that decide what comes out, and their values; not those of other judges."""
    left_out = {"argv", "command", "judge_kind", "judge_owners", "quiet", "yes", *foreign_options(args)}
    for name, value in vars(args).items():
        if name not in left_out and value is not None:
            yield name, value
