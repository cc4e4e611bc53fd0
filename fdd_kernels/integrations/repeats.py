"""Rows that accelerate repeats at the end of a data set to give every process as many."""

from __future__ import annotations

import warnings

from accelerate import Accelerator
from torch import Tensor

from fdd_kernels.hf.distiller import Distiller


def without_repeats(
    inputs: dict[str, Tensor], accelerator: Accelerator, distiller: Distiller
) -> dict[str, Tensor]:
    """Return the batch without valid positions in rows that repeat earlier ones.

    Warns:
        UserWarning: the data has no length, so that accelerate does not say which rows they are.
    """
    state, processes = accelerator.gradient_state, accelerator.num_processes
    may_repeat = processes > 1 and accelerator.even_batches and state.end_of_dataloader
    if not may_repeat or state.remainder == 0:
        return inputs
    if state.remainder < 0:
        warnings.warn(
            "the data of this evaluation has no length, and accelerate does not say which "
            f"rows of its last batch repeat earlier ones for the sake of {processes} "
            "processes: they count twice. Give data with a length, or "
            'accelerator_config={"dispatch_batches": True}',
            stacklevel=2,
        )
        return inputs
    rows = len(next(iter(inputs.values())))
    own = min(max(state.remainder - accelerator.process_index * rows, 0), rows)
    return inputs if own == rows else distiller.without_rows_from(inputs, own)
