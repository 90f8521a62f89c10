"""`data.json` in the folder of a run of `mogeo align`: its data, how it was split, and the prompts it was trained on.

`mogeo evaluate` reads it, so as to judge on prompts that were held out only. Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mogeo.dpo.data import Row, same_prompt
from mogeo.errors import InputError

_FILE = "data.json"


@dataclass(frozen=True)
class DataOrigin:
    """The data of a run, and how it was split.

    Attributes:
        data: hub name, or absolute path of a file.
        held_out: share or number of held-out prompts, as in `mogeo.dpo.data.split_rows`.
        seed: of the split.
        objectives: names of the run's objectives.
        trained: hashes of the training prompts.
    """

    data: str
    held_out: float | int
    seed: int
    objectives: tuple[str, ...]
    trained: frozenset[str]

    @classmethod
    def of(
        cls, data: str, held_out: float | int, seed: int, objectives: Sequence[str], train_rows: Iterable[Row]
    ) -> DataOrigin:
        """Note down what a run was given.

        Args:
            data: hub name or path.
            held_out: as in `split_rows`.
            seed: of the split.
            objectives: names.
            train_rows: the training rows.
        """
        place = str(Path(data).resolve()) if Path(data).is_file() else data
        trained = frozenset(_hash(row["instruction"]) for row in train_rows)
        return cls(place, held_out, seed, tuple(objectives), trained)

    def trained_on(self, prompt: str) -> bool:
        """Whether the run was trained on this prompt, or on one that differs from it in white space only."""
        return _hash(prompt) in self.trained

    def write(self, folder: Path) -> None:
        """Write data.json."""
        record = {**asdict(self), "trained": sorted(self.trained)}
        (folder / _FILE).write_text(json.dumps(record) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> DataOrigin:
        """Read data.json.

        Raises:
            InputError: it is missing or damaged.
        """
        try:
            record = json.loads((folder / _FILE).read_text("utf-8"))
            names, trained = tuple(record["objectives"]), frozenset(record["trained"])
            return cls(record["data"], record["held_out"], record["seed"], names, trained)
        except FileNotFoundError:
            cure = f"to judge it all the same, name its model: {folder / 'model'}, with --data, --held-out and --seed"
            raise InputError(f"run '{folder}' has no {_FILE}, which says what it was trained on; {cure}") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"'{folder / _FILE}' cannot be read ({error})") from None


def _hash(prompt: str) -> str:
    # 64 bits: among a million prompts, two collide with probability 3e-8, and one would then wrongly be left out.
    return hashlib.sha256(same_prompt(prompt).encode("utf-8", "surrogatepass")).hexdigest()[:16]
