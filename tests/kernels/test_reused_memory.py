"""Memory of cached logits: lent from one call to the next, never to two at once."""

from __future__ import annotations

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


def gradients(seed: int = 0) -> list[torch.Tensor]:
    """Compute the gradients of a call whose logits are cached."""
    p = random_problem((ROWS,), COLUMNS, *WIDTHS, layers=3, seed=seed)
    leaves = [*p.student_hidden, p.student_weight]
    states = p.student_hidden, p.student_weight, p.teacher_hidden, p.teacher_weight
    return list(torch.autograd.grad(fused_fdd_loss(*states, backend="cpu"), leaves))


def memory(columns: int = COLUMNS) -> torch.Tensor:
    """Borrow the memory of a call's logits."""
    p = random_problem((ROWS,), columns, *WIDTHS, layers=3)
    tensors = [[h.detach() for h in states] for states in (p.student_hidden, p.teacher_hidden)]
    heads = p.student_weight.detach(), p.teacher_weight.detach()
    inputs = LensInputs(tensors[0], heads[0], None, tensors[1], heads[1], None, None, None)
    spec = cost_spec(CostOptions(), columns, 3, 3)
    tiles = tiling.cached_tiles(ROWS, columns, torch.get_num_threads())
    rows = problem.valid_rows(inputs)
    return extension.kernels.cache_memory(problem.problem_of(inputs, spec, rows, tiles))


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
