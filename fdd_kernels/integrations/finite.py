"""Check the loss of a step before the optimizer uses it: that it is finite, and that the step has
valid positions.
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
    "rate, warm up longer, clip gradients, or compute in float32"
)
# Why a step may have no valid position.
MASKED_LABELS = (
    "every label is -100 (or masked, or a first token's). Look at the labels of your data: a "
    "response template that is not found, prompts as long as max_length, or a collator that "
    "masks too much give such batches"
)


class NonFiniteLossError(FloatingPointError):
    """The loss, or the student's weights, became infinite or NaN; `problem` says where and with
    which terms.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}. {_REMEDY}")


def require_finite(
    when: str, terms: Mapping[str, float | Tensor], *, kept: str | None = None
) -> None:
    """Raise unless the loss of a step is finite: call it before `optimizer.step()`.

    Args:
        when: name of the step in the error, as in "step 12".
        terms: scalars by name, as from `DistillerTerms.named()`; copied from their device.
        kept: what is left to resume from, for the error.

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


def warn_of_nothing(step: int, causes: str = MASKED_LABELS) -> None:
    """Warn that a step has no valid position, and name likely causes."""
    warnings.warn(
        f"no position is valid in step {step}, so that its loss is 0 and nothing is learnt: "
        f"{causes}",
        stacklevel=3,
    )


def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every weight is finite; of a sharded model, every local one."""
    local = [
        getattr(p, "_local_tensor", p).detach()
        for p in parameters
        if p.is_floating_point() and not p.is_meta
    ]
    return all(bool(torch.isfinite(tensor).all()) for tensor in local if tensor.numel())


def as_json(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
