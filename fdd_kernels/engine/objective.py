"""The interface between the engine and an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec

# (statistics, rows) -> upstream gradients of `requests` and `moments`. `rows` are the positions of
# a row block among all rows, each valid or with statistics of 0; None for all rows.
UpstreamOf = Callable[[Statistics, Tensor | None], tuple[Tensor, Tensor]]


class Objective(Protocol):
    """What the engine asks of an objective, for one call.

    Attributes:
        spec: the requests and pair moments that it needs.
        is_computed: per output, whether it depends on the student; the others are constants.
        known_upstream: whether `outputs` are sums over rows of which the first is the loss. Its
            gradient is then known in forward but for one factor.
    """

    spec: LensSpec
    is_computed: tuple[bool, ...]
    known_upstream: bool

    def outputs(self, statistics: Statistics) -> tuple[Tensor, ...]:
        """Compute the outputs of all rows in operations that autograd can differentiate."""

    def dense_outputs(self, inputs: LensInputs) -> tuple[Tensor, ...]:
        """Compute the outputs with dense (R, V) tensors, for the backend "reference"."""

    def upstream(
        self, grad_outputs: Sequence[Tensor | float | None], dtype: torch.dtype
    ) -> UpstreamOf:
        """Return the closed form of the gradients of the statistics, in `dtype`.

        The gradients are those of sum(grad * output); None stands for no gradient. Asked for only
        where `known_upstream`.
        """
