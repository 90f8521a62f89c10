"""One model on several ranks: replicas (DDP) or shards (FSDP2). Knows no losses, files or objectives.

Whatever the engine, a state holds what one process would hold: whole tensors under plain names and numbers. So a run
can go on with another engine, or another number of ranks, than it began with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mogeo.dpo.log_probs import sequence_log_probs
from mogeo.dpo.processes import Processes
from mogeo.errors import InputError
from mogeo.gradients.ranks import is_sharded, sharded

State = dict[str, Any]


class SingleProcess:
    """One process, and the model as it is.

    Attributes:
        model: the transformers model itself. Under another engine, call it through `log_probs` only.
        log_probs: `sequence_log_probs` of the model: takes the tensors of a batch.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model.to(device), device
        self.log_probs: Callable[..., Tensor] = partial(sequence_log_probs, self.model)

    def reducing(self, n_passes: int) -> AbstractContextManager[Any]:
        """Context for the forward and backward passes of a step, of so many for each objective."""
        return nullcontext()

    def weights(self) -> State:
        """The model's state. On ranks but the first, it may lack its tensors."""
        weights: State = self.model.state_dict()
        return weights

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """The optimizer's state. On ranks but the first, it may lack its tensors."""
        return optimizer.state_dict()

    def load(self, optimizer: Optimizer, weights: State, optimizer_state: State) -> None:
        """Load what `weights` and `optimizer_state` returned, under whichever engine: the first rank's is loaded."""
        self.model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)


class Replicated(SingleProcess):
    """DDP: every rank holds the model, as the first one had it."""

    def __init__(self, model: Any, device: torch.device, ranks: Processes) -> None:
        super().__init__(model, device)
        self.ranks = ranks
        self._replica = nn.parallel.DistributedDataParallel(
            _LogProbs(self.model), device_ids=[device] if device.type == "cuda" else None
        )
        self.log_probs = self._forward

    def _forward(self, *batch: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # nothing to reduce
            return sequence_log_probs(self.model, *batch)
        try:
            scores: Tensor = self._replica(*batch)
        except RuntimeError as error:
            if "finished reduction" not in str(error):
                raise
            raise InputError(
                "a loss did not reach every parameter, and DDP waits for the gradients of all: use --fsdp, or "
                "--micro-batch with fewer pairs than a rank has in a step, where DDP does not reduce"
            ) from error
        return scores

    def reducing(self, n_passes: int) -> AbstractContextManager[Any]:
        """DDP reduces in every backward; sums over micro-batches, and sketches, are reduced once instead, by mogeo."""
        return nullcontext() if n_passes == 1 else self._replica.no_sync()

    def load(self, optimizer: Optimizer, weights: State, optimizer_state: State) -> None:
        """Load the first rank's states on every rank, one tensor at a time."""
        own = self.model.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        plan = self.ranks.on_first(lambda: _outline([weights, optimizer_state]))
        loaded = {name: self._placed(weights.get(name), meta, own[name]) for name, meta in plan[0].items()}
        per_parameter = {
            i: {key: self._placed(optimizer_state.get("state", {}).get(i, {}).get(key), meta, parameters[i])
                for key, meta in entries.items()}
            for i, entries in plan[1]["state"].items()
        }  # fmt: skip
        super().load(optimizer, loaded, {**plan[1], "state": per_parameter})

    def _placed(self, whole: Any, plan: Any, like: Tensor) -> Any:
        """The first rank's tensor `whole`, as this rank holds it; `plan` is its outline."""
        if not isinstance(plan, Tensor):
            return plan
        if self.ranks.first:
            return self._part(whole.to(self.device).contiguous(), like)
        return self._part(torch.empty(plan.shape, dtype=plan.dtype, device=self.device), like)

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        dist.broadcast(whole, src=0)
        return whole


class Sharded(Replicated):
    """FSDP2: every rank holds its part of each parameter, and of its optimizer state; layers are whole while they run.

    Raises:
        InputError: the model does not say what its layers are.
    """

    def __init__(self, model: Any, device: torch.device, ranks: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        names = set(getattr(model, "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__ in names]
        if not layers:
            raise InputError(
                f"{type(model).__name__} names no layers to shard (_no_split_modules is {sorted(names)}): leave out "
                "--fsdp, every rank then holds the whole model"
            )
        # As the classes above do, but for moving the whole model to the device.
        self.model, self.device, self.ranks = model, device, ranks
        # Shards of one model: what a checkpoint lacks is drawn at random when it is loaded, on each rank for itself.
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(device.type, (ranks.size,))
        for layer in layers:  # moved to the device one by one, and cut up there: the whole never has to fit
            fully_shard(layer, mesh=mesh)
        self._root: Any = fully_shard(_LogProbs(model), mesh=mesh)
        self.log_probs = self._forward

    def _forward(self, *batch: Tensor) -> Tensor:
        scores: Tensor = self._root(*batch)
        if not torch.is_grad_enabled():
            # No backward will do it, and what is not in a layer (embedding, head) would stay whole: `parameters()`
            # would then be other tensors than the optimizer's, and stale ones after the next step.
            self._root.reshard()
        return scores

    def reducing(self, n_passes: int) -> AbstractContextManager[Any]:
        """FSDP reduces in every backward: a gradient that is not reduced has no place in a shard."""
        return nullcontext()

    def weights(self) -> State:
        """The model's state, gathered from all ranks; on ranks but the first, None for tensors."""
        names: dict[int, str] = {}
        tied_to = {
            name: names.setdefault(id(p), name) for name, p in self.model.named_parameters(remove_duplicate=False)
        }
        whole: State = {}
        for name, tensor in super().weights().items():
            first = tied_to.get(name, name)
            whole[name] = whole[first] if first in whole else self._whole(tensor)
        return whole

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """The optimizer's state, gathered from all ranks; on ranks but the first, None for tensors."""
        state = super().optimizer_state(optimizer)
        gathered = {i: {key: self._whole(v) for key, v in entries.items()} for i, entries in state["state"].items()}
        return {**state, "state": gathered}

    def _whole(self, value: Any) -> Any:
        full = value.full_tensor() if is_sharded(value) else value
        if not isinstance(full, Tensor):
            return full
        return full.cpu() if self.ranks.first else None

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        if is_sharded(like) and whole.shape == like.shape:  # not the count of steps, which every rank has
            return distribute_tensor(whole, sharded(like).device_mesh, sharded(like).placements)
        return super()._part(whole, like)


class _LogProbs(nn.Module):
    """`sequence_log_probs` as the forward of a module: what engines hook is the whole way, the head included."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor) -> Tensor:
        return sequence_log_probs(self.model, *batch)


def _outline(state: Any) -> Any:
    """The same nesting, with tensors that have a shape and no data."""
    if isinstance(state, dict):
        return {key: _outline(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_outline(value) for value in state]
    return state.to("meta") if isinstance(state, Tensor) else state


def make_engine(model: Any, device: torch.device, ranks: Processes, fsdp: bool) -> SingleProcess:
    """Put the model on its device, or spread it over the ranks."""
    if ranks.size == 1:
        return SingleProcess(model, device)
    return Sharded(model, device, ranks) if fsdp else Replicated(model, device, ranks)
