"""OptimizerWrapper: a torch optimizer seen through another one, with every manner of torch.optim kept.

Knows hooks, groups, state and checkpoints; nothing of objectives. Parameters, their groups, state and learning rates
belong to the base alone: `Optimizer.load_state_dict` and Accelerate's `prepare` replace those objects in the base, so a
second reference to them would go stale, and with it every learning-rate scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

# The entry of every group that holds our state: nothing else of a state_dict survives in torch.distributed.checkpoint.
# Flattened checkpoints ask the live groups which entries there are, so these have one too: {}, which is never written.
_STATE_KEY = "mogeo"


class OptimizerWrapper(Optimizer):
    """Delegates to `base`. A subclass says what to do before the base steps, and what more there is to save.

    Raises:
        TypeError: `base` is no `torch.optim.Optimizer`, or one that cannot be wrapped.
    """

    #: Attributes that copies and pickles leave behind.
    _transient: tuple[str, ...] = ()

    def __init__(self, base: Optimizer) -> None:
        if isinstance(base, OptimizerWrapper):
            raise TypeError(f"base is a {type(base).__name__} already: wrap the optimizer inside it, base.base")
        if not isinstance(base, Optimizer):
            raise TypeError(f"base is a {type(base).__name__}: pass a torch.optim.Optimizer, such as AdamW")
        if isinstance(base, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS cannot be wrapped: it builds curvature from differences of one function's gradients, and the "
                "shared direction follows another weighted sum at every evaluation. Use a base such as AdamW"
            )
        # Optimizer.__init__ installs the hook tables; what it writes about parameters goes to a stand-in and is
        # forgotten.
        self.base = cast(Optimizer, SimpleNamespace(add_param_group=lambda group: None))
        super().__init__([torch.empty(0)], {})
        self.base = base

    def prepare_step(self) -> bool:
        """Called when the base is about to use gradients: before it steps, and after each evaluation of a closure.

        Returns:
            Whether it is to step.
        """
        return True

    def own_state(self) -> dict[str, Any]:
        """What to save besides the base's state: dicts by strings, lists, strings, numbers, None, and small tensors."""
        return {}

    def check_own_state(self, own: dict[str, Any]) -> None:
        """Raise ValueError if `load_own_state` could not take this."""

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Restore what `own_state` returned, tensors on the CPU; {} where the checkpoint is the bare base's."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base optimizer step, once gradients are ready.

        Args:
            closure: re-evaluates the losses, calls this optimizer's `backward`, and returns a loss.

        Returns:
            What the base optimizer's `step` returns: the closure's value, or None.
        """
        if self.waiting:
            return None
        arguments: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        options: dict[str, Any] = {}
        for hook in list(self._optimizer_step_pre_hooks.values()):
            changed = hook(self, arguments, options)
            if changed is not None:
                arguments, options = changed
        closure = arguments[1] if len(arguments) > 1 else options.get("closure")
        if not self.prepare_step():
            return None
        result: Any = self.base.step() if closure is None else self.base.step(self._preparing(closure))
        for post_hook in list(self._optimizer_step_post_hooks.values()):
            post_hook(self, arguments, options)
        return result

    @property
    def waiting(self) -> bool:
        """Whether `step` and `zero_grad` do nothing, as Accelerate's, if that is the base, before the last batch."""
        return not getattr(getattr(self.base, "gradient_state", None), "sync_gradients", True)

    # Optimizer wraps the step of every class to run hooks, the global ones among them. They run inside base.step()
    # already and would fire twice; so this step counts as wrapped, and runs the hooks of this instance itself.
    step.hooked = True  # type: ignore[attr-defined]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "step" in vars(cls):
            cls.step.hooked = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        """Whatever else the base can do, such as the `train()` and `eval()` of schedule-free optimizers."""
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def _preparing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            value = closure()
            self.prepare_step()
            return value

        return evaluate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `p.grad` of the base optimizer's parameters."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, themselves, each with an entry "mogeo" that announces `own_state`."""
        for group in self.base.param_groups:
            group.setdefault(_STATE_KEY, {})
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's state, itself."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, themselves."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict, with `own_state` as JSON under "mogeo" in each of its groups.

        The bare base optimizer can load it, and `load_state_dict` accepts one of the bare base. Gradients are not part
        of it: save after a step, not in the middle of gradient accumulation.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base.state_dict()
        own = _written(self.own_state())
        state_dict = {**state_dict, "param_groups": [{**g, _STATE_KEY: own} for g in state_dict["param_groups"]]}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or in the bare base optimizer.

        Raises:
            ValueError: it does not fit this optimizer. Nothing is loaded then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = [dict(group) for group in state_dict["param_groups"]]
        entries = [group.pop(_STATE_KEY, {}) for group in groups]
        own = next((_read(entry) for entry in entries if entry), {})
        self.check_own_state(own)
        self.base.load_state_dict({**state_dict, "param_groups": groups})
        self.load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as in torch.optim, and so does `step`, over which schedulers put a wrapper of theirs.
        lost = (*self._transient, "step")
        return {name: value for name, value in vars(self).items() if name not in lost and not name.endswith("_hooks")}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


# One string, because every way of torch to walk a checkpoint takes it whole. Dicts and lists it takes apart: empty ones
# vanish, and of the others only entries are read, or broadcast, that the loading optimizer has too. A new optimizer
# knows no objectives yet.


def _written(own: dict[str, Any]) -> str:
    def tensor_as_lists(value: Any) -> dict[str, Any]:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the weighting's state_dict holds a {type(value).__name__}: return dicts, lists, strings, numbers, "
                "None and tensors"
            )
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}

    return json.dumps(own, default=tensor_as_lists)


def _read(entry: str | dict[str, Any]) -> dict[str, Any]:
    def lists_as_tensor(value: dict[str, Any]) -> Any:
        if value.keys() != {"tensor", "dtype", "shape"}:
            return value
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])

    if isinstance(entry, dict):  # as it was written at first
        return entry
    own: dict[str, Any] = json.loads(entry, object_hook=lists_as_tensor)
    return own
