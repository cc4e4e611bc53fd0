"""The loss and its gradients, forward and backward, by this package's strategies and by others, at
the pairs' own shapes.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import dense, gpu_model, peers
from benchmarks.gpu import ours
from benchmarks.gpu.bench import Bench, NotHere, WrongNumbersError
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

GIB = 2**30
MOST_DIFFERENCE = 0.1  # of gradients by norm: logits rounded to bfloat16 differ by some 0.015
CHUNK_ROWS = gpu_model.CHUNK_ROWS
Gradients = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Way:
    """A way to compute the loss: `run(bench, problem, options)` gives it with its gradients.

    `predicted`: the model's function; None: there is none. `whole`: it computes the whole
    objective, and is compared with ours. `package`: what it is of.
    """

    run: Callable[[Bench, Problem, dict], Gradients]
    predicted: Callable[..., gpu_model.Prediction] | None = None
    whole: bool = True
    package: str | None = None
    strategy: str | None = None
    softcap: bool = True

    def missing(self, bench: Bench) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.strategy is not None:
            return ours.missing(self.strategy)
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def _ours(strategy: str, cache_bytes: int | None = None) -> Way:
    def run(bench: Bench, problem: Problem, options: dict) -> Gradients:
        with ours.chosen(strategy, cache_bytes):
            return ours.gradients(ours.loss, problem, options)

    predicted = {"slabbed": gpu_model.slabbed, "one_pass": gpu_model.one_pass}.get(
        strategy, gpu_model.cached
    )
    if cache_bytes is not None and predicted is gpu_model.cached:
        predicted = functools.partial(gpu_model.cached, budget=cache_bytes)
    return Way(run, predicted, strategy=strategy)


def _plain(loss_of: Callable[[Problem, dict], Tensor], predicted=None, **about: Any) -> Way:
    return Way(
        lambda bench, problem, options: ours.gradients(loss_of, problem, options),
        predicted,
        **about,
    )


def _compiled_rows(bench: Bench) -> Callable[..., Tensor]:
    """dense.row_losses compiled for the shapes of the next call; compiled anew for each
    workload.
    """
    if bench.compiled is None:
        bench.compiled = bench.card.compile(dense.row_losses)
    return bench.compiled


def _compiled(bench: Bench, problem: Problem, options: dict) -> Gradients:
    rows = _compiled_rows(bench)

    def loss(problem: Problem, options: dict) -> Tensor:
        return rows(
            list(problem.student_hidden),
            problem.student_weight,
            list(problem.teacher_hidden),
            problem.teacher_weight,
            options,
        ).mean()

    return ours.gradients(loss, problem, options)


def _chunked(bench: Bench, problem: Problem, options: dict) -> Gradients:
    """Compiled, by chunks of rows: each chunk's gradients at once, the head's added up in its own
    dtype.
    """
    rows = _compiled_rows(bench)
    count = problem.student_hidden[0].shape[0]
    weight, total = problem.student_weight, 0.0
    grad_hidden = [torch.empty_like(h) for h in problem.student_hidden]
    grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
    for first in range(0, count, CHUNK_ROWS):
        part = slice(first, min(first + CHUNK_ROWS, count))
        hidden = [h[part].detach().requires_grad_() for h in problem.student_hidden]
        loss = (
            rows(
                hidden,
                weight,
                [h[part] for h in problem.teacher_hidden],
                problem.teacher_weight,
                options,
            ).sum()
            / count
        )
        wanted = hidden if grad_weight is None else [*hidden, weight]
        found = torch.autograd.grad(loss, wanted)
        for whole, chunk in zip(grad_hidden, found):
            whole[part] = chunk
        if grad_weight is not None:
            grad_weight += found[-1]
        total = total + loss.detach()
    return total, grad_hidden if grad_weight is None else [*grad_hidden, grad_weight]


def _upcast(problem: Problem, options: dict) -> Tensor:
    return dense.row_losses(
        problem.student_hidden,
        problem.student_weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        options,
        upcast=True,
    ).mean()


WAYS: dict[str, Way] = {
    **{name: _ours(name) for name in ours.STRATEGIES},
    "cached 0.5 GiB": _ours("cached", GIB // 2),
    "cached 1 GiB": _ours("cached", GIB),
    "cached 4 GiB": _ours("cached", 4 * GIB),
    "dense": _plain(
        lambda problem, options: dense.dense_rows(problem, options).mean(), gpu_model.dense
    ),
    "dense .float()": _plain(_upcast, functools.partial(gpu_model.dense, how="float")),
    "torch.compile": Way(_compiled, gpu_model.compiled),
    "chunked": Way(_chunked, gpu_model.chunked),
    "liger": _plain(
        functools.partial(peers.liger, compiled=True, chunk_rows=CHUNK_ROWS),
        whole=False,
        package="liger_kernel",
        softcap=False,
    ),
    "trl": _plain(peers.trl, whole=False, package="trl"),
}


def step(pair: str, way: str, rows: int = 4096, *, trained: bool = True) -> Callable[[Bench], dict]:
    """The step that measures one way at one shape, at fewer rows where those do not fit."""

    def run(bench: Bench) -> dict:
        return measure(bench, bench.workload(pair, rows, trained=trained), way)

    return run


def measure(bench: Bench, workload: Workload, name: str) -> dict:
    """Milliseconds, peak memory and the error beside ours; rows are halved until it fits, and ours
    measured there too.
    """
    way = WAYS[name]
    reason = way.missing(bench)
    if (
        reason is None
        and not way.softcap
        and any("softcap" in option for option in workload.loss_options)
    ):
        reason = "has no soft cap"
    if reason is not None:
        raise NotHere(f"{name}: {reason}")
    bench.compiled, wanted = None, workload.rows
    bench.forget()
    # What the model says is half again too much is not tried.
    while way.strategy is None and way.predicted is not None and workload.rows > 1:
        if way.predicted(bench.model, bench.call(workload)).kept < 1.5 * bench.card.memory():
            break
        workload = replace(workload, rows=workload.rows // 2)
    while True:
        try:
            found = _measured(bench, workload, way)
            break
        except torch.OutOfMemoryError:
            if workload.rows < wanted // 4 or workload.rows < 2:
                raise
        bench.report(f"{workload.rows} rows", "out of memory")
        bench.forget()
        bench.compiled = None
        workload = replace(workload, rows=workload.rows // 2)
    if workload.rows < wanted:
        found["ours_at_these_rows"] = _measured(bench, workload, WAYS["auto"])
    return found


def _measured(bench: Bench, workload: Workload, way: Way) -> dict:
    card, options = bench.card, workload.loss_options
    problem = bench.problem(workload)
    run = card.once(lambda: way.run(bench, problem, options), workload, way)
    (loss, found), _ = card.peak(run)  # compiles, and warms up
    outputs = sum(g.numel() * g.element_size() for g in found)
    compared = _compared(bench, workload, way, loss, found)
    del loss, found
    _, peak = card.peak(run)
    seconds = card.seconds(run, warm_up=1)
    predicted = None if way.predicted is None else way.predicted(bench.model, bench.call(workload))
    return {
        "rows": workload.rows,
        "shapes": workload.describe(),
        "ms": statistics.median(seconds) * 1e3,
        "least_ms": min(seconds) * 1e3,
        "all_ms": [s * 1e3 for s in seconds],
        "host_ms": card.host_seconds(run) * 1e3,
        "peak_bytes": peak,
        "beyond_gradients": peak - outputs,
        **compared,
        "smi": card.smi(),
        "predicted_ms": predicted and predicted.seconds * 1e3,
        "predicted_bytes": predicted and predicted.kept,
    }


def _compared(
    bench: Bench, workload: Workload, way: Way, loss: Tensor, found: list[Tensor]
) -> dict:
    """How far loss and gradients are from those of this package's default, by norms: rounded logits
    differ by a percent.
    """
    if not way.whole or way.strategy == "auto":
        return {"loss": float(loss)}
    default, problem = WAYS["auto"], bench.problem(workload)
    run = bench.card.once(
        lambda: default.run(bench, problem, workload.loss_options), workload, default
    )
    reference, gradients = run()
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, gradients)
    ]
    if not max(errors) < MOST_DIFFERENCE:
        raise WrongNumbersError(
            f"gradients of {bench.card.name} differ from those of another way by {max(errors):.2f}"
        )
    return {
        "loss": float(loss),
        "loss_of_ours": float(reference),
        "gradients_beside_ours": max(errors),
    }
