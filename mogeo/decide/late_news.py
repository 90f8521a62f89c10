"""What the host is told of a step that the device decided: read once it has arrived, never waited for.

Knows tensors, events and decisions. A copy to pinned memory is asynchronous; the event behind it tells whether it is
there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogeo.decide.rules import Decision, Rules
from mogeo.geometry.exact_min_norm import Status
from mogeo.user_warnings import warn_user
from mogeo.weightings import bad_weights, require_positive_losses


class Letter(NamedTuple):
    """Numbers on their way, and whatever the receiver needs beside them."""

    host: list[Tensor]
    event: torch.cuda.Event | None
    enclosed: Any


class Mailbox:
    """Letters from a device to the host, in the order they were sent."""

    def __init__(self) -> None:
        self._letters: deque[Letter] = deque()

    def post(self, tensors: list[Tensor], enclosed: Any = None) -> None:
        """Send small tensors. Not while a CUDA graph is captured: its replays have no host to read them."""
        event = None
        if tensors[0].is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for target, source in zip(host, tensors, strict=True):
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(tensors[0].device))
        else:
            host = [t.clone() for t in tensors]
        self._letters.append(Letter(host, event, enclosed))

    def arrived(self) -> Iterator[tuple[list[list[Any]], Any]]:
        """Take out the letters that are here: their numbers as lists, and what was enclosed."""
        while self._letters:
            event = self._letters[0].event
            if event is not None and (
                torch.cuda.is_current_stream_capturing() or not event.query()  # type: ignore[no-untyped-call]
            ):
                return
            letter = self._letters.popleft()
            yield [host.numpy().tolist() for host in letter.host], letter.enclosed


class News:
    """What the user must hear of a step: at once where the host decided it, else once the device's news has arrived.

    Attributes:
        mailbox: what the device has sent.
        warned: whether the user has been warned of an objective that was left out. Once is enough.
    """

    def __init__(self, *, warned: bool = False) -> None:
        self.mailbox = Mailbox()
        self.warned = warned

    def tell(self, decided: Decision, rules: Rules, *, on_device: bool) -> None:
        """Warn of objectives that a step left out, or have the news sent."""
        if on_device:
            verdict = decided.status if decided.bad_weights is None else decided.bad_weights
            numbers = [decided.nonfinite] if verdict is None else [decided.nonfinite, verdict.reshape(1)]
            if verdict is not None or not self.warned:
                mean = decided.mean if rules.follow_means else None
                seen = (decided.losses, decided.gram) if mean is None else (mean.losses, mean.seen)
                self.mailbox.post(numbers, (rules, *seen))
        elif not self.warned and rules.nonfinite == "skip":
            self._warn(decided.nonfinite.tolist(), rules)

    def read(self) -> None:
        """Warn, or raise, over what the device decided in earlier steps.

        Raises:
            ValueError: a loss ≤ 0 under a weighting that divides by it.
            RuntimeError: the weighting did not return one finite weight per objective.
        """
        for (nonfinite, *verdict), (rules, losses, gram) in self.mailbox.arrived():
            if not self.warned and rules.nonfinite == "skip":
                self._warn(nonfinite, rules)
            bad = verdict == [[True]]
            if verdict == [[Status.NONPOSITIVE_LOSS]] or (bad and rules.weighting.needs_positive_losses):
                require_positive_losses(gram, losses, rules.objectives, rules.weighting)
            if bad:
                raise bad_weights(rules.weighting, "values that are not finite", len(rules.objectives))

    def _warn(self, nonfinite: list[bool], rules: Rules) -> None:
        if any(nonfinite):
            self.warned = True
            left_out = ", ".join(repr(name) for name, bad in zip(rules.objectives, nonfinite, strict=True) if bad)
            warn_user(
                f"left objective {left_out} out of a step: its loss or gradient is not finite. Further cases are only "
                "counted, in report.nonfinite_counts. With a GradScaler use nonfinite='propagate'",
                RuntimeWarning,
            )
