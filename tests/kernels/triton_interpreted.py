"""Test what Triton alone needs; tests/kernels/test_triton_interpreter.py runs this file with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import gc
import json
import random
import threading
from dataclasses import replace

import filelock
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends import BACKENDS
from fdd_kernels.backends.call_shape import CallShape
from fdd_kernels.backends.triton import autotune, config, elementwise, memory, strategy, work_table
from fdd_kernels.backends.triton.gather_rows import move_rows
from fdd_kernels.backends.triton.launch import recorded
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.testing import assert_within_budget, evaluate, exact, random_problem
from tests.support.allocations import Allocations, allocated_peak
from tests.support.interpreter import BUILDER, check_overflow

OPTIONS = {"trajectory": "jsd", "ce_weight": 0.5, "temperature": 2.0}


@pytest.fixture
def shuffled(monkeypatch):
    """Run the programs of every launch in a random order, with NaN in unwritten memory, and check
    integers for overflow.
    """
    in_order, orders = BUILDER.set_grid_idx, {}

    def set_grid_idx(x, y, z):
        grid = BUILDER.grid_dim
        if (x, y, z) == (0, 0, 0) or grid not in orders:
            places = [
                (i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])
            ]
            orders[grid] = random.Random(len(orders)).sample(places, len(places))
        in_order(*orders[grid][(x * grid[1] + y) * grid[2] + z])

    monkeypatch.setattr(BUILDER, "set_grid_idx", set_grid_idx)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills the tensors of torch.empty with NaN
    check_overflow(True)
    yield orders
    check_overflow(False)
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def collected(monkeypatch):
    """Free a launch's tensors after it: the interpreter holds them in a cycle of references."""
    launch = interpreter.GridExecutor.__call__

    def launch_and_collect(*args, **kwargs):
        launch(*args, **kwargs)
        gc.collect()

    gc.freeze()  # a collection leaves out what exists already
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_collect)
    yield
    gc.unfreeze()


@pytest.fixture(params=strategy.STRATEGIES[1:])
def each_strategy(request, monkeypatch):
    monkeypatch.setenv(strategy.STRATEGY, request.param)
    return request.param


def run(problem, upstream=None, **options):
    return evaluate(problem, fused_fdd_loss, upstream, backend="triton", **options)


def tensors(outcome):
    return [*outcome.terms, *outcome.gradients.values()]


@pytest.mark.slow
def test_order_of_programs_does_not_matter(each_strategy, shuffled, monkeypatch):
    problem = random_problem((2, 3), 70, dtype=torch.float32, labels=True)
    found = run(problem, **OPTIONS)
    assert any(len(order) > 1 for order in shuffled.values())
    monkeypatch.undo()
    monkeypatch.setenv(strategy.STRATEGY, each_strategy)
    expected = run(problem, **OPTIONS)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(a, b)
    assert_within_budget(problem, found, None, **OPTIONS)


@pytest.mark.slow
def test_several_blocks_of_rows_and_chunks_of_columns(monkeypatch):
    """The budgets shrunk until every loop on the host turns more than once, and each dtype of a
    head is summed.
    """
    monkeypatch.setenv(strategy.STRATEGY, "one_pass")
    monkeypatch.setattr(memory, "BLOCK_BYTES", 1)
    monkeypatch.setattr(memory, "GRAD_BYTES", 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = random_problem((17,), 70, dtype=dtype)
        assert_within_budget(problem, run(problem), None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_of_the_heads_size_is_allocated_but_its_gradient(monkeypatch, dtype):
    """Budgets of 64 tokens of the vocabulary; few rows, so a head is by far the largest tensor."""
    columns, width, backend = 300, 64, BACKENDS["triton"]
    monkeypatch.setenv(strategy.STRATEGY, "one_pass")
    monkeypatch.setattr(memory, "GRAD_BYTES", 1)
    monkeypatch.setattr(memory, "HEAD_BYTES", 64 * width * 4)
    problem = random_problem((17,), columns, width, width, layers=1, dtype=dtype)
    for block_bytes, trained, expected in (
        (memory.BLOCK_BYTES, True, 1),
        (1, True, 1 + (dtype != torch.float32)),
        (memory.BLOCK_BYTES, False, 0),
    ):
        monkeypatch.setattr(memory, "BLOCK_BYTES", block_bytes)
        seen = Allocations()
        watched = replace(
            backend, stats=seen.watching(backend.stats), grad=seen.watching(backend.grad)
        )
        monkeypatch.setitem(BACKENDS, "triton", watched)
        run(problem if trained else problem.frozen("student_weight"))
        large = [size for size in seen.sizes if size > columns * width // 2]
        assert len(large) == expected, large


@pytest.mark.slow
def test_memory_is_what_a_call_allocates(monkeypatch, each_strategy, collected):
    """With the interpreter's tiles, and budgets that make no part small beside the others."""
    monkeypatch.setattr(memory, "PLANNED_ARCHITECTURE", config.INTERPRETER)
    monkeypatch.setattr(
        memory, "PLANNED_MULTIPROCESSORS", config.multiprocessors(torch.device("cpu"))
    )
    monkeypatch.setattr(memory, "BLOCK_BYTES", 1)
    monkeypatch.setattr(memory, "GRAD_BYTES", 2**13)
    backend, peaks = BACKENDS["triton"], []

    def measured(operation):
        def run(*arguments):
            found = []
            peaks.append(allocated_peak(lambda: found.append(operation(*arguments))))
            return found[0]

        return run

    watched = replace(
        backend, grad=measured(backend.grad), stats_and_grad=measured(backend.stats_and_grad)
    )
    monkeypatch.setitem(BACKENDS, "triton", watched)
    rows, columns, widths = 32, 160, (96, 80)
    problem = random_problem((rows,), columns, *widths, layers=2, dtype=torch.float32)
    outcome = run(problem, output_in_dynamics=True)
    gradients = sum(gradient.nbytes for gradient in outcome.gradients.values())
    predicted = (
        sum(memory.memory(CallShape(2, rows, columns, *widths, itemsize=4)).values()) + gradients
    )
    assert peaks == [pytest.approx(predicted, rel=0.15)]


def test_float16_gradients_below_its_smallest_number(each_strategy):
    """Elements of dL/dx near 1e-7, where float16 has no digits, still sum to gradients within
    its range.
    """
    problem = random_problem((3,), dtype=torch.float16)
    found, expected = (
        run(problem, upstream=3e-6, reduction="sum"),
        exact(problem, 3e-6, reduction="sum"),
    )
    for name, gradient in found.gradients.items():
        error = (gradient - expected.gradients[name]).abs().max()
        assert error < 2.0**-24 + 2e-3 * expected.gradients[name].abs().max()


@triton.jit
def elementwise_kernel(
    log_q, log_p, value, grad, a, b, DIVERGENCE: tl.constexpr, SIZE: tl.constexpr
):
    i = tl.arange(0, SIZE)
    q, p = tl.load(log_q + i), tl.load(log_p + i)
    tl.store(value + i, elementwise.divergence_value(q, p, a, b, DIVERGENCE))
    tl.store(grad + i, elementwise.divergence_grad(q, p, a, b, DIVERGENCE))


# Ends and middles of the parameters' ranges.
SHARES = [(share,) for share in (1e-9, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3)]
EXPONENTS = [(0.0, 0.3), (0.4, 0.0), (0.2, 0.7), (1e-9, 0.5), (0.5, 1e-9), (1.0, 1.0), (0.1, 3.0)]
FORMULAS = [
    (name, parameters)
    for name, entry in DIVERGENCES.items()
    for parameters in {0: [()], 1: SHARES, 2: EXPONENTS}[len(entry.parameters)]
]


@pytest.mark.parametrize(("name", "parameters"), FORMULAS, ids=str)
def test_elementwise_pairs_are_the_registry(name, parameters):
    """At every distance of the models; probabilities of 0 on either side, and on both, have their
    limits, and NaN shows.
    """
    log_p = -torch.rand(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 12
    x = torch.logspace(-6, 1, 64, dtype=torch.float64)
    log_p, log_q = log_p.float(), (log_p + torch.cat([x, -x]).repeat(2)).float()
    log_p[:3] = log_q[:3] = -torch.inf
    log_p[3], log_q[4] = -torch.inf, -torch.inf
    log_q[5:8] = log_p[5:8]
    log_p[8] = log_q[9] = torch.nan
    value, grad = torch.empty(256), torch.empty(256)
    a, b = work_table.numbers_of(parameters)
    elementwise_kernel[(1,)](log_q, log_p, value, grad, a, b, DIVERGENCE=name, SIZE=256)
    exact = DIVERGENCES[name]
    for found, formula in ((value, exact.value), (grad, exact.grad)):
        expected = formula(log_q.double(), log_p.double(), *parameters)
        finite = expected.isfinite()
        torch.testing.assert_close(found[~finite].double(), expected[~finite], equal_nan=True)
        rounding = (log_q - log_p).abs() * (log_q.exp() + log_p.exp())
        scale = expected.abs() + rounding.nan_to_num(0.0, 0.0)
        assert ((found - expected).abs() <= 2e-6 * scale + 1e-30)[finite].all()


@triton.jit
def tanh_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, elementwise.tanh(tl.load(x + i)))


def test_tanh_is_accurate_near_zero_and_far_away():
    x = torch.cat([torch.logspace(-9, 2.5, 128), -torch.logspace(-9, 2.5, 128)])
    out = torch.empty(256)
    tanh_kernel[(1,)](x, out, SIZE=256)
    torch.testing.assert_close(out.double(), x.double().tanh(), rtol=1e-6, atol=0)


# A multiprocessor's shared memory in KiB, by the makers' documentation.
SHARED_MEMORY = {
    "sm_80": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}


@pytest.mark.parametrize("architecture", config.ARCHITECTURES)
def test_tiles_fit_the_shared_memory_and_the_rows(architecture):
    """Operands of every stage of the pipeline fit; few rows get a tile of few rows."""
    for dtype in (torch.bfloat16, torch.float32):
        for widths in ((64, 100), (64, 128), (64, 0)):
            few, many = (
                config.choose((rows, 1000, *widths), dtype, architecture) for rows in (64, 65)
            )
            assert few.block_rows == 64 <= many.block_rows
            for tile in (few, many):
                operands = (tile.block_rows + tile.block_columns) * tile.block_depth
                held = tile.num_stages * operands * dtype.itemsize
                assert held <= SHARED_MEMORY[architecture] * 1024
                assert tile.block_columns % tile.block_strip == 0


def test_precision_of_float32_is_one_that_the_architecture_has(monkeypatch):
    monkeypatch.setenv(config.F32_PRECISION, "tf32x3")
    assert config.f32_precision("sm_90") == "tf32x3"
    with pytest.raises(ValueError, match="not one of ieee, tf32, which gfx942 has"):
        config.f32_precision("gfx942")


def test_autotuning_is_cached_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv(autotune.SWITCH, "1")
    monkeypatch.setenv("FDD_KERNELS_CACHE", str(tmp_path))
    timed = []

    def timer(run, candidate):
        timed.append(candidate)
        return -candidate.block_columns

    arguments = ("stats", (300, 1000, 64, 64), torch.bfloat16, "sm_90", None)
    best = autotune.tuned(*arguments, timer=timer)
    assert best.block_columns == max(c.block_columns for c in timed)
    timed.clear()
    assert autotune.tuned(*arguments, timer=timer) == best
    assert not timed
    for work in ("5:0,kl|", "5:0,jsd|", "2:0,kl|0,1"):  # another work, another search
        autotune.tuned(*arguments, timer=timer, work=work)
        assert timed
        timed.clear()
    assert len(json.loads(autotune.cache_file().read_text())) == 4
    monkeypatch.delenv(autotune.SWITCH)
    assert autotune.tuned(*arguments, timer=timer) == config.choose(
        (300, 1000, 64, 64), torch.bfloat16, "sm_90"
    )


def test_entries_that_another_process_adds_meanwhile_survive(monkeypatch, tmp_path):
    monkeypatch.setenv("FDD_KERNELS_CACHE", str(tmp_path))
    configuration = config.choose((300, 1000, 64, 64), torch.bfloat16, "sm_90")
    # as another process does while it adds "theirs"
    with filelock.FileLock(autotune.cache_file().with_suffix(".lock")):
        ours = threading.Thread(target=autotune._write, args=("ours", configuration))
        ours.start()
        ours.join(0.5)
        autotune.cache_file().write_text(json.dumps({"theirs": vars(configuration)}))
    ours.join()
    assert set(json.loads(autotune.cache_file().read_text())) == {"ours", "theirs"}


def test_the_device_decides_by_the_median_of_runs_with_an_empty_cache(monkeypatch):
    monkeypatch.setattr(
        triton.testing,
        "do_bench",
        lambda run, return_mode: run() or 3.0 if return_mode == "median" else None,
    )
    ran = []
    assert autotune.seconds(ran.append, "a configuration") == pytest.approx(0.003)
    assert ran == ["a configuration"]

    def too_large(_config):
        raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")

    assert autotune.seconds(too_large, "another") == float("inf")


def test_rows_of_many_layers_are_moved_by_few_launches():
    """Gather ten layers, one of them strided, and scatter all but one without a gradient."""
    states = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    states[4] = torch.stack([states[4], states[4]], -1)[..., 0]
    order = torch.tensor([6, 2, 0, 5, 1, 3, 4], dtype=torch.int32)
    count = torch.tensor([4], dtype=torch.int32)
    block = torch.full((10, 5, 5), torch.nan)
    with recorded() as launches:
        move_rows(states, block, order, count, 1, into_block=True)
    assert [one.grid[2] for one in launches] == [4, 1, 5]
    move_rows(states, block, order, count, 1, into_block=True)
    for state, moved in zip(states, block):
        assert torch.equal(moved[:3], state[order[1:4].long()])
        assert not moved[3:].any()
    found = [None if i == 7 else torch.zeros(7, 5) for i in range(10)]
    move_rows(found, block, order, count, 1, into_block=False, scale=torch.tensor([0.5]))
    for i, gradient in enumerate(found):
        if gradient is not None:
            expected = torch.zeros(7, 5)
            expected[order[1:4].long()] = 2 * block[i, :3]
            assert torch.equal(gradient, expected)
