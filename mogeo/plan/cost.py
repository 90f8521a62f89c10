"""How long a step takes in a mode, compared with plain training. Arithmetic on data-sheet figures; knows no torch.

Plain training is one forward and one backward of the sum of the losses, and an optimizer step. A mode adds bytes to
read (for the Gram matrix and the combination), to send to the host, or to send between ranks; a sketch also adds a
second forward and backward. All these times are added up, as if nothing ran at the same time.
"""

from __future__ import annotations

from typing import NamedTuple

from mogeo.plan.memory import OPTIMIZERS, Mode, Setup, row_size


class Device(NamedTuple):
    """A device's figures by its data sheet: bytes, bytes per second in one direction, operations per second."""

    memory: float
    bf16: float  #: dense products in bf16, sums in fp32
    fp32: float  #: products in fp32, without TF32, as torch does by default
    bandwidth: float  #: of the memory
    pcie: float  #: to the host
    link: float  #: to other devices: NVLink, or PCIe where there is none


DEVICES = {
    "h100": Device(80e9, 989e12, 67e12, 3350e9, 64e9, 450e9),
    "h200": Device(141e9, 989e12, 67e12, 4800e9, 64e9, 450e9),
    "a100": Device(80e9, 312e12, 19.5e12, 2039e9, 32e9, 300e9),
    "rtx4090": Device(24e9, 165e12, 82.6e12, 1008e9, 32e9, 32e9),
    "cpu": Device(64e9, 1e12, 1e12, 100e9, 100e9, 10e9),
}
"""NVIDIA's SXM cards by their data sheets (A100: with 80 GB). The figures of "cpu" are a guess at a server."""

COMPUTE_EFFICIENCY = 0.4
"""Share of the data sheet's operations per second that training reaches."""

BANDWIDTH_EFFICIENCY = 0.8
"""Share of the data sheet's bytes per second that memory, PCIe and links reach."""

HOST_BANDWIDTH = 50e9
"""Bytes per second that the host reads rows with, for one rank."""


class Step(NamedTuple):
    """Seconds of a step's parts."""

    compute: float  #: forward and backward
    optimizer: float  #: the base optimizer's reading and writing
    engine: float  #: gradients and weights between ranks
    mogeo: float  #: Gram matrix, combination, PCIe

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self)


def step(mode: Mode | None, setup: Setup, device: Device, operations: float) -> Step:
    """How long a step takes, averaged over the steps that solve for weights and those that do not.

    Args:
        mode: one of `mogeo.plan.memory.modes`, with losses as callables, so that each has its own backward; None: plain
            training.
        setup: the fine-tune.
        device: its figures.
        operations: floating-point operations of the forward and backward of one objective's batch.
    """
    pace = (device.fp32 if setup.precision == "fp32" else device.bf16) * COMPUTE_EFFICIENCY
    compute = setup.objectives * operations / pace
    # Reads weight, gradient and states; writes weight and states.
    touched = (3 + 2 * OPTIMIZERS[setup.optimizer]) * setup.held * setup.size
    optimizer = touched / (device.bandwidth * BANDWIDTH_EFFICIENCY)

    # FSDP2 gathers twice, and scatters once.
    width = (2 * setup.whole + setup.size) / 3

    def taking(passes: float, own: float = 0.0, again: float = 0.0) -> Step:
        sent = passes * setup.shape.elements * width * (setup.ranks - 1) / setup.ranks
        return Step(compute + again, optimizer, sent / (device.link * BANDWIDTH_EFFICIENCY), own)

    if mode is None:
        return taking(_ONCE[setup.engine])
    # In no_sync() gradients of one row add up, and are reduced once.
    one_row = taking(_ONCE[setup.engine] * (1 if setup.engine == "ddp-shard-rows" else setup.objectives))
    if mode.rows == "one":
        return one_row
    solving = taking(_passes(mode, setup), _own(mode, setup, device), compute if mode.rows == "sketch" else 0.0)
    if not mode.refreshes:
        return solving
    every = setup.refresh_every
    return Step(*(rare / every + usual * (every - 1) / every for rare, usual in zip(solving, one_row, strict=True)))


def ratio(mode: Mode, setup: Setup, device: Device, operations: float) -> float:
    """How long a step of a mode takes, divided by that of plain training; arguments as in `step`."""
    return step(mode, setup, device, operations).total / step(None, setup, device, operations).total


_ONCE = {"none": 0, "ddp": 2, "ddp-shard-rows": 2, "fsdp2": 3}
"""Elements that a rank sends for one forward and one backward, in units of N·(n − 1)/n."""


def _passes(mode: Mode, setup: Setup) -> int:
    """Elements that a rank sends at a step that solves, in those units: the table of docs/distributed.md."""
    objectives, once = setup.objectives, _ONCE[setup.engine]
    if setup.engine != "ddp-shard-rows":
        return (2 if mode.rows == "sketch" else 1) * objectives * once
    # A sketch of a sum is the sum of sketches: nothing else is reduced before the second pass.
    return once if mode.rows == "sketch" else objectives + 1


def _own(mode: Mode, setup: Setup, device: Device) -> float:
    """Seconds of what mogeo does with rows, at a step that solves."""
    bandwidth = device.bandwidth * BANDWIDTH_EFFICIENCY
    direction = float(setup.held * setup.size)
    if mode.rows == "sketch":  # each gradient is read once
        return setup.objectives * direction / bandwidth
    rows = float(setup.objectives * setup.held * row_size(mode, setup))
    if setup.engine == "ddp-shard-rows":
        rows, direction = rows / setup.ranks, direction / setup.ranks
    touched = 2 * rows + direction  # by the Gram matrix, and by the combination
    if not mode.on_host:
        return touched / bandwidth
    return (rows + direction) / (device.pcie * BANDWIDTH_EFFICIENCY) + touched / HOST_BANDWIDTH
