"""The loss and its gradients, forward and backward, by this package's strategies and by others, at
the pairs' own shapes.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import dense, gpu_model, objectives, peers
from benchmarks.gpu.bench import (
    Bench,
    Gradients,
    NotHere,
    WrongNumbersError,
    chosen,
    gradients,
    ours,
)
from benchmarks.workloads import Workload
from fdd_kernels.common.sizes import GIB
from fdd_kernels.testing import Problem

MOST_DIFFERENCE = 0.1  # of gradients by norm: logits rounded to bfloat16 differ by some 0.015
CHUNK_ROWS = gpu_model.CHUNK_ROWS


@dataclass(frozen=True)
class Way:
    """A way to compute the loss: `run(bench, problem, options)` returns it with its gradients.

    `predicted` is the model's function, if there is one. A way that computes the `whole` loss is
    compared with ours. `package` is the one that it imports; `ours`: a strategy of this one.
    """

    run: Callable[[Bench, Problem, dict], Gradients]
    predicted: Callable[..., gpu_model.Prediction] | None = None
    whole: bool = True
    package: str | None = None
    ours: bool = False
    softcap: bool = True

    def missing(self) -> str | None:
        """Say why it cannot run here; None if it can."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed"


def _ours(strategy: str, cache_bytes: int | None = None) -> Way:
    def run(bench: Bench, problem: Problem, options: dict) -> Gradients:
        with chosen(strategy, cache_bytes):
            return gradients(ours, problem, options)

    predicted = gpu_model.WAYS.get(strategy, gpu_model.cached)
    if cache_bytes is not None:
        predicted = partial(gpu_model.cached, budget=cache_bytes)
    return Way(run, predicted, ours=True)


def _plain(loss_of: Callable[[Problem, dict], Tensor], predicted=None, **about: Any) -> Way:
    return Way(lambda bench, *call: gradients(loss_of, *call), predicted, **about)


def _compiled_rows(bench: Bench) -> Callable[..., Tensor]:
    """Compile the dense form for the shapes of the next call, anew for each workload."""
    if bench.compiled is None:
        bench.compiled = bench.card.compile(objectives.dense_rows)
    return bench.compiled


def _states_and_heads(problem: Problem) -> tuple:
    states = list(problem.student_hidden), list(problem.teacher_hidden)
    return states[0], problem.student_weight, states[1], problem.teacher_weight


def _compiled(bench: Bench, problem: Problem, options: dict) -> Gradients:
    rows = _compiled_rows(bench)
    return gradients(lambda *call: rows(*call).mean(), problem, options)


def _chunked(bench: Bench, problem: Problem, options: dict) -> Gradients:
    """Run the compiled loss by chunks of rows: each chunk's gradients at once, the head's added up
    in its own dtype.
    """
    rows = _compiled_rows(bench)
    student, weight, teacher, teacher_weight = _states_and_heads(problem)
    total, count = 0.0, len(student[0])
    grad_hidden = [torch.empty_like(h) for h in student]
    grad_weight = [torch.zeros_like(weight)] if weight.requires_grad else []
    for first in range(0, count, CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        hidden = [h[part].detach().requires_grad_() for h in student]
        chunk = Problem(tuple(hidden), weight, tuple([h[part] for h in teacher]), teacher_weight)
        loss = rows(chunk, options).sum() / count
        found = torch.autograd.grad(loss, [*hidden, weight] if grad_weight else hidden)
        for whole, of_chunk in zip(grad_hidden, found):
            whole[part] = of_chunk
        for whole in grad_weight:
            whole += found[-1]
        total = total + loss.detach()
    return total, grad_hidden + grad_weight


def _upcast(problem: Problem, options: dict) -> Tensor:
    return dense.row_losses(*_states_and_heads(problem), options, upcast=True).mean()


def _dense(problem: Problem, options: dict) -> Tensor:
    return objectives.dense_rows(problem, options).mean()


_liger = partial(peers.liger, compiled=True, chunk_rows=CHUNK_ROWS)
WAYS: dict[str, Way] = {
    **{strategy: _ours(strategy) for strategy in ("auto", "cached", "slabbed", "one_pass")},
    **{f"cached {size:g} GiB": _ours("cached", int(size * GIB)) for size in (0.5, 1, 4)},
    "dense": _plain(_dense, gpu_model.dense),
    "dense .float()": _plain(_upcast, partial(gpu_model.dense, how="float")),
    "torch.compile": Way(_compiled, gpu_model.compiled),
    "chunked": Way(_chunked, gpu_model.chunked),
    "liger": _plain(_liger, whole=False, package="liger_kernel", softcap=False),
    "trl": _plain(peers.trl, whole=False, package="trl"),
}


def step(pair: str, way: str, rows: int = 4096, *, trained: bool = True) -> Callable[[Bench], dict]:
    """Make the step that measures one way at one shape, with fewer rows where it does not fit."""
    return lambda bench: measure(bench, bench.workload(pair, rows, trained=trained), way)


def measure(bench: Bench, workload: Workload, name: str) -> dict:
    """Measure milliseconds, peak memory and the error beside ours. Rows are halved until it fits,
    and ours is measured with these rows too.
    """
    way, wanted = WAYS[name], workload.rows
    reason = way.missing()
    if reason is None and not way.softcap and any("softcap" in o for o in workload.loss_options):
        reason = "has no soft cap"
    if reason is not None:
        raise NotHere(f"{name}: {reason}")
    bench.compiled = None
    bench.forget()
    # Predicted to need half again more than there is: not tried.
    while not way.ours and workload.rows > 1:
        predicted = _predicted(bench, workload, way)
        if predicted is None or predicted.kept < 1.5 * bench.card.memory():
            break
        workload = workload.with_rows(workload.rows // 2)
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
        workload = workload.with_rows(workload.rows // 2)
    if workload.rows < wanted:
        found["ours_at_these_rows"] = _measured(bench, workload, WAYS["auto"])
    return found


def _predicted(bench: Bench, workload: Workload, way: Way) -> gpu_model.Prediction | None:
    """Ask the model, which knows the loss with its default options."""
    if way.predicted is None or workload.group == "objectives":
        return None
    return way.predicted(bench.model, bench.call(workload))


def _measured(bench: Bench, workload: Workload, way: Way) -> dict:
    card, options = bench.card, workload.loss_options
    problem = bench.problem(workload)
    run = card.once(lambda: way.run(bench, problem, options), workload, way)
    (loss, found), _ = card.peak(run)  # compiles, and warms up
    outputs = sum(gradient.nbytes for gradient in found)
    compared = _compared(bench, workload, way, loss, found)
    del loss, found
    _, peak = card.peak(run)
    seconds = card.seconds(run)
    predicted = _predicted(bench, workload, way)
    if way.ours and workload.beside:
        compared["beside"] = ", ".join(f"{k}={v}" for k, v in workload.beside)
        compared["beside_ms"] = _median_ms(bench, way, problem, workload.options_beside)
    return {
        "rows": workload.rows,
        "shapes": workload.describe(),
        "ms": statistics.median(seconds) * 1e3,
        "least_ms": min(seconds) * 1e3,
        "all_ms": [s * 1e3 for s in seconds[:20]],
        "host_ms": card.host_seconds(run) * 1e3,
        "peak_bytes": peak,
        "beyond_gradients": peak - outputs,
        **compared,
        "smi": card.smi(),
        "predicted_ms": predicted and predicted.seconds * 1e3,
        "predicted_bytes": predicted and predicted.kept,
    }


def _median_ms(bench: Bench, way: Way, problem: Problem, options: dict) -> float:
    run = bench.card.once(lambda: way.run(bench, problem, options))
    run()
    return statistics.median(bench.card.seconds(run)) * 1e3


def _compared(
    bench: Bench, workload: Workload, way: Way, loss: Tensor, found: list[Tensor]
) -> dict:
    """Compare loss and gradients with those of this package's default, by norms: rounded logits
    differ by a percent.
    """
    default = WAYS["auto"]
    if not way.whole or way is default:
        return {"loss": float(loss)}
    problem, options = bench.problem(workload), workload.loss_options
    run = bench.card.once(lambda: default.run(bench, problem, options), workload, default)
    reference, expected = run()
    pairs = zip((loss, *found), (reference, *expected))
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
    if not max(errors) < MOST_DIFFERENCE:
        difference = f"differ from those of another way by {max(errors):.2f}"
        raise WrongNumbersError(f"loss or gradients on {bench.card.name} {difference}")
    beside = {"loss_of_ours": float(reference), "gradients_beside_ours": max(errors)}
    return {"loss": float(loss)} | beside
