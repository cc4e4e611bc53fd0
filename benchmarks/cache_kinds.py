"""What each kind of teacher cache costs a training step, beside the teacher itself: size, time of
the loss, error.

python -m benchmarks.cache_kinds

GPT-2 from GPT-2 XL (V = 50257, widths 768 and 1600, four sampled layers and the output, frozen
head, float32), random states of a residual stream. The time is that of the loss and its gradients
with what a kind needs in memory; the teacher's own forward, which a cache saves whatever its kind,
and reading files are not in it. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.inputs import build_problem
from benchmarks.workloads import GPT2
from fdd_kernels import fdd_loss_reference, fused_fdd_loss
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.summary import StatisticsLoss, StatisticsMaker, statistics_widths
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.testing import Problem

EXACT_ROWS = 16  # of the comparison with float64, which is dense


def states_loss(problem: Problem, codec: str | None) -> Callable[[list[Tensor]], Tensor]:
    """The loss with the teacher's states as they are, or as a cache gives them back."""
    states = problem.teacher_hidden
    if codec is not None:
        states = [CODECS[codec].decode(CODECS[codec].encode(h), h.dtype) for h in states]
    return lambda hidden: fused_fdd_loss(
        hidden, problem.student_weight, states, problem.teacher_weight
    )


def statistics_loss(problem: Problem) -> Callable[[list[Tensor]], Tensor]:
    options, weight = LossOptions(), problem.student_weight
    found = StatisticsMaker(options, weight)(problem.teacher_hidden, problem.teacher_weight)
    loss = StatisticsLoss(options, len(problem.teacher_hidden), weight)
    return lambda hidden: loss(hidden, found).loss


def run(loss: Callable[[list[Tensor]], Tensor], problem: Problem) -> tuple[Tensor, Tensor, float]:
    """Value, gradients (L, R, D) and seconds of forward and backward."""
    hidden = [h.detach().requires_grad_() for h in problem.student_hidden]
    start = time.perf_counter()
    value = loss(hidden)
    gradients = torch.autograd.grad(value, hidden)
    return value.detach(), torch.stack(gradients), time.perf_counter() - start


def first_rows(problem: Problem, count: int) -> Problem:
    return replace(
        problem,
        student_hidden=tuple(h[:count] for h in problem.student_hidden),
        teacher_hidden=tuple(h[:count] for h in problem.teacher_hidden),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=256, metavar="N", help="positions (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="(%(default)s)")
    arguments = parser.parse_args()
    problem = build_problem(replace(GPT2, rows=arguments.rows, train_head=False)).frozen(
        "student_weight"
    )
    layers, width = len(problem.teacher_hidden), problem.teacher_hidden[0].shape[-1]
    widths = statistics_widths(LossOptions(), layers, problem.student_hidden[0].shape[-1])
    ways = {"teacher's states, float32": (4 * layers * width, states_loss, None)}
    ways |= {
        f"states, {name}": (layers * CODECS[name].bytes_per_row(width), states_loss, name)
        for name in CODECS
    }
    ways["statistics, float32"] = 4 * sum(widths.values()), lambda p, _: statistics_loss(p), None

    few = first_rows(problem, EXACT_ROWS)
    wide = few.to(torch.float64)
    exact = run(
        lambda h: fdd_loss_reference(
            h, wide.student_weight, wide.teacher_hidden, wide.teacher_weight
        ),
        wide,
    )
    rows = {}
    for name, (size, make, codec) in ways.items():
        value, gradients, _ = run(make(few, codec), few)
        off = (gradients.double() - exact[1]).norm(dim=-1) / exact[1].norm(dim=-1)
        rows[name] = [
            str(size),
            f"{abs(float(value) / float(exact[0]) - 1):.1e}",
            f"{float(off.max()):.1e}",
        ]
    losses = {name: make(problem, codec) for name, (_, make, codec) in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(arguments.repeats + 1):
        for name, loss in losses.items():
            taken = run(loss, problem)[2]
            if turn:
                seconds[name].append(taken)
    table = Table(
        title=(
            f"{arguments.rows} positions, {torch.get_num_threads()} threads, median of "
            f"{arguments.repeats}"
        )
    )
    for column in (
        "loss from",
        "bytes a position",
        "error of the value",
        "of the gradient, worst row",
        "seconds",
        "to",
    ):
        table.add_column(column)
    for name, cells in rows.items():
        taken = seconds[name]
        table.add_row(
            name, *cells, f"{statistics.median(taken):.3f}", f"{min(taken):.3f}-{max(taken):.3f}"
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
