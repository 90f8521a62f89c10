"""A model in one process, or spread over several by DDP or FSDP2. Knows no losses, files or objectives.

All three give and take the same states: whole tensors under the names that a single process uses. So a run can be
resumed with another engine, or another number of ranks, than it was started with.
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

State = dict[str, Any]


class SingleProcess:
    """The model in a single process.

    Args:
        model: a causal language model of transformers.
        device: where it is moved to.

    Attributes:
        model: the model. Subclasses hook a wrapper around it, so call it through `log_probs` only.
        log_probs: `mogeo.dpo.log_probs.sequence_log_probs` of the model; takes the tensors of a `Batch`.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model.to(device), device
        self.log_probs: Callable[..., Tensor] = partial(sequence_log_probs, self.model)

    def reducing(self, n_passes: int) -> AbstractContextManager[Any]:
        """A context for the forward and backward passes of one step.

        Args:
            n_passes: how many there are for each objective.
        """
        return nullcontext()

    def weights(self) -> State:
        """The model's state dict. Ranks other than the first may get None in place of tensors."""
        weights: State = self.model.state_dict()
        return weights

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """The optimizer's state dict. Ranks other than the first may get None in place of tensors."""
        return optimizer.state_dict()

    def load(self, optimizer: Optimizer, weights: State, optimizer_state: State) -> None:
        """Load states that `weights` and `optimizer_state` of any engine returned.

        Args:
            optimizer: whose state is loaded.
            weights: the model's state; that of the first rank counts.
            optimizer_state: the optimizer's state; that of the first rank counts.
        """
        self.model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)


class Replicated(SingleProcess):
    """DDP: each rank holds the whole model, with the first rank's weights.

    Args:
        model: as in `SingleProcess`.
        device: of this rank.
        ranks: the processes that train together.
    """

    def __init__(self, model: Any, device: torch.device, ranks: Processes) -> None:
        super().__init__(model, device)
        self.ranks = ranks
        self._replica = nn.parallel.DistributedDataParallel(
            _LogProbs(self.model), device_ids=[device] if device.type == "cuda" else None
        )
        self.log_probs = self._forward

    def _forward(self, *batch: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # without a backward, DDP has nothing to do
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
        """With several passes, keep DDP from reducing gradients in each: mogeo reduces their sum once per step."""
        return nullcontext() if n_passes == 1 else self._replica.no_sync()

    def load(self, optimizer: Optimizer, weights: State, optimizer_state: State) -> None:
        """Load the first rank's states on every rank, one tensor at a time: no rank holds all of them twice."""
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
        """This rank's part of a tensor of the first rank.

        Args:
            whole: the tensor; only the first rank's is used.
            plan: what `_outline` made of it.
            like: a tensor that is placed as the result has to be.
        """
        if not isinstance(plan, Tensor):
            return plan
        if self.ranks.first:
            return self._part(whole.to(self.device).contiguous(), like)
        return self._part(torch.empty(plan.shape, dtype=plan.dtype, device=self.device), like)

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        dist.broadcast(whole, src=0)
        return whole


class Sharded(Replicated):
    """FSDP2: each rank holds a shard of each parameter and of its optimizer state. A layer is whole only while it runs.

    Args:
        model: as in `SingleProcess`.
        device: of this rank.
        ranks: the processes that train together.

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
        # Not super().__init__(): it would move the whole model to the device.
        self.model, self.device, self.ranks = model, device, ranks
        # Each rank has loaded the model by itself, and has drawn weights that the files lack at random. Take the first
        # rank's, so that all shards are of one model.
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(device.type, (ranks.size,))
        for layer in layers:  # moves one layer at a time to the device, which need not have room for the whole model
            fully_shard(layer, mesh=mesh)
        self._root: Any = fully_shard(_LogProbs(model), mesh=mesh)
        self.log_probs = self._forward

    def _forward(self, *batch: Tensor) -> Tensor:
        scores: Tensor = self._root(*batch)
        if not torch.is_grad_enabled():
            # What is in no layer (embedding, head) stays whole until a backward, and here there is none. `parameters()`
            # would then return other tensors than the optimizer has, which would be out of date after the next step.
            self._root.reshard()
        return scores

    def reducing(self, n_passes: int) -> AbstractContextManager[Any]:
        """FSDP2 reduces gradients in every backward, since a rank has no room for those of whole parameters."""
        return nullcontext()

    def weights(self) -> State:
        """The model's state, gathered from all ranks. Ranks other than the first get None in place of tensors."""
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
        """The optimizer's state, gathered from all ranks. Ranks other than the first get None in place of tensors."""
        state = super().optimizer_state(optimizer)
        gathered = {i: {key: self._whole(v) for key, v in entries.items()} for i, entries in state["state"].items()}
        return {**state, "state": gathered}

    def _whole(self, value: Any) -> Any:
        from torch.distributed.tensor import DTensor

        full = value.full_tensor() if isinstance(value, DTensor) else value
        if not isinstance(full, Tensor):
            return full
        return full.cpu() if self.ranks.first else None

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if (
            isinstance(like, DTensor) and whole.shape == like.shape
        ):  # AdamW's count of steps is a scalar, whole on every rank
            return distribute_tensor(whole, like.device_mesh, like.placements)
        return super()._part(whole, like)


class _LogProbs(nn.Module):
    """A module whose forward is `sequence_log_probs`: DDP and FSDP2 hook a module's forward, and need all of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor) -> Tensor:
        return sequence_log_probs(self.model, *batch)


def _outline(state: Any) -> Any:
    """The same nested state, with tensors on the meta device, which have a shape and a type but no data."""
    if isinstance(state, dict):
        return {key: _outline(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_outline(value) for value in state]
    return state.to("meta") if isinstance(state, Tensor) else state


def make_engine(model: Any, device: torch.device, ranks: Processes, fsdp: bool) -> SingleProcess:
    """Move a model to its device, or spread it over the ranks.

    Args:
        model: a causal language model of transformers.
        device: of this process.
        ranks: the processes that train together.
        fsdp: with several ranks, use FSDP2 instead of DDP.
    """
    if ranks.size == 1:
        return SingleProcess(model, device)
    return Sharded(model, device, ranks) if fsdp else Replicated(model, device, ranks)
