"""Records as `mogeo align` writes them, with made-up numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("helpfulness", "honesty", "truthfulness")

Records = list[dict[str, Any]]


def history(
    objectives: tuple[str, ...], steps: int = 30, geometry: bool = True, tracked: bool = False, **changes: Any
) -> Records:
    """A run's records.

    Args:
        objectives: names.
        steps: number of training steps.
        geometry: whether there are gradients of single objectives, and so cosines and alignments.
        tracked: whether the run was tracked. Its first two steps can tell nothing of mean gradients.
        changes: entries of the training records that replace those made up.
    """
    rng = np.random.default_rng(0)
    k = len(objectives)
    by_name = lambda values: dict(zip(objectives, np.asarray(values).tolist(), strict=True))  # noqa: E731
    unknown = dict.fromkeys(objectives)
    records: Records = []
    for step in range(1, steps + 1):
        told = tracked and step > 2
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "loss": by_name(rng.uniform(0.5, 0.8, k)),
            "weight": by_name(rng.uniform(0, 1, k)),
            "cosines": rng.uniform(-1, 1, (k, k)).tolist() if geometry else None,
            "alignment": by_name(rng.uniform(-1, 1, k)) if geometry else None,
            "alignment_of": "mini-batch",
        }
        if tracked:
            scales = rng.uniform(10, 100, k)
            record |= {
                "alignment": record["alignment"] if told else unknown,
                "alignment_of": "mean gradients",
                "alignment_error": by_name(rng.uniform(0.05, 0.1, k)) if told else unknown,
                "mean_cosines": rng.uniform(-1, 1, (k, k)).tolist() if told else [[None] * k] * k,
                "noise_scale": by_name(scales) if told else unknown,
                "noise_scale_interval": by_name([[s / 2, 2 * s] for s in scales] if told else [[5.0, None]] * k),
                "evidence": by_name(np.full(k, float(told))),
            }
        records.append({**record, **changes})
    evaluations = [{"kind": "eval", "step": step, "accuracy": by_name(rng.uniform(0.4, 0.7, k))} for step in (0, steps)]
    return [evaluations[0], *records, evaluations[1]]


def before_tracking(records: Records) -> Records:
    """The same records as a version wrote them that could not track."""
    later = ("alignment_of", "alignment_error", "mean_cosines", "noise_scale", "noise_scale_interval", "evidence")
    return [{key: value for key, value in record.items() if key not in later} for record in records]
