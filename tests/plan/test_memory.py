"""Bytes and ratios of `mogeo plan`: how they grow and shrink, and which mode is chosen. No model is built here."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mogeo.errors import InputError
from mogeo.plan.cost import DEVICES, ratio
from mogeo.plan.memory import ENGINES, OPTIMIZERS, PRECISIONS, Memory, Mode, Peaks, Setup, Shape, memory, modes
from mogeo.plan.recommend import Candidate, choose

SHAPE = Shape(elements=12_000, buffer_bytes=64, layers=4, layer_elements=2_500, outer_elements=2_000, lora_elements=800)
PEAKS = Peaks(streamed=70_000, kept=110_000)

NOT_MIXED = {("mixed", engine) for engine in ENGINES if engine != "fsdp2"}

setups = st.builds(
    lambda objectives, precision, optimizer, engine, ranks, sketch, every: Setup(
        SHAPE,
        PEAKS,
        objectives,
        "autocast" if (precision, engine) in NOT_MIXED else precision,
        optimizer,
        engine,
        1 if engine == "none" else ranks,
        False,
        sketch,
        every,
    ),
    st.integers(2, 9),
    st.sampled_from(sorted(PRECISIONS)),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from(ENGINES),
    st.integers(2, 16),
    st.integers(1, 200),
    st.integers(2, 20),
)


def of(setup: Setup, name: str) -> Mode:
    return next(mode for mode in modes(setup) if mode.name == name)


@given(setups)
def test_more_objectives_never_take_less(setup: Setup) -> None:
    more = dataclasses.replace(setup, objectives=setup.objectives + 1)
    for mode in modes(setup):
        before, after = memory(mode, setup), memory(mode, more)
        assert after.device + after.host >= before.device + before.host
        if mode.rows == "one":
            assert after == before


@given(setups)
def test_every_mode_but_the_exact_one_saves_memory_or_time(setup: Setup) -> None:
    exact = of(setup, "exact")
    for mode in modes(setup):
        saves = memory(mode, setup).device <= memory(exact, setup).device
        faster = ratio(mode, setup, DEVICES["h100"], 1e9) <= ratio(exact, setup, DEVICES["h100"], 1e9)
        small = setup.objectives * 2 <= setup.size or setup.engine == "ddp-shard-rows"  # rows smaller than a direction
        assert saves or faster or (mode.half and small)


@given(setups, st.integers(2, 4))
def test_shards_shrink_with_their_number(setup: Setup, factor: int) -> None:
    if setup.engine != "fsdp2":
        return
    wider = dataclasses.replace(setup, ranks=setup.ranks * factor)
    for mode in modes(setup):
        assert memory(mode, wider).rows <= memory(mode, setup).rows
        assert memory(mode, wider).weights <= memory(mode, setup).weights
        assert memory(mode, wider).activations == memory(mode, setup).activations


def test_what_the_exact_mode_holds() -> None:
    setup = Setup(SHAPE, PEAKS, objectives=4)
    n = 12_000 * 4
    assert memory(of(setup, "exact"), setup) == Memory(n + 64, 2 * n, 4 * n, 0, 0, 0, 70_000, 0)
    assert memory(of(setup, "bf16 rows"), setup).rows == 4 * n // 2 + n
    assert memory(of(setup, "host rows"), setup).host == 4 * n


def test_shards_that_are_gathered_as_bf16_are_half_as_large_while_whole() -> None:
    wide, mixed = (Setup(SHAPE, PEAKS, 4, precision, engine="fsdp2", ranks=4) for precision in ("autocast", "mixed"))
    before, after = memory(of(wide, "exact"), wide), memory(of(mixed, "exact"), mixed)
    assert after.engine == 2 * (2_000 + 2 * 2_500) + max((2 + 4) * 2_500, 4 * 2_000)
    assert before.engine == 4 * (2_000 + 2 * 2_500) + max((4 + 4) * 2_500, 4 * 2_000)
    assert after.autograd == 2 * before.autograd  # the traced gradients are bf16 then, and their shards fp32
    assert (after.weights, after.optimizer, after.rows) == (before.weights, before.optimizer, before.rows)
    assert ratio(of(mixed, "exact"), mixed, DEVICES["h100"], 1e9) < ratio(of(wide, "exact"), wide, DEVICES["h100"], 1e9)


def test_held_weights_keep_the_rows_of_the_step_that_solved() -> None:
    setup = Setup(SHAPE, Peaks(40_000, 110_000), objectives=4)
    assert memory(of(setup, "refresh"), setup) == memory(of(setup, "exact"), setup)


def test_only_fsdp_gathers() -> None:
    with pytest.raises(InputError, match="--precision mixed with --engine ddp"):
        Setup(SHAPE, PEAKS, 4, "mixed", engine="ddp", ranks=2)


def candidate(mode: Mode, held: int, step: float) -> Candidate:
    return Candidate(mode, Memory(0, 0, held, 0, 0, 0, 0, 0), step)


def test_the_most_exact_that_fits_and_costs_little_more_than_the_cheapest() -> None:
    uniform, exact = Mode("uniform", rows="one"), Mode("exact")
    rounded, old = Mode("rounded", exactness="rounded"), Mode("old", exactness="approximate")
    of_all = [candidate(uniform, 1, 1.0), candidate(exact, 9, 1.2), candidate(rounded, 5, 1.2), candidate(old, 4, 1.0)]
    assert choose(of_all, 10) is of_all[3]
    assert choose([*of_all[:3], candidate(old, 4, 1.15)], 10) is of_all[1]
    assert choose([*of_all[:3], candidate(old, 4, 1.15)], 8) is of_all[2]
    assert choose(of_all, 3) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"objectives": 0}, "--objectives 0"), ({"engine": "ddp"}, "--ranks 1"), ({"ranks": 4}, "engine none")],
)
def test_what_does_not_fit_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Setup(**{"shape": SHAPE, "peaks": PEAKS, "objectives": 4, **options})  # type: ignore[arg-type]
