"""Judge the responses of several models against golden ones, and sum up: counts, net win rates, tables, records.

`judge_models` does the work of `mogeo evaluate`, for any judge. Knows no models, files or command lines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mogeo.errors import InputError
from mogeo.figures.table import Table
from mogeo.judging.golden import Question
from mogeo.judging.judge import OVERALL, WORST, Judge, Verdict
from mogeo.judging.win_rates import LEVEL, RESAMPLES, Estimate, Estimates, estimate

Responses = Mapping[str, Sequence[Sequence[str]]]
"""Label of a model -> for each prompt, the model's responses to it: one, or as many as were sampled."""

_IDENTICAL = -1  # stands in place of an index where the response is the golden one


@dataclass(frozen=True)
class Comparisons:
    """What has to be judged: N distinct triples of prompt, response and golden response.

    What several models say alike is judged once. A response that is the golden one is a tie, and no judge is asked.

    Attributes:
        prompts: [N].
        candidates: [N], responses.
        references: [N], golden responses.
        places: label of a model -> int64 [prompts, samples]: where in these lists each of its responses is; -1 for a
            response that is the golden one.
    """

    prompts: list[str]
    candidates: list[str]
    references: list[str]
    places: dict[str, NDArray[np.int64]]

    @classmethod
    def of(cls, questions: Sequence[Question], responses: Responses) -> Comparisons:
        """Collect the comparisons of some models.

        Args:
            questions: the prompts with their golden responses.
            responses: of each model, to these prompts.

        Raises:
            InputError: the models do not all have the same number of responses to each prompt.
        """
        shapes = {label: sorted({len(said) for said in of_model}) for label, of_model in responses.items()}
        short = [label for label, of_model in responses.items() if len(of_model) != len(questions)]
        if short or len({tuple(shape) for shape in shapes.values()}) != 1 or len(next(iter(shapes.values()))) != 1:
            raise InputError(f"every model needs equally many responses to each of {len(questions)} prompts: {shapes}")
        index: dict[tuple[str, str, str], int] = {}
        places = {}
        for label, of_model in responses.items():
            places[label] = np.array(
                [
                    [
                        _IDENTICAL
                        if text.strip() == question.golden.strip()
                        else index.setdefault((question.prompt, text, question.golden), len(index))
                        for text in said
                    ]
                    for question, said in zip(questions, of_model, strict=True)
                ],
                dtype=np.int64,
            )
        prompts, candidates, references = (list(column) for column in zip(*index, strict=True)) if index else ([],) * 3
        return cls(prompts, candidates, references, places)


@dataclass(frozen=True)
class Judged:
    """What came of judging M models.

    Attributes:
        objectives: what was judged, besides "overall".
        questions: the prompts with their golden responses.
        responses: of each model.
        verdicts: label of a model -> [prompts][samples].
        estimates: net win rates and their intervals, the models in the order of `labels`.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """

    objectives: tuple[str, ...]
    questions: list[Question]
    responses: Responses
    verdicts: dict[str, list[list[Verdict]]]
    estimates: Estimates
    seed: int
    resamples: int

    @property
    def labels(self) -> list[str]:
        """The models' labels, in the order in which they were given."""
        return list(self.verdicts)

    @property
    def asked(self) -> tuple[str, ...]:
        """The questions that the judge was asked about each response: "overall", then the objectives."""
        return (OVERALL, *self.objectives)

    def counts(self, label: str, question: str) -> dict[str, int]:
        """How many of a model's responses won, tied and lost, and how many were not judged."""
        given = [verdict[question] for said in self.verdicts[label] for verdict in said]
        names = {"wins": 1, "ties": 0, "losses": -1, "not_judged": None}
        return {name: sum(v == value for v in given) for name, value in names.items()}

    # ---- to be written ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Counts, rates and intervals as plain values for JSON. A rate is None if nothing was judged."""
        models: dict[str, Any] = {}
        for m, label in enumerate(self.labels):
            rates = {
                question: {**self.counts(label, question), **_plain(self.estimates.rates[m][q])}
                for q, question in enumerate(self.asked)
            }
            models[label] = {"net_win_rate": rates}
            if self.estimates.worst:
                objective = self._worst_objective(m)
                models[label][WORST] = {"objective": objective, **_plain(self.estimates.worst[m])}
        differences = {
            label: dict(zip(self._rows(), map(_plain, row), strict=True))
            for label, row in zip(self.labels[1:], self.estimates.differences, strict=True)
        }
        return {
            "prompts": len(self.questions),
            "samples_per_prompt": len(next(iter(self.verdicts.values()))[0]),
            "objectives": list(self.objectives),
            "models": models,
            "minus_first": {"first": self.labels[0], "models": differences},
            "interval": {"method": "BCa bootstrap over prompts", "level": LEVEL, "resamples": self.resamples,
                         "seed": self.seed},
        }  # fmt: skip

    def records(self) -> list[dict[str, Any]]:
        """One record per response: the texts, the verdict, and the reasons that the judge gave for it."""
        return [
            {
                "model": label,
                "prompt": question.prompt,
                "sample": s,
                "response": self.responses[label][p][s],
                "golden": question.golden,
                "verdict": {name: verdict[name] for name in self.asked},
                "details": dict(verdict.details),
            }
            for label, of_model in self.verdicts.items()
            for p, (question, said) in enumerate(zip(self.questions, of_model, strict=True))
            for s, verdict in enumerate(said)
        ]

    # ---- to be shown -----------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """A table of net win rates; one of differences from the first model, if there are several; one of counts."""
        rates, labels = self._table_of_rates(), self.labels
        tables = [rates]
        if len(labels) > 1:
            rows = [
                [name, *(_cell(row[i]) for row in self.estimates.differences)] for i, name in enumerate(self._rows())
            ]
            note = "paired by prompt; an interval without 0 is a difference that this many prompts can tell"
            tables.append(Table(f"Minus {labels[0]}, in points", ["", *labels[1:]], rows, note))
        counted = [
            [question, *("/".join(map(str, self.counts(label, question).values())) for label in labels)]
            for question in self.asked
        ]
        tables.append(Table("Wins/ties/losses/not judged", ["", *labels], counted))
        return tables

    def _table_of_rates(self) -> Table:
        estimates = self.estimates
        rows = [[name, *(_cell(row[q]) for row in estimates.rates)] for q, name in enumerate(self.asked)]
        if estimates.worst:
            rows.append([WORST, *map(_cell, estimates.worst)])
            rows.append(["  which is", *(self._worst_objective(m) or "-" for m in range(len(self.labels)))])
        n, samples = len(self.questions), len(next(iter(self.verdicts.values()))[0])
        sampled = f", {samples} samples each" if samples > 1 else ""
        note = (
            f"{n} prompts{sampled}. Net win rate: wins minus losses, of what was judged; 0: as good as golden. "
            f"[{LEVEL:.0%} interval: bootstrap over prompts]"
        )
        return Table("Net win rate against the golden responses, %", ["", *self.labels], rows, note)

    def _rows(self) -> list[str]:
        return [*self.asked, *([WORST] if self.estimates.worst else [])]

    def _worst_objective(self, m: int) -> str | None:
        values = dict(zip(self.asked, (e.value for e in self.estimates.rates[m]), strict=True))
        if any(math.isnan(values[name]) for name in self.objectives):
            return None
        return min(self.objectives, key=values.__getitem__)


def judge_models(
    judge: Judge,
    questions: Sequence[Question],
    responses: Responses,
    *,
    comparisons: Comparisons | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Judged:
    """Have a judge compare every response with its prompt's golden one, by objective and overall.

    Args:
        judge: compares two texts at a time.
        questions: the prompts with their golden responses.
        responses: of each model, to these prompts. Since all models answer the same ones, their differences are paired.
        comparisons: `Comparisons.of(questions, responses)`, if the caller has it already.
        resamples: of the bootstrap that gives the intervals.
        seed: of the bootstrap.

    Raises:
        InputError: there are no prompts, or the judge does not return a verdict for each comparison.
    """
    if not questions:
        raise InputError("nothing to judge: there are no prompts")
    made = comparisons or Comparisons.of(questions, responses)
    given = judge.compare(made.prompts, made.candidates, made.references) if made.prompts else []
    if len(given) != len(made.prompts):
        raise InputError(
            f"{type(judge).__name__} returned {len(given)} verdicts for {len(made.prompts)} comparisons: compare() has "
            "to return one for each, in order"
        )
    tie = Verdict(dict.fromkeys(judge.objectives, 0), 0, {"identical": True})
    verdicts = {
        label: [[tie if i == _IDENTICAL else given[i] for i in said] for said in places.tolist()]
        for label, places in made.places.items()
    }
    asked = (OVERALL, *judge.objectives)
    values = np.array(
        [
            [[[math.nan if (v := verdict[name]) is None else v for name in asked] for verdict in said] for said in of]
            for of in verdicts.values()
        ],
        dtype=np.float64,
    )  # [M, P, S, Q]
    estimates = estimate(values, range(1, len(asked)), resamples=resamples, seed=seed)
    return Judged(tuple(judge.objectives), list(questions), responses, verdicts, estimates, seed, resamples)


def _cell(found: Estimate) -> str:
    if math.isnan(found.value):
        return "-"
    return f"{_percent(found.value)} [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: no "-0.0"


def _plain(found: Estimate) -> dict[str, float | None]:
    values = {"value": found.value, "low": found.low, "high": found.high}
    return {name: None if math.isnan(value) else value for name, value in values.items()}
