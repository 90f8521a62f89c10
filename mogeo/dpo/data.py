"""From rated completions to one set of preference pairs per objective. Knows no tokens, models or training.

A row has UltraFeedback's shape (https://huggingface.co/datasets/openbmb/UltraFeedback):
`{"instruction": str, "completions": [{"response": str, "annotations": {objective: {"Rating": "4"}}}, ...]}`; every
other column is ignored. Ratings are strings, and some are "N/A".
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mogeo.errors import InputError

Row = dict[str, Any]

PAIRINGS = ("best-worst", "all", "random")

COUNTS = {
    "pairs": "preference pairs kept",
    "ties": "prompts (with pairing 'all': pairs) whose ratings do not differ",
    "single": "prompts with fewer than two usable completions",
    "identical": "pairs whose two texts are the same",
    "unrated": "completions without a numeric rating",
    "empty": "completions with an empty response",
}
"""The numbers in `Preferences.counts`: name → what it counts."""


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt; `chosen` was rated strictly higher than `rejected`."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Preferences:
    """The preference pairs of each objective.

    Attributes:
        pairs: objective → its pairs.
        counts: objective → name in `COUNTS` → how many pairs were made, and what was left out.
    """

    pairs: dict[str, list[Pair]]
    counts: dict[str, dict[str, int]]

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives' names, in the order of weights and tables."""
        return tuple(self.pairs)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_rows(source: str | Path) -> list[Row]:
    """Read all rows of a data set.

    Args:
        source: a local .jsonl, .json or .parquet file, or the name of a data set on the Hugging Face hub, whose split
            `train` is read.

    Raises:
        InputError: there is no such file or data set, or it does not hold a list of objects.
    """
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.is_file():
        if path.suffix not in readers:
            raise InputError(f"data file '{path}' has to end in {', '.join(readers)}")
        rows = readers[path.suffix](path)
    elif path.is_dir():
        raise InputError(f"data '{path}' is a folder; name one file in it ({', '.join(readers)})")
    elif path.suffix in readers or path.is_absolute() or len(path.parts) > 2:
        raise InputError(f"data file '{path}' does not exist")
    else:
        rows = _read_hub(str(source))
    if not rows:
        raise InputError(f"data '{source}' holds no rows")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
                raise InputError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: a JSON object is needed, found {type(row).__name__}")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); for one object a line, name the file .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a JSON array of objects is needed")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({error})") from None
    return rows


def _read_hub(name: str) -> list[Row]:
    import datasets

    try:
        return list(datasets.load_dataset(name, split="train"))
    except Exception as error:  # the hub's client raises dozens of types, which all mean the same to the user
        reason = str(error).strip().splitlines()
        raise InputError(
            f"'{name}' is neither a local file nor a data set that could be read from the hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'})"
        ) from error


# ---- splitting -------------------------------------------------------------------------------------------------------


def split_rows(rows: Sequence[Row], held_out: float | int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows by prompt into training rows and held-out rows. All rows of a prompt are on the same side.

    Args:
        rows: in UltraFeedback's shape.
        held_out: which share of the distinct prompts is held out (a float in (0, 1)), or how many are (an int).
        seed: decides which prompts are held out.

    Returns:
        Training rows and held-out rows, each in the order of `rows`.

    Raises:
        InputError: one side would be empty, or a row has no instruction.
    """
    prompts = [same_prompt(_text(row, "instruction", f"row {number}")) for number, row in enumerate(rows, start=1)]
    distinct = list(dict.fromkeys(prompts))
    count = round(held_out * len(distinct)) if isinstance(held_out, float) else held_out
    if not 0 < count < len(distinct):
        raise InputError(
            f"held-out {held_out} makes {count} of {len(distinct)} distinct prompts; both sides need at least one"
        )
    chosen = set(random.Random(f"held-out/{seed}").sample(distinct, count))
    train = [row for row, prompt in zip(rows, prompts, strict=True) if prompt not in chosen]
    return train, [row for row, prompt in zip(rows, prompts, strict=True) if prompt in chosen]


def same_prompt(prompt: str) -> str:
    """The prompt with every run of white space as one blank. Prompts that are then equal count as the same prompt.

    Otherwise a copy of a held-out prompt with other white space could be among the training prompts.
    """
    return " ".join(prompt.split())


# ---- pairing ---------------------------------------------------------------------------------------------------------


def build_preferences(
    rows: Sequence[Row], objectives: Iterable[str] | None = None, pairing: str = "best-worst", seed: int = 0
) -> Preferences:
    """Preference pairs of each objective: two completions of one prompt whose ratings differ strictly.

    Args:
        rows: in UltraFeedback's shape.
        objectives: names and their order; None: all that occur, in the order in which they first do.
        pairing: ``best-worst``: one pair per prompt, of the highest-rated and the lowest-rated completion (if several
            have that rating, one of them at random); ``random``: one pair per prompt, drawn from all pairs with
            different ratings; ``all``: all pairs with different ratings.
        seed: for the draws, which depend on the seed, the objective and the row's prompt, and not on other rows.

    Raises:
        InputError: a missing column (naming row and column), an unknown objective, or one without a usable pair.
    """
    if pairing not in PAIRINGS:
        raise InputError(f"unknown pairing {pairing!r}: use one of {', '.join(PAIRINGS)}")
    parsed = [_parse(row, number) for number, row in enumerate(rows, start=1)]
    found = list(dict.fromkeys(name for _, completions in parsed for _, ratings in completions for name in ratings))
    names = found if objectives is None else list(objectives)
    if not names:
        raise InputError("the data rates no objective: every 'annotations' is empty")
    if unknown := [name for name in names if name not in found]:
        raise InputError(f"no completion is rated for {', '.join(unknown)}; the data rates {', '.join(found)}")
    if len(set(names)) < len(names):
        raise InputError(f"an objective is named twice: {', '.join(names)}")

    pairs: dict[str, list[Pair]] = {name: [] for name in names}
    counts = {name: dict.fromkeys(COUNTS, 0) for name in names}
    for name in names:
        for prompt, completions in parsed:
            rated = _usable(completions, name, counts[name])
            draw = random.Random(f"{seed}/{name}/{prompt}")
            for better, worse in _pick(rated, pairing, draw, counts[name]):
                if better == worse:
                    counts[name]["identical"] += 1
                else:
                    pairs[name].append(Pair(prompt, better, worse))
        counts[name]["pairs"] = len(pairs[name])
        if not pairs[name]:
            raise InputError(f"objective '{name}' has no usable pair in {len(rows)} rows ({_counted(counts[name])})")
    return Preferences(pairs, counts)


def _counted(counts: dict[str, int]) -> str:
    return "; ".join(f"{meaning}: {counts[key]}" for key, meaning in COUNTS.items() if key != "pairs")


_Completion = tuple[str, dict[str, float | None]]  # response, objective → rating or None


def _usable(completions: list[_Completion], objective: str, counts: dict[str, int]) -> list[tuple[str, float]]:
    """(response, rating) of each completion with a rating and a response. The others are added to `counts`."""
    rated = []
    for response, ratings in completions:
        rating = ratings.get(objective)
        if rating is None:
            counts["unrated"] += 1
        elif not response.strip():
            counts["empty"] += 1
        else:
            rated.append((response, rating))
    return rated


def _pick(
    rated: list[tuple[str, float]], pairing: str, draw: random.Random, counts: dict[str, int]
) -> list[tuple[str, str]]:
    """(better, worse) responses of one prompt. What does not make a pair is added to `counts`."""
    if len(rated) < 2:
        counts["single"] += 1
        return []
    if pairing == "best-worst":
        high, low = max(r for _, r in rated), min(r for _, r in rated)
        if high == low:
            counts["ties"] += 1
            return []
        return [(draw.choice([c for c, r in rated if r == high]), draw.choice([c for c, r in rated if r == low]))]
    ordered = [(a, b) if x > y else (b, a) for (a, x), (b, y) in itertools.combinations(rated, 2) if x != y]
    if pairing == "all":
        counts["ties"] += math.comb(len(rated), 2) - len(ordered)
        return ordered
    if not ordered:
        counts["ties"] += 1
        return []
    return [draw.choice(ordered)]


# ---- checking one row ------------------------------------------------------------------------------------------------


def _parse(row: Row, number: int) -> tuple[str, list[_Completion]]:
    """(prompt, completions) of row `number` (from 1)."""
    prompt = _text(row, "instruction", f"row {number}")
    completions = []
    for index, completion in enumerate(_field(row, "completions", list, f"row {number}"), start=1):
        where = f"row {number}, completion {index}"
        if not isinstance(completion, dict):
            raise InputError(f"{where}: an object is needed, found {type(completion).__name__}")
        annotations = _field(completion, "annotations", dict, where)
        ratings = {name: rating_of(value, f"{where}, objective '{name}'") for name, value in annotations.items()}
        # UltraFeedback holds a few completions that are null: the model said nothing.
        response = "" if completion.get("response", "") is None else _text(completion, "response", where)
        completions.append((response, ratings))
    return prompt, completions


def _field(record: Row, column: str, kind: type, where: str) -> Any:
    """The value of a column; InputError if it is missing or not of this type."""
    if column not in record:
        raise InputError(f"{where}: column '{column}' is missing (found: {', '.join(map(str, record)) or 'nothing'})")
    value = record[column]
    if not isinstance(value, kind):
        raise InputError(f"{where}: column '{column}' has to be a {kind.__name__}, found {type(value).__name__}")
    return value


def _text(record: Row, column: str, where: str) -> str:
    text: str = _field(record, column, str, where)
    return text


def rating_of(annotation: Any, where: str) -> float | None:
    """The rating in an annotation such as {"Rating": "4"}; None if it is no finite number ("N/A", "", null).

    Args:
        annotation: from a row.
        where: which row, completion and objective, for the message.

    Raises:
        InputError: the annotation has another form.
    """
    if annotation is None:
        return None
    if not isinstance(annotation, dict) or "Rating" not in annotation:
        raise InputError(f'{where}: an annotation of the form {{"Rating": "4"}} is needed, found {annotation!r:.60}')
    try:
        rating = float(annotation["Rating"])
    except (TypeError, ValueError):
        return None
    return rating if math.isfinite(rating) else None
