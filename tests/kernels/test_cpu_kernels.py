"""Test the C++ kernels alone: instruction sets, tiles, threads, processes, odd memory.

test_backends.py and test_accuracy.py test the loss itself on every backend.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fdd_kernels import _build, fused_fdd_loss
from fdd_kernels.backends import CallShape, check_spec, cpu
from fdd_kernels.backends.cpu import cached, extension, tiling
from fdd_kernels.engine import ops
from fdd_kernels.lens import layout
from fdd_kernels.lens.divergence_text import parse_divergence
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import COUNT, GRAD_SUM, LSE_T, M_TT, MEAN_T, TOP_S, TOP_T
from fdd_kernels.lens.spec import NLL, Layers, LensSpec, PairMoments, Request
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import make_plan
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.testing import assert_within_budget, evaluate, random_problem, unit_roundoff
from tests.support.heads_alike import with_common_direction

if extension.kernels is None:
    pytest.skip(f"no C++ kernels: {extension.why_missing}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BF16, F16 = torch.bfloat16, torch.float16


def check(problem, **options) -> None:
    assert_within_budget(
        problem, evaluate(problem, fused_fdd_loss, None, backend="cpu", **options), None, **options
    )


def gradients(problem, **options) -> list[torch.Tensor]:
    loss = fused_fdd_loss(**problem.arguments, backend="cpu", **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(problem.leaves.values()))]


@contextlib.contextmanager
def threads_of(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """Threads of the kernels; more than this machine may have cores."""
    with threads_of(request.param):
        yield request.param


def python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


INSTRUCTION_SETS = pytest.mark.parametrize("name", ["avx512", "avx2", "generic"])


@INSTRUCTION_SETS
def test_every_instruction_set_of_this_processor_is_right(name):
    process = python(
        "import torch\n"
        "from fdd_kernels.backends.cpu.extension import kernels\n"
        "from fdd_kernels.testing import assert_within_budget, evaluate, random_problem\n"
        "print(kernels.instruction_set())\n"
        "for trajectory, dtype in (('kl', torch.float32), ('jsd', torch.bfloat16)):\n"
        "    problem = random_problem((40,), 300, 24, 40, labels=True, bias='plain', dtype=dtype)\n"
        "    options = {'trajectory': trajectory, 'ce_weight': 0.5, 'student_softcap': 5.0}\n"
        "    found = evaluate(problem, backend='cpu', **options)\n"
        "    assert_within_budget(problem, found, **options)\n",
        FDD_KERNELS_ISA=name,
    )
    out, err = process.communicate(timeout=120)
    skip_what_is_lacking(name, process, err)
    assert process.returncode == 0, err
    assert out.strip() == name


def skip_what_is_lacking(name: str, process: subprocess.Popen, err: str) -> None:
    if process.returncode and "this processor lacks it" in err:
        pytest.skip(f"this processor lacks {name}")


@pytest.mark.slow
@INSTRUCTION_SETS
def test_many_options_with_every_instruction_set(name):
    if name == extension.kernels.instruction_set():
        pytest.skip("the tests themselves use it")
    probe = python(
        "from fdd_kernels.backends.cpu.extension import kernels; kernels.instruction_set()",
        FDD_KERNELS_ISA=name,
    )
    skip_what_is_lacking(name, probe, probe.communicate(timeout=120)[1])
    chosen = "every_trajectory or every_option and padded or at_any_temperature"
    tests = [
        "tests/numerics/test_backends.py",
        "tests/numerics/test_accuracy.py",
        "-k",
        chosen,
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"FDD_KERNELS_ISA": name, "FDD_TEST_BACKENDS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_an_unknown_instruction_set_is_refused():
    process = python(
        "from fdd_kernels.backends.cpu.extension import kernels; kernels.instruction_set()",
        FDD_KERNELS_ISA="mmx",
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode
    assert "FDD_KERNELS_ISA=mmx" in err


def test_bfloat16_gemms():
    """Multiply bfloat16 as processors with AMX or AVX512_BF16 do; here perhaps without the
    instructions.
    """
    code = (
        "import torch; from fdd_kernels import fused_fdd_loss; from "
        "fdd_kernels.backends.cpu.extension import kernels\n"
        "from fdd_kernels.testing import evaluate, random_problem\n"
        "found = evaluate(random_problem((40,), 500, 32, 24, dtype=torch.bfloat16), "
        "fused_fdd_loss, backend='cpu')\n"
        "print(kernels.bf16_gemm(), [float(g.double().sum()) for g in "
        "found.gradients.values()])"
    )
    processes = [python(code, FDD_KERNELS_BF16_PRODUCTS=switch) for switch in "01"]
    (wide, err_0), (narrow, err_1) = [process.communicate(timeout=120) for process in processes]
    assert wide.startswith("False"), err_0
    assert narrow.startswith("True"), err_1
    # gradients are rounded: it is another path
    assert narrow.split(" ", 1)[1] != wide.split(" ", 1)[1]


OTHER_LIBRARY = "brgemm" if extension.kernels.gemm_library() == "blas" else "blas"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "environment"),
    [
        ("bfloat16", {"FDD_KERNELS_BF16_PRODUCTS": "1"}),
        ("float32", {"FDD_KERNELS_GEMM": OTHER_LIBRARY}),
    ],
    ids=["bfloat16", OTHER_LIBRARY],
)
def test_many_gemms_that_are_not_the_default(dtype, environment):
    chosen = f"{dtype} and (ragged or low_precision or several_sets or every_way)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", chosen, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        timeout=600,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("library", ["brgemm", "blas", "mkl"])
def test_the_library_of_gemms_can_be_chosen(library):
    process = python(
        "from fdd_kernels.backends.cpu.extension import kernels; print(kernels.gemm_library())",
        FDD_KERNELS_GEMM=library,
    )
    out, err = process.communicate(timeout=120)
    if library == "mkl":
        assert "FDD_KERNELS_GEMM=mkl is not one of brgemm, blas" in err
    elif library == "brgemm" and not extension.kernels.has_brgemm(False):
        assert out.strip() == "blas"
    else:
        assert out.strip() == library


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        *itertools.product((1, 77), (1, 15, 16, 127, 129), (torch.float32, BF16)),
        (1, 32001, torch.float32),
        (77, 8001, torch.float32),
    ],
    ids=str,
)
def test_ragged_shapes(rows, columns, dtype):
    check(
        random_problem(
            (rows,), columns, 6 if dtype == BF16 else 5, 3, layers=3, bias="plain", dtype=dtype
        ),
        ce_weight=0.0,
    )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_low_precision_and_strided_inputs(dtype, contiguous):
    check(
        random_problem(
            (130,), 300, 24, 40, layers=4, dtype=dtype, labels=True, contiguous=contiguous
        ),
        ce_weight=0.5,
    )


@pytest.mark.parametrize("dtype", [BF16], ids=str)
def test_low_precision_heads_with_a_direction_in_common(dtype):
    """One rounding of dL/dlogits to bf16 would not do (test_logit_gradient_rounding.py)."""
    check(with_common_direction(random_problem((12,), 300, 32, 32, layers=2, dtype=dtype), 8.0))


def test_unaligned_inputs(threads):
    problem = random_problem((9,), 50, 7, 6)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(t.numel() + 1, dtype=t.dtype)
        view = storage[1:].view(t.shape)
        return view.copy_(t)

    check(problem.map(shifted))


def test_every_half_is_read_exactly():
    # All 63488 finite halves, subnormal ones too, as one feature vector against zeros: the mean of
    # their squares.
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = bits.view(F16)
    halves = halves[halves.isfinite() & (halves.abs() < 250)][None]
    zeros = torch.zeros_like(halves, dtype=torch.float32)
    weight = torch.zeros(halves.shape[1], 1)
    loss = fused_fdd_loss(
        torch.zeros(1, 1),
        weight,
        halves,
        None,
        trajectory="mse",
        output_in_dynamics=True,
        backend="cpu",
    )
    expected = (halves.double() - zeros.double()).square().mean()
    assert abs(loss.double() - expected) <= 8 * torch.finfo(torch.float32).eps * expected


def test_the_same_bits_in_every_run(threads):
    problem = random_problem((300,), 1000, 16, 24, layers=4, dtype=BF16)
    first = gradients(problem)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(problem)))


def test_results_do_not_depend_on_who_else_computes(threads):
    problems = [random_problem((150,), 700, 16, 24, layers=3, seed=seed) for seed in range(4)]
    alone = [gradients(problem) for problem in problems]
    together: list = [None] * len(problems)

    def work(index: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(3):
            together[index] = gradients(problems[index])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for expected, found in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(expected, found))


class _LossInWorker(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.stack(
            [g.double().norm() for g in gradients(random_problem((40,), 200, 8, 8, seed=index))]
        )


def test_in_forked_data_loader_workers_after_use_in_the_parent():
    expected = [_LossInWorker()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        _LossInWorker(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    for mine, theirs in zip(expected, loader):
        # A worker has one thread, so its tiles and the order of its sums differ.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_can_be_interrupted():
    # A shell starts background jobs with SIGINT ignored, which children inherit.
    code = """
import signal, torch
from fdd_kernels import fused_fdd_loss
signal.signal(signal.SIGINT, signal.default_int_handler)
hidden, weight = [torch.randn(4096, 256) for _ in range(5)], torch.randn(60000, 256)
print("ready", flush=True)
while True:
    fused_fdd_loss(hidden, weight, hidden, weight, backend="cpu")
"""
    process = python(code)
    try:
        assert process.stdout.readline().strip() == "ready"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in err


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("head_sum", ["0", ""], ids=["in two walks", "in one walk"])
def test_rows_in_several_sets(monkeypatch, threads, dtype, head_sum):
    problem = random_problem((90,), 200, 16, 24, layers=3, dtype=dtype, labels=True, bias="plain")
    whole = gradients(problem)
    monkeypatch.setattr(tiling, "CACHED_BYTES", 0)
    monkeypatch.setattr(tiling, "HIDDEN_BYTES", 20 * 4 * 3 * 16)  # 20 rows a set
    monkeypatch.setenv(tiling.HEAD_SUM, head_sum)
    check(problem)
    for a, b in zip(whole, gradients(problem)):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 24, 129, 50257])
@pytest.mark.parametrize("rows", [1, 9, 300, 20_000, 100_000])
def test_both_passes_cut_the_same_tiles(rows, columns):
    """A BLAS may round logits of another shape differently."""
    for layers in ((1, 1), (5, 5), (4, 9)):
        first, second = (
            tiling.choose_tiles(layers, rows, columns, 64, 2, backward=backward)
            for backward in (False, True)
        )
        assert (first.rows, first.columns) == (second.rows, second.columns)
        assert first.panel % first.columns == second.panel % second.columns == 0


CACHED = {"cached at once": 2**40, "cached in blocks": 16 * 2 * 3 * 384 * 4, "streamed": 0}
# Rows x layers of a block whose GEMMs are whole.
WHOLE = {"whole at once": 10**6, "whole in blocks": 16 * 3}


THREADS = [
    ("cached at once", 1),
    ("cached at once", 3),
    ("cached in blocks", 2),
    ("whole at once", 2),
    ("whole in blocks", 1),
    ("whole in blocks", 3),
    ("streamed", 1),
    ("streamed", 2),
    ("streamed", 3),
]


@pytest.fixture(params=THREADS, ids=lambda p: f"{p[0]}-{p[1]}")
def way(request, monkeypatch):
    """The ways to the gradients, with 1 to 3 threads; a block holds up to 16 rows of 3 layers and
    384 columns.
    """
    name, threads = request.param
    monkeypatch.setattr(tiling, "CACHED_BYTES", CACHED.get(name, 2**40))
    monkeypatch.setattr(tiling, "fast_blas", lambda: name in WHOLE)
    monkeypatch.setattr(tiling, "MIN_WHOLE_ROWS", 1)
    monkeypatch.setattr(tiling, "MAX_WHOLE_ROWS", WHOLE.get(name, 0))
    monkeypatch.setattr(tiling, "MIN_GEMM_ROWS", 0)
    with threads_of(threads):
        yield name


@pytest.fixture
def taken(monkeypatch) -> set[tuple[bool, bool]]:
    """Record of every block of cached logits whether its GEMMs are whole, and whether the teacher
    is read in place.
    """
    build, found = cached.problem_of, set()

    def recorded(inputs, spec, rows, tiles, in_gradient, *, in_place):
        found.add((tiles.whole, in_place))
        return build(inputs, spec, rows, tiles, in_gradient, in_place=in_place)

    monkeypatch.setattr(cached, "problem_of", recorded)
    return found


WAYS = {
    "plain": {},
    "every term": {"ce_weight": 0.5, "temperature": 2.0, "output_in_dynamics": True},
    "soft caps": {"student_softcap": 5.0, "teacher_softcap": 7.0, "student_logit_scale": 0.5},
    "second pass": {"trajectory": "jsd", "derivative": "mse"},
    "sum": {"reduction": "sum", "derivative": "centered_cosine"},
    "items": {"num_items_in_batch": 17},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_every_way_to_the_gradients(way, taken, dtype, options):
    check(
        random_problem(
            (40,), 300, 24, 33, layers=3, dtype=dtype, labels=True, bias="plain", contiguous=False
        ),
        **options,
    )
    whole = way in WHOLE and dtype == torch.float32
    assert taken == (set() if way == "streamed" else {(whole, False)})


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
def test_identical_models_have_no_gradient_in_every_way(way, divergence):
    """Not even one of rounding, which AdamW would turn into steps."""
    problem = random_problem((40,), 300, 24, 24, layers=3, near=0.0)
    options = {"trajectory": divergence, "output_divergence": divergence, "temperature": 2.0}
    loss, *found = gradients(problem, **options)
    assert loss == 0
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("layout", ["contiguous", "apart", "strided"])
@pytest.mark.parametrize("columns", [300, 304])
def test_every_way_in_feature_space(way, taken, columns, layout):
    """The teacher's states are read in place where a row lies in one piece, of whole vectors."""
    problem = random_problem(
        (40,), columns, 24, layers=3, feature_space=True, contiguous=layout != "strided", mask=True
    )
    if layout == "apart":
        wide = [torch.nn.functional.pad(h, (1, 16)) for h in problem.teacher_hidden]
        problem = replace(problem, teacher_hidden=tuple([h[:, 1:-16] for h in wide]))
    check(problem, trajectory="mse", derivative="mse", output_in_dynamics=True)
    in_place = columns == 304 and layout != "strided"
    assert taken == (set() if way == "streamed" else {(way in WHOLE, in_place)})


def whole_always(monkeypatch) -> None:
    """Let GEMMs be whole wherever they may."""
    monkeypatch.setattr(tiling, "fast_blas", lambda: True)
    monkeypatch.setattr(tiling, "MIN_WHOLE_ROWS", 1)


def test_whole_blocks_of_many_columns(monkeypatch, taken):
    whole_always(monkeypatch)
    check(random_problem((20,), tiling.MAX_WHOLE_COLUMNS, 24, 33, layers=3, bias="plain"))
    assert taken == {(True, False)}


def test_whole_blocks_only_where_the_blas_is_exact(monkeypatch):
    whole_always(monkeypatch)
    of_call = (3, 3), 20, 300, 24
    before = torch.get_float32_matmul_precision()
    assert tiling.whole_rows(*of_call, narrow=False) == 20
    assert tiling.whole_rows(*of_call, narrow=True) == 0
    try:
        torch.set_float32_matmul_precision("medium")
        assert tiling.whole_rows(*of_call, narrow=False) == 0
    finally:
        torch.set_float32_matmul_precision(before)
    assert tiling.whole_rows(*of_call, narrow=False) == 20


def test_memory_of_whole_blocks(monkeypatch):
    """One block: what the kernels ask for, and the teacher's stacked states beside it."""
    whole_always(monkeypatch)
    asked = []
    kernels, reserve = extension.kernels, extension.kernels.logits_memory
    monkeypatch.setattr(
        kernels, "logits_memory", lambda p: asked.append(reserve(p).nbytes) or reserve(p)
    )
    check(random_problem((40,), 300, 24, 33, layers=3))
    predicted = cpu.memory(CallShape(3, 40, 300, 24, 33, 4))
    in_all = predicted["cached logits"] + predicted["hidden states of a block"]
    assert set(asked) == {in_all - 4 * 3 * 40 * 33}


def test_every_way_with_a_padded_vocabulary(way):
    check(random_problem((40,), 300, 24, 33, layers=3, bias="padded"), vocab_size=290)


LITTLE = [("student_weight",), ("student_hidden[1]",), ("student_bias", "student_hidden[0]")]


@pytest.mark.parametrize("trained", LITTLE, ids=str)
def test_every_way_with_little_to_train(way, trained):
    problem = random_problem((40,), 300, 24, 33, layers=3, bias="plain")
    everything = dict(zip(problem.leaves, gradients(problem)[1:]))
    for name, leaf in problem.leaves.items():
        leaf.requires_grad_(name in trained)
    assert set(problem.leaves) == set(trained)
    for name, found in zip(problem.leaves, gradients(problem)[1:]):
        # Other tiles may add in another order, of numbers as large as the largest.
        atol = 1e-6 * float(everything[name].abs().max())
        torch.testing.assert_close(
            found, everything[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_way_under_defaults_that_are_not_ours(way):
    problem = random_problem((40,), 300, 24, 33, layers=3)
    expected = gradients(problem)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = gradients(problem)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


def test_terms_that_are_not_computed_need_no_gradient(way):
    problem = random_problem((40,), 300, 24, 33, layers=1)
    terms = fused_fdd_loss(**problem.arguments, backend="cpu", return_terms=True)
    assert [term.requires_grad for term in terms] == [True, True, False, False, False]
    leaf = torch.ones((), requires_grad=True)
    (leaf * 2 + terms.trajectory).backward()
    assert leaf.grad == 2


def test_checkpointing_does_not_recompute_in_forward(way):
    problem = random_problem((40,), 300, 24, 33, layers=3)
    calls = []

    def loss():
        calls.append(1)
        return fused_fdd_loss(**problem.arguments, backend="cpu")

    value = torch.utils.checkpoint.checkpoint(loss, use_reentrant=False)
    assert len(calls) == 1
    value.backward()
    assert len(calls) == 2


def test_gradients_of_single_terms_after_gradients_were_formed_for_the_loss(way):
    problem = random_problem((40,), 300, 24, 33, layers=3)
    leaves = list(problem.leaves.values())
    options = {"output_in_dynamics": True, "backend": "cpu"}
    terms = fused_fdd_loss(**problem.arguments, **options, return_terms=True)
    of_loss = torch.autograd.grad(terms.loss, leaves, retain_graph=True)
    weighted = torch.autograd.grad(
        terms.trajectory + 2 * terms.derivative, leaves, retain_graph=True
    )
    expected = fused_fdd_loss(**problem.arguments, **options, output_kd_weight=0.0, beta=2.0)
    for found, wanted in zip(weighted, torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for again, before in zip(torch.autograd.grad(2 * terms.loss, leaves), of_loss):
        torch.testing.assert_close(again, 2 * before, rtol=0, atol=0)


def rows_of_a_block(dtype=torch.float32, count=512, columns=50257, width=8, layers=5) -> int:
    """Ask the rows of a block whose logits are cached, where the head is trained."""
    states = [torch.empty(count, width, dtype=dtype) for _ in range(layers)]
    weight = torch.empty(columns, width, dtype=dtype)
    plan, _ = make_plan(LossOptions(), LossInputs(states, weight, states, weight))
    inputs = LensInputs(states, weight, None, states, weight, None, None, None)
    return cpu.cached_rows(inputs, plan.spec, [True] * (layers + 1) + [False])


def test_logits_are_cached_where_that_pays():
    rows = rows_of_a_block
    assert rows() * 10 * 50304 * 4 <= tiling.CACHED_BYTES
    assert rows() >= 80
    assert rows(count=3) == 3
    few = {"head_sum_bytes": 0, "threads": 4, "narrow": False}
    assert tiling.block_rows((5, 5), 100, 4 * tiling.TILE_COLUMNS, 8, **few) > 0
    # a thread would have nothing to do
    assert tiling.block_rows((5, 5), 100, 3 * tiling.TILE_COLUMNS, 8, **few) == 0
    assert rows(torch.float16) == 0  # sums before the loss scale would underflow
    assert rows(torch.float64) == 0
    assert rows(columns=2**20) == 0  # too few rows at a time
    assert 0 < rows(count=200) <= 100  # in equal blocks


def test_a_16_bit_head_is_summed_within_the_budget_of_its_sum(monkeypatch):
    """Half of each float32 number lies in the gradient, 2 bytes beside it."""
    monkeypatch.setattr(tiling, "CACHED_BYTES", 16 * 2 * 3 * 384 * 4)
    problem = random_problem((40,), 300, 24, 33, layers=3, dtype=BF16)
    shape = CallShape(3, 40, 300, 24, 33, 2)
    sizes = {"count": 40, "columns": 300, "width": 24, "layers": 3}
    for limit, is_cached in ((2 * 300 * 24, True), (0, False)):
        monkeypatch.setenv(tiling.HEAD_SUM, str(limit))
        assert rows_of_a_block(BF16, **sizes) == (16 if is_cached else 0)
        assert rows_of_a_block(torch.float32, **sizes) == 16
        assert ("cached logits" in cpu.memory(shape)) == is_cached
        assert cpu.memory(shape)["sum of the head's gradient"] == limit
        check(problem)
    monkeypatch.setenv(tiling.HEAD_SUM, "1GiB")
    with pytest.raises(ValueError, match="FDD_KERNELS_HEAD_SUM_BYTES='1GiB' is not a number of"):
        check(problem)


def test_a_16_bit_head_is_rounded_once(monkeypatch):
    """In blocks or at once: the float32 sums differ in their last bits, which moves a number over a
    midpoint here and there and no further than one unit of its last place.
    """
    problem = random_problem((40,), 300, 24, 33, layers=3, dtype=BF16)
    whole = evaluate(problem, backend="cpu").gradients["student_weight"].float()
    monkeypatch.setattr(tiling, "CACHED_BYTES", 16 * 2 * 3 * 384 * 4)
    in_blocks = evaluate(problem, backend="cpu").gradients["student_weight"].float()
    # Cancellation leaves the error of a float32 sum, relative to the largest numbers of a row.
    rounding = 2 * unit_roundoff(BF16) * whole.abs() + 1e-5 * whole.abs().amax(1, keepdim=True)
    assert ((whole - in_blocks).abs() <= rounding).all()
    assert (whole != in_blocks).float().mean() < 0.01


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("columns", [1, 300, 4096, 50257, 262144])
def test_tiles_of_cached_logits_are_wide_and_divide_equally(monkeypatch, columns, threads):
    monkeypatch.undo()  # `several_tiles`
    width = tiling.cached_columns(columns, threads)
    assert width % 16 == 0
    assert width <= min(tiling.MAX_CACHED_COLUMNS, columns + 15)
    assert columns < 1024 * threads or width >= 256

    def of_busiest_thread(width: int) -> int:
        return math.ceil(math.ceil(columns / width) / threads) * width

    narrow = min(tiling.TILE_COLUMNS, tiling.round_up(columns, 16))
    assert of_busiest_thread(width) <= 1.02 * of_busiest_thread(narrow)


def test_wide_tiles_of_cached_logits(monkeypatch):
    monkeypatch.undo()  # `several_tiles`
    assert tiling.cached_columns(1100, torch.get_num_threads()) > tiling.TILE_COLUMNS
    check(random_problem((40,), 1100, 24, 33, layers=3))


@pytest.mark.parametrize("layers", [(1, 1), (5, 5), (49, 49), (4, 33), (33, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 1000, 300_000])
@pytest.mark.parametrize("columns", [1, 50257, 262144])
@pytest.mark.parametrize("width", [8, 4480, 32768])
def test_tiles_stay_within_their_budgets(layers, rows, columns, width):
    for backward in (False, True):
        tiles = tiling.choose_tiles(layers, rows, columns, width, threads=2, backward=backward)
        assert tiles.rows >= 1
        assert tiles.columns <= tiles.panel
        assert tiles.panel % tiles.columns == 0
        one_tile = tiles.panel == tiles.columns
        assert one_tile or 4 * width * tiles.panel <= tiling.PACK_BYTES
        assert (
            tiles.panel <= 16
            or not backward
            or 4 * layers[0] * rows * tiles.panel <= tiling.GRADIENT_BYTES
        )
        assert tiles.rows == 8 or 4 * sum(layers) * tiles.rows * tiles.columns <= tiling.TILE_BYTES


def test_every_divergence_of_the_registry_is_compiled():
    """A switch that leaves one out does not compile (-Werror=switch)."""
    assert set(extension.kernels.divergences()) == {"", NLL, *DIVERGENCES}


def test_divergences_that_are_not_compiled_are_refused():
    spec = pairing_spec([1, 0])
    assert cpu.refusal(spec) is None
    other = replace(spec, requests=(spec.requests[0]._replace(divergence="new"),))
    reason = "compiled without a divergence 'new'"
    assert reason in cpu.refusal(other)
    with pytest.raises(ValueError, match=f'backend="cpu" cannot compute this: .*{reason}'):
        check_spec("cpu", other)


def test_constants_of_the_cpp_side_are_those_of_python():
    """csrc/layout.h repeats lens/layout.py; csrc/problem.h and row_kernels.h have the padding of
    logits.
    """
    header = (_build.source_folder() / "layout.h").read_text()
    for prefix, size in (("Request", "REQUEST_STATS"), ("Moment", "MOMENT_STATS")):
        names = re.search(rf"enum {prefix}Stat {{([^}}]+)}};", header)[1].split(",")
        expected = {  # kLseS: LSE_S; kMSS: M_SS
            name.strip(): re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()[1:]).upper()
            for name in names
        }
        expected |= {f"kM{pair}": f"M_{pair}" for pair in ("SS", "TT", "ST", "DD")}
        for index, name in enumerate(names):
            assert getattr(layout, expected[name.strip()]) == index, name
        assert getattr(layout, size) == len(names) - 1
    assert f"kCertain = {layout.CERTAIN}f;" in header
    problem = (_build.source_folder() / "problem.h").read_text()
    assert f"kRowPadding = {tiling.ROW_PADDING};" in problem
    row_kernels = (_build.source_folder() / "row_kernels.h").read_text()
    assert f"kPadding = {tiling.COLUMN_PADDING};" in row_kernels


def pairing_spec(teacher_of: list[int], teachers: int = 2) -> LensSpec:
    """Every kind of request and of pair moments; layer l of the student is compared with layer
    `teacher_of[l]` of `teachers`.
    """
    layers = [Layers(student, teacher) for student, teacher in enumerate(teacher_of)]
    kinds = [None, *DIVERGENCES, "jsd:0.1"]
    requests = []
    for i, kind in enumerate(kinds):
        named = (None, ()) if kind is None else parse_divergence(kind)
        requests.append(Request(*layers[i % len(layers)], 2.0, *named))
    requests.append(Request(*layers[0], 2.0, "kl", teacher_mix=0.3))
    requests.append(Request(*layers[-1], 1.0, NLL))
    # every layer has a request: the shifts of the others may be any number
    requests += [
        Request(i % len(layers), i % teachers, 1.0, None) for i in range(max(len(layers), teachers))
    ]
    moments = [
        PairMoments(None, layers[0], 2.0),
        PairMoments(Layers(1, 0), Layers(0, 1), 2.0),
        PairMoments(layers[1], Layers(1, 0), 0.5),
        PairMoments(None, Layers(1, 1), 3.0, True),
        PairMoments(layers[0], Layers(1, 0), 0.25, True),
    ]
    return LensSpec(19, tuple(requests), tuple(moments), 0.5, 4.0, 1.0, None)


@pytest.mark.parametrize(
    ("teacher_of", "teachers"),
    [([2, 0, 1], 3), ([1, 1, 1], 3), ([0, 2, 0], 3), ([1, 0, 1], 2), ([3, 0], 5)],
    ids=str,
)
def test_any_pairing_of_layers(teacher_of, teachers):
    """Against the backend "torch", with both ways to the gradients."""
    layers = max(len(teacher_of), teachers)
    p = random_problem((20,), 19, 8, 6, layers=layers, labels=True, mask=True, bias="plain")
    valid, labels = p.mask.bool() & (p.labels >= 0), p.labels.clamp(min=0)
    states = [
        [h.detach() for h in side[:count]]
        for side, count in ((p.student_hidden, len(teacher_of)), (p.teacher_hidden, teachers))
    ]
    student, teacher = (
        [w.detach(), b.detach()]
        for w, b in ((p.student_weight, p.student_bias), (p.teacher_weight, p.teacher_bias))
    )
    inputs = LensInputs(states[0], *student, states[1], *teacher, valid, labels)
    spec, needed = pairing_spec(teacher_of, teachers), [True] * (len(teacher_of) + 2)
    arguments = (*inputs, *spec.encode())
    expected = ops.lens_stats(*arguments, "torch")
    found = ops.lens_stats(*arguments, "cpu")
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    torch.manual_seed(0)
    upstream = [torch.randn_like(s) * valid for s in expected[1:]]
    upstream[0][:, [LSE_T, GRAD_SUM]] = 0  # of the teacher, and a constant
    upstream[1][:, [COUNT, MEAN_T, M_TT, TOP_S, TOP_T]] = 0
    gradients = ops.lens_grad(*arguments, "torch", *expected, *upstream, needed)
    streamed = ops.lens_grad(*arguments, "cpu", *expected, *upstream, needed)

    def upstream_of(rows, *statistics):
        return *statistics, *[u[..., rows] for u in upstream]

    cached, statistics = cpu.stats_and_grad(inputs, spec, 8, upstream_of, needed, True)
    torch.testing.assert_close(statistics, found, rtol=2e-5, atol=2e-5)
    for of_torch, *others in zip(gradients, streamed, cached):
        for other in others:
            atol = 1e-5 * float(of_torch.abs().max())
            torch.testing.assert_close(other, of_torch, rtol=1e-4, atol=atol)


def test_every_divergence_of_the_registry_is_in_the_triton_kernels():
    """Each is a branch of both device functions, whose last branch is a static assertion."""
    folder = Path(tiling.__file__).parents[1] / "triton"
    source = next(
        s for s in (p.read_text() for p in folder.rglob("*.py")) if "def divergence_grad(" in s
    )
    for function in ("value", "grad"):
        body = source.split(f"def divergence_{function}(")[1].split("\n@triton.jit")[0]
        assert "static_assert" in body
        for name in DIVERGENCES:
            assert f'DIVERGENCE == "{name}"' in body, (function, name)
