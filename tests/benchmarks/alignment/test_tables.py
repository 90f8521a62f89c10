"""The numbers in the comparison's tables, against computations of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from alignment import compare, tables
from alignment.cells import path_of, run_cells
from alignment.explain import explain


def result(method: str, seed: int, overall: float, **more: float) -> dict:
    rates = {"overall": overall, "a": 0.5, "b": -0.25, **more}
    return {"cell": {"regime": "base", "method": method, "lr": 0.1, "seed": seed}, "greedy": rates, "sampled": rates}


def test_an_interval_is_students() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert tables.interval(values) == pytest.approx((high - low) / 2)
    assert tables.summary(values, 2) == f"+0.42 ± {(high - low) / 2:.2f}"
    assert tables.summary([0.5], 1, signed=False) == "0.5"


def test_the_worst_is_the_worst_of_each_run_and_never_the_overall() -> None:
    assert tables.net("greedy", "worst")(result("uniform", 0, overall=-0.9)) == -25.0


def test_differences_are_paired_by_seed() -> None:
    runs = tables.by_label(
        [result("uniform", s, v) for s, v in enumerate((0.1, 0.5, 0.9))]
        + [result("mgda", s, v) for s, v in enumerate((0.2, 0.7, 1.0))]
    )
    told = tables.differences(runs, {"overall": tables.net("greedy", "overall")}, lambda label: "uniform")
    p = stats.ttest_1samp([10, 20, 10], 0).pvalue
    assert told.splitlines()[-1].startswith("| `mgda` − `uniform` | +13.3 ± 14.3 (3/3, p = ")
    assert f"p = {p:.2g})" in told


def test_a_rate_is_chosen_by_the_mean_of_greedy_and_sampled_over_the_seeds() -> None:
    results = []
    for rate, overall in ((0.1, (0.5, 0.1)), (0.2, (0.2, 0.45))):
        for seed, value in enumerate(overall):
            results.append(result("mgda", seed, value))
            results[-1]["cell"]["lr"] = rate
    assert compare.chosen_rates(results) == {"mgda": 0.2}
    results[0]["greedy"] = results[0]["sampled"] = {"overall": 0.6}
    assert compare.chosen_rates(results) == {"mgda": 0.1}


def test_conflicts_and_hurt_steps_are_counted() -> None:
    def step(cosine: float, alignment: tuple[float, float], weight: tuple[float, float]) -> dict:
        return {
            "kind": "train",
            "cosines": [[1.0, cosine], [cosine, 1.0]],
            "alignment": dict(zip("ab", alignment, strict=True)),
            "weight": dict(zip("ab", weight, strict=True)),
        }

    steps = [
        step(-0.5, (0.1, -0.2), (1.0, 3.0)),
        step(0.5, (0.1, float("nan")), (1.0, 1.0)),
        step(0.1, (0.3, 0.5), (3.0, 1.0)),
        step(-0.1, (0.2, 0.1), (1.0, 1.0)),
    ]
    found = explain([{"kind": "eval"}, *steps], "ab")
    assert (found["steps"], found["conflict"], found["hurt"]) == (4, 0.5, 0.25)
    assert found["alignment"] == pytest.approx((-0.2 + 0.1 + 0.3 + 0.1) / 4)
    assert found["weight"] == {"a": 0.5, "b": 0.5}
    assert found["weights"][0] == [0.25, 0.75]


def compute(cell: dict) -> dict:
    if cell["n"] == 3:
        raise RuntimeError("interrupted")
    return {"square": cell["n"] ** 2}


def test_cells_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        run_cells([{"n": n} for n in (1, 3)], compute, tmp_path, 1)
    path = path_of(tmp_path, {"n": 1})
    path.write_text(path.read_text().replace('"square": 1', '"square": "kept"'))
    results = run_cells([{"n": n} for n in (2, 1)], compute, tmp_path, 1)
    assert [r["square"] for r in results] == [4, "kept"]
    assert sorted(tmp_path.iterdir()) == sorted(path_of(tmp_path, {"n": n}) for n in (1, 2))
