"""Replicas whose gradients no engine has reduced, or only some: mogeo reduces them, and says what it cannot mend."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer
from tests.distributed import engines
from tests.distributed.engines import NAMES, alone, batches, full, loss_of, make_net, share_of, train
from tests.distributed.runner import RankFailedError, run
from tests.distributed.test_same_answer import assert_all_same, train_all
from tests.profiles import slow_but


@pytest.mark.parametrize("how", slow_but(["no_sync", "plain", "synced"], "plain"))
def test_gradients_are_reduced_once_or_twice_or_by_mogeo_alone(how: str) -> None:
    """In `no_sync`, with no engine at all, and where DDP did it already."""
    cases = [
        (torch.float64, weighting, {"max_grad_norm": 0.3, "shard_rows": shard_rows})
        for weighting in ("mgda-decoupled", "uniform", "group-dro(0.5)")
        for shard_rows in (False, True)
    ]
    spread = {"no_sync": unsynced, "plain": no_engine, "synced": engines.ddp}[how]
    assert_all_same(run(3, train_all, spread, cases), cases)


def no_engine(net: engines.Net) -> engines.Spread:
    return net, dist.get_world_size(), dist.get_rank()


def unsynced(net: engines.Net) -> engines.Spread:
    model, replicas, replica = engines.ddp(net)
    contextlib.ExitStack().enter_context(model.no_sync())
    return model, replicas, replica


@pytest.mark.parametrize("shard_rows", [False, True])
def test_memory_of_rows(shard_rows: bool) -> None:
    (own, rows), *_ = run(3, row_memory, shard_rows)
    assert rows == pytest.approx(own * (1 + 3 / 3 if shard_rows else 3), rel=0.15)  # padding of a small net


def row_memory(shard_rows: bool) -> tuple[int, int]:
    net = make_net(torch.float32)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters()), shard_rows=shard_rows)
    optimizer.backward({name: loss_of(net, batches(0)[name], k) for k, name in enumerate(NAMES)})
    buffers = optimizer._captures.buffers
    assert buffers is not None
    held = sum(block.numel() for block in buffers.blocks) + sum(
        b._pieces.rows.numel() for b in buffers.flat.blocks if b._pieces
    )
    return sum(p.numel() for p in net.parameters() if p.requires_grad), held


@pytest.mark.parametrize("shard_rows", slow_but([False, True], False))
@pytest.mark.parametrize("last_synced", slow_but([False, True], True))
def test_accumulation(last_synced: bool, shard_rows: bool) -> None:
    """Micro-batches without a reduction and then one with it, as Accelerate's `accumulate` does: nothing is lost."""
    expected = accumulate(False, False, spread=False)
    for result in run(2, accumulate, last_synced, shard_rows):
        for name, parameter in expected.items():
            torch.testing.assert_close(result[name], parameter, rtol=0, atol=1e-12)


def accumulate(last_synced: bool, shard_rows: bool, spread: bool = True) -> dict[str, Tensor]:
    net = make_net(torch.float64)
    model, replicas, replica = engines.ddp(net) if spread else (net, 1, 0)
    base = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    optimizer = MultiObjectiveOptimizer(base, shard_rows=shard_rows)
    for step in range(2):
        optimizer.zero_grad()
        for micro in range(3):
            unsynced = spread and not (last_synced and micro == 2)
            with model.no_sync() if unsynced else contextlib.nullcontext():
                data = {n: share_of(b, replicas, replica) for n, b in batches(3 * step + micro).items()}
                optimizer.backward({n: (lambda x=data[n], k=k: loss_of(model, x, k) / 3) for k, n in enumerate(NAMES)})
        optimizer.step()
    return {name: full(p) for name, p in net.named_parameters()}


def test_gradients_that_mirror_each_other_are_seen_to_differ() -> None:
    """g on one rank and −g on the other have one norm, and the mean zero."""
    for weight in run(2, mirrored):
        assert torch.equal(weight, torch.ones(3, dtype=torch.float64))


def mirrored() -> Tensor:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=0.1), "uniform")
    sign = 1 if dist.get_rank() == 0 else -1
    optimizer.backward({"a": sign * parameter[0] + 5, "b": 2 * sign * parameter[1] + 5})
    optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shard_rows", [False, True])
def test_a_parameter_that_only_one_rank_touches(shard_rows: bool) -> None:
    for weight, untouched in run(2, one_sided, shard_rows):
        torch.testing.assert_close(weight, torch.full((3,), -0.05, dtype=torch.float64))
        assert untouched is None


def one_sided(shard_rows: bool) -> tuple[Tensor, Any]:
    both, one, none = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([both, one, none], lr=0.1), "uniform", shard_rows=shard_rows)
    term = both.sum() + (one.sum() if dist.get_rank() == 0 else 0.0)
    optimizer.backward({"a": term + 1, "b": term + 1})
    optimizer.step()
    return one.detach(), none.grad


# --------------------------------------------------------------------------------------------------------------------
# All ranks decide alike


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("weighting", slow_but(["mgda-decoupled", "uniform", "group-dro"], "mgda-decoupled"))
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(weighting: str, engine: str) -> None:
    results = run(2, one_bad_rank, engine, weighting)
    for skipped, weights, parameters in results:
        assert skipped == results[0][0] != ()
        assert torch.equal(weights, results[0][1])
        for p, q in zip(parameters, results[0][2], strict=True):
            assert p.isfinite().all()
            assert torch.equal(p, q)


@pytest.mark.parametrize("form", slow_but(["callables", "tensors"], "callables"))
@pytest.mark.parametrize(("weighting", "options"), [("linear(1,0,1)", {}), ("mgda-decoupled", {"sketch": 4096})])
def test_fsdp_leaves_out_nothing_but_what_is_not_finite(weighting: str, options: dict[str, Any], form: str) -> None:
    """Its weight is 0, and it takes its backward, for which FSDP waits; NaN of it goes nowhere."""
    for skipped, weights, _ in run(2, one_bad_rank, "fsdp", weighting, form, options):
        assert skipped == (NAMES[1],)
        assert weights.isfinite().all()


def one_bad_rank(
    engine: str, weighting: str, form: str = "callables", options: dict[str, Any] | None = None
) -> tuple[tuple[str, ...], Tensor, list[Tensor]]:
    import warnings

    warnings.simplefilter("ignore")
    model, replicas, replica = getattr(engines, engine)(make_net(torch.float64))
    optimizer = MultiObjectiveOptimizer(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), weighting, **(options or {})
    )
    skipped: tuple[str, ...] = ()
    for step in range(3):
        data = {n: share_of(b, replicas, replica) for n, b in batches(step).items()}
        factor = math.nan if step == 1 and dist.get_rank() == 1 else 1.0
        optimizer.zero_grad()
        terms: dict[str, Any] = {
            n: (lambda x=data[n], k=k, f=factor if k == 1 else 1.0: loss_of(model, x, k) * f)
            for k, n in enumerate(NAMES)
        }
        optimizer.backward({n: term() for n, term in terms.items()} if form == "tensors" else terms)
        optimizer.step()
        assert optimizer.report is not None
        skipped = skipped or optimizer.report.skipped
    assert optimizer.report is not None
    return skipped, optimizer.report.weights, [full(p) for p in model.parameters()]


def test_fsdp_on_one_rank_uses_no_old_parameters_after_a_loss_that_is_not_finite() -> None:
    (pairs,) = run(1, lone_shards)
    for by_fsdp, by_its_parameters in pairs:
        torch.testing.assert_close(by_fsdp, by_its_parameters)


def lone_shards() -> list[tuple[Tensor, Tensor]]:
    import warnings

    warnings.simplefilter("ignore")
    model, _, _ = engines.fsdp(make_net(torch.float64))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(parameters, lr=0.1), "uniform")
    x, pairs = next(iter(batches(0).values())), []
    for factor in (1.0, math.nan, 1.0):
        optimizer.zero_grad()
        optimizer.backward(
            {n: (lambda k=k, f=factor if k else 1.0: loss_of(model, x, k) * f) for k, n in enumerate(NAMES)}
        )
        optimizer.step()
        twin = make_net(torch.float64)
        twin.load_state_dict({name: full(value) for name, value in model.state_dict().items()})
        pairs.append((loss_of(model, x, 0).detach(), loss_of(twin, x, 0).detach()))
    return pairs


def test_other_objectives_or_another_order_are_named_on_every_rank() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 0 of 2.*differ between ranks.*rank 1 of 2.*differ between"):
        run(2, disagree)


def disagree() -> None:
    net = make_net(torch.float64)
    names = NAMES if dist.get_rank() == 0 else NAMES[::-1]
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters()), objectives=names)
    optimizer.backward({name: (lambda k=k: loss_of(net, batches(0)[NAMES[0]], k)) for k, name in enumerate(names)})


def test_an_objective_that_only_some_ranks_have_is_named() -> None:
    with pytest.raises(RankFailedError, match="objective 'honesty' has a loss on some ranks of this step and none on"):
        run(2, partly)


def partly() -> None:
    net = make_net(torch.float64)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters()), objectives=NAMES)
    for k, name in enumerate(NAMES):
        if name != "honesty" or dist.get_rank() == 0:
            optimizer.backward(loss_of(net, batches(0)[name], k), objective=name)
    optimizer.combine()


def test_gradients_that_fsdp_keeps_to_itself_are_asked_for() -> None:
    with pytest.raises(RankFailedError, match=r"set_requires_gradient_sync\(False\) called.*leave it on"):
        run(2, unsynchronised)


def unsynchronised() -> None:
    model, replicas, replica = engines.fsdp(make_net(torch.float64))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    model.set_requires_gradient_sync(False)
    optimizer.backward(
        {
            n: (lambda n=n, k=k: loss_of(model, share_of(batches(0)[n], replicas, replica), k))
            for k, n in enumerate(NAMES)
        }
    )


def test_a_rank_that_dies_leaves_no_one_waiting_for_long() -> None:
    """The others end in the process group's own timeout."""
    with pytest.raises(RankFailedError, match="rank 0 of 2") as failure:
        run(2, die, timeout=3.0)
    assert "rank 1 of 2" not in str(failure.value)


def die() -> None:
    net = make_net(torch.float64)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters()))
    optimizer.backward({n: loss_of(net, batches(0)[n], k) for k, n in enumerate(NAMES)})
    if dist.get_rank() == 1:
        os._exit(7)
    optimizer.step()


def test_shards_in_plain_tensors_are_refused() -> None:
    """FSDP1's look like replicas, and would be averaged although they are parts."""
    with pytest.raises(RankFailedError, match=r"a shard in a plain tensor.*use FSDP2"):
        run(2, first_fsdp)


def first_fsdp() -> None:
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore")
    net = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD(net.parameters()))
    optimizer.backward([lambda: net(torch.ones(1, 4)).sum() + 50, lambda: net(torch.ones(1, 4)).square().sum()])


def test_random_weights_are_the_first_ranks_on_all() -> None:
    first, second = run(2, random_weights)
    assert torch.equal(first, second)


def random_weights() -> Tensor:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    torch.manual_seed(dist.get_rank())
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter]), lambda gram, losses: torch.rand(2))
    optimizer.backward({"a": parameter.sum(), "b": parameter.square().sum()})
    optimizer.step()
    return parameter.detach()


def test_means_of_fp16_do_not_overflow_on_the_way() -> None:
    for weight in run(2, large_fp16):
        assert torch.equal(weight, torch.full((3,), -40_000.0, dtype=torch.float16))


def large_fp16() -> Tensor:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float16))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter], lr=1.0), "uniform", shard_rows=True)
    optimizer.backward([lambda: (parameter.float() * 40_000).sum() + 1] * 2)
    optimizer.step()
    return parameter.detach()


def test_a_copy_shares_the_process_group() -> None:
    assert all(run(2, copied))


def copied() -> bool:
    import copy

    group = dist.new_group([0, 1])
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MultiObjectiveOptimizer(torch.optim.SGD([parameter]), process_group=group)
    twin = copy.deepcopy(optimizer)
    return twin.process_group is group and twin.base is not optimizer.base


def test_a_process_group_of_its_own() -> None:
    """Two groups of two ranks train two models: each pair agrees, and the pairs do not mix."""
    first = train(alone, torch.float64, "mgda-decoupled")
    results = run(4, two_models)
    for rank, result in enumerate(results):
        assert torch.equal(result["weights"], results[rank % 2]["weights"])
    torch.testing.assert_close(results[0]["weights"], first["weights"], rtol=0, atol=1e-12)
    assert not torch.equal(results[0]["weights"], results[1]["weights"])


def two_models() -> dict[str, Any]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    which = dist.get_rank() % 2

    def pair(net: engines.Net) -> engines.Spread:
        if which == 1:
            with torch.no_grad():
                net.embed.weight.mul_(2)
        return nn.parallel.DistributedDataParallel(net, process_group=groups[which]), 2, dist.get_rank() // 2

    return train(pair, torch.float64, "mgda-decoupled", process_group=groups[which])
