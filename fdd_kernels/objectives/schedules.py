"""Weights that change during training: plain objects with a state that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fdd_kernels.objectives.option_checks import require_choice, require_int, require_number


class Schedule:
    """What all schedules share: `state_dict` and `load_state_dict`.

    A schedule that loads another's state continues with the same numbers, bit for bit, if both
    were made with the same arguments.
    """

    _state: tuple[str, ...] = ("step",)
    step: int = 0

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
        self.initial, self.final, self.start, self.end = initial, final, start, end
        self.shape = shape

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
        TypeError, ValueError: no phase, two of one name, or numbers out of range.
    """

    def __init__(self, phases: Sequence[tuple[str, int | None, Mapping[str, float]]]) -> None:
        if not phases:
            raise ValueError("phases is empty: pass (name, steps, weights) for at least one phase")
        names = [name for name, _, _ in phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases have the names {names}: each must have its own")
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
        self.phases = [(name, steps, dict(weights)) for name, steps, weights in phases]

    @property
    def name(self) -> str:
        """The name of the current phase."""
        return self._current()[0]

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the current phase."""
        return dict(self._current()[2])

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1

    def _current(self) -> tuple[str, int | None, dict[str, float]]:
        left = self.step
        for phase in self.phases[:-1]:
            left -= phase[1]
            if left < 0:
                return phase
        return self.phases[-1]


class GradientBalance(Schedule):
    """Weights that keep the terms' gradients, at the student's states, in a fixed ratio.

    Every `every` steps, with n_k the length of term k's gradient over all states::

        w_k = ratio_k * mean of n / n_k

    so that every weighted gradient has the length ratio_k times the mean length. A term whose
    gradient is 0 or not finite keeps its weight and is in no mean. As GradNorm (Chen et al., ICML
    2018) without its training rates, and solved for the weights instead of learning them. One
    backward pass to the states for each term and measurement.

    Args:
        ratios: for each term the wanted share, greater than 0, such as {"output_kd": 1.0,
            "trajectory": 1.0}.
        every: steps from one measurement to the next; the first is at step 0.
        smoothing: share of the earlier lengths in a moving average, in [0, 1).

    Raises:
        TypeError, ValueError: a number out of range.
    """

    _state = ("step", "weights", "lengths")

    def __init__(
        self, ratios: Mapping[str, float], every: int = 100, smoothing: float = 0.0
    ) -> None:
        if not ratios:
            raise ValueError("ratios is empty: pass a number for each term")
        for name, ratio in ratios.items():
            require_number(f"ratio of {name!r}", ratio, positive=True)
        require_int("every", every, minimum=1)
        require_number("smoothing", smoothing)
        if smoothing >= 1:
            raise ValueError(f"smoothing={smoothing} must be below 1")
        self.ratios, self.every, self.smoothing = dict(ratios), every, smoothing
        self.weights: dict[str, float] = dict.fromkeys(ratios, 1.0)
        self.lengths: dict[str, float] = {}

    def update(
        self,
        terms: Mapping[str, Tensor],
        states: Tensor | Sequence[Tensor],
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> dict[str, float]:
        """Measure if it is time, go to the next step and return the weights of this one.

        Args:
            terms: the terms' values, scalars, without their weights; their graph stays.
            states: hidden states of the student that the terms depend on.
            process_group: whose processes share the weights: lengths are over the states of all.

        Raises:
            ValueError: terms other than those of `ratios`.
        """
        if set(terms) != set(self.ratios):
            raise ValueError(f"terms are {sorted(terms)}, ratios {sorted(self.ratios)}: match them")
        if self.step % self.every == 0:
            states = [states] if isinstance(states, Tensor) else list(states)
            self._balance(
                {k: _gradient_length(term, states, process_group) for k, term in terms.items()}
            )
        self.step += 1
        return dict(self.weights)

    def _balance(self, measured: Mapping[str, float]) -> None:
        for name, length in measured.items():
            if 0 < length < math.inf:
                before = self.lengths.get(name, length)
                self.lengths[name] = self.smoothing * before + (1 - self.smoothing) * length
        if self.lengths:
            mean = math.fsum(self.lengths.values()) / len(self.lengths)
            for name, length in self.lengths.items():
                self.weights[name] = self.ratios[name] * mean / length


class TAIDSchedule(Schedule):
    """The interpolation t of TAID: `teacher_mix=schedule.t` in `fused_fdd_loss`.

    With m a moving average of the relative drop of the loss, at each update but the first::

        m <- momentum * m + (1 - momentum) * (previous - loss) / previous
        t <- min(end, max(start + (end - start) * step / total_steps,
                          t + rate * sigmoid(m) * (1 - t)))

    The first update only remembers the loss. Source: Shing et al., "TAID: Temporally Adaptive
    Interpolated Distillation for Efficient Knowledge Transfer in Language Models", ICLR 2025, and
    its code; t is float64 here.

    Args:
        total_steps: of the training.
        start, end: t at its beginning and end.
        rate: alpha of the paper; 0 leaves the line from start to end.
        momentum: beta of the paper.

    Raises:
        TypeError, ValueError: a number out of range.
    """

    _state = ("step", "t", "average", "previous")

    def __init__(
        self,
        total_steps: int,
        start: float = 0.4,
        end: float = 1.0,
        rate: float = 5e-4,
        momentum: float = 0.99,
    ) -> None:
        require_int("total_steps", total_steps, minimum=1)
        for name, value in (("start", start), ("end", end), ("rate", rate), ("momentum", momentum)):
            require_number(name, value)
            if value > 1 or (name == "momentum" and value == 1):
                raise ValueError(f"{name}={value} must be in [0, 1{')' if value == 1 else ']'}")
        if end <= start:
            raise ValueError(f"end={end} must be greater than start={start}")
        self.total_steps, self.start, self.end = total_steps, start, end
        self.rate, self.momentum = rate, momentum
        self.t, self.average, self.previous = float(start), 0.0, None

    def update(self, loss: Tensor | float, step: int | None = None) -> float:
        """Take the distillation loss of a step, and return t for the next one.

        Args:
            loss: a scalar; a tensor's number is looked at. With several processes pass the mean
                over them, or their t differ.
            step: the optimizer's step, if there are several updates a step (gradient
                accumulation); otherwise updates are counted, from 0.

        Raises:
            ValueError: a loss that is not finite.
        """
        loss = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        if not math.isfinite(loss):
            raise ValueError(f"loss={loss} must be finite: leave out the update of such a step")
        if step is not None:
            require_int("step", step, minimum=0)
            self.step = step
        if self.previous is not None:
            drop = (self.previous - loss) / (self.previous + 1e-15)
            self.average = self.momentum * self.average + (1 - self.momentum) * drop
            line = self.start + (self.end - self.start) * self.step / self.total_steps
            pushed = self.t + self.rate * _sigmoid(self.average) * (1 - self.t)
            self.t = min(self.end, max(line, pushed))
        self.previous = loss
        self.step += 1
        return self.t


def _sigmoid(x: float) -> float:
    """Compute 1 / (1 + e^-x) without overflow."""
    return (1 + math.tanh(x / 2)) / 2


def _gradient_length(term: Tensor, states: Sequence[Tensor], process_group) -> float:
    """Return the length of a term's gradient over all states."""
    found = (torch.zeros_like(term),)  # of a term that is not computed
    if term.requires_grad:
        found = torch.autograd.grad(term, states, retain_graph=True, materialize_grads=True)
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in found])
    squares = norms.square().sum()
    if process_group is not None:
        torch.distributed.all_reduce(squares, group=process_group)
    return math.sqrt(float(squares))
