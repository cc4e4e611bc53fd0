"""Costs of each kind of teacher cache in a training step, beside the teacher itself: size, time of
the loss, error.

python -m benchmarks.cache_kinds

GPT-2 from GPT-2 XL (V = 50257, widths 768 and 1600, four sampled layers and the output, frozen
head, float32), random states of a residual stream. The time is that of the loss and its gradients
with everything in memory: without the teacher's forward, which every cache saves, and without
reading files. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from benchmarks.inputs import build_problem
from benchmarks.report import markdown
from benchmarks.workloads import GPT2
from fdd_kernels import fdd_loss_reference, fused_fdd_loss
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.summary import SummaryLoss, SummaryMaker, summary_widths
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.testing import Problem

EXACT_ROWS = 16  # of the comparison with float64, which is dense
Loss = Callable[[list[Tensor]], Tensor]


def states_loss(problem: Problem, codec: str | None) -> Loss:
    """Make the loss with the teacher's states as they are, or as a cache returns them."""
    states = problem.teacher_hidden
    if codec is not None:
        states = [CODECS[codec].decode(CODECS[codec].encode(h), h.dtype) for h in states]
    heads = problem.student_weight, problem.teacher_weight
    return lambda hidden: fused_fdd_loss(hidden, heads[0], states, heads[1])


def statistics_loss(problem: Problem, _: None) -> Loss:
    """Make the loss with a summary of the teacher."""
    options, weight = LossOptions(), problem.student_weight
    found = SummaryMaker(options, weight)(problem.teacher_hidden, problem.teacher_weight)
    loss = SummaryLoss(options, len(problem.teacher_hidden), weight)
    return lambda hidden: loss(hidden, found).loss


def run(loss: Loss, problem: Problem) -> tuple[Tensor, Tensor, float]:
    """Return value, gradients (L, R, D) and seconds of forward and backward."""
    hidden = [h.detach().requires_grad_() for h in problem.student_hidden]
    start = time.perf_counter()
    value = loss(hidden)
    gradients = torch.autograd.grad(value, hidden)
    return value.detach(), torch.stack(gradients), time.perf_counter() - start


def errors(loss: Loss, few: Problem) -> tuple[float, float]:
    """Return the relative error of the value, and of the gradient in the worst row, against
    float64.
    """
    wide = few.to(torch.float64)
    rest = wide.student_weight, wide.teacher_hidden, wide.teacher_weight
    exact, exact_gradients, _ = run(lambda h: fdd_loss_reference(h, *rest), wide)
    value, gradients, _ = run(loss, few)
    off = (gradients.double() - exact_gradients).norm(dim=-1) / exact_gradients.norm(dim=-1)
    return abs(float(value) / float(exact) - 1), float(off.max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="(%(default)s)")
    arguments = parser.parse_args()
    workload = replace(GPT2, rows=arguments.rows, train_head=False)
    problem, few = build_problem(workload), build_problem(workload, rows=EXACT_ROWS)
    layers, width = len(problem.teacher_hidden), problem.teacher_hidden[0].shape[-1]
    widths = summary_widths(LossOptions(), layers, workload.student_width)
    ways = {"teacher's states, float32": (4 * layers * width, states_loss, None)}
    for name, codec in CODECS.items():
        ways[f"states, {name}"] = layers * codec.bytes_per_row(width), states_loss, name
    ways["statistics, float32"] = 4 * sum(widths.values()), statistics_loss, None

    losses = {name: make(problem, codec) for name, (_, make, codec) in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(arguments.repeats + 1):
        for name, loss in losses.items():
            seconds[name].append(run(loss, problem)[2])
    rows = []
    for name, (size, make, codec) in ways.items():
        of_value, of_gradient = errors(make(few, codec), few)
        row = {
            "loss from": name,
            "bytes a token": f"{size}",
            "error of the value": f"{of_value:.1e}",
        }
        row |= {"of the gradient, worst row": f"{of_gradient:.1e}"}
        times = seconds[name][1:]  # after a warm-up
        row |= {"seconds": f"{statistics.median(times):.3f}"}
        rows.append(row | {"range": f"{min(times):.3f}-{max(times):.3f}"})
    threads = f"{torch.get_num_threads()} threads"
    print(f"{arguments.rows} tokens, {threads}, median of {arguments.repeats}\n")
    print(*markdown(pd.DataFrame(rows)), sep="\n")


if __name__ == "__main__":
    main()
