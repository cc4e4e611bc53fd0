"""The options of a config that change during training. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fdd_kernels.objectives.schedules import NoFormError, Schedule, Stages, WeightSchedule
from fdd_kernels.objectives.taid import TAIDSchedule

if TYPE_CHECKING:  # imports torch
    from fdd_kernels.objectives.gradient_balance import GradientBalance

# The weight of each term that GradientBalance may balance.
WEIGHT_OF_TERM = {
    "output_kd": "output_kd_weight",
    "trajectory": "alpha",
    "derivative": "beta",
    "ce": "ce_weight",
}
# The layers that a term needs among those whose dynamics are compared.
_LAYERS_OF_TERM = {"trajectory": 1, "derivative": 2}
SCHEDULED = (
    *("alpha", "beta", "output_kd_weight", "ce_weight", "teacher_mix"),
    *("temperature", "output_temperature", "derivative_temperature"),
)


class Scheduled:
    """What a config's `schedules`, `stages` and `gradient_balance` say, as new objects.

    Args:
        schedules, stages, gradient_balance: as in `FDDConfig`: objects, their texts, or None.

    Raises:
        TypeError, ValueError: a text of another form, an option that cannot be scheduled or that
            is given twice, an object with a state.

    Example: with `Scheduled("alpha=linear:1,0,0,500", None, None)`, `at(250)` is {"alpha": 0.5}.
    """

    def __init__(
        self,
        schedules: Mapping[str, Schedule] | str | None,
        stages: Stages | str | None,
        gradient_balance: GradientBalance | str | None,
    ) -> None:
        self.schedules = _schedules_of(schedules)
        self.stages = None if stages is None else _fresh("stages", stages, Stages)
        self.balance = None if gradient_balance is None else _balance_of(gradient_balance)
        staged = [] if self.stages is None else list(self.stages.weights)
        if self.stages is not None and not staged:
            raise ValueError(f"stages={str(self.stages)!r} names no option: give each phase one")
        for where, names in (("schedules", self.schedules), ("stages", staged)):
            for name in names:
                if name not in SCHEDULED:
                    raise ValueError(
                        f"{where} names {name!r}, which is not one of {', '.join(SCHEDULED)}"
                    )
        for name in staged:
            if name in self.schedules:
                raise ValueError(f"{name} is in schedules and in stages: leave it out of one")
        self.names = (*self.schedules, *staged)

    @property
    def texts(self) -> dict[str, str | None]:
        """The three options of a config as texts; None where there is nothing."""
        schedules = ";".join(f"{n}={self.schedules[n]}" for n in SCHEDULED if n in self.schedules)
        others = {"stages": self.stages, "gradient_balance": self.balance}
        texts = {name: None if value is None else str(value) for name, value in others.items()}
        return {"schedules": schedules or None} | texts

    @property
    def taid(self) -> TAIDSchedule | None:
        """The schedule of `teacher_mix` that follows the loss."""
        found = self.schedules.get("teacher_mix")
        return found if isinstance(found, TAIDSchedule) else None

    def at(self, step: int) -> dict[str, float]:
        """Return the scheduled options at a step, without GradientBalance's factors; TAID's t is
        its current one.
        """
        found = {} if self.stages is None else self.stages.at(step)
        for name, schedule in self.schedules.items():
            found[name] = schedule.t if schedule is self.taid else schedule.at(step)
        return found

    @property
    def turns(self) -> list[int]:
        """The steps at which an option may become 0 or stop to be 0, or reaches its ends.

        Between two of them every option is monotone, and either 0 or greater than 0.
        """
        steps = {0} if self.stages is None else set(self.stages.begins)
        for schedule in self.schedules.values():
            if isinstance(schedule, WeightSchedule):
                steps |= {schedule.start, schedule.start + 1, schedule.end}
        return sorted(steps)


def _schedules_of(given: Mapping[str, Schedule] | str | None) -> dict[str, Any]:
    if given is None:
        return {}
    if isinstance(given, str):
        pairs = [part.partition("=")[::2] for part in given.split(";")]
        names = [name.strip() for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"schedules={given!r} names an option twice: give each one once")
        if "" in names:
            raise ValueError(
                f"schedules={given!r} has a part without a name: write name=schedule;name=schedule"
            )
        given = dict(zip(names, [text.strip() for _, text in pairs]))
    if not isinstance(given, Mapping):
        raise TypeError(
            f"schedules must be a mapping of names to schedules, or its text, got "
            f"{type(given).__name__}"
        )
    found = {}
    for name, value in given.items():
        is_taid = isinstance(value, TAIDSchedule) or str(value).startswith("taid")
        if is_taid and name != "teacher_mix":
            raise ValueError(
                f"schedules gives {name} a TAIDSchedule, which is for teacher_mix: give a "
                "WeightSchedule"
            )
        kind = TAIDSchedule if is_taid else WeightSchedule
        try:
            found[name] = _fresh(f"schedules: {name}", value, kind)
        except NoFormError as error:
            if name != "teacher_mix" or is_taid:
                raise
            raise ValueError(f"{error}; or a TAIDSchedule: {TAIDSchedule._form}") from None
    return found


def _balance_of(given: GradientBalance | str) -> GradientBalance:
    from fdd_kernels.objectives.gradient_balance import GradientBalance

    balance = _fresh("gradient_balance", given, GradientBalance)
    for term in balance.ratios:
        if term not in WEIGHT_OF_TERM:
            raise ValueError(
                f"gradient_balance={str(balance)!r} names {term!r}, which is not one of "
                f"{', '.join(WEIGHT_OF_TERM)}"
            )
    return balance


def _fresh(name: str, given: Any, kind: type) -> Any:
    """Return a new schedule of the text of `given`."""
    if type(given) not in (str, kind):  # a text does not hold what a subclass changes
        raise TypeError(f"{name} must be a {kind.__name__} or its text, got {type(given).__name__}")
    try:
        made = kind.parse(str(given))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if not isinstance(given, str) and given.state_dict() != made.state_dict():
        raise ValueError(
            f"{name}={given!r} has a state ({given.state_dict()}), which a config does not hold: "
            "give a new schedule, and load its state with distiller.load_state_dict"
        )
    return made


def check_scheduled(config: Any, options: Any) -> Scheduled:
    """Check the schedules of an `FDDConfig` against its other options, and return them.

    Args:
        config: the `FDDConfig`.
        options: its `LossOptions`, without what changes.

    Raises:
        TypeError, ValueError: as `Scheduled`; a value in the config that a schedule would override,
            options that do not go together at some step, a step without a term, a balanced term
            that never has a weight.
    """
    found = Scheduled(config.schedules, config.stages, config.gradient_balance)
    for name in found.names:
        value = getattr(config, name)
        if value != getattr(type(config), name):
            raise ValueError(
                f"{name}={value} was given beside a schedule of {name}, which would override it: "
                "leave one of them out"
            )
    unseen = set(found.balance.ratios) if found.balance else set()
    for step in found.turns if found.names or unseen else ():
        try:
            at_step = replace(options, **found.at(step))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (by the schedule at step {step})") from None
        computed = {t for t in WEIGHT_OF_TERM if at_step.has_term(t)}
        computed -= {t for t, layers in _LAYERS_OF_TERM.items() if config.dynamics_layers < layers}
        if not computed:
            weights = ", ".join(f"{n}={getattr(at_step, n):g}" for n in WEIGHT_OF_TERM.values())
            raise ValueError(
                f"at step {step} the schedule gives {weights} and there are "
                f"{config.dynamics_layers} layers: there is nothing to learn; give one of them a "
                "weight at every step"
            )
        unseen -= computed
    for term in sorted(unseen):
        raise ValueError(
            f"gradient_balance={str(found.balance)!r} names {term}, which has no weight at any "
            f"step: leave it out, or give {WEIGHT_OF_TERM[term]} a weight"
        )
    return found
