"""Which processes there are, what is told to whom, and what is refused before anybody waits."""

import contextlib
import gc
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mogeo.dpo.config import AlignConfig
from mogeo.dpo.processes import (
    Processes,
    current_processes,
    device_of_rank,
    join_processes,
    launched_processes,
    leave_process_group,
)
from mogeo.dpo.scoring import score_sequences
from mogeo.dpo.tokens import TokenSequence
from mogeo.errors import InputError
from tests.distributed.runner import run

LAUNCH = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(**variables):
        for name in LAUNCH:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_process_without_a_launcher_is_alone(environment):
    environment()
    assert launched_processes() == current_processes() == Processes(0, 1)
    with join_processes("abacus") as ranks:  # no device is touched for nothing
        assert ranks == Processes(0, 1)
    environment(**LAUNCH)
    assert launched_processes() == Processes(1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 2, but RANK not set: start with torchrun --nproc-per-node 2"),
        ({"RANK": "one"}, "RANK is 'one': it has to be a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_half_a_launch_is_refused(environment, changes, message):
    environment(**{**LAUNCH, **changes})
    with pytest.raises(InputError, match=message):
        launched_processes()


def test_each_rank_takes_a_gpu_of_its_own(environment, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(**LAUNCH)
    assert device_of_rank("cuda", Processes(1, 2)) == torch.device("cuda", 1)
    assert device_of_rank("cuda:1", Processes()) == torch.device("cuda", 1)
    assert device_of_rank("cpu", Processes(1, 2)) == torch.device("cpu")
    with pytest.raises(InputError, match="'cuda:0' is one GPU for 2 ranks: name cuda"):
        device_of_rank("cuda:0", Processes(1, 2))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="start at most 2 ranks on it"):
        device_of_rank("cuda", Processes(2, 3))


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (AlignConfig(pairs_per_objective=8), 3, r"8 pairs .* over 3 ranks: take 6 or 9 \(--pairs\)"),
        (AlignConfig(pairs_per_objective=2), 3, r"take 3 \(--pairs\)"),
        (AlignConfig(fsdp=True), 1, "this process is alone"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(config, size, message):
    with pytest.raises(InputError, match=message):
        config.check_ranks(size)


def test_shares_are_the_whole_in_order():
    whole = torch.arange(12)
    assert torch.equal(torch.cat([Processes(rank, 3).share(whole) for rank in range(3)]), whole)


SEQUENCES = [TokenSequence(tuple(range(3, 3 + n)), start) for n, start in [(5, 2), (9, 4), (4, 1), (7, 6), (9, 1)]]


def scores(model):
    ranks = current_processes()
    told = ranks.on_first(lambda: f"rank {ranks.rank}")
    with pytest.raises(InputError, match="no such file"):
        ranks.on_first(refuse)
    ranks.check_agreed({"seed": 0})
    with pytest.raises(InputError, match="rank 0 has seed 0, rank 1 has 1: start every rank"):
        ranks.check_agreed({"seed": ranks.rank})
    result = score_sequences(model, SEQUENCES, batch_size=2, pad=0, precision=contextlib.nullcontext(), ranks=ranks)
    return result, told, ranks.any(ranks.rank == 1)


def refuse():
    raise InputError("no such file")


@pytest.mark.slow
def test_ranks_share_the_scoring_and_get_the_same_bits(make_model):
    """Three batches over two ranks: one has nothing left in the last round."""
    model = make_model()
    expected = score_sequences(model, SEQUENCES, batch_size=2, pad=0, precision=contextlib.nullcontext())
    for result, told, any_set in run(2, scores, model):
        assert torch.equal(result, expected)
        assert (told, any_set) == ("rank 0", True)


def test_a_model_that_holds_the_group_is_gone_before_it_ends(monkeypatch):
    """Though a reference cycle holds the model."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(nn.Linear(2, 2))
    object.__setattr__(model, "itself", model)
    reference, destroy, gone = weakref.ref(model), dist.destroy_process_group, []

    def end():
        gone.append(reference() is None)
        destroy()

    monkeypatch.setattr(dist, "destroy_process_group", end)
    gc.disable()
    try:
        del model
        assert reference() is not None
        leave_process_group()
    finally:
        gc.enable()
    assert gone == [True]
    assert not dist.is_initialized()


def test_threads_of_a_group_that_somebody_holds_let_go_of_every_tensor():
    """Otherwise they may ask for Python's lock while the process ends, which aborts it.

    With so long a switch interval Python takes the lock from no thread: others get it only while this one waits.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    holder, given, interval = dist.group.WORLD, [], sys.getswitchinterval()
    sys.setswitchinterval(100.0)
    try:
        for _ in range(100):
            tensor = torch.zeros(1000)
            given.append(weakref.ref(tensor))
            dist.all_reduce(tensor, async_op=True)
        del tensor
        leave_process_group()
        assert holder.size() == 1  # the group is still there
        assert all(reference() is None for reference in given)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.slow
def test_nobody_leaves_before_the_others_have_come(tmp_path):
    assert run(2, leave_late, str(tmp_path / "come")) == [True, True]


def leave_late(path):
    """Of two ranks the first comes late. Afterwards they meet in a new group, as the runner expects them to."""
    if dist.get_rank() == 0:
        time.sleep(1.0)
        Path(path).touch()
    rank = dist.get_rank()
    leave_process_group()
    all_had_come = Path(path).exists()
    dist.init_process_group("gloo", store=dist.FileStore(f"{path}.store", 2), rank=rank, world_size=2)
    return all_had_come
