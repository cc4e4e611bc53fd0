"""Weights that change during training: plain objects with a text and a state that JSON can hold.

Imports no torch: the command line parses their texts before it does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdd_kernels.objectives.option_checks import require_choice, require_int, require_number


class Schedule:
    """What all schedules share: a text, and a state.

    `str(schedule)` is a text of its arguments and `parse` makes a schedule of it. Schedules of one
    text are equal; the state has no part in that. A schedule that loads another's state continues
    with the same numbers, bit for bit, if both were made with the same arguments.
    """

    _state: tuple[str, ...] = ("step",)
    _form: str  # of the text, for errors
    step: int = 0

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Make a schedule from its text.

        Raises:
            TypeError, ValueError: no such text, or a number out of range.
        """
        try:
            return cls._of(text)
        except NoFormError:
            raise NoFormError(f"{text!r} is no {cls.__name__}: write {cls._form}") from None

    @classmethod
    def _of(cls, text: str) -> Schedule:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash((type(self), str(self)))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings, lists and dictionaries."""
        found = {name: getattr(self, name) for name in self._state}
        return {k: dict(v) if isinstance(v, dict) else v for k, v in found.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Raises:
            ValueError: a state of another kind of schedule.
        """
        if set(state) != set(self._state):
            raise ValueError(
                f"the state has {sorted(state)}, but {type(self).__name__} has "
                f"{sorted(self._state)}: it is of another schedule"
            )
        for name, value in state.items():
            setattr(self, name, dict(value) if isinstance(value, Mapping) else value)


class NoFormError(ValueError):
    """A text that is not of a schedule's form."""


def as_number(text: str, kind: Callable[[str], Any] = float) -> Any:
    """Parse a number in the text of a schedule."""
    try:
        return kind(text)
    except ValueError:
        raise NoFormError from None


def as_numbers(text: str) -> dict[str, float]:
    """Parse "name=number,name=number"."""
    pairs = [part.partition("=") for part in text.split(",")] if text.strip() else []
    found = {name.strip(): as_number(value) for name, _, value in pairs}
    if len(found) < len(pairs) or "" in found:
        raise NoFormError
    return found


def number_text(value: float) -> str:
    """Write a number in the shortest way that `as_number` parses to the same bits."""
    return repr(float(value)).removesuffix(".0")


def numbers_text(values: Mapping[str, float]) -> str:
    """Write numbers as `as_numbers` parses them, by name: the same for the same numbers."""
    return ",".join(f"{name}={number_text(value)}" for name, value in sorted(values.items()))


class WeightSchedule(Schedule):
    """A weight that goes from `initial` at step `start` to `final` at step `end`.

    `value` is the weight at the current step; `advance()` once a step.

    Args:
        initial, final: the weight before `start` and after `end`.
        start, end: steps, of which the first is 0.
        shape: "linear", or "cosine", half a period.

    Raises:
        TypeError, ValueError: a number out of range, or `end` not after `start`.
    """

    _form = "linear:initial,final,start,end or cosine:initial,final,start,end"

    def __init__(
        self, initial: float, final: float, start: int, end: int, shape: str = "linear"
    ) -> None:
        require_number("initial", initial)
        require_number("final", final)
        require_int("start", start, minimum=0)
        require_int("end", end, minimum=0)
        require_choice("shape", shape, ("linear", "cosine"))
        if end <= start:
            raise ValueError(f"end={end} must be after start={start}")
        self.initial, self.final = float(initial), float(final)
        self.start, self.end, self.shape = start, end, shape

    @classmethod
    def _of(cls, text: str) -> Schedule:
        shape, _, rest = text.partition(":")
        parts = rest.split(",")
        if shape not in ("linear", "cosine") or len(parts) != 4:
            raise NoFormError
        return cls(*map(as_number, parts[:2]), *[as_number(p, int) for p in parts[2:]], shape)

    def __str__(self) -> str:
        ends = f"{number_text(self.initial)},{number_text(self.final)}"
        return f"{self.shape}:{ends},{self.start},{self.end}"

    def at(self, step: int) -> float:
        """Return the weight at a step."""
        if step <= self.start:
            return self.initial
        if step >= self.end:
            return self.final
        part = (step - self.start) / (self.end - self.start)
        if self.shape == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.initial + (self.final - self.initial) * part

    @property
    def value(self) -> float:
        """The weight at the current step."""
        return self.at(self.step)

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1


class Stages(Schedule):
    """Phases one after another, each with its weights: the dynamics first, then the task.

    `name` and `weights` are those of the current phase; `advance()` once a step. The last phase
    does not end.

    Args:
        phases: (name, steps, weights) each: how many steps, and a dictionary of weights, such as
            ("dynamics", 1000, {"alpha": 1.0, "beta": 1.0, "ce_weight": 0.0}). All name the same
            weights. `steps` of the last may be None.

    Raises:
        TypeError, ValueError: no phase, two of one name or a name with one of "=:;", or numbers out
            of range.
    """

    _form = "name=steps:weight=number,...;name:weight=number,..."

    def __init__(self, phases: Sequence[tuple[str, int | None, Mapping[str, float]]]) -> None:
        if not phases:
            raise ValueError("phases is empty: pass (name, steps, weights) for at least one phase")
        names = [name for name, _, _ in phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases have the names {names}: each must have its own")
        if any(set("=:;") & set(name) for name in names):
            raise ValueError(f'phases have the names {names}: use names without "=", ":" and ";"')
        for index, (name, steps, weights) in enumerate(phases):
            if steps is not None or index < len(phases) - 1:
                require_int(f"steps of phase {name!r}", steps, minimum=1)
            if set(weights) != set(phases[0][2]):
                raise ValueError(
                    f"phase {name!r} has weights {sorted(weights)} and phase {names[0]!r} "
                    f"{sorted(phases[0][2])}: name the same in every phase"
                )
            for weight, value in weights.items():
                require_number(f"{weight} of phase {name!r}", value)
        self.phases = [
            (name, steps, {k: float(v) for k, v in weights.items()})
            for name, steps, weights in phases
        ]

    @classmethod
    def _of(cls, text: str) -> Schedule:
        phases = []
        for part in text.split(";"):
            head, colon, weights = part.partition(":")
            name, given, steps = head.partition("=")
            if not colon:
                raise NoFormError
            phases.append(
                (name.strip(), as_number(steps, int) if given else None, as_numbers(weights))
            )
        return cls(phases)

    def __str__(self) -> str:
        return ";".join(
            f"{name}{'' if steps is None else f'={steps}'}:{numbers_text(weights)}"
            for name, steps, weights in self.phases
        )

    @property
    def name(self) -> str:
        """The name of the current phase."""
        return self._at(self.step)[0]

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the current phase."""
        return self.at(self.step)

    def at(self, step: int) -> dict[str, float]:
        """Return the weights at a step."""
        return dict(self._at(step)[2])

    @property
    def begins(self) -> list[int]:
        """The first step of each phase."""
        return [0, *itertools.accumulate(steps for _, steps, _ in self.phases[:-1])]

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1

    def _at(self, step: int) -> tuple[str, int | None, dict[str, float]]:
        left = step
        for phase in self.phases[:-1]:
            left -= phase[1]
            if left < 0:
                return phase
        return self.phases[-1]
