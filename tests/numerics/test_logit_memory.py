"""Memory of the objectives of the logits: one row block, of bounded bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fdd_kernels import row_statistics
from fdd_kernels.backends.torch_stream import blocks
from fdd_kernels.lens.row_blocks import MATRICES
from fdd_kernels.testing import random_problem
from tests.support.allocations import allocated_peak
from tests.support.logit_objectives import (
    F32,
    LOSSES,
    NAMES,
    random_call,
    statistics_arguments,
)

BF16 = torch.bfloat16


def cap(name: str) -> str:
    return "softcap" if name == "selected" else "student_softcap"


class TestMemory:
    ROWS, COLUMNS = 512, 2048
    MATRIX = 4 * ROWS * COLUMNS  # bytes of one (R, V) tensor: 4 MiB

    @pytest.mark.parametrize("low", [F32, BF16], ids=str)
    @pytest.mark.parametrize(
        ("name", "options"),
        [*[(n, {}) for n in (*NAMES, "statistics")], *[(n, {"reduction": "none"}) for n in LOSSES]],
        ids=str,
    )
    def test_no_tensor_of_rows_by_columns(self, name, options, low, monkeypatch):
        """One block, within its bytes; with the head's gradient it is far below one matrix."""
        budget = 2**20
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", budget)
        shape = {"columns": self.COLUMNS, "student_width": 4, "teacher_width": 4, "dtype": low}
        if name == "statistics":
            p = random_problem((self.ROWS,), layers=1, **shape)
            peak = allocated_peak(lambda: row_statistics(**statistics_arguments(p)))
        else:
            call = random_call(name, (self.ROWS,), **shape, options=options)
            peak = allocated_peak(lambda: call.run("torch"))
        # Gradients twice (sums and results), converted heads, and numbers per row.
        others = 4 * 4 * 2 * (2 * self.COLUMNS + 2 * self.ROWS) + 4 * 64 * self.ROWS
        assert peak <= budget + others, f"{peak / 2**20:.2f} MiB"
        assert budget + others < self.MATRIX / 2

    @pytest.mark.parametrize("name", [*NAMES, "statistics"])
    def test_the_matrices_that_a_row_function_holds(self, name):
        """At most `MATRICES` of a block's size, whatever else there is."""
        rows, columns = 64, 8192
        matrix = 4 * rows * columns
        shape = {"columns": columns, "student_width": 2, "teacher_width": 2}
        if name == "statistics":
            p = random_problem((rows,), layers=1, **shape)
            peak = allocated_peak(lambda: row_statistics(**statistics_arguments(p)))
        else:
            call = random_call(name, (rows,), **shape, options={cap(name): 30.0})
            if name == "decoupled_kd":  # no row is left out
                labels = call.problem.labels.clamp(min=0)
                call = replace(call, problem=replace(call.problem, labels=labels))
            peak = allocated_peak(lambda: call.run("torch"))
        assert peak <= (MATRICES + blocks._OWN_MATRICES) * matrix, peak / matrix

    @pytest.mark.parametrize("columns", [1, 1000, 152064, 10**7])
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_blocks_fit_their_bytes(self, columns, device):
        rows = blocks.block_rows(columns, 4, device)
        budget = blocks.BLOCK_BYTES.get(device, blocks.ACCELERATOR_BLOCK_BYTES)
        whole = rows * columns * 4 * (MATRICES + blocks._OWN_MATRICES)
        assert rows == 1 or whole <= budget
