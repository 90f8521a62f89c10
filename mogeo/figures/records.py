"""What the records of a run's `metrics.jsonl` say, as numbers. Draws nothing.

Records of earlier versions lack entries that later ones have. A missing entry, null (NaN and infinity in JSON) and a
number that is not finite all mean the same here: not known, NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

StepRecord = Mapping[str, Any]
"""One line of metrics.jsonl; its entry `kind` is "train" or "eval"."""

Floats = NDArray[np.float64]

ROUNDING = 1e-5
"""An alignment this far below zero is taken for rounding, as by `mogeo.StepReport.hurt`."""


def of_training(records: Sequence[StepRecord], field: str = "step") -> list[StepRecord]:
    """The records of training steps that say something of `field`."""
    return [record for record in records if record["kind"] == "train" and record.get(field) is not None]


def column(records: Sequence[StepRecord], field: str, name: str) -> Floats:
    """`record[field][name]` of each record, fp64 [len(records)]."""
    return _floats([(record.get(field) or {}).get(name) for record in records])


def lower_bounds(records: Sequence[StepRecord], name: str) -> Floats:
    """The least that an objective's noise scale can be, of each record, fp64 [len(records)]."""
    return _floats([((record.get("noise_scale_interval") or {}).get(name) or [None])[0] for record in records])


def cosines(records: Sequence[StepRecord], field: str) -> Floats:
    """`record[field]` of records that have it, the cosines of K gradients, fp64 [len(records), K, K].

    Estimates from few steps may lie beyond what a cosine can be: ±1 then.
    """
    return np.clip(_floats([record[field] for record in records]), -1, 1)


def of_mean_gradients(records: Sequence[StepRecord]) -> bool:
    """Whether a run's alignments are those of mean gradients, which tracking estimates, at every step that has any.

    Else they are of each step's mini-batch: the direction is made of the same noisy gradients that it is held against,
    so that they are larger than they are in expectation.
    """
    told = {record.get("alignment_of") for record in of_training(records, "alignment")}
    return told == {"mean gradients"}


def share_hurt(records: Sequence[StepRecord], name: str, errors: float = 0.0) -> float:
    """The share of a run's steps that hurt an objective: whose alignment with it is negative by more than rounding.

    Steps whose alignment is not known are left out; NaN if there are no others.

    Args:
        records: of a run.
        name: of the objective.
        errors: count only steps whose alignment is negative by more than so many of its standard errors.
    """
    return mean(_hurts(of_training(records), name, errors))


def share_hurt_so_far(records: Sequence[StepRecord], name: str, errors: float = 0.0) -> Floats:
    """For each of these records, `share_hurt` of it and all before it, fp64 [len(records)]."""
    found = _hurts(records, name, errors)
    known = np.cumsum(~np.isnan(found))
    return np.where(known > 0, np.nancumsum(found) / np.maximum(known, 1), np.nan)


def running_mean(values: Floats) -> Floats:
    """Mean over `window` values around each value; NaNs are left out of it."""
    half = window(len(values)) // 2
    return np.array([mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def window(count: int) -> int:
    """Over how many of `count` values a running mean is taken: a twentieth, and an odd number."""
    return 2 * (count // 40) + 1


def mean(values: Floats) -> float:
    """Mean of the values that are not NaN. NaN if there is none (np.nanmean would also warn)."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def quantile(rows: Floats, q: float) -> Floats:
    """Quantile of each column, NaNs left out. NaN for a column of NaNs (np.nanquantile would also warn)."""
    return np.array([np.nan if np.isnan(c).all() else np.nanquantile(c, q) for c in rows.T])


def _hurts(records: Sequence[StepRecord], name: str, errors: float) -> Floats:
    """1.0 where an objective is hurt, 0.0 where it is not, NaN where its alignment is not known."""
    alignment = column(records, "alignment", name)
    # Where an error is not known, nothing is certain: NaN is not below zero.
    upper = alignment + errors * column(records, "alignment_error", name) if errors else alignment
    return np.where(np.isnan(alignment), np.nan, upper < -ROUNDING)


def _floats(values: Any) -> Floats:
    """An array in which None and what is not finite is NaN."""
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)
