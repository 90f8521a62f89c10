"""Settings of an alignment run and their checks. Must not import torch: the command line reads its defaults here."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mogeo.errors import InputError

LOSSES = ("sigmoid", "ipo", "hinge")
SCHEDULES = ("constant", "linear", "cosine")
AUTOCASTS = ("bf16", "none")
PROMPT_FORMATS = ("chat", "plain")
ROW_DTYPES = ("bf16",)

OPTIMIZER_OPTIONS = (
    "guarantee_descent", "preference", "min_weight", "smoothing",
    "refresh_every", "release_rows", "row_dtype", "host_rows", "sketch",
)  # fmt: skip
"""Settings that `mogeo.MultiObjectiveOptimizer` takes under the same names, and that one objective does not need."""


@dataclass(frozen=True)
class AlignConfig:
    """How `align` trains. Defaults: the setting of the MGDA-Decoupled paper (arXiv 2604.20685) where it gives one."""

    weighting: str | Callable[..., Any] = "mgda-decoupled"
    """A name that `mogeo.weightings.resolve` knows, or a callable (gram, losses) → weights."""
    guarantee_descent: bool = False
    """Take the direction nearest to the weighting's that hurts no objective, to first order."""
    preference: dict[str, float] | None = field(default=None, hash=False)
    """Which objectives should gain more: objective → positive number, of which only the ratios count; None: none."""
    min_weight: float = 0.0
    """Floor under each coefficient, ≥ 0 and below 1/K for K objectives; coefficients sum to 1."""
    smoothing: float = 0.0
    """Share of the past in the weights, averaged over the steps that solve, in [0, 1)."""
    refresh_every: int = 1
    """Steps from one solve for the weights to the next; in between they are held."""
    release_rows: bool = False
    """Give the memory of gradient rows back after each solve."""
    row_dtype: str | None = None
    """Keep gradient rows in this precision, one of `ROW_DTYPES`; None: the parameters'."""
    host_rows: bool = False
    """Keep gradient rows in the host's memory."""
    sketch: int | None = None
    """Numbers of a random projection kept per objective in place of a row; each loss of a step that solves is then
    evaluated and differentiated twice. None: rows."""
    beta: float = 0.5
    """Strength of the pull towards the reference model; > 0."""
    loss: str = "sigmoid"
    """One of `LOSSES`; the formulas are in `mogeo.dpo.losses.dpo_loss`."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong, in [0, 0.5); sigmoid loss only."""
    modpo_weights: tuple[float, ...] | None = None
    """MODPO's w, in the order of the objectives, > 0 and with a sum of 1; None: DPO. See `mogeo.dpo.modpo`."""
    learning_rate: float = 5e-7
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    weight_decay: float = 0.0
    warmup_steps: int = 10
    """Steps of linear warm-up from 0 to the learning rate."""
    schedule: str = "linear"
    """What the learning rate does after warm-up: one of `SCHEDULES`; linear and cosine end at 0."""
    max_steps: int | None = None
    """Optimizer steps; None: as many as `epochs` take."""
    epochs: float = 1.0
    """Passes over the objective with the most pairs (smaller ones are seen more often); ignored with `max_steps`."""
    pairs_per_objective: int = 8
    """Pairs of each objective in a step, over all ranks."""
    micro_batch: int | None = None
    """Pairs that go through the model at once (memory); None: all of a rank's. The result differs by rounding only."""
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
    """A torch device; auto: CUDA where there is one, else the CPU. Of several ranks, each takes a GPU of its own."""
    fsdp: bool = False
    """Of several ranks, let each hold a shard of the model (FSDP2) instead of all of it (DDP)."""
    max_length: int | None = None
    """Tokens of prompt and completion together; longer pairs are left out. None: the model's context."""
    prompt_format: str = "chat"
    """chat: the tokenizer's chat template; plain: prompt, completion, end-of-sequence token."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be."""
        _require(self.beta > 0 and math.isfinite(self.beta), "beta", self.beta, "a positive number")
        _require(self.loss in LOSSES, "loss", self.loss, f"one of {', '.join(LOSSES)}")
        _require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "in [0, 0.5)")
        if self.label_smoothing > 0 and self.loss != "sigmoid":
            raise InputError(f"label_smoothing is defined for the sigmoid loss only, not for loss '{self.loss}'")
        if (weights := self.modpo_weights) is not None:
            holds = all(w > 0 for w in weights) and math.isclose(sum(weights), 1)
            _require(holds, "modpo_weights", weights, "positive, with a sum of 1")
            if self.loss != "sigmoid" or self.label_smoothing > 0:
                raise InputError("MODPO is defined for the sigmoid loss without label smoothing: drop one of them")
        self._check_optimizer_options()
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
        clip = self.max_grad_norm
        _require(clip is None or clip > 0, "max_grad_norm", clip, "a positive number")
        for name in ("eval_every", "save_every"):
            every = getattr(self, name)
            _require(every is None or every >= 0, name, every, "at least 0")
        _require(self.autocast in AUTOCASTS, "autocast", self.autocast, f"one of {', '.join(AUTOCASTS)}")
        _require(self.max_length is None or self.max_length > 1, "max_length", self.max_length, "at least 2")
        formats = ", ".join(PROMPT_FORMATS)
        _require(self.prompt_format in PROMPT_FORMATS, "prompt_format", self.prompt_format, f"one of {formats}")

    def _check_optimizer_options(self) -> None:
        for name, p in (self.preference or {}).items():
            _require(p > 0 and math.isfinite(p), f"preference of '{name}'", p, "a positive number")
        _require(0 <= self.min_weight < 1, "min_weight", self.min_weight, "in [0, 1/K) for K objectives")
        _require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")
        _require(self.refresh_every >= 1, "refresh_every", self.refresh_every, "at least 1")
        known = self.row_dtype is None or self.row_dtype in ROW_DTYPES
        _require(known, "row_dtype", self.row_dtype, f"one of {', '.join(ROW_DTYPES)}, or None")
        known = self.sketch is None or 1 <= self.sketch <= 1 << 30
        _require(known, "sketch", self.sketch, "1 to 2**30 numbers")
        for name in ("row_dtype", "host_rows"):
            if self.sketch is not None and getattr(self, name):
                raise InputError(f"sketch keeps no gradient rows, and {name} is about these: leave out one of them")

    def of_one_objective(self) -> AlignConfig:
        """The same settings for a run that has nothing to balance: plain training."""
        default = AlignConfig()
        return dataclasses.replace(
            self, weighting="uniform", **{name: getattr(default, name) for name in OPTIMIZER_OPTIONS}
        )

    def check_ranks(self, size: int) -> None:
        """Raise InputError if this many ranks cannot share a step out."""
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
        """Optimizer steps of the run, given the number of pairs of the objective that has the most."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * most_pairs / self.pairs_per_objective))

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 1) of `steps`: a function of the step, so there is nothing to save."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        # The step after the last would have rate 0: the last one still counts.
        left = (steps + 1 - step) / (steps + 1 - min(self.warmup_steps, steps))
        return self.learning_rate * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; a callable weighting becomes its repr."""
        values = dataclasses.asdict(self)
        values["betas"] = list(self.betas)
        if not isinstance(self.weighting, str):
            values["weighting"] = repr(self.weighting)
        return values


def share_or_number(text: str) -> float | int:
    """argparse type: "200" is a number of prompts, "0.1" a share of them."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def named_number(text: str) -> tuple[str, float]:
    """argparse type: "honesty=2" is a name and its number."""
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
