"""OptimizerWrapper: a torch optimizer seen through another one, with every manner of torch.optim kept.

Knows groups, state, checkpoints, and proxies that other libraries put around optimizers; nothing of objectives.
Parameters, their groups, state and learning rates belong to the base alone.
"""

from __future__ import annotations

import base64
import json
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mogeo.compiled_code import outside_compiled_code
from mogeo.delegating import DelegatingOptimizer
from mogeo.several_bases import SeveralBases, unprepared
from mogeo.unsuitable_bases import refuse_unsuitable
from mogeo.user_warnings import warn_user

# The entry of every group that holds our state: nothing else of a state_dict survives in torch.distributed.checkpoint.
# Flattened checkpoints ask the live groups which entries there are, so these have one too: {}, which is never written.
# A state_dict without groups has this entry itself.
_STATE_KEY = "mogeo"

# Where a state_dict that is no dict goes, beside our own state.
_BASE_KEY = "mogeo.base"


class OptimizerWrapper(DelegatingOptimizer):
    """Delegates to `base`. A subclass says what to do before the base steps, and what more there is to save.

    Args:
        base: the optimizer to wrap; or several of them over the parameters of one model, each parameter in one, which
            then are `base.bases` (`mogeo.several_bases.SeveralBases`).

    Raises:
        TypeError: `base` is no `torch.optim.Optimizer`, or one that cannot be wrapped.
        ValueError: `base` is empty, or several bases share a parameter.
    """

    def __init__(self, base: Optimizer | Sequence[Optimizer]) -> None:
        whole: object = SeveralBases(base) if isinstance(base, (list, tuple)) else base
        if not isinstance(whole, Optimizer):
            raise TypeError(f"base is a {type(whole).__name__}: pass a torch.optim.Optimizer, such as AdamW")
        for one in _each(whole):
            if isinstance(one, OptimizerWrapper):
                raise TypeError(f"base is a {type(one).__name__} already: wrap the optimizer inside it, base.base")
            refuse_unsuitable(one)
        self._original = weakref.ref(self)
        self._told: set[str] = set()
        # What Optimizer.__init__ writes about parameters goes to a stand-in and is forgotten.
        self.base = cast(Optimizer, SimpleNamespace(add_param_group=lambda group: None))
        super().__init__()
        self.base = whole

    # ----------------------------------------------------------------------------------------------------------------
    # What a subclass defines

    def prepare_step(self) -> bool:
        """Called when the base is about to use gradients: before it steps, and after each evaluation of a closure.

        Returns:
            Whether it is to use them. If not, the base does not step: no hook runs, and nothing decays.
        """
        return True

    @property
    def has_prepared(self) -> bool:
        """Whether `prepare_step` ever had something to prepare, be it a step that it then left out."""
        return True

    def own_state(self) -> dict[str, Any]:
        """What to save besides the base's state: dicts by strings, lists, strings, numbers, None, and small tensors."""
        return {}

    def check_own_state(self, own: dict[str, Any]) -> None:
        """Raise ValueError if `load_own_state` could not take this."""

    def load_own_state(self, own: dict[str, Any]) -> None:
        """Restore what `own_state` returned, tensors on the CPU; {} where the checkpoint is the bare base's."""

    # ----------------------------------------------------------------------------------------------------------------
    # Steps

    @outside_compiled_code
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base optimizer step, once gradients are ready.

        Hooks find them in `p.grad`, those registered here as well as the base's and the global ones. (With a closure,
        they find there what there is before it runs.)

        Args:
            closure: re-evaluates the losses, calls this optimizer's `backward`, and returns a loss.

        Returns:
            What the base optimizer's `step` returns: the closure's value, or None.
        """
        if self.waiting:
            return None
        return super().step(closure) if self.prepare_step() else None

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            self._tell_of_missing_gradients(None)
            return self.base.step()
        evaluated = closure

        def prepared() -> Any:
            before = self._gradients()
            value = evaluated()
            if not self.prepare_step():
                hidden.extend(self._hidden_gradients())
            self._tell_of_missing_gradients(before)
            return value

        hidden: list[tuple[Tensor, Tensor]] = []
        try:
            return self.base.step(prepared)
        finally:
            for parameter, grad in hidden:
                if parameter.grad is None:  # a later evaluation of the closure may have been of use
                    parameter.grad = grad

    def _hidden_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Take every gradient away, so that a base in the middle of its step moves nothing; what was taken."""
        parameters = [parameter for group in self.base.param_groups for parameter in group["params"]]
        taken = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in taken:
            parameter.grad = None
        return taken

    def _tell_of_missing_gradients(self, before_closure: list[tuple[int, int] | None] | None) -> None:
        """Warn, once, of a step that trains nothing, or of a closure whose gradients go past this optimizer.

        A step after a plain `loss.backward()` is one like the base's own, and meant: nothing is said. Lightning gives
        every step a closure, so it counts whether the closure changed the gradients.

        Args:
            before_closure: `_gradients()` as it was before the closure ran; None if there is no closure.
        """
        if self.has_prepared or "missing gradients" in self._told:
            return
        gradients = self._gradients()
        if all(gradient is None for gradient in gradients):
            problem = (
                "step() found no gradient on any parameter, and nothing that backward() was handed: no parameter moves"
            )
        elif before_closure is not None and gradients != before_closure:
            problem = (
                "the closure of step() left gradients that did not come through this optimizer's backward(), so the "
                "step follows them as they are and balances nothing"
            )
        else:
            return
        self._told.add("missing gradients")
        warn_user(
            f"{problem}. Call backward(losses) of this optimizer after zero_grad() and before step(), or in the "
            "closure; in Lightning that takes manual optimization, self.automatic_optimization = False",
            RuntimeWarning,
        )

    def _gradients(self) -> list[tuple[int, int] | None]:
        """Which gradient each parameter has, and how often it was written to; [] once that is of no interest."""
        if self.has_prepared or "missing gradients" in self._told:
            return []
        parameters = (parameter for group in self.base.param_groups for parameter in group["params"])
        return [None if p.grad is None else (id(p.grad), p.grad._version) for p in parameters]

    @property
    def waiting(self) -> bool:
        """Whether `step` and `zero_grad` do nothing, as Accelerate's, if that is the base, before the last batch."""
        states = (getattr(base, "gradient_state", None) for base in _each(self.base))
        return not all(getattr(state, "sync_gradients", True) for state in states)

    @outside_compiled_code
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `p.grad` of the base optimizer's parameters."""
        self.base.zero_grad(set_to_none=set_to_none)

    # ----------------------------------------------------------------------------------------------------------------
    # Attributes

    def __getattr__(self, name: str) -> Any:
        """Whatever else the base can do, such as the `train()` and `eval()` of schedule-free optimizers."""
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, on the optimizer itself even where `self` is a proxy of it.

        Lightning and Fabric hand out proxies whose class inherits from the optimizer's: methods run with the proxy as
        `self`, read from the optimizer what the proxy lacks, and would write to the proxy, unseen by the optimizer. So
        what the optimizer has, it keeps; what it does not know, and methods that are put in the place of others, belong
        to the proxy.
        """
        original = getattr(self, "_original", lambda: None)()
        belongs_here = original is None or original is self
        if not belongs_here and name in vars(original) and not callable(getattr(type(self), name, None)):
            setattr(original, name, value)
            if name not in vars(self):  # a proxy that began as a copy holds both
                return
        super().__setattr__(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. With several bases, call `add_param_group` of one of `base.bases`."""
        self.base.add_param_group(param_group)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, themselves, each with an entry "mogeo" that announces `own_state`."""
        groups = self.base.param_groups
        for group in groups:
            group.setdefault(_STATE_KEY, {})
        return groups

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

    # ----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict, with `own_state` as JSON under "mogeo".

        In torch's own form, {"state", "param_groups"}, each group has that entry: the bare base optimizer can load it.
        A dict of another form has the entry itself, and whatever is no dict becomes {"mogeo": ..., "mogeo.base": ...}.
        With several bases it is torch's form over all of them (`SeveralBases`).

        `load_state_dict` accepts what the bare base saved, in any of these forms. Gradients are not part of it: save
        after a step, not in the middle of gradient accumulation.
        """
        state_dict: dict[str, Any] = super().state_dict()
        return state_dict

    def _make_state_dict(self) -> dict[str, Any]:
        state_dict = self.base.state_dict()
        own = {**self.own_state(), "group_kinds": self._group_kinds()}
        written = _written(own)
        if not isinstance(state_dict, dict):
            return {_STATE_KEY: written, _BASE_KEY: state_dict}
        if _has_groups(state_dict):
            return {**state_dict, "param_groups": [{**g, _STATE_KEY: written} for g in state_dict["param_groups"]]}
        return {**state_dict, _STATE_KEY: written}

    def load_state_dict(self, state_dict: Any) -> None:
        """Load what `state_dict` returned, here or in the bare base optimizer.

        Raises:
            ValueError: it does not fit this optimizer. Nothing is loaded then.
        """
        super().load_state_dict(state_dict)

    def _load(self, state_dict: Any) -> None:
        own: dict[str, Any] = {}
        if _has_groups(state_dict):
            groups = [dict(group) for group in state_dict["param_groups"]]
            entries = [group.pop(_STATE_KEY, {}) for group in groups]
            own = next((_read(entry) for entry in entries if entry), {})
            state_dict = {**state_dict, "param_groups": groups}
        elif isinstance(state_dict, dict) and _STATE_KEY in state_dict:
            own = _read(state_dict[_STATE_KEY])
            state_dict = {name: value for name, value in state_dict.items() if name != _STATE_KEY}
            state_dict = state_dict.get(_BASE_KEY, state_dict)
        kinds = own.pop("group_kinds", None)
        if kinds is not None:
            self._check_kinds(kinds)
        self.check_own_state(own)
        self.base.load_state_dict(state_dict)
        self.load_own_state(own)

    def _check_kinds(self, saved: list[str]) -> None:
        """Raise ValueError if the groups of several bases, there or here, were stepped by other optimizers than here.

        From one base to one, of any kinds, torch's own rules are enough.
        """
        here = self._group_kinds()
        several = isinstance(self.base, SeveralBases) or len(set(saved)) > 1
        if several and saved != here:
            raise ValueError(
                f"the state was saved for groups of {saved}, and they belong to {here} here: make the same bases, in "
                "the same order"
            )

    def _group_kinds(self) -> list[str]:
        """The class that steps each group."""
        if isinstance(self.base, SeveralBases):
            return self.base.group_kinds
        return [type(unprepared(self.base)).__name__] * len(self.base.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_original", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._original = weakref.ref(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def _each(base: Optimizer) -> tuple[Optimizer, ...]:
    return base.bases if isinstance(base, SeveralBases) else (base,)


def _has_groups(state_dict: Any) -> bool:
    """Whether a state_dict has torch's form, with groups to put an entry into."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    return isinstance(groups, (list, tuple)) and bool(groups) and all(isinstance(group, dict) for group in groups)


# One string, because every way of torch to walk a checkpoint takes it whole. Dicts and lists it takes apart: empty ones
# vanish, and of the others only entries are read, or broadcast, that the loading optimizer has too. A new optimizer
# knows no objectives yet.


_AS_NUMBERS = 1024  # elements up to which a tensor is written as numbers; beyond, its bytes take a quarter of the room


def _written(own: dict[str, Any]) -> str:
    def tensor_as_text(value: Any) -> dict[str, Any]:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the weighting's state_dict holds a {type(value).__name__}: return dicts, lists, strings, numbers, "
                "None and tensors"
            )
        dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
        if value.numel() <= _AS_NUMBERS:
            return {"tensor": value.tolist(), "dtype": dtype, "shape": shape}
        data = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return {"bytes": base64.b64encode(data).decode("ascii"), "dtype": dtype, "shape": shape}

    return json.dumps(own, default=tensor_as_text)


def _read(entry: str | dict[str, Any]) -> dict[str, Any]:
    def text_as_tensor(value: dict[str, Any]) -> Any:
        if value.keys() == {"tensor", "dtype", "shape"}:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
        if value.keys() == {"bytes", "dtype", "shape"}:
            data = torch.frombuffer(bytearray(base64.b64decode(value["bytes"])), dtype=torch.uint8)
            return data.view(getattr(torch, value["dtype"])).reshape(value["shape"])
        return value

    if isinstance(entry, dict):  # as it was written at first
        return entry
    own: dict[str, Any] = json.loads(entry, object_hook=text_as_tensor)
    return own
