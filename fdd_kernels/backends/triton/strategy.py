"""Choose the strategy of a call: a plain rule over shape, device and memory. Needs no triton.

    cached    training: the logits of a row block, all layers and the whole vocabulary, stay in
              scratch between statistics and gradients, so that every GEMM runs once
    slabbed   the two operations apart: the logits of a slab of the vocabulary at a time, computed
              again for the gradients
    one_pass  the GEMM inside the kernels: no scratch of the vocabulary's size at all

FDD_KERNELS_TRITON_STRATEGY chooses ("auto" is the rule), FDD_KERNELS_CACHE_BYTES bounds the scratch
for logits. The thresholds are predictions of benchmarks/gpu_model.py: no GPU has run this yet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.common.environment import byte_limit
from fdd_kernels.common.sizes import MIB

STRATEGY = "FDD_KERNELS_TRITON_STRATEGY"
STRATEGIES = ("auto", "cached", "slabbed", "one_pass")
CACHE_BYTES = "FDD_KERNELS_CACHE_BYTES"

MOST_CACHE_BYTES = 2048 * MIB
CACHE_SHARE = 32  # of the device's memory
SLAB_BYTES = 256 * MIB
GRADIENT_BYTES = 128 * MIB  # dL/dlogits of a slab
ALIGNMENT = 16  # elements: rows of scratch start where 128-bit loads and the vendor's GEMM want
SLAB_TOKENS = 2048  # a slab is a multiple of this: of every kernel's tile
GEMM_TILE = 128
ROW_STEP = 4
MOST_CACHED_ROWS = 4480  # rows x layers of a block: a GEMM gains nothing beyond
MOST_SLABBED_ROWS = 8192
# Rows x layers of a block from which loading both heads once a block is cheaper than two GEMMs.
FEWEST_CACHED_ROWS = {"trained": 512, "frozen": 256}


def chosen_strategy() -> str:
    """Return the strategy that the environment asks for, "auto" without one.

    Raises:
        ValueError: the environment asks for one that does not exist.
    """
    strategy = os.environ.get(STRATEGY) or "auto"
    if strategy not in STRATEGIES:
        raise ValueError(f"{STRATEGY}={strategy!r} is not one of {', '.join(STRATEGIES)}")
    return strategy


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of scratch for logits on a device; see `cache_budget`."""
    return cache_budget(
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    )


def cache_budget(device_memory: int | None) -> int:
    """Return the bytes of scratch for logits, given the device's memory (None: unknown).

    FDD_KERNELS_CACHE_BYTES, or 2 GiB and at most a 32nd of the device's memory.

    Raises:
        ValueError: the environment variable is no number of bytes.
    """
    most = MOST_CACHE_BYTES
    if device_memory is not None:
        most = min(most, device_memory // CACHE_SHARE)
    return byte_limit(CACHE_BYTES, most)


def padded(columns: int) -> int:
    """Count the elements from one row of logits in scratch to the next."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def balanced_rows(rows: int, most: int, layers: int) -> int:
    """Return the rows of a block, at most `most`: blocks of nearly equal size.

    Where there are several, rows x layers are just under whole GEMM tiles, and rows are multiples
    of ROW_STEP: Triton compiles a kernel once more for a pointer that 16 bytes do not divide.
    """
    if rows <= most:
        return rows
    even = -(-rows // -(-rows // most))
    tiles = -(-even * layers // GEMM_TILE)
    for fitting in (tiles, tiles - 1):
        found = fitting * GEMM_TILE // layers // ROW_STEP * ROW_STEP
        if 0 < found <= most:
            return found
    return most


def scratch_elements(shape: CallShape, rows: int) -> int:
    """Count the float32 elements of the logits of `rows` rows, the whole vocabulary."""
    return shape.heads * shape.layers * rows * padded(shape.columns)


def rows_of_cache(shape: CallShape, budget: int) -> int:
    """Return the rows of a block whose logits fit `budget` bytes; 0 where those are too few to
    pay.
    """
    if not shape.rows:
        return 0
    most = min(
        budget // (FLOAT * scratch_elements(shape, 1)), max(1, MOST_CACHED_ROWS // shape.layers)
    )
    fewest = FEWEST_CACHED_ROWS["trained" if shape.train_head else "frozen"]
    if most == 0 or (shape.rows > most and most * shape.layers < fewest):
        return 0
    return balanced_rows(shape.rows, most, shape.layers)


@dataclass(frozen=True)
class Slabs:
    """Rows of a block, and tokens of a slab of its logits."""

    rows: int
    tokens: int


def slabs_of(shape: CallShape, budget: int) -> Slabs | None:
    """Return slabs within `budget` bytes of logits.

    None where not even the fewest tokens of one tile of rows fit.
    """
    most = max(1, MOST_SLABBED_ROWS // shape.layers)
    smallest = min(SLAB_TOKENS, padded(shape.columns))
    per_row = FLOAT * shape.heads * shape.layers * smallest
    most = min(most, budget // per_row)
    if most < min(shape.rows, max(1, GEMM_TILE // shape.layers)):
        return None
    rows = balanced_rows(shape.rows, most, shape.layers)
    tokens = (
        min(budget, SLAB_BYTES)
        // (FLOAT * shape.heads * shape.layers * max(rows, 1))
        // SLAB_TOKENS
        * SLAB_TOKENS
    )
    return Slabs(rows, max(smallest, min(tokens, padded(shape.columns))))


def gradient_tokens(rows: int, layers: int, columns: int, itemsize: int) -> int:
    """Return the tokens of a slab of dL/dlogits within GRADIENT_BYTES."""
    most = GRADIENT_BYTES // (layers * max(rows, 1) * itemsize) // SLAB_TOKENS * SLAB_TOKENS
    return min(max(SLAB_TOKENS, most), padded(columns))
