"""What is logged per objective, summed on the device until somebody asks. Knows numbers and names; no trainer.

Adding costs no synchronisation; `values` costs one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mogeo.report import StepReport

PER_PAIR = ("loss", "rewards/accuracies", "rewards/margins")
"""Means over the labelled pairs of an objective, logged as f"{name}/{objective}"."""


class Tally:
    """Means since the last `reset`: over pairs, and over steps.

    Args:
        objectives: names, in order.
        device: of what will be added.
    """

    def __init__(self, objectives: Sequence[str], device: torch.device) -> None:
        self.objectives = tuple(objectives)
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        # The last entry of each counts: pairs of an objective, and steps in which a number existed.
        self._pairs = torch.zeros(len(self.objectives), len(PER_PAIR) + 1, dtype=torch.float64, device=self.device)
        self._own_pairs = torch.zeros_like(self._pairs)  # this rank's, not shared yet
        self._steps: dict[str, Tensor] = {}

    def add_pairs(self, index: int, count: int, means: Sequence[Tensor]) -> None:
        """Add means (scalars, in the order of `PER_PAIR`) over `count` pairs of the objective at `index`, of this rank.

        They count once `share` has been called.
        """
        row = torch.stack([*(mean.detach().double() for mean in means), torch.ones_like(means[0], dtype=torch.float64)])
        self._own_pairs[index] += row * count

    def share(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take in the pairs of all ranks. Every rank calls this."""
        self._pairs += sum_over_ranks(self._own_pairs)
        self._own_pairs = torch.zeros_like(self._pairs)

    def add_report(self, report: StepReport, scale: Tensor | None = None) -> None:
        """Add what one step decided. Objectives that the step did without count in no mean but that of their weight.

        Args:
            report: of the step.
            scale: what the losses were multiplied by before their backward, by a `GradScaler`.
        """
        self._add_step("loss", report.losses)  # what was descended; it takes the place of the mean over pairs
        self._add_step("weights", report.weights)
        norms, cosines, alignment = report.grad_norms, report.cosines, report.alignment
        if norms is None or cosines is None or alignment is None:
            return
        if scale is not None:
            norms = norms / scale
        self._add_step("grad_norm", norms.masked_fill(report.absent, torch.nan))
        self._add_step("alignment", alignment)
        self._add_step("cosine", cosines)

    def _add_step(self, name: str, values: Tensor) -> None:
        known = values.isfinite()
        both = torch.stack([values.masked_fill(~known, 0.0), known.to(torch.float64)])
        self._steps[name] = self._steps[name] + both if name in self._steps else both

    def values(self) -> dict[str, float]:
        """Everything that was added, by the name it is logged under. Waits for the device."""
        named: dict[str, float] = {}
        for objective, (*sums, count) in zip(self.objectives, self._pairs.tolist(), strict=True):
            if count:
                named.update({f"{name}/{objective}": total / count for name, total in zip(PER_PAIR, sums, strict=True)})
        for name, both in self._steps.items():
            sums, counts = both.tolist()
            for i, objective in enumerate(self.objectives):
                if name == "cosine":
                    for j, other in enumerate(self.objectives[:i]):
                        if counts[i][j]:
                            named[f"cosine/{other}/{objective}"] = sums[i][j] / counts[i][j]
                elif counts[i]:
                    named[f"{name}/{objective}"] = sums[i] / counts[i]
        return named
