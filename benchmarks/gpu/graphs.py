"""What the strategies may gain yet, and what they promise: a second stream, masked rows, CUDA
graphs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu import ours
from benchmarks.gpu.bench import Bench, WrongNumbersError
from benchmarks.gpu.kernels import moved_bytes, watched_call
from benchmarks.gpu.products import multiplier
from fdd_kernels.testing import Problem


def second_stream(pair: str) -> Callable[[Bench], dict]:
    """The step that runs a block's elementwise kernels beside the products of another block, each
    on its own stream.

    `hidden` is the part of the shorter of the two that the longer hides; the model's
    `cached(hidden=...)` takes it.
    """

    def step(bench: Bench) -> dict:
        card, workload = bench.card, bench.workload(pair)
        problem, multiply = bench.problem(workload), multiplier()
        largest = watched_call(bench, workload, "auto" if ours.missing("cached") else "cached")
        heavy = [started for started in largest.values() if moved_bytes(started) is not None]
        heavy = heavy or list(largest.values())[:1]
        m = card.size(1660, 4)
        hidden = torch.randn(m, workload.teacher_width, dtype=torch.bfloat16, device=card.device)
        logits = torch.empty(m, workload.columns, device=card.device)
        second = card.cuda.Stream()

        def products() -> None:
            multiply(logits, hidden, problem.teacher_weight.t())

        def kernels() -> None:
            for started in heavy:
                started.again()

        def both() -> None:
            with card.on(second):
                kernels()
            products()

        def beside() -> None:
            second.wait_stream(card.cuda.current_stream())
            with card.cuda.stream(second):
                kernels()
            products()
            card.cuda.current_stream().wait_stream(second)

        found = {}
        for name, run in (
            ("products", products),
            ("kernels", kernels),
            ("in turn", both),
            ("beside each other", beside),
        ):
            found[name] = statistics.median(card.seconds(run, most=0.5))
        shorter = min(found["products"], found["kernels"])
        hidden_part = (found["products"] + found["kernels"] - found["beside each other"]) / max(
            shorter, 1e-12
        )
        return {
            "ms": {k: v * 1e3 for k, v in found.items()},
            "hidden": hidden_part,
            "of": [s.name for s in heavy],
        }

    return step


def masks(bench: Bench) -> dict:
    """Half of the rows masked, as prompts are: eager calls may count the rows, a captured one
    cannot.
    """
    card, workload = bench.card, bench.workload("Llama")
    whole = bench.problem(workload)
    mask = torch.arange(workload.rows, device=card.device) % 2 == 0
    half = replace(whole, mask=mask)
    options = workload.loss_options
    for name, problem in (("all rows", whole), ("half of the rows", half)):
        run = card.once(lambda problem=problem: ours.gradients(ours.loss, problem, options)[1])
        replay, _ = card.captured(run)
        eager, captured = (statistics.median(card.seconds(r, most=1.0)) for r in (run, replay))
        bench.report(name, {"eager_ms": eager * 1e3, "captured_ms": captured * 1e3})
    return {}


def whole_step(bench: Bench) -> dict:
    """Forward and backward in one CUDA graph: its replays give the same bits, and see new
    inputs.
    """
    card, workload = bench.card, bench.workload("GPT-2", bench.card.size(2048, 2048))
    problem = bench.problem(workload)

    def run() -> list[Tensor]:
        loss, found = ours.gradients(ours.loss, problem, workload.loss_options)
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
        raise WrongNumbersError(
            f"replays of a captured step: same bits {equal}, relative difference from eager "
            f"{apart:.2e}"
        )
    seconds = [statistics.median(card.seconds(r, most=1.0)) for r in (run, replay)]
    return {
        "same_bits": equal,
        "apart": apart,
        "eager_ms": seconds[0] * 1e3,
        "replay_ms": seconds[1] * 1e3,
        "new_states": new_states(bench, problem),
    }


def _same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second))


def new_states(bench: Bench, problem: Problem) -> str:
    """A captured step sees what is written into its inputs: the gradients of other states are other
    gradients.
    """
    states = problem.student_hidden[0].detach()
    replay, captured = bench.card.captured(lambda: [ours.gradients(ours.loss, problem, {})[0]])
    replay()
    before = captured[0].clone()
    states.mul_(1.5)
    replay()
    if torch.equal(before, captured[0]):
        raise WrongNumbersError("a replay with other hidden states gave the same loss")
    bench.forget()
    return "seen"
