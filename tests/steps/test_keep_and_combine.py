"""KeepAndCombine: where objectives conflict, parameter by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer
from tests.deciders import let_decide
from tests.nets import NAMES, Net, inputs, shared_losses, wrapped


def rows_of(net: nn.Module, losses: dict[str, Tensor], parameter: nn.Parameter) -> Tensor:
    found = []
    for loss in losses.values():
        (grad,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        found.append(torch.zeros_like(parameter).flatten() if grad is None else grad.flatten())
    return torch.stack(found).double()


@pytest.mark.parametrize("way", ["host", "device", "rows apart"])
def test_gram_matrices_of_parameters_sum_to_the_whole(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_decide(way, monkeypatch)
    net, x = Net(torch.float32), inputs(dtype=torch.float32)
    net.trunk.bias.requires_grad_(False)
    net.heads[1].double()
    net.heads[1].register_forward_pre_hook(lambda module, args: (args[0].double(),))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.named_parameters(), lr=0.1), gram_by_parameter=True)
    losses = shared_losses(net, x)
    wanted = {name: rows_of(net, losses, p) for name, p in net.named_parameters() if p.requires_grad}
    optimizer.backward(losses)
    report = optimizer.combine()
    assert report.gram_by_parameter is not None
    assert report.gram is not None
    assert report.parameters == tuple(wanted)
    torch.testing.assert_close(report.gram_by_parameter.sum(0), report.gram, rtol=1e-5, atol=1e-6)
    for gram, rows in zip(report.gram_by_parameter, wanted.values(), strict=True):
        torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-5, atol=1e-6)
    cosines = report.cosines_by_parameter["trunk.weight"]
    expected = nn.functional.cosine_similarity(wanted["trunk.weight"][0], wanted["trunk.weight"][1], dim=0)
    torch.testing.assert_close(cosines[0, 1], expected, rtol=1e-5, atol=1e-6)
    assert report.cosines_by_parameter["unused.weight"].isnan().all()


def test_without_names_a_parameter_has_its_place() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    base = torch.optim.SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1)
    optimizer = MultiObjectiveOptimizer(base, "mgda", gram_by_parameter=True)
    optimizer.backward([(a * b).sum(), (b * c).sum()])
    assert optimizer.combine().parameters == ("0.0", "0.1", "1.0")


def test_nothing_where_it_was_not_asked_for_or_no_rows_are_kept() -> None:
    net, x = Net(), inputs()
    for options in ({}, {"weighting": "uniform", "gram_by_parameter": True}, {"sketch": 9, "gram_by_parameter": True}):
        optimizer = wrapped(net, objectives=NAMES, **options)
        optimizer.backward(shared_losses(net, x))
        report = optimizer.combine()
        assert report.gram_by_parameter is None
        assert report.cosines_by_parameter == {}
        assert report.parameters == ()
