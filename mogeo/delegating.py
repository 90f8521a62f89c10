"""DelegatingOptimizer: a torch optimizer that owns no parameters, because other optimizers inside it do.

Knows what torch.optim.Optimizer does around `step`, `state_dict` and `load_state_dict`: hooks, and what copies leave
behind. Knows nothing of who the others are. `param_groups`, `state` and `defaults` are properties of the subclass that
ask the others each time: `Optimizer.load_state_dict` and Accelerate's `prepare` replace these objects in the others, so
a second reference would go stale, and with it every learning-rate scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from mogeo.compiled_code import outside_compiled_code


class DelegatingOptimizer(Optimizer):
    """Hooks of its own around `_step`, `_make_state_dict` and `_load`, which a subclass defines."""

    #: Attributes that copies and pickles leave behind.
    _transient: tuple[str, ...] = ()

    def __init__(self) -> None:
        # It makes the hook tables. It also sets param_groups, state and defaults and adds a group: a subclass lets that
        # pass as long as there is no optimizer inside it.
        super().__init__([torch.empty(0)], {})

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        raise NotImplementedError

    def _make_state_dict(self) -> Any:
        raise NotImplementedError

    def _load(self, state_dict: Any) -> None:
        raise NotImplementedError

    @outside_compiled_code
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimizers inside step, between the hooks of this one.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the step returns: the closure's value, or None.
        """
        arguments: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        options: dict[str, Any] = {}
        for hook in list(self._optimizer_step_pre_hooks.values()):
            changed = hook(self, arguments, options)
            if changed is not None:
                arguments, options = changed
        result = self._step(arguments[1] if len(arguments) > 1 else options.get("closure"))
        for post_hook in list(self._optimizer_step_post_hooks.values()):
            post_hook(self, arguments, options)
        return result

    # Optimizer wraps the step of every class to run hooks, the global ones among them. Those run in the steps of the
    # optimizers inside already and would fire twice; so this step counts as wrapped, and runs the hooks of this
    # instance itself.
    step.hooked = True  # type: ignore[attr-defined]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "step" in vars(cls):
            cls.step.hooked = True  # type: ignore[attr-defined]

    def state_dict(self) -> Any:
        """What to save, between the hooks for it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._make_state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: Any) -> None:
        """Load what `state_dict` returned, between the hooks for it."""
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()  # hooks may change it, as in torch.optim
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as in torch.optim, and so does `step`, over which schedulers put a wrapper of theirs.
        lost = (*self._transient, "step")
        return {name: value for name, value in vars(self).items() if name not in lost and not name.endswith("_hooks")}
