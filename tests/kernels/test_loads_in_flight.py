"""The reader of machine code, on loops written by hand: what is said, what counts it, and what it waits for.

A load of 16 bytes takes a unit of time, so that n of them under way together bring 16n bytes a unit.
"""

from __future__ import annotations

import struct

import pytest

from tests.kernels.loads_in_flight import (
    NONE,
    Instruction,
    instructions,
    main_loop,
    read_listing,
    replay,
    resident_programs,
)

LOAD = "LDG.E.128 R4, desc[UR4][R2.64]"
COPY = "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64], P0"
USE = "FADD R0, R0, R4"


def code(*lines: tuple[str, int, set[int]] | str) -> list[Instruction]:
    """Text, scoreboard it counts in (or NONE), scoreboards it waits for; or text alone."""
    full = [(line, NONE, set()) if isinstance(line, str) else line for line in lines]
    return [Instruction(16 * i, text, to, sum(1 << b for b in awaited)) for i, (text, to, awaited) in enumerate(full)]


# --------------------------------------------------------------------------------------------------------------------
# Replay


def test_loads_that_are_asked_for_together_are_in_flight_together() -> None:
    loop = code((LOAD, 0, set()), (LOAD, 1, set()), (LOAD, 1, set()), (USE, NONE, {0}), (USE, NONE, {1}))
    assert replay(loop, 16) == 48


def test_loads_sunk_beside_their_uses_are_in_flight_one_by_one() -> None:
    loop = code((LOAD, 0, set()), (USE, NONE, {0}), (LOAD, 1, set()), (USE, NONE, {1}))
    assert replay(loop, 16) == 16


def test_a_load_that_is_used_a_round_later_is_in_flight_beside_the_next() -> None:
    """Two registers in turn: while one is waited for, the other's load is on its way."""
    loop = code((USE, NONE, {0}), (LOAD, 0, set()), (USE, NONE, {1}), (LOAD, 1, set()))
    assert replay(loop, 16) == 32


def test_one_scoreboard_for_all_is_waited_for_as_a_whole() -> None:
    """The same with one scoreboard, which is empty only once the younger load has come, too."""
    loop = code((USE, NONE, {0}), (LOAD, 0, set()), (USE, NONE, {0}), (LOAD, 0, set()))
    assert replay(loop, 16) == 16


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_copies_are_waited_for_in_groups(allowed: int) -> None:
    """Two copies a round, one group; the oldest is waited for where one more than allowed is on its way."""
    loop = code(f"DEPBAR.LE SB0, {allowed:#x}", "BAR.SYNC.DEFER_BLOCKING 0x0", COPY, COPY, "LDGDEPBAR")
    assert replay(loop, 16) == 32 * (allowed + 1)


def test_what_other_loads_bring_is_not_counted_but_waited_for() -> None:
    table = ("LDG.E R3, desc[UR4][R2.64]", 0, set())
    assert replay(code(table, (LOAD, 1, {0}), (USE, NONE, {1})), 16) == 8


def test_a_load_waits_for_nothing_that_it_does_not_name() -> None:
    assert replay(code((LOAD, 0, set()), ("MUFU.RCP R1, R1", 2, set()), (USE, NONE, {0, 2})), 16) == 16


@pytest.mark.parametrize(
    ("text", "size"),
    [("LDG.E.U8 R1, [R2]", 1), ("@P0 LDG.E.U16 R1, [R2]", 2), ("LDG.E.CONSTANT R1, [R2]", 4), ("LDG.E.64 R2, [R4]", 8)],
)
def test_widths(text: str, size: int) -> None:
    (instruction,) = code(text)
    assert instruction.is_load
    assert instruction.bytes == size


def test_what_is_no_load_from_global_memory() -> None:
    assert not any(step.is_load for step in code("LDGDEPBAR", "LDS.128 R4, [R0]", "LDL R1, [R1]", "STG.E.128 [R2], R4"))


# --------------------------------------------------------------------------------------------------------------------
# Loops


def opcodes(loop: list[Instruction]) -> list[str]:
    return [instruction.text.split(" R")[0] for instruction in loop]


def test_the_first_loop_that_loads_such_vectors() -> None:
    """Not one before it of scalars, nor a larger one behind it."""
    found = main_loop(
        code(
            "LDG.E R1, [R2]", "@P0 BRA 0x0",
            "MOV R1, R2", LOAD, "@!P1 BRA 0x20",
            LOAD, LOAD, "BRA P2, 0x50", "EXIT",
        ),
        16,
    )  # fmt: skip
    assert [instruction.address for instruction in found] == [0x20, 0x30, 0x40]


def test_a_rare_way_through_is_longer() -> None:
    """Of two ways that load as much, the shorter; either comes first."""
    rare = main_loop(code("@P0 BRA 0x40", LOAD, "NOP", "BRA 0x50", LOAD, "@P1 BRA 0x0", "EXIT"), 16)
    assert [instruction.address for instruction in rare] == [0x00, 0x40, 0x50]


def test_a_way_that_loads_more_is_the_main_one() -> None:
    found = main_loop(code("@P0 BRA 0x30", LOAD, "NOP", "@P1 BRA 0x0", "EXIT"), 16)
    assert [instruction.address for instruction in found] == [0x00, 0x10, 0x20, 0x30]


def test_an_inner_loop_is_gone_through_once() -> None:
    found = main_loop(code("NOP", LOAD, "NOP", "@P0 BRA 0x20", LOAD, "@P1 BRA 0x0", "EXIT"), 16)
    assert [instruction.address for instruction in found] == [0x00, 0x10, 0x20, 0x30, 0x40, 0x50]


def test_code_without_such_a_loop() -> None:
    assert main_loop(code(LOAD, "NOP", "@P0 BRA 0x10", "EXIT"), 16) == []


# --------------------------------------------------------------------------------------------------------------------
# Listings, and what fits


def test_scoreboards_are_read_from_the_upper_half_of_an_instruction() -> None:
    """As in ptxas's code for sm_90: a load counted by scoreboard 2, what waits for it, and what waits for 0 and 5."""

    def encoded(counts_in: int, waits_for: int) -> bytes:
        return struct.pack("<QQ", 0, (counts_in << 5 | NONE << 8 | waits_for << 11) << 41)

    listing = """
        /*0100*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/              @!P0 FADD R0, R0, R4 ;
        /*0120*/                   BRA 0x100 ;
"""
    binary = encoded(2, 0) + encoded(NONE, 0b100) + encoded(NONE, 0b100001)
    found = instructions(read_listing(listing), binary, 0x100)
    assert [(step.counts_in, step.waits_for) for step in found] == [(2, 0), (NONE, 4), (NONE, 33)]
    assert [step.opcode for step in found] == ["LDG.E.128", "FADD", "BRA"]
    assert [step.is_conditional for step in found] == [False, True, False]
    assert found[2].target == 0x100


@pytest.mark.parametrize(
    ("registers", "shared_memory", "warps", "programs"),
    [
        (32, 0, 4, 16),  # threads
        (33, 0, 4, 12),  # registers, dealt by eights
        (255, 0, 4, 2),
        (80, 12288, 1, 17),  # shared memory
        (32, 0, 1, 32),  # blocks
        (96, 49152, 4, 4),
    ],
)
def test_how_many_programs_a_multiprocessor_holds(
    registers: int, shared_memory: int, warps: int, programs: int
) -> None:
    assert resident_programs(registers, shared_memory, warps) == programs
