"""The way from an objective and its tensors to its outputs."""

from __future__ import annotations

from torch import Tensor

from fdd_kernels.engine.autograd import LensStatistics, flatten
from fdd_kernels.engine.cached_logits import OutputsAndGradients, row_block
from fdd_kernels.engine.objective import Objective
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics


def evaluate(
    objective: Objective,
    inputs: LensInputs,
    backend: str,
    *,
    shard=None,
    block_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute the outputs of an objective, differentiable once.

    Args:
        objective: requests, and the way from statistics to outputs and back.
        inputs: the tensors that the spec counts layers in.
        backend: a key of `BACKENDS`.
        shard: this process's part of the vocabulary (`VocabShard`), or None for all of it.
        block_rows: rows per block for the cached-logits path, 0 for the two operations; None
            chooses. All processes of a shard's group must give the same.
    """
    layers, tensors = len(inputs.student_hidden), flatten(inputs)
    if block_rows is None:
        block_rows = row_block(objective, inputs, backend)
    if block_rows:
        return OutputsAndGradients.apply(objective, backend, shard, block_rows, layers, *tensors)
    encoded = objective.spec.encode()
    statistics = LensStatistics.apply(*encoded, backend, shard, layers, *tensors)
    return objective.outputs(Statistics(*statistics))
