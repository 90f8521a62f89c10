"""What benchmarks/alignment measures with: gradients that are replayed, estimates without bias, a dial on the world."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from alignment.dial import MINORITY, DialledWorld, correlations, mean_correlation, unbalanced
from alignment.estimators import u_statistic
from alignment.explain import HURT, explain
from alignment.generated_world import Method
from alignment.mini_batches import Gradients, replayed, watched, watcher
from alignment.realised import hurts

from mogeo import MultiObjectiveOptimizer
from mogeo.demo.world import OBJECTIVES, World
from mogeo.dpo.data import build_preferences


def test_replayed_losses_have_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(3, 5, requires_grad=True), torch.randn(7, requires_grad=True)]
    seen = Gradients(torch.randn(2, 22), torch.tensor([0.3, 1e3]))
    for loss, row, value in zip(replayed(parameters, seen), seen.rows, seen.losses, strict=True):
        assert torch.equal(loss(), value)
        found = torch.autograd.grad(loss(), parameters)
        assert torch.equal(torch.cat([gradient.flatten() for gradient in found]), row)


def test_a_watcher_finds_the_weights_of_the_optimizer_that_it_watches_and_leaves_its_gradients_alone() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.1), "mgda")
    beside = watcher(parameters, weighting="mgda")
    for _ in range(3):
        seen = Gradients(torch.randn(3, 17), torch.ones(3))
        optimizer.zero_grad()
        optimizer.backward(replayed(parameters, seen))
        weights = optimizer.combine().weights
        before = [parameter.grad.clone() for parameter in parameters]
        assert torch.equal(watched(beside, parameters, seen).weights, weights)
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
        optimizer.step()


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), k=st.integers(1, 4))
def test_the_u_statistic_is_the_mean_product_of_different_mini_batches(seed: int, n: int, k: int) -> None:
    rows = torch.randn(n, k, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = [rows[a] @ rows[b].T for a in range(n) for b in range(n) if a != b]
    found = u_statistic(rows.sum(0), (rows @ rows.mT).sum(0), n)
    torch.testing.assert_close(found, torch.stack(pairs).mean(0))


@given(seed=st.integers(0, 10**6))
def test_a_step_hurts_those_whose_loss_it_raises(seed: int) -> None:
    """Oracle: linear losses, of which the mean over the mini-batches is known after the step."""
    generator = torch.Generator().manual_seed(seed)
    independent = [torch.randn(len(OBJECTIVES), 6, generator=generator) for _ in range(8)]
    change = torch.randn(6, generator=generator, dtype=torch.float64)
    rise = torch.stack(independent).double().mean(0) @ change
    told = hurts(change, independent)
    assert [told[name]["z"] < 0 for name in OBJECTIVES] == (rise > 0).tolist()
    agree = [rows.double() @ change for rows in (torch.stack(independent[i::2]).mean(0) for i in (0, 1))]
    assert [told[name]["halves agree"] == 1 for name in OBJECTIVES] == (agree[0].sign() == agree[1].sign()).tolist()


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("uniform", Method("uniform")),
        ("uniform, guaranteed", Method("uniform", True)),
        ("uniform, guaranteed, track auto", Method("uniform", True, "auto")),
        ("mgda-decoupled, track 0.95", Method("mgda-decoupled", False, 0.95)),
        ("linear(0.4, 0.2, 0.2, 0.2), track 0.9", Method("linear(0.4, 0.2, 0.2, 0.2)", False, 0.9)),
    ],
)
def test_a_method_is_read(text: str, method: Method) -> None:
    assert Method.parse(text) == method


def test_the_dial_leaves_texts_alone_and_makes_objectives_agree() -> None:
    plain = World(3).rows(80)
    agreements = (0.0, 0.25, 0.5, 1.0)
    worlds = [DialledWorld(3, agreement).rows(80) for agreement in agreements]
    assert worlds[0] == plain
    for rows in worlds:
        texts = [[c["response"] for c in row["completions"]] for row in rows]
        assert texts == [[c["response"] for c in row["completions"]] for row in plain]
    means = [mean_correlation(correlations(rows, OBJECTIVES)["pearson"]) for rows in worlds]
    assert all(low < high for low, high in pairwise(means))


def test_what_is_wrong_with_one_objective_leaves_the_others_alone() -> None:
    pairs = build_preferences(World(3).rows(80), OBJECTIVES, "all", 3)
    assert unbalanced(pairs, "none", 3) is pairs
    few = unbalanced(pairs, f"few {MINORITY}", 3)
    assert len(few.pairs[MINORITY]) == round(0.05 * len(pairs.pairs[MINORITY]))
    flipped = unbalanced(pairs, "flipped honesty", 3)
    turned = sum(a.chosen == b.rejected for a, b in zip(pairs.pairs["honesty"], flipped.pairs["honesty"], strict=True))
    assert 0.2 < turned / len(pairs.pairs["honesty"]) < 0.4
    for changed, name in ((few, MINORITY), (flipped, "honesty")):
        assert all(changed.pairs[other] == pairs.pairs[other] for other in OBJECTIVES if other != name)


def test_steps_of_which_a_report_cannot_tell_do_not_count() -> None:
    def step(alignment: tuple[float, float], evidence: float | None) -> dict[str, object]:
        by_name = None if evidence is None else {"a": evidence, "b": 1.0}
        return {
            "kind": "train",
            "weight": {"a": 1.0, "b": 3.0},
            "cosines": [[1.0, -0.5], [-0.5, 1.0]],
            "alignment": dict(zip("ab", alignment, strict=True)),
            "evidence": by_name,
        }

    nan = float("nan")
    found = explain([step((nan, nan), 0.0), step((-0.5, nan), 0.5), step((0.5, HURT / 2), 1.0)], ("a", "b"))
    assert found["hurt"] == 0.5
    assert found["hurt_by_objective"] == {"a": 0.5, "b": 0.0}
    assert found["evidence"] == {"a": 0.5, "b": 1.0}
    assert found["noise_scale"] is None
    assert explain([step((nan, nan), 0.0)], ("a", "b"))["hurt"] is None
