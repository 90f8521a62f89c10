"""The files of a run, and how a resumed run reads them. Knows no losses, batches or weightings.

run.json          settings and their fingerprints     metrics.jsonl     one record a line
reference.pt      the reference's log-probabilities   checkpoint.pt     model, optimizer, random state, step
model/            the aligned model and tokenizer, once the run is finished
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mogeo.errors import InputError

Record = dict[str, Any]


class RunFolder:
    """The output folder of one run.

    Args:
        path: of the folder; it is made if it does not exist.
        resume: whether the run in it goes on.

    Raises:
        InputError: see `check_output`.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        check_output(path, resume)
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.model = path / "model"
        self._metrics, self._checkpoint = path / "metrics.jsonl", path / "checkpoint.pt"
        self._reference = path / "reference.pt"

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write run.json."""
        _replace(self.path / "run.json", lambda at: at.write_text(json.dumps(settings, indent=2) + "\n", "utf-8"))

    def check_settings(self, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        """Check that a resumed run has the settings that it was started with.

        Args:
            settings: those of now.
            defaults: values of settings that run.json may lack, because an earlier version wrote it.

        Raises:
            InputError: they differ; the message lists the differences.
        """
        before = json.loads((self.path / "run.json").read_text("utf-8"))
        before = {**{k: v for k, v in (defaults or {}).items() if k in settings}, **before}
        settings = json.loads(json.dumps(settings))
        keys = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
        if keys:
            changes = "; ".join(f"{k} was {before.get(k)!r}, is {settings.get(k)!r}" for k in keys)
            raise InputError(
                f"'{self.path}' cannot be resumed with other settings ({changes}); restore them or start anew"
            )

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Add a record to metrics.jsonl. NaN and infinity become null, since JSON has neither."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def rewind(self, step: int) -> list[Record]:
        """Remove the records after a step, and a last line that a crash cut off; return the records that are left."""
        records = []
        for line in self._metrics.read_text("utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] <= step:
                records.append(record)
        text = "".join(json.dumps(record) + "\n" for record in records)
        _replace(self._metrics, lambda at: at.write_text(text, "utf-8"))
        return records

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the last checkpoint. If the process dies meanwhile, either the old or the new one is there, whole."""
        _replace(self._checkpoint, lambda at: torch.save(state, at))

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the last checkpoint; its tensors are on the CPU.

        Raises:
            InputError: it cannot be read.
        """
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises errors of pickle, zip or torch
            raise InputError(f"checkpoint '{self._checkpoint}' cannot be read ({error!s:.200})") from error
        return state

    def finish(self) -> None:
        """Remove the checkpoint, which is three times as large as the model and not needed when the run is over."""
        self._checkpoint.unlink(missing_ok=True)

    # ---- reference -------------------------------------------------------------------------------------------------

    def reference(self, fingerprint: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The reference's log-probabilities: read if they were written under this fingerprint, else computed and
        written.

        Args:
            fingerprint: of all that they depend on.
            compute: computes them.
        """
        cached = self.cached_reference(fingerprint)
        if cached is not None:
            return cached
        scores = compute()
        _replace(self._reference, lambda at: torch.save({"fingerprint": fingerprint, "scores": scores}, at))
        return scores

    def cached_reference(self, fingerprint: str) -> list[Tensor] | None:
        """The reference's log-probabilities if they were written under this fingerprint, else None."""
        if not self._reference.is_file():
            return None
        cached = torch.load(self._reference, weights_only=True)
        scores: list[Tensor] = cached["scores"]
        return scores if cached["fingerprint"] == fingerprint else None


def check_output(path: Path, resume: bool) -> None:
    """Check that a run can start, or go on, in a folder. Changes nothing.

    Args:
        path: of the folder; it need not exist.
        resume: whether a run is to go on.

    Raises:
        InputError: a new run would overwrite another one; or there is no run, or no checkpoint, to go on with.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"output '{path}' is a file; name a folder")
    begun, finished = (path / "run.json").is_file(), (path / "model").is_dir()
    begun = begun or (path / "metrics.jsonl").is_file()
    if not resume and (begun or finished):
        raise InputError(f"output '{path}' already holds a run; resume it (--resume) or name another folder")
    if resume and not begun:
        raise InputError(f"output '{path}' holds no run to resume; leave out --resume to start one")
    if resume and finished and not (path / "checkpoint.pt").is_file():
        raise InputError(f"the run in '{path}' is finished; there is nothing to resume")
    if resume and not (path / "checkpoint.pt").is_file():
        raise InputError(f"the run in '{path}' ended before its first checkpoint; delete the folder and start anew")


def fingerprint(*parts: nn.Module | Iterable[Any]) -> str:
    """A SHA-256 hash.

    Args:
        parts: a module counts by the names, types, shapes and values of its parameters; anything else by the repr of
            each of its items.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"\0part")
        if not isinstance(part, nn.Module):
            for item in part:  # one at a time, since the repr of a whole data set would take gigabytes
                digest.update(repr(item).encode() + b"\0")
            continue
        for name, parameter in part.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            # uint8, since numpy has no bfloat16
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file so that it is never half written: write another one beside it, and rename that.

    Args:
        path: of the file.
        write: writes the new file to the path that it is given.
    """
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """The same nested value, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
