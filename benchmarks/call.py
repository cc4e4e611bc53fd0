"""The tensors of a workload's call, and the name of its objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fdd_kernels.testing import Problem

LOSS = "fused_fdd_loss"


def objective_of(problem: Problem) -> str:
    """Name the objective of a call; that of a plain problem is the loss."""
    return problem.objective if isinstance(problem, Call) else LOSS


@dataclass(frozen=True)
class Call(Problem):
    """The tensors of one call.

    Attributes:
        objective: a name of `objectives.OBJECTIVES`.
        ids, logprobs: the teacher's likeliest tokens and their log-probabilities, (R, K).
        heads: of attention, where rows are positions, hidden states are queries and weights keys.
    """

    objective: str = LOSS
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    heads: int | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `fused_fdd_loss`."""
        own = ("objective", "ids", "logprobs", "heads")
        return {name: value for name, value in super().arguments.items() if name not in own}

    @property
    def row_count(self) -> int:
        return len(self.student_hidden[0])

    def rows(self, part: slice) -> Call:
        """Cut some rows out of every tensor that has rows."""

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple([h[part] for h in value])
            return value if value is None else value[part]

        names = ("student_hidden", "teacher_hidden", "labels", "token_weights", "ids", "logprobs")
        return replace(self, **{name: cut(getattr(self, name)) for name in names})
