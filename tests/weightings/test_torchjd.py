"""Every weighting of TorchJD that maps a Gramian to weights, in an optimizer; the others are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("torchjd")

from torchjd import aggregation as torchjd

from mogeo.weightings import resolve
from tests.nets import Net, assert_direction, gradient_rows, inputs, shared_losses, wrapped

GRAMIAN: dict[str, Any] = {
    "AlignedMTLWeighting": {},
    "CAGradWeighting": {"c": 0.4},
    "ConstantWeighting": {"weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)},
    "CRMOGMWeighting": {"weighting": torchjd.UPGradWeighting()},
    "DualProjWeighting": {},
    "FairGradWeighting": {"alpha": 1.0},
    "GradVacWeighting": {},
    "IMTLGWeighting": {},
    "KrumWeighting": {"n_byzantine": 0},
    "MGDAWeighting": {},
    "MeanWeighting": {},
    "PCDWeighting": {},
    "PCGradWeighting": {},
    "RandomWeighting": {},
    "SumWeighting": {},
    "UPGradWeighting": {},
}
OF_GRADIENTS = ("ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting")
NEEDS_MORE = ("CAGradWeighting", "FairGradWeighting")  # packages of its own, which TorchJD names


def make(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(torchjd, name)(**GRAMIAN.get(name, {}))
    except ImportError as error:
        assert name in NEEDS_MORE
        pytest.skip(f"TorchJD's {name} needs a package that is not installed: {error}")


def test_the_table_is_complete() -> None:
    known = {*GRAMIAN, *OF_GRADIENTS, "Weighting"}
    assert {name for name in dir(torchjd) if name.endswith("Weighting")} == known


@pytest.mark.parametrize("name", GRAMIAN)
def test_weighs_the_gradients_of_a_step(name: str) -> None:
    theirs = make(name)
    net, x = Net(), inputs()
    optimizer = wrapped(net, theirs)
    optimizer.backward(shared_losses(net, x))
    torch.manual_seed(3)
    report = optimizer.combine()
    rows = gradient_rows(net, x)
    assert_direction(net, report, rows)
    torch.manual_seed(3)  # some draw at random
    torch.testing.assert_close(report.weights, make(name)(rows @ rows.T).double(), rtol=1e-6, atol=1e-9)
    optimizer.step()


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_what_reads_the_gradients_themselves_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="Gramian weightings, such as UPGradWeighting"):
        resolve(make(name))


def test_an_aggregator_stands_for_its_weighting() -> None:
    gram = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
    expected = torchjd.UPGradWeighting()(gram)
    torch.testing.assert_close(resolve(torchjd.UPGrad())(gram, torch.ones(2)), expected)
    with pytest.raises(TypeError, match="reads the gradients themselves"):
        resolve(torchjd.ConFIG())


def test_ours_is_what_theirs_computes_to_its_regularisation() -> None:
    generator = torch.Generator().manual_seed(0)
    for k in (2, 3, 5):
        rows = torch.randn(k, 9, dtype=torch.float64, generator=generator)
        rows[1] -= rows[0]
        gram = rows @ rows.T
        theirs = torchjd.UPGradWeighting()(gram)
        torch.testing.assert_close(resolve("upgrad")(gram, torch.ones(k)), theirs, rtol=1e-2, atol=1e-3)
        dual = torchjd.DualProjWeighting()(gram)
        guarded = torch.ops.mogeo.descent(gram, torch.full((k,), 1 / k, dtype=torch.float64))[0]
        torch.testing.assert_close(guarded, dual, rtol=1e-2, atol=1e-3)
