"""Split heads over gloo processes: loss and gradients against one process, refusals, a kill."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from fdd_kernels import Distiller, FDDLossTerms, fused_fdd_loss
from fdd_kernels.backends import why_unavailable
from fdd_kernels.testing import Outcome, Problem, assert_within_budget, evaluate, unit_roundoff
from tests.distributed.vocab_worker import (
    BOUNDS,
    CONFIG,
    backwards_problem,
    cases,
    grid_problem,
    sequence_problem,
    tensor_parallel_models,
)
from tests.support.hf_models import tiny_batch
from tests.support.processes import finish, start
from tests.support.vocab_threads import in_parts

# tests/numerics/test_merged_statistics.py runs the same code in threads
pytestmark = pytest.mark.slow
WORKER = "tests.distributed.vocab_worker"
CACHES = why_unavailable("cpu", torch.device("cpu")) is None  # only the C++ backend caches logits
WORLDS = (2, 4)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Start a group when first asked; return each process's results and exit, after the last is
    killed.
    """

    @functools.cache
    def run(kind: str, world: int) -> tuple[list[dict], list[tuple[int, str]]]:
        folder = tmp_path_factory.mktemp(f"{kind}{world}")
        ends = finish(start(WORKER, kind, world, folder))
        files = [folder / f"{rank}.pt" for rank in range(world)]
        assert all(file.exists() for file in files), "\n".join(errors[-3000:] for _, errors in ends)
        return [torch.load(file, weights_only=True) for file in files], ends

    return run


@pytest.fixture(scope="module", params=WORLDS)
def results(request, processes) -> list[dict]:
    return processes("results", request.param)[0]


@pytest.mark.parametrize("way", ["at once", "in blocks"])
@pytest.mark.parametrize("name", list(cases()))
def test_equals_one_process(results, name, way):
    check_case(results, name, way)
    if CACHES:
        assert [result[way][name]["blocks"] for result in results] == [blocks_of(name, way)] * len(
            results
        )


NOT_CACHED = ("per token", "float64", "no position counts", "no positions")


def blocks_of(name: str, way: str) -> list[int]:
    """Return the rows of each block with cached logits: the fewest that any process would take,
    3 on rank 0.
    """
    if name in NOT_CACHED:
        return []
    rows = valid_rows(cases()[name][0])
    return [rows] if way == "at once" else [min(3, rows - first) for first in range(0, rows, 3)]


def valid_rows(problem: Problem) -> int:
    rows, _ = problem.weighted(problem.flattened(-100, (), ()))
    valid = rows.valid
    return math.prod(problem.leading_shape) if valid is None else int(valid.sum())


@pytest.mark.parametrize("way", ["not on rank 0", "with another backend on rank 0"])
def test_nobody_caches_logits_unless_all_can(results, way):
    check_case(results, "everything", way)
    assert not any(result[way]["everything"]["blocks"] for result in results)


def test_backward_passes_after_the_first(results):
    """A second one forms the gradients anew, block by block; terms alone go through the two
    operations.
    """
    problem, found = backwards_problem(), [result["backwards"] for result in results]
    check(found, problem, None, {"output_in_dynamics": True, "output_kd_weight": 0.0, "beta": 2.0})
    blocks = -(-valid_rows(problem) // 3)
    if CACHES:
        assert [of_rank["blocks"] for of_rank in found] == [[blocks, 2 * blocks, 2 * blocks]] * len(
            found
        )


def check_case(results: list[dict], name: str, way: str) -> None:
    check([result[way][name] for result in results], *cases()[name])


def check(found: list[dict], problem: Problem, upstream: float | None, options: dict) -> None:
    """Every process has the same terms and hidden gradients, and the whole is within the budget of
    one process.
    """
    assert_same_everywhere([of_rank["terms"] for of_rank in found])
    of_hidden = [n for n in found[0]["gradients"] if "hidden" in n]
    assert_same_everywhere([[of_rank["gradients"][n] for n in of_hidden] for of_rank in found])
    gradients = {n: found[0]["gradients"][n] for n in of_hidden}
    for n in sorted(set(problem.leaves) - set(of_hidden)):
        gradients[n] = torch.cat([of_rank["gradients"][n] for of_rank in found])
    outcome = Outcome(FDDLossTerms(*found[0]["terms"]), gradients)
    if problem.student_weight.dtype == torch.bfloat16:
        check_bfloat16(problem, outcome, options, len(found))
    elif 0 in problem.leading_shape:
        assert outcome.terms.loss == 0
        assert {n: (g.shape, bool(g.any())) for n, g in gradients.items()} == {
            n: (t.shape, False) for n, t in problem.leaves.items()
        }
    else:
        assert_within_budget(problem, outcome, upstream, **options)


def assert_same_everywhere(of_ranks: list) -> None:
    for tensors in of_ranks[1:]:
        for a, b in zip(of_ranks[0], tensors, strict=True):
            assert torch.equal(a, b)


def check_bfloat16(problem, outcome: Outcome, options: dict, world: int) -> None:
    """Each share of a hidden gradient is rounded before they are summed, and so is the sum."""
    truth, shares = in_parts(problem.to(torch.float64), BOUNDS[world], backend="torch", **options)
    unit = unit_roundoff(torch.bfloat16)
    of_hidden = [name for name in truth.gradients if "hidden" in name]
    assert [len(of_rank) for of_rank in shares] == [len(of_hidden)] * world
    for name, true in truth.gradients.items():
        rounded = true.abs()
        if name in of_hidden:
            parts = [of_rank[of_hidden.index(name)] for of_rank in shares]
            rounded = rounded + sum(part.abs() for part in parts).view_as(true)
        error = (outcome.gradients[name].double() - true).abs()
        assert (error <= 1.01 * unit * rounded + 1e-5 * true.abs().max()).all(), name
    torch.testing.assert_close(outcome.terms.loss.double(), truth.terms.loss, rtol=1e-5, atol=0)


def test_sequence_parallel_rows_equal_one_process(results):
    problem = sequence_problem()
    expected = evaluate(problem, fused_fdd_loss, shift=True, ce_weight=0.5)
    found = [result["sequence"] for result in results]
    check_shares(found, expected, dim=1)


def test_data_parallel_beside_vocabulary_parallel(processes):
    expected = evaluate(grid_problem(), fused_fdd_loss, ce_weight=0.5)
    grid = [result["grid"] for result in processes("results", 4)[0]]
    assert torch.equal(grid[0]["loss"], grid[1]["loss"])
    for a, b in (grid[:2], grid[2:]):
        assert_same_everywhere([a["hidden"], b["hidden"]])
    whole_head = torch.cat([grid[0]["student_weight"], grid[1]["student_weight"]])
    check_shares([g | {"student_weight": whole_head} for g in grid[::2]], expected, dim=0)
    assert not any(g.any() for g in grid[0]["hidden"]), "no position of the first batch counts"


def check_shares(found: list[dict], expected: Outcome, dim: int) -> None:
    """Loss and head gradient, summed over the processes, and each one's rows of the hidden
    gradients.
    """
    for of_rank in found:
        torch.testing.assert_close(of_rank["loss"], expected.terms.loss, rtol=1e-6, atol=0)
        close(of_rank["student_weight"], expected.gradients["student_weight"])
    for layer, parts in enumerate(zip(*[of_rank["hidden"] for of_rank in found])):
        close(torch.cat(parts, dim), expected.gradients[f"student_hidden[{layer}]"])


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare two float32 evaluations whose sums differ in order."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", list(tensor_parallel_models()))
def test_distiller_with_split_heads(results, kind):
    student, teacher = tensor_parallel_models()[kind]
    loss = Distiller(student, teacher, CONFIG)(tiny_batch()).loss
    loss.backward()
    for result in results:
        check_model(result["distillers"][kind], student, loss)


def test_distiller_with_split_heads_under_fsdp(processes):
    student, teacher = tensor_parallel_models()["both heads"]
    distiller = Distiller(student, teacher, CONFIG)
    parts = [tiny_batch(rows=2 + data, seed=20 + data) for data in range(2)]
    items = sum(distiller.count_positions(part) for part in parts)
    loss = sum(distiller(part, num_items_in_batch=items).loss for part in parts)
    loss.backward()
    for result in processes("results", 4)[0]:
        check_model(result["fsdp"], student, loss)


def check_model(found: dict, student, loss: torch.Tensor) -> None:
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=0)
    scale = max(float(p.grad.abs().max()) for p in student.parameters())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            found["gradients"][name],
            parameter.grad,
            rtol=1e-4,
            atol=1e-6 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


EVERYWHERE = {
    "vocabularies differ": (
        "ValueError: over the processes of vocab_group student_weight has 37 rows and "
        "teacher_weight 36"
    ),
    "other columns": (
        "ValueError: the rows of student_weight [12, 25] and of teacher_weight [13, 24]"
    ),
    "other options": (
        "RuntimeError: ranks 0 and 1 of vocab_group were called with different options"
    ),
    "other positions": (
        "RuntimeError: ranks 0 and 1 of vocab_group were called with different options, shapes"
    ),
    "other labels": "RuntimeError: the processes of vocab_group have [7, 0] valid tokens",
    "other gradients": (
        "RuntimeError: ranks 0 and 1 of vocab_group were called with different options"
    ),
    "label": "ValueError: labels contains 37",
    "vocab_size": "ValueError: vocab_size=38 is larger than a vocabulary",
    "no column": "ValueError: ranks [1] of vocab_group hold no column below vocab_size=12",
    "feature space": (
        "ValueError: vocab_group splits LM heads over processes, but teacher_weight=None"
    ),
    "reference": 'ValueError: backend="reference" keeps dense tensors of one process',
    "group": "TypeError: vocab_group must be a torch.distributed.ProcessGroup",
    "DTensor": "TypeError: student_weight is a DTensor",
}


def test_split_heads_without_their_group_and_whole_heads_that_train_are_refused(results):
    for refused in [result["distillers"]["refused"] for result in results]:
        assert refused["no vocab_group"].startswith("RuntimeError: the student's head is a DTensor")
        assert "vocab_group=group" in refused["no vocab_group"]
        assert refused["whole head"].startswith(
            "RuntimeError: the student's head is whole on every process"
        )


def test_refusals_come_on_every_process_and_leave_nothing_behind(processes):
    results, _ = processes("refusals", 2)
    for found in [result["refusals"] for result in results]:
        for name, message in EVERYWHERE.items():
            assert found[name].startswith(message), f"{name}: {found[name]}"
        assert "cannot be compiled" in found["compiled"]
    one = [result["refusals"]["one process refuses"] for result in results]
    assert one[0].startswith("RuntimeError: ranks [1] of vocab_group refused their arguments")
    assert one[1].startswith("ValueError: student_bias has shape")
    check_case(results, "everything", "at once")  # the group is still in step


@pytest.mark.parametrize("world", WORLDS)
def test_a_process_that_is_killed_ends_the_others(processes, world):
    *others, (killed, _) = processes("results", world)[1]
    assert killed == 9
    for status, errors in others:
        assert status not in (0, None)
        assert "Error" in errors
