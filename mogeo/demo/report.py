"""What `mogeo demo` shows: tables, a sentence that sums them up, a picture and an HTML page.

Knows the outcomes of `experiment` and how to show them. The sentence is put together from the numbers, so that it never
claims what they do not show.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mogeo.demo.experiment import Outcome, SeedResult, mean_weights
from mogeo.demo.recipe import BASELINE, BEFORE, GUARDED, PAPER, TRACKED
from mogeo.demo.world import OBJECTIVES, REGIMES
from mogeo.figures.comparison import Bars, write_comparison
from mogeo.figures.html_report import write_report
from mogeo.figures.panels import MissingMatplotlibError, require_matplotlib
from mogeo.figures.records import column, mean, share_hurt
from mogeo.figures.table import Table
from mogeo.judging.win_rates import NetWinRates

logger = logging.getLogger("mogeo")

Metric = Callable[[Outcome], float]

_SHORT = {"instruction_following": "instructions"}  # for headings, which decide how wide a column is
_COLUMNS = ("overall", "worst", *OBJECTIVES)
_PICTURE = "demo.png"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def values(results: Sequence[SeedResult], label: str, metric: Metric) -> list[float]:
    """A metric of one model, one value per seed.

    Args:
        results: of all seeds.
        label: of the model.
        metric: from an outcome to a number.
    """
    return [metric(outcome) for result in results for outcome in result.outcomes if outcome.label == label]


def _net(rates: Callable[[Outcome], NetWinRates], column: str) -> Metric:
    """A metric: the net win rate in percent, overall, of the worst objective ("worst"), or of one objective."""

    def metric(outcome: Outcome) -> float:
        found = rates(outcome)
        return 100 * {"overall": found.overall, "worst": found.worst, **found.objectives}[column]

    return metric


def _greedy(column: str) -> Metric:
    return _net(lambda outcome: outcome.greedy, column)


def _sampled(column: str) -> Metric:
    return _net(lambda outcome: outcome.sampled, column)


def _accuracy(column: str) -> Metric:
    """A metric: held-out accuracy in percent, the mean over objectives ("overall"), the worst, or that of one."""

    def metric(outcome: Outcome) -> float:
        of = outcome.accuracy
        return 100 * {"overall": statistics.fmean(of.values()), "worst": min(of.values()), **of}[column]

    return metric


# ---- the table -------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[str], Metric]] = {
    "greedy answers: net win rate, %": _greedy,
    "sampled answers: net win rate, %": _sampled,
    "held-out pairs: accuracy, %": _accuracy,
}


def labels(results: Sequence[SeedResult]) -> list[str]:
    """The labels of the models, in the order of the tables."""
    return [outcome.label for outcome in results[0].outcomes]


def result_table(results: Sequence[SeedResult]) -> Table:
    """All measures of all models: the mean over the seeds ± their standard deviation."""
    rows: list[tuple[str, ...]] = []
    for section, metric in SECTIONS.items():
        rows.append((section, *[""] * len(_COLUMNS)))
        for label in labels(results):
            cells = [
                _cell(values(results, label, metric(column)), signed=metric is not _accuracy) for column in _COLUMNS
            ]
            rows.append((f"  {label}", *cells))
    n = len(results)
    spread = f"mean of {n} seeds ± standard deviation" if n > 1 else "one seed"
    flipped = [f"{share:.0%} of {name}' are flipped" for name, share in REGIMES[results[0].regime].items()]
    note = (
        f"{spread}; {len(results[0].prompts)} held-out prompts; training labels: {', '.join(flipped) or 'clean'}.\n"
        "net win rate: answers rated higher than the golden one (of four rated answers, that with the largest sum of\n"
        "ratings) minus those rated lower; 0: as good as golden. overall: by that sum; worst: the lowest objective.\n"
        "accuracy: rated pairs whose better answer alignment made likelier; 50 before it by definition. overall: mean."
    )
    title = "Four objectives in conflict: helpfulness against the three others"
    return Table(title, ("", *(_SHORT.get(c, c) for c in _COLUMNS)), rows, note)


def _cell(of_seeds: Sequence[float], signed: bool) -> str:
    mean = f"{statistics.fmean(of_seeds):{'+' if signed else ''}.1f}"
    return mean if len(of_seeds) == 1 else f"{mean} ±{statistics.stdev(of_seeds):4.1f}"


def weight_table(results: Sequence[SeedResult]) -> Table:
    """The mean weight of each objective under each method."""
    rows = []
    for label in labels(results):
        if label != BEFORE:
            means = [mean_weights(o, OBJECTIVES) for r in results for o in r.outcomes if o.label == label]
            rows.append((label, *(f"{statistics.fmean(column):.3f}" for column in zip(*means, strict=True))))
    return Table("Mean weight on each objective's gradient", ("", *(_SHORT.get(c, c) for c in OBJECTIVES)), rows)


def hurt_table(results: Sequence[SeedResult]) -> Table:
    """The share of the steps of each method that hurt each objective in expectation, as far as its records can tell."""
    rows = []
    for label in labels(results):
        if label != BEFORE:
            shares = [_shares_hurt(results, label, name) for name in OBJECTIVES]
            rows.append((label, *(_cell(known, signed=False) if known else "–" for known in map(_known, shares))))
    note = (
        "steps whose direction has a negative cosine with the objective's mean gradient, as tracked over the steps,\n"
        "among those in which that gradient can be told from zero. –: there are none."
    )
    return Table("Steps that hurt each objective, %", ("", *(_SHORT.get(c, c) for c in OBJECTIVES)), rows, note)


def _histories(results: Sequence[SeedResult], label: str) -> list[list[dict[str, Any]]]:
    """The records of a method, one list per seed."""
    return [outcome.history for result in results for outcome in result.outcomes if outcome.label == label]


def _shares_hurt(results: Sequence[SeedResult], label: str, name: str) -> list[float]:
    """The share of the steps of a method that hurt an objective, in percent, one value per seed."""
    return [100 * share_hurt(records, name) for records in _histories(results, label)]


def _noise_scales(results: Sequence[SeedResult], label: str, name: str) -> list[float]:
    """The mean noise scale of an objective over the steps that tell it, in mini-batches, one value per seed."""
    return [mean(column(records, "noise_scale", name)) for records in _histories(results, label)]


def answer_table(result: SeedResult) -> Table:
    """How each model answers one held-out prompt: one on which the models' greedy answers differ the most."""
    spoken = [len({outcome.answers[i] for outcome in result.outcomes}) for i in range(len(result.prompts))]
    i = spoken.index(max(spoken))
    prompt = result.prompts[i]
    said = [("golden", result.golden[i]), *((outcome.label, outcome.answers[i]) for outcome in result.outcomes)]
    rows = [(who, *(f"{r:g}" for r in result.world.rate(prompt, text).values()), text) for who, text in said]
    return Table(
        f"Ratings (1 to 5) of answers to: {prompt}", ("", *(_SHORT.get(c, c) for c in OBJECTIVES), "answer"), rows
    )


# ---- the sentence ----------------------------------------------------------------------------------------------------


def conclusion(results: Sequence[SeedResult]) -> str:
    """What GUARDED gains against BASELINE, and what that costs; and what became of the worst objective otherwise."""
    n, worst = len(results), _accuracy("worst")
    minority = min(OBJECTIVES, key=lambda name: statistics.fmean(values(results, BASELINE, _accuracy(name))))
    hurt = {label: _percent(_shares_hurt(results, label, minority)) for label in (BASELINE, PAPER, GUARDED)}
    return (
        f"In {n} seed{'s' * (n > 1)}, against {BASELINE}, '{GUARDED}' {_lift(results, worst)} the worst held-out "
        f"accuracy ({_from_to(results, worst)}) and {_change(results, _accuracy('overall'))} points of the mean; it "
        f"{_lift(results, _greedy('worst'))} the worst objective's net win rate in greedy answers "
        f"({_from_to(results, _greedy('worst'))}), {_lift(results, _sampled('worst'))} it in sampled ones "
        f"({_from_to(results, _sampled('worst'))}), and overall it {_change(results, _greedy('overall'))} and "
        f"{_change(results, _sampled('overall'))}. In expectation {hurt[BASELINE]} of the steps of {BASELINE} hurt "
        f"{minority}, {hurt[PAPER]} of those of {PAPER}, and {hurt[GUARDED]} of those of '{GUARDED}'. The worst "
        f"held-out accuracy of {PAPER} is "
        f"{statistics.fmean(values(results, PAPER, worst)):.1f}, of '{TRACKED}' "
        f"{statistics.fmean(values(results, TRACKED, worst)):.1f}."
    )


def _percent(shares: Sequence[float]) -> str:
    """The mean of percentages, one per seed, of which some may be NaN."""
    known = _known(shares)
    return f"{statistics.fmean(known):.0f}%" if known else "an unknown share"


def _known(values: Sequence[float]) -> list[float]:
    """Those that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def _differences(results: Sequence[SeedResult], metric: Metric) -> list[float]:
    """A metric of GUARDED minus that of BASELINE, one value per seed."""
    ours, theirs = values(results, GUARDED, metric), values(results, BASELINE, metric)
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def _lift(results: Sequence[SeedResult], metric: Metric) -> str:
    """Whether GUARDED has a higher value than BASELINE in all seeds, on average, or not, as a verb."""
    gains = _differences(results, metric)
    if min(gains) > 0:
        return "lifts"
    return "lifts on average" if statistics.fmean(gains) > 0 else "does not lift"


def _from_to(results: Sequence[SeedResult], metric: Metric) -> str:
    """The values of BASELINE and GUARDED, and in how many seeds the latter is higher."""
    before, after = (statistics.fmean(values(results, label, metric)) for label in (BASELINE, GUARDED))
    gains = _differences(results, metric)
    return f"{before:.1f} to {after:.1f}, higher in {sum(gain > 0 for gain in gains)} of {len(gains)}"


def _change(results: Sequence[SeedResult], metric: Metric) -> str:
    """How much GUARDED gains or loses against BASELINE, on average."""
    change = statistics.fmean(_differences(results, metric))
    return f"{'gains' if change > 0 else 'loses'} {abs(change):.1f}"


# ---- what is printed and written -------------------------------------------------------------------------------------


def terminal(results: Sequence[SeedResult]) -> str:
    """What the terminal shows at the end: three tables and the sentence."""
    tables = (result_table(results), weight_table(results), hurt_table(results))
    return "\n\n".join([*(table.text() for table in tables), conclusion(results)])


def write(output: Path, results: Sequence[SeedResult], command: str, seconds: float) -> list[Path]:
    """Write results.json, and with matplotlib the picture and the HTML page.

    Args:
        output: the folder, which exists.
        results: of all seeds.
        command: the command line, for the page.
        seconds: how long it took, for the page.

    Returns:
        The files that were written.
    """
    numbers = output / "results.json"
    numbers.write_text(json.dumps(_plain(results, command, seconds), indent=1) + "\n", "utf-8")
    try:
        require_matplotlib()
    except MissingMatplotlibError as error:
        logger.warning("no picture and no report: %s", error)
        return [numbers]
    title = "mogeo demo: four objectives in conflict"
    seeds = f" ({len(results)} seeds; a bar is their mean)" if len(results) > 1 else ""
    picture = write_comparison(
        output / _PICTURE,
        title + seeds,
        [*(_bars(results, section, metric) for section, metric in SECTIONS.items()), *_told_by_steps(results)],
        OBJECTIVES,
        _histories(results, GUARDED),
        f"weights of '{GUARDED}' (dashed: their means)",
    )
    first = results[0]
    runs = {f"{o.label}, seed {first.seed}": o.history for o in first.outcomes if o.history}
    tables = [result_table(results), weight_table(results), hurt_table(results), answer_table(first)]
    notes = [conclusion(results), f"Command: {command}; {seconds:.0f} s."]
    report, *_ = write_report(output, title, OBJECTIVES, runs, tables, notes, pictures=[picture])
    return [picture, report, numbers]


def _bars(results: Sequence[SeedResult], section: str, metric: Callable[[str], Metric]) -> Bars:
    """A panel of the picture, for one section of the table."""
    series = {
        label: [values(results, label, metric(column)) for column in _COLUMNS]
        for label in labels(results)
        if not (metric is _accuracy and label == BEFORE)
    }
    heading, ylabel = section.split(": ")
    baseline = 50.0 if metric is _accuracy else 0.0
    return Bars(heading, ylabel, [_SHORT.get(c, c) for c in _COLUMNS], series, baseline)


def _told_by_steps(results: Sequence[SeedResult]) -> list[Bars]:
    """Panels of what the steps tell of mean gradients: whom they hurt, and how noisy they are."""
    methods = [label for label in labels(results) if label != BEFORE]
    panels = []
    for heading, ylabel, measure in (
        ("steps that hurt each objective in expectation", "% of the steps", _shares_hurt),
        ("noise of a mini-batch", "noise / signal, in ‖g‖²", _noise_scales),
    ):
        series = {
            label: [_known(measure(results, label, name)) or [math.nan] for name in OBJECTIVES] for label in methods
        }
        panels.append(Bars(heading, ylabel, [_SHORT.get(name, name) for name in OBJECTIVES], series))
    return panels


def _plain(results: Sequence[SeedResult], command: str, seconds: float) -> dict[str, Any]:
    """All numbers of all seeds as plain values, for computations of one's own."""
    runs = [
        {
            "seed": result.seed,
            "label": outcome.label,
            "weighting": outcome.weighting,
            **{
                kind: {column: round(metric(column)(outcome), 3) for column in _COLUMNS}
                for kind, metric in (("greedy", _greedy), ("sampled", _sampled), ("accuracy", _accuracy))
            },
            "history": outcome.history,
        }
        for result in results
        for outcome in result.outcomes
    ]
    regime = results[0].regime
    return {"command": command, "regime": regime, "seconds": round(seconds, 1), "unit": "percent", "runs": runs}
