"""N processes give what one process gives on the same global batch, and the same bits on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import engines
from tests.distributed.engines import ENGINES, alone, train
from tests.distributed.runner import run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def assert_same(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])  # bit for bit
        torch.testing.assert_close(result["weights"], expected["weights"], rtol=0, atol=tolerance)
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=10 * tolerance, atol=tolerance)
        for name, parameter in expected["parameters"].items():
            torch.testing.assert_close(result["parameters"][name], parameter, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(engine: str, dtype: torch.dtype) -> None:
    ranks, spread = ENGINES[engine]
    expected = train(alone, dtype, "mgda-decoupled", max_grad_norm=0.3)
    results = run(ranks, case, spread, dtype, "mgda-decoupled", {"max_grad_norm": 0.3})
    assert_same(results, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["tensors", "callables"])
@pytest.mark.parametrize("weighting", ["uniform", "group-dro(0.5)", "mgda-normalized"])
def test_every_weighting_in_every_form(weighting: str, form: str) -> None:
    """Under DDP, K forwards and then K backwards leave all but the first gradient unreduced: mogeo reduces them."""
    expected = train(alone, torch.float64, weighting)
    assert_same(run(2, case, engines.ddp, torch.float64, weighting, {"form": form}), expected, 1e-12)


def case(spread: Any, dtype: torch.dtype, weighting: str, options: dict[str, Any]) -> dict[str, Any]:
    return train(spread, dtype, weighting, **options)


@pytest.mark.parametrize("shape", ["fsdp", "ddp"])
def test_bf16_computation(shape: str) -> None:
    """Mixed precision rounds per rank: the answer is that of one process to what bf16 keeps."""
    expected = train(alone, torch.float32, "mgda-decoupled")
    results = run(
        2, case, engines.fsdp_bf16 if shape == "fsdp" else engines.ddp_bf16, torch.float32, "mgda-decoupled", {}
    )
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])
        torch.testing.assert_close(result["weights"], expected["weights"], rtol=0, atol=0.05)
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=0.02, atol=0.02)
