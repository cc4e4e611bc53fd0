"""The three strategies of the Triton backend; run by tests/kernels/test_triton_interpreter.py with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import pytest
import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends.call_shape import CallShape
from fdd_kernels.backends.triton import config, gemm, operations, strategy
from fdd_kernels.backends.triton.launch import recorded
from fdd_kernels.testing import assert_within_budget, evaluate, exact, random_problem

TOKENS = config.INTERPRETED_ROW_LAUNCH.block  # of a tile
STRATEGIES = strategy.STRATEGIES[1:]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Use slabs of one tile: few tokens make several."""
    monkeypatch.setattr(strategy, "SLAB_TOKENS", TOKENS)


@pytest.fixture(params=STRATEGIES)
def named(request, monkeypatch):
    monkeypatch.setenv(strategy.STRATEGY, request.param)
    return request.param


def run(problem, upstream=None, **options):
    return evaluate(problem, fused_fdd_loss, upstream, backend="triton", **options)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, TOKENS - 1, TOKENS, TOKENS + 1])
@pytest.mark.parametrize(("rows", "layers"), [(1, 1), (2, 3)])
def test_shapes(named, columns, rows, layers):
    problem = random_problem((rows,), columns, layers=layers, dtype=torch.float32)
    options = {"beta": 0.0} if columns == 1 else {}  # deltas over one token have no direction
    assert_within_budget(problem, run(problem, **options), None, **options)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 17])
def test_rows_that_are_masked_are_not_computed(named, rows):
    """More rows than a tile for the kernels that have tiles of rows, whose tile of columns is
    smaller.
    """
    if rows > 2 and named == "slabbed":
        pytest.skip("its rows are moved as for cached logits, and a program owns one")
    columns = TOKENS + 3 if rows == 2 else 40
    problem = random_problem((rows,), columns, layers=2, dtype=torch.bfloat16, labels=True)
    problem = replace(problem, mask=torch.arange(rows) % 3 != 1)
    assert_within_budget(problem, run(problem, ce_weight=1.0), None, ce_weight=1.0)


@pytest.mark.slow
def test_the_strategies_agree(monkeypatch):
    """To the rounding of sums of float32, far below any budget."""
    problem = random_problem((3,), 2 * TOKENS + 5, dtype=torch.float32, labels=True)
    options = {
        "trajectory": "jsd",
        "ce_weight": 0.5,
        "temperature": 2.0,
        "output_in_dynamics": True,
    }
    outcomes = []
    for name in STRATEGIES:
        monkeypatch.setenv(strategy.STRATEGY, name)
        outcomes.append(run(problem, **options))
    first, *others = outcomes
    for other in others:
        for a, b in zip(first.terms, other.terms):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name, gradient in first.gradients.items():
            assert (gradient - other.gradients[name]).norm() <= 2e-5 * gradient.norm()


@pytest.mark.slow
def test_several_blocks_and_slabs(monkeypatch):
    """Scratch for two rows: every loop on the host turns more than once, and each dtype of a head
    is summed.
    """
    monkeypatch.setattr(strategy, "FEWEST_CACHED_ROWS", {"trained": 1, "frozen": 1})
    monkeypatch.setattr(strategy, "GEMM_TILE", 4)
    monkeypatch.setattr(strategy, "ROW_STEP", 1)
    monkeypatch.setattr(strategy, "GRADIENT_BYTES", 1)
    columns = 2 * TOKENS + 5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = random_problem((4,), columns, layers=2, dtype=dtype, labels=True)
        layers = len(problem.student_hidden)
        monkeypatch.setenv(strategy.CACHE_BYTES, str(2 * 2 * 4 * layers * strategy.padded(columns)))
        for name in ("cached", "slabbed"):
            monkeypatch.setenv(strategy.STRATEGY, name)
            masked = replace(problem, mask=torch.arange(4) != 1)
            assert_within_budget(masked, run(masked, trajectory="jsd"), None, trajectory="jsd")


@pytest.mark.slow
def test_mixed_dtypes_and_odd_layouts(named):
    """Hidden states in float32 with heads in bfloat16, converted part by part, one a transposed
    view.
    """
    problem = random_problem((2,), TOKENS + 9, dtype=torch.bfloat16)
    wide = tuple([h.detach().float().requires_grad_() for h in problem.student_hidden])
    weight = problem.student_weight.detach().t().contiguous().t().requires_grad_()
    problem = replace(problem, student_hidden=wide, student_weight=weight)
    assert_within_budget(problem, run(problem), None)


def recorded_gemms(rows: int, columns: int, **options) -> list:
    """The GEMMs of a training call with cached logits, on meta tensors."""
    problem = random_problem((rows,), columns, dtype=torch.bfloat16)
    student = [h.detach().to("meta").requires_grad_() for h in problem.student_hidden]
    teacher = [h.detach().to("meta") for h in problem.teacher_hidden]
    with recorded() as found:
        inputs, spec = _inputs(
            student, problem.student_weight, teacher, problem.teacher_weight, **options
        )
        block_rows = operations.cached_rows(
            inputs, spec, [True] * (len(inputs.student_hidden) + 1) + [False]
        )
        assert block_rows > 0
        needed = [True] * (len(inputs.student_hidden) + 1) + [False]
        operations.stats_and_grad(inputs, spec, block_rows, _upstream, needed, True)
    return [launch.arguments for launch in found if launch.kernel is gemm.multiply]


def _inputs(student, student_weight, teacher, teacher_weight, **options):
    from fdd_kernels.objectives.fdd.loss import prepare, used_by
    from fdd_kernels.objectives.fdd.options import LossOptions
    from fdd_kernels.objectives.inputs import LossInputs

    weights = [w.detach().to("meta") for w in (student_weight, teacher_weight)]
    plan, tensors = prepare(
        LossInputs(student, weights[0], teacher, weights[1]),
        LossOptions(backend="torch", **options),
    )
    return used_by(plan, tensors), plan.spec


def _upstream(rows, shifts, requests, moments):
    return shifts, requests, moments, torch.empty_like(requests), torch.empty_like(moments)


def test_every_product_is_done_once(monkeypatch):
    monkeypatch.setenv(strategy.STRATEGY, "cached")
    columns = 3 * TOKENS + 5
    gemms = recorded_gemms(8, columns)
    problem = random_problem((8,), columns, dtype=torch.bfloat16)
    layers, widths = (
        len(problem.student_hidden),
        {h[0].shape[-1] for h in (problem.student_hidden, problem.teacher_hidden)},
    )
    of_logits = [g["out"].shape == (8 * layers, columns) for g in gemms]
    logits = [g for g, is_one in zip(gemms, of_logits) if is_one]
    gemms = [g for g, is_one in zip(gemms, of_logits) if not is_one]
    assert {g["a"].shape[1] for g in logits} == widths
    assert len(logits) == 2  # one a head
    of_head = [g["out"].shape[0] for g in gemms if g["a"].shape[1] == 8 * layers]
    of_states = [g["b"].shape[0] for g in gemms if g["out"].shape[0] == 8 * layers]
    assert sum(of_head) == sum(of_states) == columns


@pytest.mark.slow
def test_scratch_that_does_not_fit_is_said_once(monkeypatch):
    problem = replace(
        random_problem((4,), TOKENS + 9, dtype=torch.float32), mask=torch.arange(4) != 1
    )
    expected = run(problem)
    monkeypatch.setattr(operations, "_warned", set())

    def without_room(elements, device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(operations, "new_scratch", without_room)
    monkeypatch.setattr(operations, "slabs_of", lambda shape, budget: None)
    with pytest.warns(
        UserWarning, match=r"MiB of scratch for cached logits do not fit .* FDD_KERNELS_CACHE_BYTES"
    ):
        found = run(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(problem)
    for name, gradient in expected.gradients.items():
        assert (gradient - found.gradients[name]).norm() <= 2e-5 * gradient.norm()


@pytest.mark.slow
def test_not_a_number_shows(named):
    """NaN in a row's states gives NaN in its loss and gradients, whatever the objective; other rows
    stay as they are.
    """
    for options in ({"trajectory": "jsd"}, {"trajectory": "cosine", "derivative": "mse"}):
        for side in ("student_hidden", "teacher_hidden"):
            problem = random_problem((2,), TOKENS + 9, layers=2, dtype=torch.float32)
            with torch.no_grad():
                getattr(problem, side)[0][1, 0] = torch.nan
            found = run(
                problem, upstream=torch.ones(2), reduction="none", output_kd_weight=0.0, **options
            )
            assert found.terms.loss.isnan().tolist() == [False, True], (options, side)
            rows = found.gradients["student_hidden[0]"]
            assert rows.isnan().any(-1).tolist() == [False, True], (options, side)


@pytest.mark.slow
def test_biases_of_minus_infinity(named):
    """The kernels know no distance of deltas, only their sums: the gradients of these two flow
    through different ones.
    """
    problem = random_problem((2,), 2 * TOKENS + 9, dtype=torch.float32, bias="plain")
    with torch.no_grad():
        for bias in (problem.student_bias, problem.teacher_bias):
            bias[TOKENS : 2 * TOKENS + 3] = -torch.inf  # a whole tile and more
    for derivative in ("cosine", "mse"):
        assert_within_budget(
            problem, run(problem, derivative=derivative), None, derivative=derivative
        )


@pytest.mark.slow
def test_invalid_rows_under_large_biases(named):
    """Their logits are the biases alone, whose exponentials overflow at this temperature."""
    problem = random_problem((3,), TOKENS + 9, layers=2, dtype=torch.float32, bias="plain")
    with torch.no_grad():
        problem.student_bias[3] = problem.teacher_bias[5] = 10.0
    problem = replace(problem, mask=torch.arange(3) != 1)
    for reduction in ("mean", "none"):
        upstream = torch.ones(3) if reduction == "none" else None
        found = run(problem, upstream, temperature=0.1, output_temperature=0.1, reduction=reduction)
        assert all(gradient.isfinite().all() for gradient in found.gradients.values())


def test_features_in_several_blocks(monkeypatch):
    """Without a softmax request statistics of blocks are views of all rows' statistics; their
    gradients are not.
    """
    monkeypatch.setattr(strategy, "GEMM_TILE", 4)
    monkeypatch.setattr(strategy, "ROW_STEP", 1)
    monkeypatch.setattr(strategy, "FEWEST_CACHED_ROWS", {"trained": 1, "frozen": 1})
    problem = random_problem((5,), 40, layers=3, dtype=torch.float32, feature_space=True)
    problem = replace(problem, mask=torch.arange(5) != 2)
    options = {
        "trajectory": "mse",
        "derivative": "mse",
        "output_kd_weight": 0.0,
        "output_in_dynamics": True,
    }
    for rows in (2, 5):
        monkeypatch.setenv(strategy.CACHE_BYTES, str(rows * 4 * 3 * strategy.padded(40)))
        assert_within_budget(problem, run(problem, **options), None, **options)


def test_the_value_of_kl_for_models_that_nearly_agree(monkeypatch):
    """Relative to the value, where the first pass's difference of sums has no digit left."""
    monkeypatch.setenv(strategy.STRATEGY, "cached")
    for near in (1e-2, 1e-3, 1e-4):
        problem = random_problem((2,), 2 * TOKENS, dtype=torch.float32, near=near)
        found, expected = run(problem).terms, exact(problem, None).terms
        for name in ("output_kd", "trajectory"):
            a, b = getattr(found, name), getattr(expected, name)
            assert abs(a - b) <= 1.5e-6 / near * b, (
                near,
                name,
                a,
                b,
            )  # logits are off by some 1e-6, log q - log p is of size near


def test_plain_gemm():
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (130, 70, 200), (17, 33, 257)):
        a = torch.randn(k, m, generator=generator).half().t()
        b = torch.randn(k, n, generator=generator).half()
        out = torch.full((m, n + 3), torch.nan)[:, :n]
        gemm.launch_product(out, a, b, accumulate=False)
        torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
        gemm.launch_product(out, a, b, accumulate=True)
        torch.testing.assert_close(out, 2 * (a.float() @ b.float()), rtol=1e-5, atol=2e-4)


def shape(**changes) -> CallShape:
    of = {"layers": 5, "rows": 4096, "columns": 32000, "student_width": 2048, "teacher_width": 5120}
    return CallShape(**(of | {"itemsize": 2} | changes))


def test_rule():
    """Blocks that fit the budget, are nearly even, and are not too few rows to pay."""
    budget = strategy.MOST_CACHE_BYTES
    for columns in (32000, 50257, 151936, 262144):
        rows = strategy.rows_of_cache(shape(columns=columns), budget)
        assert 0 < rows * 5 <= strategy.MOST_CACHED_ROWS
        assert rows * 5 >= strategy.FEWEST_CACHED_ROWS["trained"]
        assert 8 * 5 * rows * strategy.padded(columns) <= budget
        assert rows % strategy.ROW_STEP == 0
        assert -(rows * 5) % strategy.GEMM_TILE <= strategy.ROW_STEP * 5
    assert strategy.rows_of_cache(shape(columns=262144), 256 * strategy.MIB) == 0
    # all of them fit
    assert strategy.rows_of_cache(shape(columns=262144, rows=20), 256 * strategy.MIB) == 20
    assert strategy.rows_of_cache(shape(rows=0), budget) == 0
    slabs = strategy.slabs_of(shape(columns=262144), 256 * strategy.MIB)
    assert 8 * 5 * slabs.rows * slabs.tokens <= 256 * strategy.MIB
    assert strategy.slabs_of(shape(), 1000) is None


def test_bad_environment_is_named(monkeypatch):
    problem = random_problem((2,), 40, dtype=torch.float32)
    monkeypatch.setenv(strategy.STRATEGY, "fast")
    with pytest.raises(
        ValueError,
        match="FDD_KERNELS_TRITON_STRATEGY='fast' is not one of auto, cached, slabbed, one_pass",
    ):
        run(problem)
    monkeypatch.setenv(strategy.STRATEGY, "auto")
    monkeypatch.setenv(strategy.CACHE_BYTES, "2GiB")
    with pytest.raises(ValueError, match="FDD_KERNELS_CACHE_BYTES='2GiB' is not a number of bytes"):
        run(problem)


def shard_of_a_vocabulary(rank: int, path: str, name: str) -> None:
    """One of two processes: its rows of both heads, against one process with all of them."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2
    )
    os.environ[strategy.STRATEGY] = name
    options = {"trajectory": "jsd", "ce_weight": 0.5, "backend": "triton"}
    whole, part = (random_problem((3,), TOKENS + 40, labels=True) for _ in range(2))
    expected = fused_fdd_loss(**whole.arguments, **options)
    expected.backward()
    own = slice(0, 70) if rank == 0 else slice(70, None)
    weight = part.student_weight.detach()[own].requires_grad_()
    heads = {"student_weight": weight, "teacher_weight": part.teacher_weight[own]}
    found = fused_fdd_loss(
        **part.arguments | heads, **options, vocab_group=torch.distributed.group.WORLD
    )
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pairs = [(weight.grad, whole.student_weight.grad[own])]
    pairs += [(a.grad, b.grad) for a, b in zip(part.student_hidden, whole.student_hidden)]
    for a, b in pairs:
        assert (a - b).norm() <= 1e-5 * b.norm()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cached", "slabbed"])
def test_heads_that_are_split_over_processes(name, tmp_path):
    torch.multiprocessing.spawn(
        shard_of_a_vocabulary, args=(str(tmp_path / "store"), name), nprocs=2
    )
