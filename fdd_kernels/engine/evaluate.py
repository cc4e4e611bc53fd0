"""The way from a call to its outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fdd_kernels.engine.autograd import LensStatistics, flatten
from fdd_kernels.engine.cached_logits import OutputsAndGradients
from fdd_kernels.engine.objective import Objective
from fdd_kernels.engine.vocab_parallel import VocabShard
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics


@dataclass(frozen=True)
class Call:
    """One call of an objective, checked and planned.

    Attributes:
        objective: requests, and the way from statistics to outputs and back.
        inputs: the tensors, whose layers the objective's spec counts.
        backend: a key of `BACKENDS`, or "reference".
        block_rows: rows per block of the cached-logits path (`row_block`); 0 for two operations.
        shard: this process's part of the vocabulary, or None for all of it. All processes of its
            group must take the same `block_rows`.
    """

    objective: Objective
    inputs: LensInputs
    backend: str
    block_rows: int = 0
    shard: VocabShard | None = None


def evaluate(call: Call) -> tuple[Tensor, ...]:
    """Compute the outputs of a call, differentiable once (any number of times by the reference)."""
    objective, backend, shard = call.objective, call.backend, call.shard
    if backend == "reference":
        return objective.dense_outputs(call.inputs)
    layers, tensors = len(call.inputs.student_hidden), flatten(call.inputs)
    if call.block_rows:
        return OutputsAndGradients.apply(
            objective, backend, shard, call.block_rows, layers, *tensors
        )
    encoded = objective.spec.encode()
    statistics = LensStatistics.apply(*encoded, backend, shard, layers, *tensors)
    return objective.outputs(Statistics(*statistics))
