"""Tables of what noise does to weights, reports and runs, and what tracked gradients change: from the cells on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from alignment import dial, estimators, realised, tables
from alignment.cells import Result
from alignment.compare import REGIMES, TRACK, TRACKED, merit
from alignment.explain import HURT
from mogeo.demo.world import OBJECTIVES


def parts(folder: Path) -> list[str]:
    """All tables of a folder of results."""
    return [
        *tracked(folder / "world"),
        *of_estimators(tables.read(folder / "estimators")),
        *of_realised_steps(tables.read(folder / "realised")),
        *of_map(tables.read(folder / "map")),
    ]


# ---- runs ------------------------------------------------------------------------------------------------------------


def tracked(folder: Path) -> list[str]:
    """Methods with and without tracked gradients, at learning rates chosen for each, and at one for all."""
    selection = tables.read(folder / "selection tracked")
    told = ["## Tracked gradients: learning rates", tables.selection(selection, merit)] if selection else []
    before = [r for r in tables.read(folder / "before") if r["cell"]["method"] == "before"]
    told += _compared(tables.read(folder / "tracked"), before, "")
    at_one = tables.read(folder / "tracked at one rate")
    for rate in sorted({r["cell"]["lr"] for r in at_one}):
        told += _compared([r for r in at_one if r["cell"]["lr"] == rate], before, f", all at {rate:g}")
    return told


def _compared(results: Sequence[Result], before: Sequence[Result], at: str) -> list[str]:
    """Tables of runs, regime by regime."""
    told: list[str] = []
    for regime in REGIMES:
        ours = sorted((r for r in results if r["cell"]["regime"] == regime), key=lambda r: tables.rank(r, TRACKED))
        if not ours:
            continue
        seeds = {r["cell"]["seed"] for r in ours}
        runs = tables.by_label([*(r for r in before if r["cell"]["seed"] in seeds), *ours])
        told += [
            f"## Tracked gradients, {regime}, seeds {min(seeds)} to {max(seeds)}{at}",
            tables.levels(runs, tables.WORLD_COLUMNS, counts={"seeds with nobody below 50": tables.nobody_lost}),
        ]
        kinds: dict[str, tuple[Callable[[str, str], tables.Metric], str]] = {
            "greedy": (tables.net, "overall"),
            "sampled": (tables.net, "overall"),
            "accuracy": (tables.held_out, "mean"),
        }
        for kind, (metric, whole) in kinds.items():
            columns = {name: metric(kind, name) for name in (whole, *OBJECTIVES)}
            told += [f"### {kind}, by objective", tables.levels(runs, columns)]
        others: dict[str, Callable[[str], str]] = {
            "uniform": lambda label: tables.BASELINE,
            "the same without tracking": lambda label: label.removesuffix(TRACK),
            "its static twin": lambda label: f"{tables.TWIN} of {label}",
        }
        for name, other in others.items():
            told += [f"### minus {name}, paired by seed", tables.differences(runs, tables.WORLD_COLUMNS, other)]
        told += ["### why", tables.explanation(runs, OBJECTIVES), tables.reported(runs, OBJECTIVES)]
    return told


def of_map(results: Sequence[Result]) -> list[str]:
    """Where it pays: each method minus `uniform`, by how far objectives agree and what is wrong with one of them."""
    if not results:
        return []
    by_place: dict[tuple[float, str], list[Result]] = {}
    for result in results:
        by_place.setdefault((result["cell"]["dial"], result["cell"]["imbalance"]), []).append(result)
    dials = sorted({place[0] for place in by_place})
    imbalances = [name for name in dial.IMBALANCES if any(place[1] == name for place in by_place)]
    agreement = {}
    told = ["## Map", "Correlations between the objectives' ratings of the answers to a prompt, means over seeds:"]
    rows = []
    for value in dials:
        found = [r["correlations"] for r in results if r["cell"]["dial"] == value]
        means = {kind: fmean(dial.mean_correlation(f[kind]) for f in found) for kind in ("pearson", "spearman")}
        agreement[value] = f"λ = {value:g} (r = {means['pearson']:.2f})"
        mine = OBJECTIVES.index(dial.MINORITY)
        minority = [f"{fmean(f['pearson'][mine][i] for f in found):.2f}" for i in range(len(OBJECTIVES)) if i != mine]
        rows.append([f"λ = {value:g}", *(f"{mean:.2f}" for mean in means.values()), " ".join(minority)])
    others = ", ".join(name for name in OBJECTIVES if name != dial.MINORITY)
    told.append(tables.markdown(["", "Pearson, all pairs", "Spearman", f"{dial.MINORITY} with {others}"], rows))
    for name, metric in tables.WORLD_COLUMNS.items():
        rows = []
        for method in dial.METHODS:
            for value in dials:
                label = f"`{method}`" + ("" if method == tables.BASELINE else f" − `{tables.BASELINE}`")
                cells = [_against_uniform(by_place.get((value, kind), []), method, metric) for kind in imbalances]
                rows.append([f"{label}, {agreement[value]}", *cells])
        told += [f"### {name}, by what is wrong", tables.markdown(["", *imbalances], rows)]
    return told


def _against_uniform(results: Sequence[Result], method: str, metric: tables.Metric) -> str:
    """A method minus `uniform` at one place of the map, paired by seed; of `uniform` itself its level."""
    by_label = tables.by_label(results)
    mine, base = by_label.get(method, {}), by_label.get(tables.BASELINE, {})
    if method == tables.BASELINE:
        return tables.summary([metric(r) for r in base.values()]) if base else "–"
    differences = [metric(mine[seed]) - metric(base[seed]) for seed in mine if seed in base]
    if not differences:
        return "–"
    return f"{tables.summary(differences)} ({sum(d > 0 for d in differences)}/{len(differences)})"


# ---- gradients -------------------------------------------------------------------------------------------------------


def of_estimators(results: Sequence[Result]) -> list[str]:
    """Errors of the weights by estimator: at rest and along a run, and by the age of weights that are refreshed."""
    if not results:
        return []
    along = [r for r in results if r["cell"]["where"] == estimators.ALONG]
    resting = [r for r in results if r["cell"]["where"] != estimators.ALONG]
    places = sorted({r["cell"]["where"] for r in resting}, key=lambda place: int(place.split()[-1]))

    by_place = [[r for r in resting if r["cell"]["where"] == place] for place in places]

    def values(of: Sequence[Result], weighting: str, estimator: str, key: str) -> list[Any]:
        wanted = (weighting, estimator)
        return [rec[key] for r in of for rec in r["records"] if (rec["weighting"], rec["estimator"]) == wanted]

    errors, parts_of_them, by_age = [], [], []
    for weighting in estimators.WEIGHTINGS:
        for estimator in estimators.ESTIMATORS:
            label = f"`{weighting}`, {estimator}"
            at = [values(of, weighting, estimator, "error") for of in by_place]
            moving = values(along, weighting, estimator, "error")
            errors.append([label, *(_mean_and_width(each) for each in (*at, moving))])
            bias, spread = (values(resting, weighting, estimator, key) for key in ("bias", "spread"))
            parts_of_them.append([label, *(f"{fmean(each):.3f}" if each else "–" for each in (bias, spread))])
            ages = values(along, weighting, estimator, "by age")
            listed = ages[0] if ages else {}
            by_age.append([label, *(_mean_and_width([each[age] for each in ages]) for age in listed)])
    told = [
        "## Estimators: ‖w − w_ref‖₁ of shares",
        tables.markdown(["", *places, estimators.ALONG], errors),
        "At rest, the error's parts (means over checkpoints and seeds):",
        tables.markdown(["", "bias", "spread"], parts_of_them),
    ]
    if along:
        ages = [f"every {age}" for age in along[0]["records"][0]["by age"]]
        told += [
            "### Weights that are refreshed at every T-th step, along the run",
            tables.markdown(["", *ages], by_age),
        ]
    if resting:
        told += ["### At rest: what the estimators can be held against", _sampled(resting), _noise(resting, places)]
        told += ["Intervals of two standard errors that hold the truth, %:", _covered(resting)]
    return told


def _mean_and_width(values: Sequence[float]) -> str:
    return tables.summary(values, digits=3, signed=False) if values else "–"


def _sampled(resting: Sequence[Result]) -> str:
    """How near as many mini-batches come to the exact reference, without bias."""
    rows = []
    for weighting in estimators.WEIGHTINGS:
        found = [r["sampled"][weighting] for r in resting]
        rows.append([f"`{weighting}`", *(f"{fmean(f[key] for f in found):.3f}" for key in ("error", "halves"))])
    return tables.markdown(["U-statistic over a whole stream", "error", "between its halves"], rows)


def _noise(resting: Sequence[Result], places: Sequence[str]) -> str:
    """The true noise scale by objective: noise over signal of one mini-batch."""
    rows = []
    for place in places:
        found = [r["noise_scale"] for r in resting if r["cell"]["where"] == place]
        rows.append([place, *(f"{fmean(f[name] for f in found):.1f}" for name in OBJECTIVES)])
    return tables.markdown(["noise scale, mini-batches", *OBJECTIVES], rows)


def _covered(resting: Sequence[Result]) -> str:
    rows = []
    for estimator in resting[0]["covered"]:
        cells = []
        for key in ("gram", "noise_scale", "told"):
            values = [r["covered"][estimator][key] for r in resting if r["covered"][estimator][key] is not None]
            cells.append(f"{100 * fmean(values):.0f}" if values else "–")
        rows.append([estimator, *cells])
    return tables.markdown(["", "entries of the Gram matrix", "noise scales", "noise scales told"], rows)


def of_realised_steps(results: Sequence[Result]) -> list[str]:
    """How often realised steps hurt an objective, and what reports said of them."""
    if not results:
        return []
    runs = tables.by_label(sorted(results, key=lambda r: tables.rank(r, realised.METHODS)))
    rows, by_objective = [], []
    for label, by_seed in runs.items():
        found = list(by_seed.values())
        checks = [check for r in found for check in r["checks"]]
        seen = [each for check in checks for each in check["realised"].values()]
        said = [value for check in checks for value in check["reported"].values() if value is not None]
        rows.append(
            [
                f"`{label}`",
                _of(sum(each["z"] < 0 for each in seen), len(seen)),
                _of(sum(each["z"] < -2 for each in seen), len(seen)),
                _of(sum(abs(each["z"]) < 2 for each in seen), len(seen)),
                _of(sum(each["halves agree"] for each in seen), len(seen)),
                _of(
                    sum(value is not None and value < HURT for value in said), sum(value is not None for value in said)
                ),
                f"{100 * fmean(r['reported']['any'] for r in found):.0f}",
            ]
        )
        cells = []
        for name in OBJECTIVES:
            mine = [check["realised"][name] for check in checks]
            told = [check["reported"][name] for check in checks if check["reported"][name] is not None]
            cosines = [each["cosine"] for each in mine if each["cosine"] is not None]
            mean = f"{fmean(cosines):+.2f}".replace("-", "−") if cosines else "–"
            hurt, said_so = (sum(each["z"] < 0 for each in mine), sum(value < HURT for value in told))
            cells.append(f"{hurt} / {said_so} of {len(mine)} ({mean})")
        by_objective.append([f"`{label}`", *cells])
    header = [
        "", "hurts", "beyond two standard errors", "within two", "halves agree", "its own report: hurts",
        "… steps of the whole run that hurt anybody, %",
    ]  # fmt: skip
    columns = {"hurts, %": _hurting, **tables.WORLD_COLUMNS}
    return [
        "## Realised steps: (step, objective) that are hurt",
        tables.markdown(header, rows),
        "By objective: hurt in truth / by the report, and the mean cosine of −Δθ with the mean gradient:",
        tables.markdown(["", *OBJECTIVES], by_objective),
        tables.levels(runs, columns, counts={"seeds with nobody below 50": tables.nobody_lost}),
        "### minus uniform, paired by seed",
        tables.differences(runs, columns, lambda label: tables.BASELINE),
        "### in the metric, minus the same without",
        tables.differences(runs, columns, lambda label: label.removesuffix(realised.IN_THE_METRIC)),
    ]


def _hurting(result: Result) -> float:
    """The share of (step, objective) of a run that are hurt, in percent."""
    return 100 * fmean(each["z"] < 0 for check in result["checks"] for each in check["realised"].values())


def _of(count: float, total: int) -> str:
    return f"{count:.0f}/{total}"
