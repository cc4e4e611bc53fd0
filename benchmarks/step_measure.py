"""The measurements of whole training steps, and the process of its own for one of them: `python -m
benchmarks.step_measure JOB.json`, started by `runner.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import steps
from benchmarks.accuracy import COARSE, COARSE_ROUNDED
from benchmarks.call import Call
from benchmarks.dense import fdd_rows
from benchmarks.gemms import GemmTimes
from benchmarks.inputs import build_problem
from benchmarks.measure import (
    MEMORY_IN_USE,
    Job,
    begin_peak,
    clock,
    do_job,
    peak_memory,
    spread,
    time_step,
)
from benchmarks.providers import Provider
from benchmarks.steps import LAYERS, LOSSES, Models
from fdd_kernels.testing import unit_roundoff, value_floors

CHECKED_ROWS = 8  # whose rounding is bounded
WARM_UP_TOKENS = 16


def train(models: Models, provider: Provider, device: torch.device) -> tuple[float, float]:
    """Run one training step: seconds until the loss is there, and of the whole step."""
    forward, total, _ = time_step(
        device, provider.loss, lambda loss: models.train(lambda: loss(models, provider.drops))
    )
    return forward, total


def loss_and_gradients(models: Models, provider: Provider) -> tuple[float, list[Tensor]]:
    """Compute the loss and the gradients of the student's weights, without a step."""
    loss = provider.loss(models, provider.drops)
    found = torch.autograd.grad(loss, list(models.student.parameters()), materialize_grads=True)
    return float(loss.detach()), list(found)


def allowed_difference(models: Models, options: dict[str, Any], loss: float) -> float:
    """Bound the difference of two right losses of the batch, of the size of `loss`.

    As in `fdd_kernels.testing.budgets`, a row is off by at most twice the error of the dense loss
    against float64 (in bf16 its logits are rounded), plus what float32 arithmetic may lose. The
    mean over rows is off by at most the largest of these, taken from a few rows. The float32 mean
    itself rounds by (2 + sqrt(R)) u.
    """
    student, teacher = models.head_inputs(options, CHECKED_ROWS)
    heads = [m.get_output_embeddings().weight for m in (models.student, models.teacher)]
    call = Call(student, heads[0].detach(), teacher, heads[1])
    found, exact = (fdd_rows(p, steps.DERIVATIVE) for p in (call, call.to(torch.float64)))
    about = steps.loss_options(models, options) | {"reduction": "none"}
    rows = 2 * (found.double() - exact).abs() + value_floors(call, **about).loss
    relative = (2 + models.batch["labels"].numel() ** 0.5) * unit_roundoff(torch.float32)
    return float(rows.max()) + 2 * relative * abs(loss)


def compare(models: Models, job: Job) -> dict[str, dict]:
    """Check that dense and ours compute the same loss and gradients, for output KD and for FDD.

    Returns the check of each provider, in the form of records. Which of two that differ is wrong
    is not known: neither passes. One whose partner could not run is not compared.
    """
    checks: dict[str, dict] = {}
    for options in (steps.KD, {}):
        both = [p for p in job.providers if p.drops == options]
        found = []
        for provider in both:
            job.report("running", provider.name)
            found.append(loss_and_gradients(models, provider))
        check: dict[str, Any] = {"losses": [loss for loss, _ in found], "passed": True}
        if len(found) == 2:
            check |= _difference(models, options, *found)
        checks |= {provider.name: check for provider in both}
    job.report("running", None)
    return checks


def _difference(
    models: Models,
    options: dict[str, Any],
    dense: tuple[float, list[Tensor]],
    ours: tuple[float, list[Tensor]],
) -> dict[str, Any]:
    limit = allowed_difference(models, options, dense[0])
    difference = abs(dense[0] - ours[0])
    pairs = list(zip(dense[1], ours[1]))
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    gradient = (squares / sum(float(a.double().square().sum()) for a, _ in pairs)) ** 0.5
    narrow = models.student.dtype != torch.float32
    most = COARSE_ROUNDED if narrow else COARSE
    found = {"error": difference, "limit": limit, "gradient": gradient, "gradient_limit": most}
    reasons = []
    if not difference <= limit:
        values = f"{dense[0]:.7g} dense, {ours[0]:.7g} ours"
        reasons.append(f"loss differs: {values}, where rounding explains {limit:.2g}")
    if not gradient <= most:
        reasons.append(f"gradient differs by {gradient:.2g}, where rounding explains {most:g}")
    return found | {"passed": not reasons, "reason": "; its ".join(reasons) or None}


def time_steps(job: Job) -> None:
    """Time steps with the losses in turn, `repeats` rounds after a warm-up round, on the same two
    models; in every round the GEMMs that FDD adds to output KD.

    A provider whose loss is not its partner's is not timed: its result has the check alone.
    """
    workload, device = job.workload, job.device
    models = steps.of_workload(workload, device)
    checks = compare(models, job)
    able = [p for p in job.providers if checks[p.name]["passed"]]
    added = replace(workload, layers=LAYERS - 1)
    gemms = GemmTimes(added, build_problem(added, device))

    times: dict[str, list[tuple[float, float]]] = {p.name: [] for p in able}
    for _ in range(1 + job.repeats):
        gemms.measure(partial(clock, device))
        for provider in able:
            job.report("running", provider.name)
            times[provider.name].append(train(models, provider, device))
    job.report("running", None)
    gemms.drop_first()
    job.report("products", gemms.summary())
    for name, check in checks.items():
        if name not in times:
            job.report(name, {"check": check})
            continue
        (_, warm_up), *rounds = times[name]
        forward, total = (spread(list(of_round)) for of_round in zip(*rounds))
        result = {"check": check, "warm_up": warm_up, "forward": forward, "total": total}
        job.report(name, result | {"tokens_per_second": (workload.rows + 1) / total["median"]})


def step_memory(job: Job) -> None:
    """Measure the peak memory of one training step in a fresh process: beyond the interpreter, and
    beyond both models.

    A step of a toy pair comes first, so that libraries, their code and their threads do not count;
    a step with few tokens makes the optimizer's state, which is there in every later step.
    """
    (provider,), workload, device = job.providers, job.workload, job.device
    pair, dtype = steps.PAIRS[workload.pair], getattr(torch, workload.dtype)
    train(Models(pair.toy, (1, WARM_UP_TOKENS), dtype, device), provider, device)
    interpreter = begin_peak(device)
    models = steps.of_workload(workload, device)
    loaded = begin_peak(device)
    job.report("running", provider.name)
    whole = models.batch
    models.batch = {name: tensor[:, :WARM_UP_TOKENS] for name, tensor in whole.items()}
    train(models, provider, device)
    models.batch = whole
    begin_peak(device)
    _, seconds = train(models, provider, device)
    peak = peak_memory(device)
    trained = [p for p in models.student.parameters() if p.requires_grad]
    result = {
        "beyond_inputs": peak - loaded,
        "beyond_interpreter": peak - interpreter,
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": models.optimizer_bytes,
        "process_peak": peak,
        "inputs": models.weight_bytes,
        "measure": MEMORY_IN_USE[device.type],
        "seconds": seconds,
    }
    job.report(provider.name, result)


MEASURES = {"time": time_steps, "memory": step_memory}

if __name__ == "__main__":
    do_job(sys.argv[1], LOSSES, MEASURES)
