"""Metrics per objective, summed up on the device until they are logged. Knows numbers and names; no trainer.

To add a number, the host does not have to wait for the device; only `values` waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mogeo.report import StepReport

PER_PAIR = ("loss", "rewards/accuracies", "rewards/margins")
"""Names of the means over an objective's labelled pairs, which are logged as f"{name}/{objective}"."""

OF_PAIRS = ("cosine", "mean_cosine")
"""Names of the numbers of two objectives, which are logged as f"{name}/{one}/{other}"."""


class Tally:
    """Means over pairs, and means over steps, since the last `reset`.

    Args:
        objectives: names, in order.
        device: of the numbers that will be added.
    """

    def __init__(self, objectives: Sequence[str], device: torch.device) -> None:
        self.objectives = tuple(objectives)
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added."""
        # Sums; the last column counts the pairs.
        self._pairs = torch.zeros(len(self.objectives), len(PER_PAIR) + 1, dtype=torch.float64, device=self.device)
        self._own_pairs = torch.zeros_like(self._pairs)  # of this rank, until `share`
        self._steps: dict[str, Tensor] = {}

    def add_pairs(self, index: int, count: int, means: Sequence[Tensor]) -> None:
        """Add means over pairs of one objective, on this rank. They are part of `values` after the next `share`.

        Args:
            index: of the objective.
            count: number of pairs.
            means: scalars on the device, in the order of `PER_PAIR`.
        """
        row = torch.stack([*(mean.detach().double() for mean in means), torch.ones_like(means[0], dtype=torch.float64)])
        self._own_pairs[index] += row * count

    def share(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add up the pairs of all ranks. All ranks have to call this.

        Args:
            sum_over_ranks: sums a tensor over ranks.
        """
        self._pairs += sum_over_ranks(self._own_pairs)
        self._own_pairs = torch.zeros_like(self._pairs)

    def add_report(self, report: StepReport, scale: Tensor | None = None) -> None:
        """Add the numbers of one step.

        An objective without a finite loss and gradient in the step counts in the mean of weights only, and in what is
        said of mean gradients, which are known without it.

        Args:
            report: of the step.
            scale: the factor by which a `GradScaler` multiplied the losses before their backward; None: there was none.
        """
        self._add_step("loss", report.losses)  # logged under the same name as the mean over pairs, in place of it
        self._add_step("weights", report.weights)
        norms, alignment, hurt = report.grad_norms, report.alignment, report.hurt
        noise = report.noise_scale_interval
        if norms is not None:
            norms = norms if scale is None else norms / scale
            norms = norms.masked_fill(report.absent | report.nonfinite, torch.nan)
        self._add_step("grad_norm", norms)
        self._add_step("alignment", alignment)
        if alignment is not None and hurt is not None:
            self._add_step("hurt", hurt.to(alignment.dtype).masked_fill(alignment.isnan(), torch.nan))
        self._add_step("cosine", report.cosines)
        self._add_step("mean_cosine", report.mean_cosines)
        self._add_step("noise_scale", report.noise_scale)
        self._add_step("noise_scale_at_least", None if noise is None else noise[:, 0])
        self._add_step("evidence", report.evidence)

    def _add_step(self, name: str, values: Tensor | None) -> None:
        """Add numbers of one step, if it has any; those that are not finite are left out of the mean."""
        if values is None:
            return
        known = values.isfinite()
        both = torch.stack([values.masked_fill(~known, 0.0), known.to(torch.float64)])
        self._steps[name] = self._steps[name] + both if name in self._steps else both

    def values(self) -> dict[str, float]:
        """All means, by the names under which they are logged. Waits for the device."""
        named: dict[str, float] = {}
        for objective, (*sums, count) in zip(self.objectives, self._pairs.tolist(), strict=True):
            if count:
                named.update({f"{name}/{objective}": total / count for name, total in zip(PER_PAIR, sums, strict=True)})
        for name, both in self._steps.items():
            sums, counts = both.tolist()
            for i, objective in enumerate(self.objectives):
                if name in OF_PAIRS:
                    for j, other in enumerate(self.objectives[:i]):
                        if counts[i][j]:
                            named[f"{name}/{other}/{objective}"] = sums[i][j] / counts[i][j]
                elif counts[i]:
                    named[f"{name}/{objective}"] = sums[i] / counts[i]
        return named
