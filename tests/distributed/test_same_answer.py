"""N processes give what one process gives on the same global batch, and the same bits on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import engines
from tests.distributed.engines import ENGINES, alone, train
from tests.distributed.runner import run
from tests.profiles import slow_but

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def assert_same(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float) -> None:
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])  # bit for bit
        torch.testing.assert_close(result["weights"], expected["weights"], rtol=0, atol=tolerance)
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=10 * tolerance, atol=tolerance)
        for name, parameter in expected["parameters"].items():
            torch.testing.assert_close(result["parameters"][name], parameter, rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine", slow_but(ENGINES, "ddp", "tp"))
def test_every_engine(engine: str) -> None:
    ranks, spread = ENGINES[engine]
    cases = [(dtype, "mgda-decoupled", {"max_grad_norm": 0.3}) for dtype in TOLERANCE]
    assert_all_same(run(ranks, train_all, spread, cases), cases)


def test_every_weighting_in_every_form() -> None:
    """Under DDP, K forwards and then K backwards leave all but the first gradient unreduced: mogeo reduces them."""
    cases = [
        (torch.float64, weighting, {"form": form})
        for weighting in ("uniform", "group-dro(0.5)", "mgda-normalized")
        for form in ("tensors", "callables")
    ]
    assert_all_same(run(2, train_all, engines.ddp, cases), cases)


Case = tuple[torch.dtype, str, dict[str, Any]]


def train_all(spread: Any, cases: list[Case]) -> list[dict[str, Any]]:
    """Several runs in one set of processes: to start these takes longer than to train."""
    return [train(spread, dtype, weighting, **options) for dtype, weighting, options in cases]


def assert_all_same(results: list[list[dict[str, Any]]], cases: list[Case]) -> None:
    """Results by rank and case, each as one process has it."""
    for of_ranks, (dtype, weighting, options) in zip(zip(*results, strict=True), cases, strict=True):
        expected = train(alone, dtype, weighting, **{k: v for k, v in options.items() if k != "shard_rows"})
        assert_same(list(of_ranks), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", ["fsdp", "ddp"])
def test_bf16_computation(shape: str) -> None:
    """Mixed precision rounds per rank: the answer is that of one process to what bf16 keeps."""
    expected = train(alone, torch.float32, "mgda-decoupled")
    spread = engines.fsdp_bf16 if shape == "fsdp" else engines.ddp_bf16
    results = [result for (result,) in run(2, train_all, spread, [(torch.float32, "mgda-decoupled", {})])]
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])
        torch.testing.assert_close(result["weights"], expected["weights"], rtol=0, atol=0.05)
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=0.02, atol=0.02)
