"""The options of the costs of all pairs of layers."""

from __future__ import annotations

from dataclasses import dataclass

from fdd_kernels.lens import divergences
from fdd_kernels.objectives.option_checks import (
    require_divergence,
    require_head_options,
    require_number,
)

# Without meaning in feature space.
OF_LOGITS = (
    "temperature",
    "student_softcap",
    "teacher_softcap",
    "student_logit_scale",
    "teacher_logit_scale",
)


@dataclass(frozen=True)
class CostOptions:
    """The options of `layer_costs`, under the same names; see there."""

    cost: str = "kl"
    per_row: bool = False
    temperature: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    ignore_index: int = -100
    shift: bool = False
    vocab_size: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        distances = divergences.FEATURE_DISTANCES
        if self.cost not in distances:
            require_divergence("cost", self.cost, distances)
        require_number("temperature", self.temperature, positive=True)
        require_head_options(self)
