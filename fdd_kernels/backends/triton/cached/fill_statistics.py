"""The statistics of a row block from its logits: one pass over them, or two."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fdd_kernels.backends.triton.cached.blocks import Block
from fdd_kernels.backends.triton.cached.merge import cached_merge_kernel, merge_values_kernel
from fdd_kernels.backends.triton.cached.second_pass import cached_second_pass_kernel
from fdd_kernels.backends.triton.cached.stats import cached_stats_kernel, fields_of
from fdd_kernels.backends.triton.config import row_launch
from fdd_kernels.backends.triton.launch import SMALL, Launch, launch


def fill_statistics(block: Block) -> None:
    """Fill `block.statistics`."""
    spec, table = block.spec, block.table
    shifts, requests, moments = block.statistics
    shape = row_launch("stats")
    tiles = triton.cdiv(spec.columns, shape.block)
    fields = fields_of(block.layers, table.slots, len(spec.moments))
    state = torch.empty((fields, block.rows, tiles), dtype=torch.float32, device=shifts.device)
    common = {
        "state": state,
        "slots": table.slots,
        "tiles": tiles,
        "TEACHER": spec.needs_teacher,
        "WEIGHTED": table.has_weights,
        "MIXED": table.has_mixtures,
        "DIVERGENCE": table.one_pass_divergence,
    }
    for slab in block.logits.slabs(spec.columns):
        for one in block.tile_launches(
            cached_stats_kernel,
            shape,
            slab,
            labels=block.labels,
            first_column=slab.start,
            SOFTMAX=table.slots > 0,
            MOMENTS=bool(spec.moments),
            LABELS=table.has_labels,
            **common,
        ):
            launch(one)
    arguments = {
        **block.arguments(),
        **common,
        "shifts": shifts,
        "requests": requests,
        "moments": moments,
        "stride": shifts.stride(1),
        "BLOCK_T": _power_of_2(tiles),
    }
    launch(Launch(cached_merge_kernel, (block.rows, block.layers), SMALL, arguments))
    if not table.second_pass:
        return
    shape = row_launch("second_pass")
    tiles = triton.cdiv(spec.columns, shape.block)
    sums = torch.empty(
        (table.second_pass, 2, block.rows, tiles), dtype=torch.float32, device=shifts.device
    )
    for slab in block.logits.slabs(spec.columns):
        for one in block.tile_launches(
            cached_second_pass_kernel,
            shape,
            slab,
            extra_axis=(table.second_pass,),
            sums=sums,
            shifts=shifts,
            requests=requests,
            tiles=tiles,
            stride=shifts.stride(1),
            DIVERGENCE=table.divergence,
        ):
            launch(one)
    launch(merge_values_launch(block, sums, requests, seconds=True))


def merge_values_launch(block: Block, sums: Tensor, requests: Tensor, *, seconds: bool) -> Launch:
    """Sum tiles into VALUE of `requests`; `seconds`: of the second pass, with GRAD_SUM."""
    arguments = {
        "sums": sums,
        "requests": requests,
        "count": block.count,
        "table": block.table.values,
        "table_width": block.table.width,
        "rows": block.rows,
        "stride": requests.stride(1),
        "tiles": sums.shape[-1],
        "SECONDS": seconds,
        "BLOCK_T": _power_of_2(sums.shape[-1]),
    }
    return Launch(merge_values_kernel, (block.rows, sums.shape[0]), SMALL, arguments)


def _power_of_2(tiles: int) -> int:
    return triton.next_power_of_2(max(tiles, 1))
