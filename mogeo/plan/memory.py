"""Bytes that a rank needs at the peak of a step, item by item and mode by mode. Arithmetic; knows no torch.

What a forward and a backward need is measured (`mogeo.plan.activations`). Everything else follows from counts: with N
the number of trainable elements on a rank, g bytes per element, K objectives and n ranks,

    weights            N·g, and the model's buffers
    optimizer          2·N·g (AdamW), N·g (SGD with momentum, Lion)
    rows               K·N·g; constant weights N·g; see `Mode`
    autograd           N·g with several ranks, where gradients stay until the backward is done
    engine             DDP: its buckets, N·g. FSDP2: the parts of the model that are whole for a while
    reference          N·g, unless its scores are computed beforehand
    activations        measured, with the gradient that is on its way to a row; up to 32 MiB of other gradients that may
                       wait for theirs are not counted
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

from mogeo.errors import InputError

OPTIMIZERS = {"adamw": 2, "sgd": 1, "lion": 1}
"""States per parameter, each in the parameter's dtype."""

ENGINES = ("none", "ddp", "ddp-shard-rows", "fsdp2")
"""One process; DDP; DDP in `no_sync()` with `shard_rows=True`; FSDP2, each layer and the rest of the model a unit."""

PRECISIONS = {"autocast": 4, "fp32": 4, "bf16": 2, "mixed": 4}
"""Bytes of a weight, and of its gradient and optimizer states. "autocast": fp32 weights, products in bf16. "mixed":
fp32 shards, which FSDP2 gathers as bf16, and gradients reduced in fp32 (`MixedPrecisionPolicy(torch.bfloat16,
torch.float32)`)."""


class Shape(NamedTuple):
    """Counts of a model's elements; tied parameters count once."""

    elements: int  #: parameters
    buffer_bytes: int
    layers: int
    layer_elements: int  #: parameters of the largest layer
    outer_elements: int  #: parameters outside the layers: embeddings, head, last norm
    lora_elements: int  #: inputs plus outputs of all linear maps in the layers: LoRA trains r times as many parameters


class Peaks(NamedTuple):
    """Bytes at the peak of forward and backward, beside what is there between steps."""

    streamed: int  #: each parameter's gradient is moved away as it is complete: one process
    kept: int  #: gradients stay until the backward ends: several ranks


@dataclass(frozen=True)
class Setup:
    """A fine-tune whose memory and time are to be planned.

    Attributes:
        shape: of the model. All its parameters are trained.
        peaks: of a micro-batch of one objective. Losses are callables, so that only one objective's graph is in memory.
        objectives: K.
        precision: one of `PRECISIONS`.
        optimizer: one of `OPTIMIZERS`.
        engine: one of `ENGINES`.
        ranks: n; 1 with engine "none".
        resident_reference: whether the reference model stays on the device, in the weights' dtype.
        sketch: d, numbers that a sketched row keeps.
        refresh_every: T, steps from one solve to the next in modes that keep weights in between.

    Raises:
        InputError: a number is out of range.
    """

    shape: Shape
    peaks: Peaks
    objectives: int
    precision: str = "autocast"
    optimizer: str = "adamw"
    engine: str = "none"
    ranks: int = 1
    resident_reference: bool = False
    sketch: int = 262_144
    refresh_every: int = 10

    def __post_init__(self) -> None:
        for option, value in (
            ("--objectives", self.objectives),
            ("--ranks", self.ranks),
            ("--sketch", self.sketch),
            ("--refresh-every", self.refresh_every),
        ):
            if value < 1:
                raise InputError(f"{option} {value}: give a whole number of at least 1")
        if (self.engine == "none") != (self.ranks == 1):
            raise InputError(
                f"--engine {self.engine} with --ranks {self.ranks}: one rank goes with engine none, several with "
                f"{', '.join(ENGINES[1:])}"
            )
        if self.precision == "mixed" and self.engine != "fsdp2":
            raise InputError(
                f"--precision mixed with --engine {self.engine}: it is a policy of FSDP2; use --engine fsdp2, or "
                "--precision autocast"
            )

    @property
    def size(self) -> int:
        """g: bytes of a weight, and of its gradient."""
        return PRECISIONS[self.precision]

    @property
    def whole(self) -> int:
        """Bytes of a weight, and of its gradient, once FSDP2 has gathered it."""
        return 2 if self.precision == "mixed" else self.size

    @property
    def held(self) -> int:
        """N: trainable elements that a rank holds."""
        return -(-self.shape.elements // self.ranks) if self.engine == "fsdp2" else self.shape.elements


# ---- modes -----------------------------------------------------------------------------------------------------------

Rows = Literal["one", "all", "sketch"]
EXACTNESS = ("exact", "rounded", "approximate")


@dataclass(frozen=True)
class Mode:
    """A way to hold K gradients.

    Attributes:
        name: what the table calls it.
        keywords: of `MultiObjectiveOptimizer`, as one writes them.
        rows: "one", the weighted sum, with constant weights; "all", K; "sketch", K short ones.
        half: rows are bf16, and the direction is not.
        on_host: rows lie in the host's memory, pinned.
        refreshes: weights are solved for at every T-th step, and the K rows freed in between.
        exactness: of the direction, one of `EXACTNESS`: as the weighting says; from rows rounded to bf16; or with
            weights that are older, or from sketches.
    """

    name: str
    keywords: dict[str, str] = field(default_factory=dict)
    rows: Rows = "all"
    half: bool = False
    on_host: bool = False
    refreshes: bool = False
    exactness: str = "exact"


def modes(setup: Setup) -> list[Mode]:
    """The modes that make a difference in a setup: plain training, then the exact mode, then those that need less."""
    half = {"row_dtype": "torch.bfloat16"}
    host = {"host_rows": "True"}
    often = {"refresh_every": str(setup.refresh_every)}
    sketch = {"sketch": str(setup.sketch)}
    found = [
        Mode("uniform", {"weighting": '"uniform"'}, rows="one"),
        Mode("exact"),
        Mode("bf16 rows", half, half=True, exactness="rounded"),
        Mode("host rows", host, on_host=True),
        Mode("bf16 host rows", half | host, half=True, on_host=True, exactness="rounded"),
        Mode("sketch", sketch, rows="sketch", exactness="approximate"),
        Mode("refresh", often, refreshes=True, exactness="approximate"),
        Mode("host rows, refresh", host | often, on_host=True, refreshes=True, exactness="approximate"),
        Mode("sketch, refresh", sketch | often, rows="sketch", refreshes=True, exactness="approximate"),
    ]
    return [mode for mode in found if not (mode.half and setup.size == 2)]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the peak of a step: on the device, and in the host's memory."""

    weights: int
    optimizer: int
    rows: int
    autograd: int
    engine: int
    reference: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        """All of it that lies on the device."""
        everything: int = sum(getattr(self, item.name) for item in fields(self))
        return everything - self.host


def memory(mode: Mode, setup: Setup) -> Memory:
    """The memory that a rank needs.

    Args:
        mode: one of `modes`.
        setup: the fine-tune.
    """
    shape, size, held = setup.shape, setup.size, setup.held
    weights = held * size + shape.buffer_bytes
    device_rows, host_rows = _rows(mode, setup)
    autograd = 0 if setup.engine == "none" else setup.peaks.kept - setup.peaks.streamed
    engine = 0
    if setup.engine.startswith("ddp"):
        engine = held * size
    elif setup.engine == "fsdp2":
        autograd = math.ceil(autograd / setup.ranks) * size // setup.whole  # shards of gradients are as wide as weights
        # Whole at the same time: what is outside the layers, and two layers, of which the next is gathered while one
        # runs. At the end of a layer's backward also its gradients, twice: as autograd made them, and in the buffer
        # from which they are scattered; or the latter for what is outside the layers, if that is more.
        engine = setup.whole * (shape.outer_elements + 2 * shape.layer_elements)
        engine += max((setup.whole + size) * shape.layer_elements, size * shape.outer_elements)
    return Memory(
        weights=weights,
        optimizer=OPTIMIZERS[setup.optimizer] * held * size,
        rows=device_rows,
        autograd=autograd,
        engine=engine,
        reference=weights if setup.resident_reference else 0,
        activations=setup.peaks.streamed,
        host=host_rows,
    )


def _rows(mode: Mode, setup: Setup) -> tuple[int, int]:
    """Bytes of rows and direction, on the device and on the host."""
    direction = setup.held * setup.size
    if mode.rows == "one":
        return direction, 0
    if mode.rows == "sketch":
        return direction + setup.objectives * setup.sketch * 4, 0
    rows = setup.objectives * setup.held * row_size(mode, setup)
    shared_out = setup.engine == "ddp-shard-rows"
    if shared_out:
        rows = math.ceil(rows / setup.ranks)
    if mode.on_host:
        return direction, rows
    # The first row serves as direction, but where it has another dtype, or is a piece.
    return rows + (direction if mode.half or shared_out else 0), 0


def row_size(mode: Mode, setup: Setup) -> int:
    """Bytes of an element of a row."""
    return 2 if mode.half else setup.size


def fsdp_ranks(mode: Mode, setup: Setup, limit: float) -> int | None:
    """The smallest power of two of FSDP2 ranks on which a mode fits.

    Args:
        mode: the mode.
        setup: the fine-tune, whose engine and ranks do not matter.
        limit: bytes that a rank may take.

    Returns:
        The number of ranks; None if it would be more than 4,096.
    """
    for ranks in (1 << i for i in range(1, 13)):
        if memory(mode, replace(setup, engine="fsdp2", ranks=ranks)).device <= limit:
            return ranks
    return None


def lora_bytes(setup: Setup, lora_rank: int, activations: int) -> int:
    """Bytes that an exact step of LoRA takes in a single process, over a frozen bf16 model.

    Args:
        setup: the fine-tune.
        lora_rank: rank of LoRA's matrices.
        activations: bytes of activations when all parameters are trained in bf16, which is an upper bound.
    """
    trained = lora_rank * setup.shape.lora_elements
    adapters = trained * 4 * (1 + OPTIMIZERS[setup.optimizer] + setup.objectives)
    return setup.shape.elements * 2 + setup.shape.buffer_bytes + adapters + activations
