"""The C++ kernels where one model has more hidden states than the other: GEMMs and memory are those
of the states there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fdd_kernels.backends import cpu
from fdd_kernels.backends.call_shape import FLOAT, CallShape
from fdd_kernels.backends.cpu import extension, problem, tiling
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import Statistics
from fdd_kernels.lens.spec import LensSpec, PairMoments, Request
from fdd_kernels.objectives.alignment.objective import cost_spec
from fdd_kernels.objectives.alignment.options import CostOptions
from fdd_kernels.testing import random_problem
from tests.support.allocations import allocated_peak

if extension.kernels is None:
    pytest.skip(f"no C++ kernels: {extension.why_missing}", allow_module_level=True)

PAIRS = [(2, 5), (4, 1), (3, 3)]
DEPTHS = pytest.mark.parametrize("depths", PAIRS, ids=str)
ROWS, COLUMNS, WIDTHS = 24, 272, (16, 20)

# Count the multiplications of all GEMMs; the profiler sees one thread.
COUNT = textwrap.dedent("""
    import json, sys
    import torch
    from torch.profiler import ProfilerActivity, profile

    from fdd_kernels.backends.cpu.extension import kernels
    from tests.kernels.test_unequal_layers import call, with_cached_logits, with_two_operations

    torch.set_num_threads(1)

    def multiplications(events):
        first = {"aten::mm": 0, "aten::addmm_": 1}  # which of the arguments are the factors
        factors = [e.input_shapes[first[e.name] :][:2] for e in events if e.name in first]
        return sum(rows * depth * columns for (rows, depth), (_, columns) in factors)

    found = []
    for depths in json.loads(sys.argv[1]):
        inputs, spec = call(depths)
        found.append({"library": kernels.gemm_library()})
        for way in (with_two_operations, with_cached_logits):
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
                way(inputs, spec)
            found[-1][way.__name__] = multiplications(recorded.events())
    print(json.dumps(found))
""")


def call(depths: tuple[int, int], rows: int = ROWS) -> tuple[LensInputs, LensSpec]:
    """Draw a call with costs of all pairs of layers."""
    p = random_problem((rows,), COLUMNS, *WIDTHS, layers=max(depths))
    student, teacher = (
        [h.detach() for h in states[:count]]
        for states, count in zip((p.student_hidden, p.teacher_hidden), depths)
    )
    heads = p.student_weight.detach(), p.teacher_weight.detach()
    inputs = LensInputs(student, heads[0], None, teacher, heads[1], None, None, None)
    return inputs, cost_spec(CostOptions(), COLUMNS, *depths)


def ones(statistics: Statistics) -> list[torch.Tensor]:
    return [torch.ones_like(s) for s in statistics[1:]]


def everything(inputs: LensInputs) -> list[bool]:
    """Mark all hidden states and the head."""
    return [True] * (len(inputs.student_hidden) + 1) + [False]


def with_two_operations(inputs: LensInputs, spec: LensSpec) -> None:
    statistics = cpu.stats(inputs, spec)
    cpu.grad(inputs, spec, (*statistics, *ones(statistics)), everything(inputs))


def with_cached_logits(inputs: LensInputs, spec: LensSpec) -> None:
    def upstream_of(rows, *block):
        return *block, *ones(Statistics(*block))

    cpu.stats_and_grad(inputs, spec, inputs.rows, upstream_of, everything(inputs), True)


@pytest.fixture(scope="module")
def counted():
    """The multiplications of both ways at each of PAIRS, from one process."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, json.dumps(PAIRS)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"FDD_KERNELS_GEMM": "blas"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(PAIRS, json.loads(done.stdout), strict=True))


@DEPTHS
def test_every_product_is_of_a_layer_that_exists(counted, depths):
    """The products are ATen's, so that torch's profiler counts them."""
    found = counted[depths]
    assert found["library"] == "blas"
    student, teacher = (ROWS * COLUMNS * n * width for n, width in zip(depths, WIDTHS))
    # of dH and dW, each as large as the student's logits
    of_gradients = 2 * student
    assert found["with_cached_logits"] == student + teacher + of_gradients
    assert found["with_two_operations"] == 2 * (student + teacher) + of_gradients


@DEPTHS
def test_the_cache_holds_the_logits_of_the_layers_that_exist(depths):
    inputs, spec = call(depths)
    tiles = tiling.cached_tiles(ROWS, COLUMNS, torch.get_num_threads())
    numbers = extension.kernels.logits_memory(
        problem.problem_of(inputs, spec, problem.valid_rows(inputs), tiles)
    ).numel()
    padded = tiling.round_up(COLUMNS, tiles.columns)
    assert numbers == sum(depths) * tiling.round_up(ROWS, tiling.ROW_PADDING) * padded
    predicted = cpu.memory(replace(shape(depths), train_head=False))
    assert predicted["cached logits"] == FLOAT * numbers
    # What the kernels allocate by themselves is not seen: operands, and sums of threads.
    peak = allocated_peak(lambda: with_cached_logits(inputs, spec))
    students, requests = depths[0], len(spec.requests)
    gradients = students * ROWS * WIDTHS[0] + COLUMNS * WIDTHS[0]
    # twice: the caller's, and the block's of `upstream_of`
    statistics = 2 * (2 * max(depths) + 2 * requests * 4) * ROWS
    sums = students * ROWS * WIDTHS[0]
    beside = cpu.memory(shape(depths))["cached logits"]  # the rest lies in the head's gradient
    assert beside <= peak <= beside + FLOAT * (gradients + statistics + sums) + 2**12


def shape(depths: tuple[int, int], rows: int = ROWS, columns: int = COLUMNS) -> CallShape:
    return CallShape(depths[0], rows, columns, *WIDTHS, FLOAT, teacher_layers=depths[1])


def test_equal_numbers_are_cut_and_predicted_as_before():
    """Naming the teacher's layers changes nothing where there are as many."""
    for layers in (1, 5, 40):
        named = CallShape(layers, 700, 50257, 64, 96, 2, teacher_layers=layers)
        unnamed = CallShape(layers, 700, 50257, 64, 96, 2)
        assert cpu.memory(named) == cpu.memory(unnamed)
        assert named.depths == unnamed.depths == (layers, layers)


@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_fewer_layers_of_one_model_take_less_memory(monkeypatch, way):
    if way == "streamed":
        monkeypatch.setattr(tiling, "CACHED_BYTES", 0)
    both = sum(cpu.memory(shape((8, 8), rows=64, columns=2048)).values())
    for depths in ((8, 2), (2, 8)):
        fewer = cpu.memory(shape(depths, rows=64, columns=2048))
        assert ("cached logits" in fewer) == (way == "cached")
        assert sum(fewer.values()) < both


def test_a_layer_that_is_not_there_is_refused():
    inputs, spec = call((2, 1))
    tiles = tiling.cached_tiles(ROWS, COLUMNS, torch.get_num_threads())
    rows = problem.valid_rows(inputs)
    lacking = [
        {"requests": (Request(0, 1, 1.0, "kl"),)},
        {"requests": (Request(2, 0, 1.0, "kl"),)},
        {"moments": (PairMoments((0, 1), (0, 0)),)},
    ]
    for changed in lacking:
        with pytest.raises(IndexError, match="of 2 and 1 hidden states"):
            problem.problem_of(inputs, replace(spec, **changed), rows, tiles)
    nll = Request(1, 1, 1.0, "nll")  # looks at the student alone
    problem.problem_of(inputs, replace(spec, requests=(nll,)), rows, tiles)
