"""`track`: averages over steps of what several ranks hold. The same bits on each, and what one process would find."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mogeo import MultiObjectiveOptimizer
from mogeo.gradients import row_sketches
from tests.distributed import engines
from tests.distributed.engines import ENGINES, Net, Spread, alone, train
from tests.distributed.runner import run
from tests.distributed.test_checkpoints import LOADED, Training, load, save
from tests.distributed.test_replicas import no_engine, unsynced
from tests.profiles import slow_but

#: d as it is, which loses next to nothing of so small a net; and shorter than what any rank holds of it.
LONG, SHORT = row_sketches.DIMENSION, 128
#: Left out: each has the shards, and so the sketches, of another engine in the table.
VARIANTS = ("ddp, bucket views", "fsdp, no reshard", "tp, sequence")
ENGINES_APART = {name: each for name, each in ENGINES.items() if name not in VARIANTS}
SPREADS = {**ENGINES_APART, "no engine": (3, no_engine), "no_sync": (2, unsynced)}
CASES: tuple[tuple[int, dict[str, Any]], ...] = ((LONG, {}), (SHORT, {}))
#: Tried without an engine, and under FSDP with tensor parallelism.
OPTIONS: tuple[tuple[int, dict[str, Any]], ...] = (
    (LONG, {"guarantee_descent": True, "row_dtype": torch.float32}),
    (LONG, {"sketch": LONG}),
    (SHORT, {"weigh_by": "mini-batch"}),
)
SCATTERED: tuple[tuple[int, dict[str, Any]], ...] = (
    (LONG, {"shard_rows": True}),
    (SHORT, {"shard_rows": True}),
    (SHORT, {"shard_rows": True, "weigh_by": "mini-batch"}),
)


def train_tracked(spread: Callable[[Net], Spread], cases: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Several runs in one set of processes, with sketches of rows in so many numbers."""
    results = []
    for row_sketches.DIMENSION, options in cases:
        tracked: dict[str, Any] = {"track": 0.7, "steps": 9, "max_grad_norm": 0.3, **options}
        results.append(train(spread, torch.float64, "mgda-decoupled", **tracked))
    row_sketches.DIMENSION = LONG
    return results


@pytest.mark.parametrize("engine", slow_but(SPREADS, "no engine"))
def test_the_same_bits_on_all_ranks_and_what_one_process_finds(engine: str) -> None:
    ranks, spread = SPREADS[engine]
    cases = [*CASES, *(OPTIONS if engine in ("no engine", "fsdp × tp") else ())]
    cases += SCATTERED if engine in ("no engine", "no_sync") else ()
    results = run(ranks, train_tracked, spread, cases)
    alike = [(LONG, {**options, "shard_rows": False, "row_dtype": None}) for _, options in cases]
    for of_ranks, expected, (dimension, options) in zip(
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
        if options.get("weigh_by") == "mini-batch":  # no sketch decides
            torch.testing.assert_close(first["weights"], expected["weights"], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints

SAVED_AFTER, STEPS = 5, 8
BEGIN_ANEW = "averages of gradients over steps (track=) begin anew"


TOPOLOGIES: dict[str, tuple[int, Callable[[Net], Spread]]] = {
    "1 process": (1, alone),
    "3, no engine": (3, no_engine),
    "2, FSDP": (2, engines.fsdp),
    "3, FSDP": (3, engines.fsdp),
}
RESUMED = ("1 process", "3, no engine", "3, FSDP")


def test_ranks_with_shards_of_uneven_sizes_name_one_layout() -> None:
    """Else a state that the first rank wrote would suit it alone, and others would begin anew."""
    first, *others = run(3, uneven)
    assert len({columns for _, columns in (first, *others)}) > 1
    for layout, _ in others:
        assert layout == first[0]
    ((evenly, _), *_) = run(2, uneven)
    assert evenly != first[0]


def uneven() -> tuple[str, int]:
    """What names the sketches of a layer whose last shard is smaller; and the columns of this rank's rows."""
    net = nn.Linear(64, 7, bias=False, dtype=torch.float64)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "mgda", track=0.9)
    x = torch.ones(1, 64, dtype=torch.float64)
    optimizer.backward({"first": lambda: net(x)[0, 0] + 1, "last": lambda: net(x)[0, 6] + 1})
    optimizer.step()
    assert optimizer._state.tracked is not None
    assert optimizer._captures.rows is not None
    return optimizer._state.tracked.state_dict()["layout"], optimizer._captures.rows.blocks[0].shape[1]


class Outcome(NamedTuple):
    """What the last steps of a run made."""

    weights: Tensor
    parameters: dict[str, Tensor]
    saved: str
    #: What was said meanwhile of averages.
    told: list[str]


def tracking(spread: Callable[[Net], Spread]) -> Training:
    return Training(spread, "mgda-decoupled", track=0.7)


def outcome(training: Training) -> Outcome:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = training.run(range(SAVED_AFTER, STEPS))
    messages = [str(each.message) for each in told]
    saved = training.optimizer.state_dict()["param_groups"][0]["mogeo"]
    return Outcome(result["weights"], result["parameters"], saved, [text for text in messages if BEGIN_ANEW in text])


def saving(spread: Callable[[Net], Spread], folder: Path) -> Outcome:
    """Save on the way, and go on."""
    training = tracking(spread)
    training.run(range(SAVED_AFTER))
    save(training, folder)
    return outcome(training)


def resuming(spread: Callable[[Net], Spread], folder: Path, forms: list[str]) -> list[Outcome]:
    """Resume from every form."""
    outcomes = []
    for how in forms:
        training = tracking(spread)
        load(training, folder, how)
        outcomes.append(outcome(training))
    return outcomes


def save_and_resume(spread: Callable[[Net], Spread], folder: Path) -> list[Outcome]:
    return [saving(spread, folder), *resuming(spread, folder, list(LOADED))]


def assert_all_same(outcomes_of_ranks: list[list[Outcome]]) -> list[Outcome]:
    """Bit for bit, on every rank and however it was resumed; all of them."""
    outcomes = [each for of_rank in outcomes_of_ranks for each in of_rank]
    for each in outcomes:
        assert torch.equal(each.weights, outcomes[0].weights)
        torch.testing.assert_close(each.parameters, outcomes[0].parameters, rtol=0, atol=0)
        assert each.saved == outcomes[0].saved
    return outcomes


@pytest.mark.parametrize("topology", slow_but(RESUMED, "3, FSDP"))
def test_resumes_bit_for_bit_on_as_many_ranks(topology: str, tmp_path: Path) -> None:
    """Every rank reads what the first one wrote."""
    ranks, spread = TOPOLOGIES[topology]
    for each in assert_all_same(run(ranks, save_and_resume, spread, tmp_path)):
        assert not each.told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"), [("3, FSDP", "2, FSDP"), ("1 process", "3, FSDP"), ("2, FSDP", "1 process")]
)
def test_on_other_ranks_averages_begin_anew(source: str, target: str, tmp_path: Path) -> None:
    """All ranks alike, and the user hears of it."""
    run(TOPOLOGIES[source][0], saving, TOPOLOGIES[source][1], tmp_path)
    results = run(TOPOLOGIES[target][0], resuming, TOPOLOGIES[target][1], tmp_path, ["sharded", "broadcast"])
    for each in assert_all_same(results):
        torch.testing.assert_close(each.weights[0], torch.full_like(each.weights[0], 1 / 3))
        assert len(each.told) == 1
