"""One model, and the ways to spread it over ranks; what a training run leaves behind, gathered. For tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from mogeo import MultiObjectiveOptimizer

NAMES = ("help", "honesty", "truth")


class Block(nn.Module):
    """Norm, and a feed-forward layer around which a residual stream flows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding tied to its head, blocks of uneven sizes, a frozen part, and a part that no loss reaches."""

    def __init__(self, width: int = 6, blocks: int = 2, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.frozen(x))


def make_net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batches(step: int) -> dict[str, Tensor]:
    """Per objective [12, 6] tokens: the batch of all ranks together."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randint(11, (12, 6), generator=generator) for name in NAMES}


def share_of(batch: Tensor, replicas: int, replica: int) -> Tensor:
    return batch.chunk(replicas)[replica]


def loss_of(net: nn.Module, tokens: Tensor, objective: int) -> Tensor:
    """A loss for each objective; they pull the same parameters to different places."""
    scores = net(tokens)
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    targets = (tokens * (objective + 2) + objective) % 11
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()) * (1 + objective)


# engine: (model) -> (model to call, number of replicas of the data, which of them this rank is)
Spread = tuple[nn.Module, int, int]


def alone(net: Net) -> Spread:
    return net, 1, 0


def ddp(net: Net, **options: Any) -> Spread:
    return DistributedDataParallel(net, **options), dist.get_world_size(), dist.get_rank()


def ddp_bucket_view(net: Net) -> Spread:
    return ddp(net, gradient_as_bucket_view=True)


def fsdp(net: Net, **options: Any) -> Spread:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return sharded(net, mesh, **options), dist.get_world_size(), dist.get_rank()


def fsdp_bf16(net: Net) -> Spread:
    return fsdp(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


class Autocast(nn.Module):
    """A model that computes in bf16 over fp32 parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores: Tensor = self.model(tokens)
        return scores.float()


def ddp_bf16(net: Net) -> Spread:
    model, replicas, replica = ddp(net)
    return Autocast(model), replicas, replica


def fsdp_keeping(net: Net) -> Spread:
    return fsdp(net, reshard_after_forward=False)


def hsdp(net: Net) -> Spread:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return sharded(net, mesh), dist.get_world_size(), dist.get_rank()


def sharded(net: Net, mesh: Any, **options: Any) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def tensor_parallel(net: Net, mesh: Any = None, sequence: bool = False) -> Spread:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    from torch.distributed.tensor import Replicate, Shard

    for block in net.blocks:
        plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan = {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            }
            into = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False)
            out_of = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
            parallelize_module(parallelize_module(block, mesh, into), mesh, out_of)
        parallelize_module(block, mesh, plan)
    return net, 1, 0


def sequence_parallel(net: Net) -> Spread:
    return tensor_parallel(net, sequence=True)


def fsdp_and_tp(net: Net) -> Spread:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(net, mesh["tensor"])
    return sharded(net, mesh["data"]), 2, mesh["data"].get_local_rank()


ENGINES: dict[str, tuple[int, Callable[[Net], Spread]]] = {
    "ddp": (2, ddp),
    "ddp, bucket views": (3, ddp_bucket_view),
    "fsdp": (3, fsdp),
    "fsdp, no reshard": (2, fsdp_keeping),
    "hsdp": (4, hsdp),
    "tp": (2, tensor_parallel),
    "tp, sequence": (2, sequence_parallel),
    "fsdp × tp": (4, fsdp_and_tp),
}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()  # type: ignore[operator]


def train(
    engine: Callable[[Net], Spread],
    dtype: torch.dtype,
    weighting: Any,
    form: str = "callables",
    steps: int = 4,
    **options: Any,
) -> dict[str, Any]:
    """Train on the same global batches, spread or not; weights per step, losses, and the parameters in full.

    With `track`, the estimates of the last step as well.
    """
    net = make_net(dtype)
    model, replicas, replica = engine(net)
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    optimizer = MultiObjectiveOptimizer(base, weighting, **options)
    weights, losses, norms = [], [], []
    for step in range(steps):
        data = {name: share_of(batch, replicas, replica) for name, batch in batches(step).items()}
        terms: dict[str, Any] = {name: (lambda x=data[name], k=k: loss_of(model, x, k)) for k, name in enumerate(NAMES)}
        optimizer.zero_grad()
        optimizer.backward({name: term() for name, term in terms.items()} if form == "tensors" else terms)
        optimizer.step()
        report = optimizer.report
        assert report is not None
        weights.append(report.weights)
        losses.append(report.losses)
        norms.append(report.direction_norm)
    return {
        "weights": torch.stack(weights),
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "parameters": {name.removeprefix("module."): full(p) for name, p in model.named_parameters()},
        "mean": report.mean,
    }
