"""What keeps memory, time or directions in bounds does so on several ranks as on one: the same steps, the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import engines
from tests.distributed.engines import alone, train
from tests.distributed.runner import run
from tests.distributed.test_replicas import unsynced
from tests.distributed.test_same_answer import TOLERANCE, assert_all_same, assert_same, train_all
from tests.profiles import slow_but

#: A sketch much longer than the gradient loses nothing.
MODES: tuple[dict[str, Any], ...] = (
    {"guarantee_descent": True},
    {"refresh_every": 2},
    {"refresh_every": 3},
    {"preference": (1.0, 2.0, 4.0), "min_weight": 0.05, "smoothing": 0.5},
    {"sketch": 1 << 16},
    {"sketch": 1 << 16, "refresh_every": 2, "guarantee_descent": True},
    {"host_rows": True},
)

SPREADS = {"ddp": engines.ddp, "no_sync": unsynced, "fsdp": engines.fsdp}


@pytest.mark.parametrize("engine", slow_but(SPREADS, "fsdp"))
def test_every_mode(engine: str) -> None:
    cases = [(torch.float64, "mgda-decoupled", {"max_grad_norm": 0.3, **mode}) for mode in MODES]
    assert_all_same(run(2, train_all, SPREADS[engine], cases), cases)


def test_shared_out_rows_refresh_as_well() -> None:
    cases = [
        (torch.float64, "mgda-decoupled", {"shard_rows": True, "max_grad_norm": 0.3, **mode})
        for mode in ({"refresh_every": 2}, {"guarantee_descent": True})
    ]
    assert_all_same(run(2, train_all, unsynced, cases), cases)


@pytest.mark.parametrize("engine", slow_but(SPREADS, "fsdp"))
def test_narrow_rows_are_right_to_their_rounding(engine: str) -> None:
    """Averages are rounded once more: the same on every rank, and near those of one process."""
    options = [{"row_dtype": torch.bfloat16, "shard_rows": shard_rows} for shard_rows in (False, True)]
    cases = [(torch.float32, "mgda", each) for each in options]
    expected = train(alone, torch.float32, "mgda", row_dtype=torch.bfloat16)
    for of_ranks in zip(*run(2, train_all, SPREADS[engine], cases), strict=True):
        for result in of_ranks:
            assert torch.equal(result["weights"], of_ranks[0]["weights"])
            torch.testing.assert_close(result["weights"], expected["weights"], rtol=0, atol=0.05)
            for name, parameter in of_ranks[0]["parameters"].items():
                assert torch.equal(result["parameters"][name], parameter)


def test_loss_tensors_are_summed_in_between() -> None:
    cases = [(torch.float64, "mgda-decoupled", {"form": "tensors", "refresh_every": 2})]
    results = run(2, train_all, engines.ddp, cases)
    expected = train(alone, torch.float64, "mgda-decoupled", "tensors", refresh_every=2)
    assert_same([result for (result,) in results], expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("engine", slow_but(SPREADS, "fsdp"))
def test_an_objective_of_weight_zero(engine: str) -> None:
    """FSDP lets go of gathered parameters in the backward: without one, the next step would use the old ones."""
    cases = [(torch.float64, "linear(1,1,0)", {"form": form}) for form in ("callables", "tensors")]
    assert_all_same(run(2, train_all, SPREADS[engine], cases), cases)
