"""Settings of an alignment run. Must not import torch: the command line reads its defaults here.

What a setting means, and which values it can have by itself, is said here. Whether the weighting, the loss and the
optimizer's options fit each other and the objectives is checked by those that know: `mogeo.dpo.train.check_settings`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mogeo.errors import InputError

SCHEDULES = ("constant", "linear", "cosine")
AUTOCASTS = ("bf16", "none")
PROMPT_FORMATS = ("chat", "plain")
ROW_DTYPES = ("bf16",)
WEIGH_BY = ("mean", "mini-batch")

OPTIMIZER_OPTIONS = (
    "guarantee_descent", "track", "weigh_by", "preference", "min_weight", "smoothing",
    "refresh_every", "row_dtype", "host_rows", "sketch",
)  # fmt: skip
"""Settings that are handed to `mogeo.MultiObjectiveOptimizer` under the same names. A single objective needs none."""


@dataclass(frozen=True)
class AlignConfig:
    """How `align` trains. The defaults are those of the MGDA-Decoupled paper (arXiv 2604.20685) where it gives any."""

    weighting: str | Callable[..., Any] = "mgda-decoupled"
    """A name that `mogeo.weightings.resolve` knows, or a callable (gram, losses) → weights."""
    guarantee_descent: bool = False
    """Take the direction nearest to the weighting's that hurts no objective, to first order."""
    track: float | str | None = None
    """Weights, guarantee and reports follow the mean gradients, estimated from averages over the steps, and not the
    gradients of one mini-batch: the averages' decay per step, above 0.5 and below 1, or "auto"; None: each step by
    itself."""
    weigh_by: str = "mean"
    """With `track`: "mean" gradients decide, or those of each "mini-batch" and only reports follow the mean ones."""
    preference: dict[str, float] | None = field(default=None, hash=False)
    """Which objectives should gain more: objective → positive number, of which only the ratios count; None: none."""
    min_weight: float = 0.0
    """The least that each objective's coefficient can be, ≥ 0 and below 1/K for K objectives; coefficients sum to 1."""
    smoothing: float = 0.0
    """Weights are averaged over the steps that solve for them; this is the share of the past, in [0, 1)."""
    refresh_every: int = 1
    """The weights are solved for at every so many steps, and kept in between."""
    row_dtype: str | None = None
    """Keep gradient rows in this precision, one of `ROW_DTYPES`; None: the parameters'."""
    host_rows: bool = False
    """Keep gradient rows in the host's memory."""
    sketch: int | None = None
    """Numbers of a random projection kept per objective in place of a row; each loss of a step that solves is then
    evaluated and differentiated twice. None: rows."""
    beta: float = 0.5
    """Strength of the pull towards the reference model, > 0."""
    loss: str | Callable[..., Any] = "sigmoid"
    """A name that `mogeo.dpo.loss_names.resolve_loss` knows, or a `mogeo.dpo.losses.PreferenceLoss`."""
    learning_rate: float = 5e-7
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    weight_decay: float = 0.0
    warmup_steps: int = 10
    """Steps of linear warm-up from 0 to the learning rate."""
    schedule: str = "linear"
    """What the learning rate does after warm-up, one of `SCHEDULES`; linear and cosine fall to 0."""
    max_steps: int | None = None
    """Optimizer steps; None: as many as `epochs` take."""
    epochs: float = 1.0
    """Passes over the pairs of the objective that has the most of them. Ignored with `max_steps`."""
    pairs_per_objective: int = 8
    """Pairs of each objective in a step, over all ranks."""
    micro_batch: int | None = None
    """Pairs that go through the model at once; None: all of a rank's. Fewer take less memory, and change the result by
    rounding only."""
    max_grad_norm: float | None = None
    """Clip the combined direction to this norm; None: no clipping."""
    seed: int = 0
    """For the order of the pairs and for dropout."""
    eval_every: int | None = None
    """Steps between evaluations on held-out pairs, besides the first and last; 0: none; None: a tenth of the run."""
    save_every: int | None = None
    """Steps between checkpoints; 0: none; None: a tenth of the run."""
    autocast: str = "bf16"
    """Precision of the forward pass; weights and optimizer state keep their own (fp32 in a model that we load)."""
    device: str = "auto"
    """A torch device; "auto" is CUDA where there is one, else the CPU. Of several ranks, each takes a GPU of its own.
    """
    fsdp: bool = False
    """With several ranks, each holds a shard of the model (FSDP2) instead of all of it (DDP)."""
    max_length: int | None = None
    """Most tokens of prompt and completion together; longer pairs are left out. None: the length of the context."""
    prompt_format: str = "chat"
    """chat: the tokenizer's chat template; plain: prompt, completion, end-of-sequence token."""

    def check(self) -> None:
        """Check each setting by itself.

        Raises:
            InputError: a setting is out of its range; the message names it.
        """
        _require(self.beta > 0 and math.isfinite(self.beta), "beta", self.beta, "a positive number")
        known = self.row_dtype is None or self.row_dtype in ROW_DTYPES
        _require(known, "row_dtype", self.row_dtype, f"one of {', '.join(ROW_DTYPES)}, or None")
        track = self.track
        known = track in (None, "auto") or (not isinstance(track, str) and 0.5 < track < 1)
        _require(known, "track", track, 'a number above 0.5 and below 1, "auto", or None')
        _require(self.weigh_by in WEIGH_BY, "weigh_by", self.weigh_by, f"one of {', '.join(WEIGH_BY)}")
        rate = self.learning_rate
        _require(rate > 0 and math.isfinite(rate), "learning_rate", rate, "a positive number")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _require(self.max_steps is None or self.max_steps > 0, "max_steps", self.max_steps, "at least 1")
        _require(self.epochs > 0 and math.isfinite(self.epochs), "epochs", self.epochs, "a positive number")
        _require(self.pairs_per_objective > 0, "pairs_per_objective", self.pairs_per_objective, "at least 1")
        _require(self.micro_batch is None or self.micro_batch > 0, "micro_batch", self.micro_batch, "at least 1")
        for name in ("eval_every", "save_every"):
            every = getattr(self, name)
            _require(every is None or every >= 0, name, every, "at least 0")
        _require(self.autocast in AUTOCASTS, "autocast", self.autocast, f"one of {', '.join(AUTOCASTS)}")
        _require(self.max_length is None or self.max_length > 1, "max_length", self.max_length, "at least 2")
        formats = ", ".join(PROMPT_FORMATS)
        _require(self.prompt_format in PROMPT_FORMATS, "prompt_format", self.prompt_format, f"one of {formats}")

    def of_one_objective(self) -> AlignConfig:
        """The same settings for plain DPO on a single objective, which has nothing to balance."""
        default = AlignConfig()
        plain = {name: getattr(default, name) for name in OPTIMIZER_OPTIONS}
        return dataclasses.replace(self, weighting="uniform", loss="sigmoid", **plain)

    def check_ranks(self, size: int) -> None:
        """Check that a step's pairs can be shared out over the ranks.

        Args:
            size: number of ranks, that is, of processes that train together.

        Raises:
            InputError: they cannot, or `fsdp` is set for a single process.
        """
        if size == 1 and self.fsdp:
            raise InputError(
                "fsdp shards the model over several ranks, and this process is alone: start it with torchrun "
                "--nproc-per-node N -m mogeo align ..., or leave fsdp out"
            )
        pairs = self.pairs_per_objective
        if pairs % size:
            below, above = pairs // size * size, -(-pairs // size) * size
            cure = f"{below} or {above}" if below else str(above)
            raise InputError(
                f"{pairs} pairs of each objective in a step cannot be shared out equally over {size} ranks: take "
                f"{cure} (--pairs), or another number of ranks"
            )

    def steps(self, most_pairs: int) -> int:
        """Number of optimizer steps of the run.

        Args:
            most_pairs: number of training pairs of the objective that has the most.
        """
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * most_pairs / self.pairs_per_objective))

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step. It depends on nothing but the step, so a checkpoint need not hold it.

        Args:
            step: number of the step, from 1.
            steps: number of steps of the run.
        """
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        # The rate falls to 0 one step after the last, so that the last step still changes something.
        left = (steps + 1 - step) / (steps + 1 - min(self.warmup_steps, steps))
        return self.learning_rate * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON. A weighting or loss that is an object becomes its repr."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name in ("weighting", "loss"):
            if not isinstance(values[name], str):
                values[name] = repr(values[name])
        return {**values, "betas": list(self.betas)}


def share_or_number(text: str) -> float | int:
    """An argparse type: "200" is a number of prompts, "0.1" a share of them."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def decay_or_auto(text: str) -> float | str:
    """An argparse type: "0.95" is a number, "auto" itself. Whether the number is a decay is for `AlignConfig.check`."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}': give a number above 0.5 and below 1, such as 0.95, or auto"
        ) from None


def named_number(text: str) -> tuple[str, float]:
    """An argparse type: "honesty=2" is a name and its number."""
    name, equals, number = text.rpartition("=")
    try:
        if not (name and equals):
            raise ValueError
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': give NAME=NUMBER, such as honesty=2") from None


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise InputError(f"{name} has to be {wanted}, got {value!r}")
