"""Further gains and promises of the strategies: a second stream, masked rows, CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, WrongNumbersError, gradients, ours
from benchmarks.gpu.kernels import heavy_launches
from fdd_kernels.backends.triton.gemm import multiply
from fdd_kernels.testing import Problem


def second_stream(pair: str) -> Callable[[Bench], dict]:
    """Make the step that runs a block's elementwise kernels beside the GEMM of another block, each
    on its own stream.

    `hidden` is the part of the shorter of the two that the longer hides.
    """

    def step(bench: Bench) -> dict:
        card, workload = bench.card, bench.workload(pair)
        problem, heavy = bench.problem(workload), list(heavy_launches(bench, workload).values())
        m, width = card.size(1660, 4), workload.teacher_width
        hidden = torch.randn(m, width, dtype=torch.bfloat16, device=card.device)
        logits = torch.empty(m, workload.columns, device=card.device)
        second = card.cuda.Stream()

        def gemm() -> None:
            multiply(logits, hidden, problem.teacher_weight.t())

        def kernels() -> None:
            for started in heavy:
                started.again()

        def in_turn() -> None:
            with card.on(second):
                kernels()
            gemm()

        def beside() -> None:
            second.wait_stream(card.cuda.current_stream())
            with card.cuda.stream(second):
                kernels()
            gemm()
            card.cuda.current_stream().wait_stream(second)

        runs = {"GEMM": gemm, "kernels": kernels, "in turn": in_turn, "beside each other": beside}
        found = {n: statistics.median(card.seconds(run, most=0.3)) for n, run in runs.items()}
        gained = found["GEMM"] + found["kernels"] - found["beside each other"]
        return {
            "ms": {name: seconds * 1e3 for name, seconds in found.items()},
            "hidden": gained / max(min(found["GEMM"], found["kernels"]), 1e-12),
            "of": [started.name for started in heavy],
        }

    return step


def masks(bench: Bench) -> dict:
    """Time calls with half of the rows masked, as prompts are: eager calls may count the valid
    rows, a captured one cannot.
    """
    card, workload = bench.card, bench.workload("Llama")
    whole = bench.problem(workload)
    half = replace(whole, mask=torch.arange(workload.rows, device=card.device) % 2 == 0)
    options = workload.loss_options
    for name, problem in (("all rows", whole), ("half of the rows", half)):
        run = card.once(lambda problem=problem: gradients(ours, problem, options)[1])
        replay, _ = card.captured(run)
        eager, captured = (statistics.median(card.seconds(r, most=0.7)) for r in (run, replay))
        bench.report(name, {"eager_ms": eager * 1e3, "captured_ms": captured * 1e3})
    return {}


def whole_step(bench: Bench) -> dict:
    """Capture forward and backward in one CUDA graph: replays give the same bits, and see new
    inputs.
    """
    card, workload = bench.card, bench.workload("GPT-2", 2048)
    problem = bench.problem(workload)

    def run() -> list[Tensor]:
        loss, found = gradients(ours, problem, workload.loss_options)
        return [loss, *found]

    eager = [t.clone() for t in run()]
    replay, captured = card.captured(run)
    found = []
    for _ in range(2):
        for tensor in captured:
            tensor.fill_(float("nan"))
        replay()
        card.cuda.synchronize()
        found.append([t.clone() for t in captured])
    equal = {"replays": _same_bits(*found), "eager": _same_bits(eager, found[0])}
    apart = max(
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found[0], eager)
    )
    if not (equal["replays"] and apart < 1e-3):
        difference = f"same bits {equal}, relative difference from eager {apart:.2e}"
        raise WrongNumbersError(f"replays of a captured step: {difference}")
    seconds = [statistics.median(card.seconds(r, most=0.7)) for r in (run, replay)]
    times = {"eager_ms": seconds[0] * 1e3, "replay_ms": seconds[1] * 1e3}
    states = {"new_states": new_states(bench, problem)}
    return {"same_bits": equal, "apart": apart} | times | states


def _same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second))


def new_states(bench: Bench, problem: Problem) -> str:
    """Check that a captured step sees new values of its inputs: other states, another loss."""
    states = problem.student_hidden[0].detach()
    replay, captured = bench.card.captured(lambda: [gradients(ours, problem, {})[0]])
    replay()
    before = captured[0].clone()
    states.mul_(1.5)
    replay()
    if torch.equal(before, captured[0]):
        raise WrongNumbersError("a replay with other hidden states gave the same loss")
    bench.forget()
    return "seen"
