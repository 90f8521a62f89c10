"""SeveralBases: several torch optimizers that share the parameters of one model, used as one optimizer.

Muon for matrices and AdamW for the rest is the common case. Knows torch.optim and nothing of objectives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mogeo.delegating import DelegatingOptimizer


class SeveralBases(DelegatingOptimizer):
    """`bases` as one optimizer: groups and state of all of them, one step after the other.

    `param_groups` are the groups of the first base, then those of the second, and so on: the very same dicts, so a
    learning-rate scheduler may be made for this optimizer or for one of its bases.

    Attributes:
        bases: the optimizers, in order.

    Raises:
        TypeError: an entry is no `torch.optim.Optimizer`.
        ValueError: there is none, or a parameter belongs to two of them.
    """

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        if not bases:
            raise ValueError("base is empty: pass at least one torch.optim.Optimizer")
        for index, base in enumerate(bases):
            if not isinstance(base, Optimizer):
                raise TypeError(f"base[{index}] is a {type(base).__name__}: pass torch.optim.Optimizers, such as AdamW")
        self.bases: tuple[Optimizer, ...] = ()
        super().__init__()
        self.bases = tuple(bases)
        self._check_parameters()

    def _check_parameters(self) -> None:
        owners: dict[Tensor, int] = {}
        for index, base in enumerate(self.bases):
            for parameter in _parameters(base):
                if parameter in owners:
                    first = owners[parameter]
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is in two bases, "
                        f"{type(self.bases[first]).__name__} (bases[{first}]) and {type(base).__name__} "
                        f"(bases[{index}]), and would be stepped twice: leave it out of one"
                    )
                owners[parameter] = index
        self._groups_checked = sum(len(base.param_groups) for base in self.bases)

    @property
    def group_kinds(self) -> list[str]:
        """For each group, the name of the class of the base that it belongs to."""
        return [type(unprepared(base)).__name__ for base in self.bases for _ in base.param_groups]

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        """The first base evaluates the closure; the others follow the gradients that it left."""
        first, *others = self.bases
        result: Any = first.step() if closure is None else first.step(closure)
        for base in others:
            base.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `p.grad` of the parameters of every base."""
        for base in self.bases:
            base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a group does not say which base it is for.

        Raises:
            ValueError: always.
        """
        if self.bases:
            listed = " or ".join(f"bases[{k}] ({type(base).__name__})" for k, base in enumerate(self.bases))
            raise ValueError(
                f"add the group to one of the bases, {listed}: optimizer.base.bases[0].add_param_group(group)"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all bases, themselves, in a new list."""
        groups = [group for base in self.bases for group in base.param_groups]
        if self.bases and len(groups) != self._groups_checked:  # somebody added one, perhaps of another's parameters
            self._check_parameters()
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for base, own in zip(self.bases, self._split(groups), strict=True):
            base.param_groups = own

    @property
    def state(self) -> Any:
        """The state of all bases, by parameter: a mapping that reads from theirs and writes to theirs."""
        return _StateOfAll(self.bases)

    @state.setter
    def state(self, state: Any) -> None:
        if not self.bases:
            return
        divided = _StateOfAll(self.bases)
        emptied: list[defaultdict[Any, Any]] = [defaultdict(dict) for _ in self.bases]
        for key, value in state.items():
            emptied[divided.owner(key)][key] = value
        for base, own in zip(self.bases, emptied, strict=True):
            base.state = own

    @property
    def defaults(self) -> dict[str, Any]:
        """Those defaults that every base has, with the first one's values.

        Schedulers ask here whether groups have a momentum, or betas, to cycle: one of them only if every group has it.
        """
        if not self.bases:
            return {}
        first, *others = (base.defaults for base in self.bases)
        return {name: value for name, value in first.items() if all(name in other for other in others)}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        for base in self.bases:
            base.defaults = {name: defaults.get(name, value) for name, value in base.defaults.items()}

    def _make_state_dict(self) -> dict[str, Any]:
        """In torch's own form, {"state": by number of the parameter, "param_groups": of all bases}.

        Parameters are numbered through all bases. A base whose state_dict has a form of its own leads to
        {"bases": [the state_dict of each]}.
        """
        states = [base.state_dict() for base in self.bases]
        if not all(isinstance(state, dict) and state.keys() == {"state", "param_groups"} for state in states):
            return {"bases": states}
        packed: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        count = 0
        for index, state in enumerate(states):
            old_numbers = [number for group in state["param_groups"] for number in group["params"]]
            new_numbers = {old: count + k for k, old in enumerate(old_numbers)}
            count += len(old_numbers)
            for key, value in state["state"].items():
                # What belongs to no parameter keeps its name, with the base that it came from.
                packed[new_numbers.get(key, (index, key))] = value
            for group in state["param_groups"]:
                groups.append({**group, "params": [new_numbers[old] for old in group["params"]]})
        return {"state": packed, "param_groups": groups}

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: groups do not match those here. Nothing is loaded then.
        """
        if "bases" in state_dict:
            states = state_dict["bases"]
            if len(states) != len(self.bases):
                raise ValueError(f"the state of {len(states)} bases was saved, and there are {len(self.bases)} here")
        else:
            states = self._states_of_each(state_dict)
        for base, state in zip(self.bases, states, strict=True):
            base.load_state_dict(state)

    def _states_of_each(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        groups = state_dict["param_groups"]
        saved, here = ([len(group["params"]) for group in those] for those in (groups, self.param_groups))
        if saved != here:
            names = ", ".join(
                f"{type(base).__name__} with groups of {[len(group['params']) for group in base.param_groups]}"
                for base in self.bases
            )
            raise ValueError(
                f"the state was saved for groups of {saved} parameters, and does not fit the bases here: {names}. Make "
                "the same bases over the same parameters, in the same order"
            )
        states = []
        for index, own in enumerate(self._split(groups)):
            numbers = {number for group in own for number in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in numbers}
            for key, value in state_dict["state"].items():
                if isinstance(key, tuple) and key[0] == index:
                    state[key[1]] = value
            states.append({"state": state, "param_groups": own})
        return states

    def _split(self, groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """As many groups for each base as it has."""
        counts = [len(base.param_groups) for base in self.bases]
        if sum(counts) != len(groups):
            raise ValueError(f"got {len(groups)} groups for bases that have {counts}")
        rest = iter(groups)
        return [[next(rest) for _ in range(count)] for count in counts]

    def __getattr__(self, name: str) -> Any:
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        if not name.startswith("_"):
            for index, base in enumerate(vars(self).get("bases", ())):
                if hasattr(base, name):
                    raise AttributeError(f"{message}: ask the base that has it, optimizer.base.bases[{index}].{name}")
        raise AttributeError(message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.bases))})"


class _StateOfAll(MutableMapping[Any, Any]):
    """`optimizer.state` over several bases. A parameter without state yet gets an empty one, as in torch.optim."""

    def __init__(self, bases: tuple[Optimizer, ...]) -> None:
        self._bases = bases
        self._owners: dict[Tensor, int] | None = None

    def owner(self, key: Any) -> int:
        """Index of the base that a parameter, or an entry that is there already, belongs to."""
        for index, base in enumerate(self._bases):
            if key in base.state:
                return index
        if self._owners is None:
            self._owners = {p: index for index, base in enumerate(self._bases) for p in _parameters(base)}
        if not isinstance(key, Tensor) or key not in self._owners:
            raise KeyError(key)
        return self._owners[key]

    def __getitem__(self, key: Any) -> Any:
        return self._bases[self.owner(key)].state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._bases[self.owner(key)].state[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._bases[self.owner(key)].state[key]

    # The next three make nothing for a parameter without state, like those of a defaultdict.

    def get(self, key: Any, default: Any = None) -> Any:
        return self._bases[self.owner(key)].state[key] if key in self else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __contains__(self, key: object) -> bool:
        return any(key in base.state for base in self._bases)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(base.state for base in self._bases)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)})"


def unprepared(base: Optimizer) -> Optimizer:
    """The optimizer that `accelerator.prepare` was given; `base` where it did not come from there."""
    inner: Optimizer = base.optimizer if hasattr(base, "gradient_state") and hasattr(base, "optimizer") else base
    return inner


def _parameters(base: Optimizer) -> list[Tensor]:
    return [parameter for group in base.param_groups for parameter in group["params"]]
