"""`track`: averages over steps of what several ranks hold. The same bits on each, and what one process would find."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mogeo.gradients import row_sketches
from tests.distributed import engines
from tests.distributed.engines import ENGINES, Net, Spread, alone, train
from tests.distributed.runner import run
from tests.distributed.test_checkpoints import LOADED, Training, load, save
from tests.distributed.test_replicas import no_engine, unsynced
from tests.profiles import slow_but

#: d as it is, which loses next to nothing of so small a net; and shorter than what any rank holds of it.
LONG, SHORT = row_sketches.DIMENSION, 128
SPREADS = {**ENGINES, "no engine": (3, no_engine), "no_sync": (2, unsynced)}
CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (LONG, {}),
    (LONG, {"guarantee_descent": True, "row_dtype": torch.float32}),
    (LONG, {"sketch": LONG}),
    (SHORT, {}),
)
SCATTERED: tuple[tuple[int, dict[str, Any]], ...] = ((LONG, {"shard_rows": True}), (SHORT, {"shard_rows": True}))


def train_tracked(spread: Callable[[Net], Spread], cases: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Several runs in one set of processes, with sketches of rows in so many numbers."""
    results = []
    for row_sketches.DIMENSION, options in cases:
        tracked: dict[str, Any] = {"track": 0.7, "steps": 9, "max_grad_norm": 0.3, **options}
        results.append(train(spread, torch.float64, "mgda-decoupled", **tracked))
    row_sketches.DIMENSION = LONG
    return results


@pytest.mark.parametrize("engine", slow_but(SPREADS, "no engine", "fsdp"))
def test_the_same_bits_on_all_ranks_and_what_one_process_finds(engine: str) -> None:
    ranks, spread = SPREADS[engine]
    cases = [*CASES, *(SCATTERED if engine in ("no engine", "no_sync") else ())]
    results = run(ranks, train_tracked, spread, cases)
    alike = [(LONG, {**options, "shard_rows": False, "row_dtype": None}) for _, options in cases]
    for of_ranks, expected, (dimension, _) in zip(
        zip(*results, strict=True), train_tracked(alone, alike), cases, strict=True
    ):
        first = of_ranks[0]
        for result in of_ranks:
            assert torch.equal(result["weights"], first["weights"])
            torch.testing.assert_close(result["mean"], first["mean"], rtol=0, atol=0, equal_nan=True)
        assert expected["mean"].evidence.min() > 0
        lengths = expected["mean"].gram.diagonal().sqrt()
        off = (first["mean"].gram - expected["mean"].gram).abs() / torch.outer(lengths, lengths)
        assert off.max() < 5 * (2 / dimension) ** 0.5
        if dimension == LONG:
            torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=5e-3)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints

SAVED_AFTER, STEPS = 5, 8
BEGIN_ANEW = "averages of gradients over steps (track=) begin anew"


def tracking(spread: Callable[[Net], Spread]) -> Training:
    return Training(spread, "mgda-decoupled", track=0.7)


def saving(spread: Callable[[Net], Spread], folder: Path) -> dict[str, Any]:
    """Save on the way; what an uninterrupted run then becomes."""
    training = tracking(spread)
    training.run(range(SAVED_AFTER))
    save(training, folder)
    return training.run(range(SAVED_AFTER, STEPS))


def resuming(spread: Callable[[Net], Spread], folder: Path, forms: list[str]) -> list[tuple[dict[str, Any], list[str]]]:
    """Resume from every form; what that became, and what was said."""
    results = []
    for how in forms:
        training = tracking(spread)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            load(training, folder, how)
            results.append((training.run(range(SAVED_AFTER, STEPS)), [str(each.message) for each in told]))
    return results


def save_and_resume(spread: Callable[[Net], Spread], folder: Path) -> list[tuple[dict[str, Any], list[str]]]:
    return [(saving(spread, folder), []), *resuming(spread, folder, list(LOADED))]


TOPOLOGIES: dict[str, tuple[int, Callable[[Net], Spread]]] = {
    "1 process": (1, alone),
    "3, no engine": (3, no_engine),
    "2, FSDP": (2, engines.fsdp),
    "3, FSDP": (3, engines.fsdp),
}


@pytest.mark.parametrize("topology", slow_but(TOPOLOGIES, "3, FSDP"))
def test_resumes_bit_for_bit_on_as_many_ranks(topology: str, tmp_path: Path) -> None:
    """Shards of uneven sizes included: every rank reads what the first one wrote."""
    of_ranks = run(*TOPOLOGIES[topology][:1], save_and_resume, TOPOLOGIES[topology][1], tmp_path)
    expected = of_ranks[0][0][0]
    for (uninterrupted, _), *resumed in of_ranks:
        assert uninterrupted["own"] == expected["own"]
        for result, told in resumed:
            assert not [each for each in told if BEGIN_ANEW in each]
            assert torch.equal(result["weights"], expected["weights"])
            assert result["own"] == expected["own"]
            torch.testing.assert_close(result["parameters"], expected["parameters"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "target"),
    slow_but([("3, FSDP", "2, FSDP"), ("1 process", "3, FSDP"), ("2, FSDP", "1 process")], ("3, FSDP", "2, FSDP")),
)
def test_on_other_ranks_averages_begin_anew(source: str, target: str, tmp_path: Path) -> None:
    run(TOPOLOGIES[source][0], saving, TOPOLOGIES[source][1], tmp_path)
    forms = ["sharded", "broadcast"]
    results = run(TOPOLOGIES[target][0], resuming, TOPOLOGIES[target][1], tmp_path, forms)
    for of_ranks in zip(*results, strict=True):
        expected = of_ranks[0][0]
        for result, told in of_ranks:
            assert len([each for each in told if BEGIN_ANEW in each]) == 1
            assert torch.equal(result["weights"], expected["weights"])
            assert torch.equal(result["weights"][0], torch.full((3,), 1 / 3, dtype=torch.float64))
            assert result["own"] == expected["own"]
