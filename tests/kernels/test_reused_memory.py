"""Memory of cached logits: that of the head's gradient until it is written, and memory lent from
one call to the next, never to two at once.
"""

from __future__ import annotations

import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fdd_kernels import fused_fdd_loss
from fdd_kernels.backends.cpu import extension, problem, tiling
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.objectives.alignment.objective import cost_spec
from fdd_kernels.objectives.alignment.options import CostOptions
from fdd_kernels.testing import random_problem

ROWS, COLUMNS, WIDTHS = 9, 700, (24, 40)


def gradients(seed: int = 0, width: int = WIDTHS[0], columns: int = COLUMNS) -> list[torch.Tensor]:
    """Compute the gradients of a call whose logits are cached."""
    p = random_problem((ROWS,), columns, width, WIDTHS[1], layers=3, seed=seed)
    leaves = [*p.student_hidden, p.student_weight]
    states = p.student_hidden, p.student_weight, p.teacher_hidden, p.teacher_weight
    return list(torch.autograd.grad(fused_fdd_loss(*states, backend="cpu"), leaves))


def cached_problem(columns: int = COLUMNS, in_gradient: tuple[bool, bool] = (False, False)):
    """Build a call of one request with KL, all rows in one block."""
    p = random_problem((ROWS,), columns, *WIDTHS, layers=3)
    tensors = [[h.detach() for h in states] for states in (p.student_hidden, p.teacher_hidden)]
    heads = p.student_weight.detach(), p.teacher_weight.detach()
    inputs = LensInputs(tensors[0], heads[0], None, tensors[1], heads[1], None, None, None)
    spec = cost_spec(CostOptions(), columns, 3, 3)
    tiles = tiling.cached_tiles(ROWS, columns, torch.get_num_threads())
    rows = problem.valid_rows(inputs)
    call = problem.problem_of(inputs, spec, rows, tiles, in_gradient)
    return call, problem.zero_statistics(inputs, spec)


def memory(columns: int = COLUMNS) -> torch.Tensor:
    """Borrow the memory of a call's logits."""
    return extension.kernels.logits_memory(cached_problem(columns)[0])


@pytest.fixture
def two_threads():
    """With many threads, calls of few columns are not cached."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def test_memory_is_lent_to_one_call_at_a_time():
    first, second = memory(), memory()
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_FREE of Linux")
def test_released_memory_is_lent_again():
    first = memory().data_ptr()
    second = memory().data_ptr()
    assert first == second


MANY = 2**20  # rows of a head: larger than any other test's, and never touched


def gradient(rows: int = MANY) -> torch.Tensor:
    """Borrow the memory of a head's gradient."""
    return extension.kernels.gradient_memory(torch.empty(rows, WIDTHS[0], dtype=torch.bfloat16))


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_FREE of Linux")
def test_gradients_have_memory_of_their_own_that_is_lent_again():
    first = gradient()
    assert first.shape == (MANY, WIDTHS[0])
    assert first.dtype == torch.bfloat16
    assert first.is_contiguous()
    address = first.data_ptr()
    del first
    between = gradient(MANY // 4)  # a small tensor does not keep a large one's memory
    logits = memory()
    assert address not in (between.data_ptr(), logits.data_ptr())
    assert gradient().data_ptr() == address
    small = between.data_ptr()
    del between
    other = mmap.mmap(-1, MANY // 4 * WIDTHS[0] * 2)  # so that no freed address comes back
    # the last one released is kept
    assert gradient(MANY // 4).data_ptr() == small
    other.close()


def test_a_gradient_can_be_resized_as_any_tensor():
    found = gradients()[-1]
    expected = found.clone()
    found.resize_(2 * COLUMNS, WIDTHS[0])
    assert torch.equal(found[:COLUMNS], expected)


def test_what_the_last_call_left_is_not_read():
    """Padding included: rows of a block and columns of a tile."""
    expected = gradients()
    for columns in (COLUMNS, 3 * COLUMNS):
        memory(columns).fill_(float("nan"))
        assert same(gradients(), expected)


def test_calls_of_several_threads_do_not_share_it():
    expected = [gradients(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for found, one in zip(threads.map(gradients, range(4)), expected):
                assert same(found, one)


@pytest.mark.parametrize("columns", [512, COLUMNS, 1500])
@pytest.mark.parametrize(
    ("width", "expected"), [(40, (False, False)), (60, (True, False)), (120, (True, True))]
)
def test_logits_in_the_memory_of_the_heads_gradient(
    monkeypatch, two_threads, width, expected, columns
):
    """Three layers of 16 padded rows are 48 numbers a column of each model, for `width` numbers."""
    rule, chosen = tiling.in_gradient, []
    monkeypatch.setattr(
        tiling, "in_gradient", lambda *sizes: chosen.append(rule(*sizes)) or chosen[-1]
    )
    found = gradients(width=width, columns=columns)
    assert chosen == [expected]
    monkeypatch.setattr(tiling, "in_gradient", lambda *_: (False, False))
    assert same(found, gradients(width=width, columns=columns))


def test_which_models_logits_lie_in_the_gradient():
    of_tiles = 16, 1024, 512, 100  # rows, columns, columns of a tile, width
    assert tiling.in_gradient((8, 2), *of_tiles) == (False, True)
    assert tiling.in_gradient((2, 8), *of_tiles) == (True, False)
    assert tiling.in_gradient((3, 0), *of_tiles) == (True, True)
    # a last tile of one column: 16 columns with padding
    assert tiling.in_gradient((3, 3), 16, 1025, 512, 100) == (False, False)
    assert tiling.in_gradient((3, 3), 16, 1025, 512, 16 * 96) == (True, True)


NOT_IN_PLACE = {
    "a head": {"teacher_weight": torch.zeros(48, 48)},
    "a bias": {"teacher_bias": torch.zeros(48)},
    "half a vector": {"columns": 40},
    "bfloat16": {"states": torch.zeros(ROWS, 48, dtype=torch.bfloat16)},
    "columns apart": {"states": torch.zeros(ROWS, 96)[:, ::2]},
}


@pytest.mark.parametrize("changed", [{}, *NOT_IN_PLACE.values()], ids=["none", *NOT_IN_PLACE])
def test_states_that_cannot_be_read_in_place_are_refused(changed):
    columns = changed.get("columns", 48)
    states = [changed.get("states", torch.zeros(ROWS, 48))] * 3
    student = [torch.zeros(ROWS, 8)] * 3
    head, bias = changed.get("teacher_weight"), changed.get("teacher_bias")
    inputs = LensInputs(student, torch.zeros(48, 8), None, states, head, bias, None, None)
    spec = cost_spec(CostOptions(), columns, 3, 3)
    call = inputs, spec, problem.valid_rows(inputs), tiling.cached_tiles(ROWS, columns, 1)
    assert problem.teacher_in_place(inputs, spec) == (not changed)
    if not changed:
        problem.problem_of(*call, in_place=True)
        return
    with pytest.raises(RuntimeError, match="cannot be read in place"):
        problem.problem_of(*call, in_place=True)


def test_a_gradient_that_is_too_small_is_refused():
    call, statistics = cached_problem(in_gradient=(True, True))
    own = extension.kernels.logits_memory(call)
    for shape in ((COLUMNS, WIDTHS[0]), (COLUMNS - 1, WIDTHS[0]), (COLUMNS, 200)):
        with pytest.raises(RuntimeError, match="gradient too small"):
            extension.kernels.stats_and_cache(call, own, torch.empty(shape), *statistics)
