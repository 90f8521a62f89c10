"""From the data that a user has to rows of pairs with one label per objective. Knows no tokens, models or training.

A row is what TRL's DPOTrainer takes (prompt, chosen, rejected, as text or as messages). In addition it has a column
`LABELS` with a list of K labels, in the order of the objectives: +1 if "chosen" is the better answer, −1 if "rejected"
is, 0 if the objective has no preference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

from mogeo.dpo.data import Preferences, Row, build_preferences
from mogeo.errors import InputError

LABELS = "objective_labels"
"""The column of labels."""

# Two rows with the same answers are the same pair if these columns agree as well. TRL reads no others.
_CONTEXT = ("prompt", "tools", "chat_template_kwargs")

_FORMS = (
    "pass pairs (prompt, chosen, rejected) with one column of +1, 0 or −1 per objective; or a mapping from each "
    "objective to a Dataset of pairs of its own; or UltraFeedback's rows (instruction, completions)"
)


def labelled_rows(
    dataset: Any, objectives: Sequence[str], name: str, *, chat: bool, seed: int, on_disk: bool = False
) -> Any:
    """Rows with labels, from a data set in any of its forms. Rows without a label for any objective are left out.

    Args:
        dataset: a `datasets.Dataset` of pairs with label columns or of UltraFeedback's rows, or an `IterableDataset` of
            pairs with label columns. A data set that this function has made is returned as it is.
        objectives: names. Labels are in this order.
        name: of the data set, for messages.
        chat: whether UltraFeedback's prompts and answers become messages for a chat template; else they stay text.
        seed: for the choice among answers with equal ratings (see `mogeo.dpo.data.build_preferences`).
        on_disk: as in `merged_sets`, for UltraFeedback's rows.

    Raises:
        InputError: the data has none of these forms, a column is missing, or a label is not +1, 0 or −1.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise InputError(f"the {name} data set holds no rows")
    if LABELS in first:
        if len(first[LABELS]) != len(objectives):
            raise InputError(
                f"the {name} data set has {len(first[LABELS])} labels a row in its column '{LABELS}', but there are "
                f"{len(objectives)} objectives: {', '.join(objectives)}"
            )
        return dataset
    if {"instruction", "completions"} <= first.keys():
        if isinstance(dataset, datasets.IterableDataset):
            raise InputError(f"the {name} data set streams UltraFeedback's rows: load it whole, or {_FORMS}")
        sets = _as_sets(build_preferences(list(dataset), objectives, seed=seed), chat)
        return merged_sets(sets, objectives, name, on_disk=on_disk)
    if not {"chosen", "rejected"} <= first.keys():
        raise InputError(f"the {name} data set has the columns {', '.join(first)}: {_FORMS}")
    missing = [objective for objective in objectives if objective not in first]
    if missing:
        raise InputError(
            f"the {name} data set has no column for {', '.join(missing)}; it has {', '.join(first)}. Without labels, "
            f"a pair belongs to no objective: {_FORMS}"
        )
    return _from_label_columns(dataset, objectives, name)


def _from_label_columns(dataset: Any, objectives: Sequence[str], name: str) -> Any:
    """Rows with labels, from pairs with one column per objective."""

    def labelled(row: Row, number: int) -> Row:
        for objective in objectives:
            if row[objective] not in (1, 0, -1):
                raise InputError(
                    f"the {name} data set, row {number + 1}: column '{objective}' holds {row[objective]!r}. A label "
                    "is +1 where 'chosen' is better, −1 where 'rejected' is, 0 where there is no preference"
                )
        return {LABELS: [int(row[objective]) for objective in objectives]}

    rows = dataset.map(labelled, with_indices=True, remove_columns=list(objectives))
    kept = rows.filter(lambda row: any(row[LABELS]))
    if isinstance(kept, datasets.IterableDataset):
        return kept
    _require_every_objective(kept[LABELS], objectives, name)
    return rows if len(kept) == len(rows) else kept


def merged_sets(
    sets: Mapping[str, Iterable[Row]], objectives: Sequence[str], name: str, *, on_disk: bool = False
) -> Any:
    """Merge one preference set per objective into one `datasets.Dataset`. A pair in several sets becomes one row.

    Such a row takes one forward instead of several. If two sets have a pair in opposite order, its labels are opposite.
    If a set has a pair n times, it stays n rows.

    Args:
        sets: objective → rows with "chosen" and "rejected", and with "prompt" unless both begin with it.
        objectives: names. Labels are in this order.
        name: of the data set, for messages.
        on_disk: whether the rows are written to the cache of `datasets`, where all ranks find them. TRL writes
            precomputed scores of the reference beside that file, and cannot share them if rows are in memory only.

    Raises:
        InputError: the sets are not those of the objectives, or a row is no pair.
    """
    unknown = [objective for objective in sets if objective not in objectives]
    missing = [objective for objective in objectives if objective not in sets]
    if unknown or missing:
        raise InputError(
            f"the {name} data does not match the objectives {', '.join(objectives)}: missing {missing}, unknown "
            f"{unknown}. Pass one data set for each"
        )
    found: dict[tuple[str, int], Row] = {}
    for index, objective in enumerate(objectives):
        repeated: dict[str, int] = {}
        for number, row in enumerate(_pairs_of(sets[objective], objective, name), start=1):
            if not {"chosen", "rejected"} <= row.keys():
                raise InputError(
                    f"the {name} data of objective '{objective}', row {number}, has the columns {', '.join(row)}: "
                    "'chosen' and 'rejected' are needed"
                )
            pair = _identity(row)
            repeated[pair] = repeated.get(pair, 0) + 1
            kept = {column: row[column] for column in (*_CONTEXT, "chosen", "rejected") if column in row}
            merged = found.setdefault((pair, repeated[pair]), {**kept, LABELS: [0] * len(objectives)})
            merged[LABELS][index] = 1 if merged["chosen"] == row["chosen"] else -1
    rows = list(found.values())
    _require_every_objective([row[LABELS] for row in rows], objectives, name)
    return (
        datasets.Dataset.from_generator(_each, gen_kwargs={"rows": rows})
        if on_disk
        else datasets.Dataset.from_list(rows)
    )


def _each(rows: list[Row]) -> Iterable[Row]:
    yield from rows


def _pairs_of(rows: Any, objective: str, name: str) -> Iterable[Row]:
    """The rows of one set; InputError if it is no data set that can be read more than once."""
    if isinstance(rows, datasets.IterableDataset) or not isinstance(rows, Iterable) or isinstance(rows, str | Mapping):
        raise InputError(
            f"the {name} data of objective '{objective}' is a {type(rows).__name__}: pass a Dataset, or a list of rows"
        )
    return rows


def _identity(row: Row) -> str:
    """A text that is the same for two rows if they have the same context and the same two answers, in either order."""
    answers = sorted(json.dumps(row[column], sort_keys=True) for column in ("chosen", "rejected"))
    return json.dumps([*(row.get(column) for column in _CONTEXT), *answers], sort_keys=True)


def _require_every_objective(labels: Iterable[Sequence[int]], objectives: Sequence[str], name: str) -> None:
    """Raise InputError if an objective has no label other than 0."""
    labelled = [any(column) for column in zip(*labels, strict=True)] or [False] * len(objectives)
    without = [objective for objective, some in zip(objectives, labelled, strict=True) if not some]
    if without:
        raise InputError(f"the {name} data has no pair with a preference for {', '.join(without)}")


def _as_sets(preferences: Preferences, chat: bool) -> dict[str, list[Row]]:
    """The pairs of each objective as rows, with messages for a chat template or with plain text."""

    def turn(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if chat else text

    return {
        objective: [
            {
                "prompt": turn("user", pair.prompt),
                "chosen": turn("assistant", pair.chosen),
                "rejected": turn("assistant", pair.rejected),
            }
            for pair in pairs
        ]
        for objective, pairs in preferences.pairs.items()
    }
