"""How many bytes of global memory a compiled loop keeps on their way, read from NVIDIA machine code (Volta and later).

An instruction that takes a while to deliver, such as a load, names one of six scoreboards, which counts it until it has
delivered; a later one names the scoreboards that must be empty before it is issued. Asynchronous copies to shared
memory are counted in groups: `LDGDEPBAR` closes one, `DEPBAR.LE SB, n` waits until no more than n are on their way.

`replay` runs a loop round by round by these rules alone, on a clock of its own: a load takes one unit of time, whether
memory or a cache serves it, and everything else takes none. Bytes of a round / units of a round is then what is on its
way in the mean (Little's law). Real code issues its instructions one after another, so that a warp has no more than
this on its way at its best; other warps fill the gaps.

Knows text and numbers, neither Triton nor mogeo.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SCOREBOARDS = 6
NONE = 7  # the scoreboard of instructions that name none

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?)\s*;", re.MULTILINE)
_OPCODE = re.compile(r"(@!?U?P\w+\s+)?([A-Z][\w.]*)")
_LOAD = re.compile(r"LDG(STS)?(?:\.\w+)*$")
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

# H100: a multiprocessor's limits. Registers are dealt to warps, in each of four partitions, 256 at a time.
_THREADS, _BLOCKS, _REGISTERS, _SHARED_MEMORY = 2048, 32, 65536, 227 * 1024
_RESERVED_SHARED_MEMORY = 1024  # per block
MULTIPROCESSORS = 132


class Instruction(NamedTuple):
    """One instruction, as far as the flow of control and of loads goes."""

    address: int
    text: str  #: as disassembled, with its predicate
    counts_in: int = NONE  #: scoreboard that counts it until it has delivered
    waits_for: int = 0  #: bit i: scoreboard i must be empty first

    @property
    def opcode(self) -> str:
        found = _OPCODE.match(self.text)
        assert found, self.text
        return found[2]

    @property
    def is_load(self) -> bool:
        """From global memory, into registers or shared memory."""
        return bool(_LOAD.match(self.opcode))

    @property
    def bytes(self) -> int:
        """What a load brings a thread."""
        return next((size for part in self.opcode.split(".") if (size := _WIDTHS.get(part))), 4)

    @property
    def is_conditional(self) -> bool:
        """For a branch: whether it may be passed by."""
        return bool(re.match(r"@|BRA\.DIV|BRA[\w.]*\s+!?U?P\d", self.text))

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


def read_listing(listing: str) -> dict[int, str]:
    """What nvdisasm says at each address."""
    return {int(address, 16): text for address, text in _INSTRUCTION.findall(listing)}


def instructions(said: dict[int, str], code: bytes, start: int) -> list[Instruction]:
    """Those of one kernel: machine code, 16 bytes an instruction, that the listing has from address `start` on."""
    found = []
    for offset in range(0, len(code), 16):
        (upper,) = struct.unpack_from("<Q", code, offset + 8)
        # 4 bits of delay, one to yield, scoreboard of its result, one of its operands, 6 bits of what it waits for.
        control = upper >> 41
        found.append(Instruction(start + offset, said[start + offset], control >> 5 & 7, control >> 11 & 63))
    return found


def main_loop(code: Sequence[Instruction], width: int) -> list[Instruction]:
    """One round of the first loop that loads `width` bytes at a time, its way back last; empty if there is none.

    Of several ways through it, the one that loads most; of those, the shortest: what is rare takes longer.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    loops: dict[int, list[int]] = {}  # by head: the branches back to it
    for i, instruction in enumerate(code):
        if instruction.target is not None and instruction.target < instruction.address:
            loops.setdefault(index[instruction.target], []).append(i)
    for head in sorted(loops):
        rounds = [[code[i] for i in way] for way in _ways(code, index, head, loops[head])]
        loaded = [sum(step.is_load and step.bytes == width for step in way) for way in rounds]
        if rounds and max(loaded):
            return min((way for way, n in zip(rounds, loaded, strict=True) if n == max(loaded)), key=len)
    return []


def _ways(code: Sequence[Instruction], index: dict[int, int], head: int, backs: Sequence[int]) -> Iterator[list[int]]:
    """Ways from the head of a loop to a branch back to it, none of which takes another branch back."""
    last = max(backs)
    pending: list[list[int]] = [[head]]
    while pending:
        way = pending.pop()
        while True:
            at = way[-1]
            instruction = code[at]
            if at in backs:
                yield list(way)
            following = []
            if instruction.target is not None and index[instruction.target] > at:
                following.append(index[instruction.target])
            leaves = instruction.opcode.split(".")[0] in ("EXIT", "RET") or instruction.target is not None
            if not leaves or instruction.is_conditional:
                following.append(at + 1)
            following = [i for i in following if i <= last]
            if not following:
                break
            pending += [[*way, other] for other in following[1:]]
            way.append(following[0])


def replay(loop: Sequence[Instruction], width: int) -> float:
    """Bytes that a thread has on their way in the mean, over many rounds of a loop; loads of `width` bytes count.

    Loads of another width (tables, weights) are waited for, but bring nothing.
    """
    rounds = 120  # the second half of which is a whole number of periods, however many tiles are on their way
    delivered = [0.0] * SCOREBOARDS
    now, group, groups = 0.0, 0.0, [0.0]
    ends = []
    for _ in range(rounds):
        for instruction in loop:
            awaited = [delivered[i] for i in range(SCOREBOARDS) if instruction.waits_for >> i & 1]
            now = max([now, *awaited])
            if instruction.opcode == "LDGDEPBAR":
                groups.append(group)
                group = 0.0
            elif instruction.opcode.startswith("DEPBAR.LE"):
                allowed = re.search(r"SB\d, 0x([0-9a-f]+)", instruction.text)
                assert allowed, instruction.text
                now = max([now, *groups[: len(groups) - int(allowed[1], 16)]])
            elif instruction.is_load:
                if instruction.opcode.startswith("LDGSTS"):
                    group = now + 1
                elif instruction.counts_in != NONE:
                    delivered[instruction.counts_in] = now + 1
        ends.append(now)
    loaded = sum(step.bytes for step in loop if step.is_load and step.bytes == width)
    units = (ends[-1] - ends[rounds // 2 - 1]) / (rounds - rounds // 2)
    return loaded / units if units else 0.0


def resident_programs(registers: int, shared_memory: int, warps: int) -> int:
    """Programs of so many warps that a multiprocessor of an H100 holds at a time.

    Args:
        registers: per thread.
        shared_memory: bytes per program.
    """
    warps_of_partition = _REGISTERS // 4 // (-(-registers // 8) * 8 * 32)
    return min(
        _BLOCKS,
        _THREADS // (32 * warps),
        warps_of_partition * 4 // warps,
        _SHARED_MEMORY // (shared_memory + _RESERVED_SHARED_MEMORY),
    )
