"""Memory of the torch backend: measured in a fresh process, and by the arithmetic of its tiles."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import product

import pytest
import torch

from fdd_kernels.backends import BACKENDS, torch_stream
from fdd_kernels.backends.torch_stream import tiling
from fdd_kernels.common.sizes import MIB
from fdd_kernels.testing import evaluate, random_problem
from tests.support.allocations import Allocations

LIMIT = 512 * MIB
# Of these widths: a tile, the sum of a gradient that has another dtype, and the allocator's slack.
MEASURED_LIMIT = tiling.TILE_BYTES["cpu"] + tiling.ACCUMULATOR_BYTES + 64 * MIB

MEASURE = textwrap.dedent("""
    import json, sys
    import torch
    from fdd_kernels import fused_fdd_loss

    layers, rows, columns, width, dtype, train_head = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dtype = getattr(torch, dtype)

    def hidden(n, grad):
        return [torch.randn(n, width).to(dtype).requires_grad_(grad) for _ in range(layers)]

    def call(student, weight, teacher, teacher_weight):
        fused_fdd_loss(student, weight, teacher, teacher_weight, backend="torch").backward()

    # In bytes; getrusage's peak would begin at that of the process that started this one.
    def status(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    tiny = torch.randn(7, width).to(dtype)
    # Imports and thread pools.
    call(hidden(3, True), tiny.clone().requires_grad_(), hidden(3, False), tiny)
    weight = torch.randn(columns, width, dtype=dtype).requires_grad_(train_head)
    teacher_weight = torch.randn(columns, width, dtype=dtype)
    student, teacher = hidden(rows, True), hidden(rows, False)
    before = status("VmRSS")
    call(student, weight, teacher, teacher_weight)
    peak = status("VmHWM")
    outputs = sum(t.grad.nbytes for t in (*student, weight) if t.grad is not None)
    print(json.dumps({"extra": peak - before - outputs, "outputs": outputs}))
""")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("layers", "rows", "columns", "dtype", "train_head"),
    [
        (1, 448, 131072, "bfloat16", True),
        (3, 144, 131072, "float32", False),
    ],
)
def test_peak_memory_of_a_fresh_process(layers, rows, columns, dtype, train_head):
    assert layers * rows * columns * 4 > MEASURED_LIMIT, (
        "one model's logits would fit: nothing is shown"
    )
    arguments = json.dumps([layers, rows, columns, 16, dtype, train_head])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    extra = json.loads(done.stdout)["extra"]
    assert extra < MEASURED_LIMIT, f"{extra / MIB:.0f} MiB beyond inputs and outputs"


EXTREMES = tuple(
    product(
        ((1, 1), (5, 5), (64, 64), (4, 33), (33, 4)),  # layers
        (1, 2047, 10**6),  # rows
        (1, 32001, 262144, 10**7),  # columns
        ((1, 1), (768, 1024), (16384, 16384)),  # widths
    )
)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_tiles_fit_their_budgets(itemsize, device_type):
    for layers, rows, columns, widths in EXTREMES:
        check_tiles(layers, rows, columns, widths, itemsize, device_type)


def check_tiles(layers, rows, columns, widths, itemsize, device_type):
    tiles = torch_stream.choose_tiles(layers, rows, columns, *widths, itemsize, device_type)
    assert 1 <= tiles.rows <= rows
    assert 1 <= tiles.columns <= columns
    assert tiles.resident_rows >= tiles.rows
    # As _tile_gradient holds them: u before and after the shift, the teacher's, the gradient, and
    # temporaries.
    logits = (3 * layers[0] + layers[1] + 8) * tiles.rows * tiles.columns * itemsize
    states = sum(n * width for n, width in zip(layers, widths))
    operands = (sum(widths) * tiles.columns + states * tiles.rows) * itemsize
    # its gradient, once more where it is written in its own dtype
    head_tile = widths[0] * tiles.columns * itemsize
    resident = layers[0] * min(tiles.resident_rows, rows) * widths[0] * itemsize
    assert logits <= tiling.TILE_BYTES.get(device_type, tiling.ACCELERATOR_TILE_BYTES)
    # One layer's GEMM of a row block, and the accumulator of a 16-bit head.
    product_of_block = layers[0] * tiles.rows * widths[0] * itemsize
    whole = (
        logits + operands + 2 * head_tile + resident + product_of_block + tiling.ACCUMULATOR_BYTES
    )
    assert whole < LIMIT


@pytest.fixture
def allocations(monkeypatch):
    """Record allocations of the torch backend's operations, with tiles of 4 rows and 16 columns."""
    monkeypatch.setattr(tiling, "choose_tiles", lambda *_: tiling.TorchTiles(4, 16, 8))
    seen = Allocations()
    own = replace(
        BACKENDS["torch"],
        stats=seen.watching(torch_stream.stats),
        grad=seen.watching(torch_stream.grad),
    )
    monkeypatch.setitem(BACKENDS, "torch", own)
    return seen


def test_nothing_of_rows_by_columns_exists(allocations):
    problem = random_problem((30,), 101, 3, 5, bias="plain", labels=True, mask=True)
    evaluate(problem, backend="torch", trajectory="jsd", ce_weight=1.0)
    assert (101, 3) in allocations.shapes, (
        "the head's gradient was not seen: this test sees nothing"
    )
    largest = max(torch.Size(shape).numel() for shape in allocations.shapes if shape[-1:] != (3,))
    # Tiles are 3 layers of 4 x 16; statistics a few numbers for each of 30 rows; a valid row is
    # dropped before either.
    assert largest <= max(3 * 4 * 16, 3 * 7 * 30)
    assert largest < 30 * 101


def test_a_frozen_head_allocates_no_gradient(allocations):
    problem = random_problem((30,), 101, 3, 5, bias="plain").frozen(
        "student_weight", "student_bias"
    )
    evaluate(problem, backend="torch")
    assert (3, 4, 3) in allocations.shapes or (3, 8, 3) in allocations.shapes, (
        "this test sees nothing"
    )
    assert (101, 3) not in allocations.shapes
    assert (101,) not in allocations.shapes
    assert (16, 3) not in allocations.shapes, "a tile of the head's gradient was formed"
