"""The interpolation between student and teacher that follows the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fdd_kernels.objectives.option_checks import require_int, require_number
from fdd_kernels.objectives.schedules import NoFormError, Schedule, as_number, number_text

if TYPE_CHECKING:  # without torch the command line parses a schedule
    from torch import Tensor


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
    _form = "taid:total_steps[,start[,end[,rate[,momentum]]]]"

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
        self.total_steps, self.start, self.end = total_steps, float(start), float(end)
        self.rate, self.momentum = float(rate), float(momentum)
        self.t, self.average, self.previous = self.start, 0.0, None

    @classmethod
    def _of(cls, text: str) -> Schedule:
        name, _, rest = text.partition(":")
        steps, *parts = rest.split(",")
        if name != "taid" or len(parts) > 4:
            raise NoFormError
        return cls(as_number(steps, int), *map(as_number, parts))

    def __str__(self) -> str:
        numbers = (self.start, self.end, self.rate, self.momentum)
        given = (
            "" if numbers == (0.4, 1.0, 5e-4, 0.99) else "," + ",".join(map(number_text, numbers))
        )
        return f"taid:{self.total_steps}{given}"

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
        loss = float(loss.detach() if hasattr(loss, "detach") else loss)
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
