"""What is checked of a step's loss: that it is a number, before the step is taken, and that
anything counts in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_REMEDY = (
    "The student has diverged, or the models give such numbers themselves: lower the learning "
    "rate, warm up longer, clip "
    "gradients, or compute in float32"
)


class NonFiniteLossError(FloatingPointError):
    """The loss, or the student's weights, became infinite or no number; `problem` says where and
    with which terms.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}. {_REMEDY}")


def require_finite(
    when: str, terms: Mapping[str, float | Tensor], *, kept: str | None = None
) -> None:
    """Raise unless the loss of a step is finite: call it before `optimizer.step()`.

    Args:
        when: how the error calls the step, as in "step 12".
        terms: by name, as `DistillerTerms.named()` gives them; scalars, read from their device.
        kept: what is left to go on from.

    Raises:
        NonFiniteLossError: names the terms and their values.
    """
    values = {
        name: float(value.detach()) if isinstance(value, Tensor) else float(value)
        for name, value in terms.items()
    }
    if not math.isfinite(values["loss"]):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise NonFiniteLossError(
            f"the loss of {when} is not finite ({shown})" + (f"; {kept}" if kept else "")
        )


def warn_of_nothing(step: int) -> None:
    """Say that no position counts in a step, and why that may be."""
    warnings.warn(
        f"no position counts in step {step}, so that its loss is 0 and nothing is learnt: every "
        "label is -100 (or masked, or "
        "a first token's). Look at the labels of your data: a response template that is not found, "
        "prompts as long as "
        "max_length, or a collator that masks too much give such batches",
        stacklevel=3,
    )


def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every weight is finite, of a sharded model those that are here."""
    local = [
        getattr(p, "_local_tensor", p).detach()
        for p in parameters
        if p.is_floating_point() and not p.is_meta
    ]
    return all(bool(torch.isfinite(tensor).all()) for tensor in local if tensor.numel())


def as_json(value: Any) -> Any:
    """`value` with null in the place of numbers that JSON does not know: infinities and NaN."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
