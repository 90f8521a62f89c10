"""State of an optimizer that changes from step to step, in one object that is changed and never replaced.

Proxies of other frameworks copy an optimizer's attributes (Lightning, Fabric): what is bound anew on the original would
stay old in the copy. So an optimizer binds this object once, and everything that moves lies in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mogeo.decide.evidence import Evidenced
from mogeo.decide.harmless import Harmless
from mogeo.decide.late_news import News
from mogeo.decide.refresh import HeldWeights
from mogeo.decide.rules import Decision, Direction, Rules
from mogeo.decide.steering import Steered, Steering
from mogeo.geometry.constants import constant_tensor
from mogeo.geometry.tracking import Decay, MeanGradients
from mogeo.gradients.ranks import Group
from mogeo.gradients.stores import Captures
from mogeo.losses.named import in_order
from mogeo.report import StepReport
from mogeo.settings import keywords_of, plain_value
from mogeo.steps.step import Step
from mogeo.user_warnings import warn_user
from mogeo.weightings import Weighting, as_weighting

# Settings on which the weights of a solve depend.
_DECIDING = ("preference", "min_weight", "smoothing", "guarantee_descent", "track", "weigh_by")

# Lost in copies and pickles: gradients, and what else belongs to the step under way.
_OF_THE_STEP = ("captures", "news", "step", "unusable")


class State:
    """What an optimizer remembers from one step to the next, and of the step under way.

    Args:
        weighting: the resolved weighting.
        objectives: names in order, or None until the first `backward`.
        settings: what the user set, by the names of the optimizer's attributes.
        process_group: that holds the model, or None for all processes.

    Attributes:
        captures: where gradients are caught.
        step: the step under way, or None.
        unusable: whether nothing could take part in the last step, and the base optimizer must leave it out.
        report: of the last step.
        tracked: averages of gradients over steps, if the user wants them.
        held: weights between solves.
        news: what the user must hear.
        nonfinite_counts: int64 [K].
        absent_counts: int64 [K].
    """

    def __init__(
        self,
        weighting: Callable[..., Any],
        objectives: tuple[str, ...] | None,
        settings: dict[str, Any],
        process_group: Group | None,
    ) -> None:
        self.weighting = weighting
        self.objectives = objectives
        self.settings = settings
        self.process_group = process_group
        self.held = HeldWeights(settings["refresh_every"])
        self.report: StepReport | None = None
        self._steering: Steering | None = None  # once objectives have an order
        self.tracked: MeanGradients | None = None
        self.tracked = self._tracked_with(settings["track"])
        self.news = News()
        self.begin_counting()
        self.forget_step()

    def forget_step(self) -> None:
        """Give back all memory for gradients; the next `backward` makes it anew."""
        self.captures = Captures()
        self.news = News(warned=self.news.warned)
        self.step: Step | None = None
        self.unusable = False

    def drop_step(self) -> None:
        """Nothing is captured any more, and nothing due."""
        self.step = None
        self.unusable = False
        self.captures.drop()

    def forget_objectives(self) -> None:
        """The call that named the objectives failed: the next one names them."""
        self.objectives = None
        self._steering = None
        self.begin_counting()

    def begin_counting(self) -> None:
        """No step has left out anybody yet."""
        count = len(self.objectives or ())
        self.nonfinite_counts = torch.zeros(count, dtype=torch.int64)
        self.absent_counts = torch.zeros(count, dtype=torch.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the objectives, once they are known."""
        assert self.objectives is not None
        return self.objectives

    # rules

    def rules(self) -> Rules:
        """What decides a step, as settings are now.

        Raises:
            ValueError: the preference or the floor does not fit the objectives.
        """
        settings = self.settings
        weighting = as_weighting(self.weighting)
        if settings["preference"] is not None or settings["min_weight"] or settings["smoothing"]:
            if self._steering is None:
                self._steering = self._new_steering()
            weighting = Steered(weighting, self._steering)
        by_means = settings["weigh_by"] == "mean"
        if self.tracked is not None and by_means and weighting.needs_gram:
            preference = None if settings["preference"] is None else in_order(settings["preference"], self.names)
            weighting = Evidenced(weighting, self.tracked, preference)
        if settings["guarantee_descent"]:
            weighting = Harmless(weighting)
        return Rules(
            self.names, weighting, settings["nonfinite"], settings["max_grad_norm"], settings["gram_by_parameter"],
            self.tracked, by_means,
        )  # fmt: skip

    def _new_steering(self, before: Steering | None = None, names: tuple[str, ...] | None = None) -> Steering:
        preference, floor, smoothing = (self.settings[name] for name in ("preference", "min_weight", "smoothing"))
        in_names_order = None if preference is None else in_order(preference, names or self.objectives)
        return Steering(in_names_order, floor, smoothing, None if before is None else before.remembered)

    def change(self, name: str, value: Any) -> None:
        """Change a setting, or "weighting", from the next step on. What earlier steps left that does not suit is
        forgotten.

        Raises:
            RuntimeError: gradients captured for the step under way do not suit. Nothing is changed then.
            ValueError: the value does not fit the objectives. Nothing is changed then.
        """
        if value is self.weighting if name == "weighting" else value == self.settings[name]:
            return
        before = (self.weighting, dict(self.settings), self._steering, self.tracked)
        if name == "weighting":
            self.weighting, self._steering = value, None
        else:
            self.settings[name] = value
            if name == "track":
                self.tracked = self._tracked_with(value)
            if name in ("preference", "min_weight", "smoothing") and self._steering is not None:
                self._steering = self._new_steering(self._steering if self.settings["smoothing"] > 0 else None)
        try:
            self._check_step(name, value, before[0])
        except BaseException:
            self.weighting, settings, self._steering, self.tracked = before
            self.settings.update(settings)
            raise
        if name == "refresh_every":
            self.held.refresh_every = value
        elif name in ("weighting", *_DECIDING) and not (name == "weigh_by" and self.tracked is None):
            self.held.forget()

    def _tracked_with(self, decay: Decay | None) -> MeanGradients | None:
        if decay is None or self.tracked is None:
            return None if decay is None else MeanGradients(decay)
        return self.tracked.with_decay(decay)

    def _check_step(self, name: str, value: object, weighting: object) -> None:
        """Raise where the step under way has gone too far for a change."""
        if self.objectives is None:
            return
        constant = self.rules().constant()
        if self.step is None or name in ("refresh_every", "nonfinite", "max_grad_norm", "weigh_by"):
            return
        if name == "memory":
            raise RuntimeError(
                "gradients are captured already in another way than memory= now says: change it after step() or "
                "zero_grad()"
            )
        if self.step.weights != constant:
            raise RuntimeError(
                f"gradients captured for {weighting!r} do not suit {value!r} as {name}: they are summed with other "
                "weights than it asks for, or kept apart where it needs one sum. Change it after step() or zero_grad()"
            )

    def reported(self, step: Step, found: Direction, groups: Sequence[Mapping[str, Any]]) -> StepReport:
        """The report of a step, with which counters and held weights go on.

        Args:
            step: as it was finished.
            found: what came of it.
            groups: of the base optimizer.
        """
        decided, absent = found.decision, step.absent(len(self.names))
        device, mean = decided.weights.device, decided.mean
        if step.held and self.tracked is not None and self.tracked.estimate is not None:
            mean = self.tracked.estimate.to(device)
        self._go_on(step, decided, absent)
        parameters: tuple[str, ...] = ()
        if found.gram_by_parameter is not None:
            parameters = _names_of(self.captures.direction.parameters, groups)
        return StepReport(
            objectives=self.names,
            losses=decided.losses,
            weights=decided.weights,
            gram=decided.gram,
            squared_norm=found.squared_norm,
            clip_factor=found.clip_factor,
            nonfinite=decided.nonfinite,
            absent=constant_tensor(absent, torch.bool, device).clone(),  # the report is the user's
            nonfinite_counts=self.nonfinite_counts.clone(),
            absent_counts=self.absent_counts.clone(),
            optimality_gap=decided.gap,
            status=decided.status,
            correction=decided.correction,
            correction_status=decided.correction_status,
            parameters=parameters,
            gram_by_parameter=found.gram_by_parameter,
            age=self.held.age if step.held else 0,
            mean=mean,
        )

    def _go_on(self, step: Step, decided: Decision, absent: tuple[bool, ...]) -> None:
        """Count who was left out of a step, and hold its weights if it solved for them."""
        device = decided.weights.device
        flags = constant_tensor(absent, torch.bool, device)
        if step.held:
            self.held.used()
        elif decided.usable and not decided.poisoned and step.weights is None:
            self.held.solved(decided.weights, ~(flags | decided.nonfinite))
        if self.tracked is not None and decided.mean is not None and decided.usable and not self.tracked.take_over():
            meanwhile = "weights are those of the preference, or equal"
            if self.settings["weigh_by"] != "mean":
                meanwhile = "reports cannot tell of mean gradients"
            warn_user(
                "averages of gradients over steps (track=) begin anew, since parameters, their shards, or memory= are "
                f"not what they were: until there are some steps again, {meanwhile}"
            )
        if self.nonfinite_counts.device != device:
            self.nonfinite_counts = self.nonfinite_counts.to(device)
            self.absent_counts = self.absent_counts.to(device)
        self.nonfinite_counts += decided.nonfinite
        if any(absent):
            self.absent_counts += flags

    # what is saved

    def _saved_settings(self) -> dict[str, Any]:
        settings = {**self.settings, **keywords_of(self.settings["memory"])}
        del settings["memory"]
        return {name: plain_value(value) for name, value in settings.items()}

    def state_dict(self) -> dict[str, Any]:
        """Objectives, counters, settings, held and smoothed weights, and the weighting's kind and state."""
        return {
            "objectives": list(self.objectives or ()),
            "nonfinite_counts": self.nonfinite_counts.tolist(),
            "absent_counts": self.absent_counts.tolist(),
            "weighting_kind": type(self.weighting).__name__,
            "weighting_name": _name_of(self.weighting),
            "weighting": as_weighting(self.weighting).state_dict(),
            "held": self.held.state_dict(),
            "tracked": {} if self.tracked is None else self.tracked.state_dict(),
            "steering": None if self._steering is None else self._steering.state_dict(),
            "settings": self._saved_settings(),
        }

    def check(self, own: dict[str, Any]) -> None:
        """Raise ValueError if the state was saved for other objectives."""
        saved = tuple(own.get("objectives", ()))
        if saved and self.objectives is not None and saved != self.objectives:
            raise ValueError(
                f"the state was saved for the objectives {list(saved)}, but this one has {list(self.objectives)}. "
                f"Make it with objectives={list(saved)}, or load into its base to drop the weighting's state"
            )
        if saved:
            self._new_steering(names=saved).constant(as_weighting(self.weighting), len(saved))

    def load_state_dict(self, own: dict[str, Any]) -> None:
        """Restore objectives, counters, held weights and the weighting's state; drop gradients captured so far.

        Settings stay as they are here; where others were saved, a warning says so. Held weights are those of the
        settings that they were solved under: under others, the next step solves.
        """
        self.forget_step()
        self.held.forget()
        if self.tracked is not None:
            self.tracked.forget()
        self._steering = None
        if not own.get("objectives"):
            return
        self.objectives = tuple(own["objectives"])
        self.begin_counting()
        for counts, saved in ((self.nonfinite_counts, "nonfinite_counts"), (self.absent_counts, "absent_counts")):
            for k, count in enumerate(own.get(saved, ())):
                counts[k] = int(count)
        if self.tracked is not None and own.get("tracked"):
            self.tracked.load_state_dict(own["tracked"])
        kind = type(self.weighting).__name__
        if own["weighting_kind"] == kind:
            as_weighting(self.weighting).load_state_dict(own["weighting"])
        elif own["weighting"]:
            warn_user(f"the state of a {own['weighting_kind']} was saved, and is not loaded into a {kind}")
        name, here = own.get("weighting_name", own["weighting_kind"]), _name_of(self.weighting)
        held, steering = own.get("held") or {}, own.get("steering") or {}
        settings, saved_settings = self._saved_settings(), {"weigh_by": "mean", **own.get("settings", {})}
        others = {key: value for key, value in saved_settings.items() if settings.get(key, value) != value}
        if name in (here, kind):
            self.rules()  # makes the steering, if there is one
            if held and others.keys().isdisjoint(_DECIDING):
                self.held.load_state_dict(held)
            if steering and self._steering is not None:
                self._steering.load_state_dict(steering)
        elif held.get("weights") or steering.get("weights"):
            warn_user(
                f"the state was saved under {name}: weights that it held or remembered are not loaded under {here}"
            )
        if others:
            saved = ", ".join(f"{key}={value!r}" for key, value in others.items())
            warn_user(f"the state was saved with {saved}; this optimizer keeps its own settings")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_STEP}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.news = News()
        self.forget_step()


def _names_of(parameters: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The names that groups give parameters (torch keeps them from `named_parameters`), or "group.position"."""
    names: dict[int, str] = {}
    for number, group in enumerate(groups):
        given = group.get("param_names") or [f"{number}.{at}" for at in range(len(group["params"]))]
        names |= {id(parameter): name for parameter, name in zip(group["params"], given, strict=True)}
    return tuple(names.get(id(parameter), "removed") for parameter in parameters)


def _name_of(weighting: object) -> str:
    """What a weighting is called in a checkpoint: equal for equal weightings, and of a function only its name."""
    return (
        repr(weighting)
        if isinstance(weighting, Weighting)
        else getattr(weighting, "__qualname__", type(weighting).__name__)
    )
