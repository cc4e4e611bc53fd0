"""The measurements of whole training steps, and the process of its own for one of them: `python -m
benchmarks.step_measure JOB.json`, started by `runner.py`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import steps
from benchmarks.accuracy import COARSE, COARSE_ROUNDED
from benchmarks.call import Call
from benchmarks.gemms import GemmTimes
from benchmarks.inputs import build_problem
from benchmarks.measure import (
    MEMORY_IN_USE,
    Report,
    begin_peak,
    clock,
    do_job,
    peak_memory,
    spread,
    synchronize,
)
from benchmarks.providers import Provider
from benchmarks.steps import LAYERS, LOSSES, Models
from benchmarks.workloads import Workload
from fdd_kernels.testing import unit_roundoff, value_floors

CHECKED_ROWS = 8  # whose rounding is bounded
WARM_UP_TOKENS = 16


def train(models: Models, provider: Provider, device: torch.device) -> tuple[float, float]:
    """Run one training step: seconds until the loss is there, and of the whole step."""
    middle = 0.0

    def loss_of() -> Tensor:
        nonlocal middle
        loss = provider.loss(models, provider.drops)
        synchronize(device)
        middle = time.perf_counter()
        return loss

    start = time.perf_counter()
    whole = clock(device, lambda: models.train(loss_of))
    return middle - start, whole


def loss_and_gradients(models: Models, provider: Provider) -> tuple[float, list[Tensor]]:
    """Compute the loss and the gradients of the student's weights, without a step."""
    loss = provider.loss(models, provider.drops)
    found = torch.autograd.grad(loss, list(models.student.parameters()), materialize_grads=True)
    return float(loss.detach()), list(found)


def allowed_difference(models: Models, options: dict[str, Any], loss: float) -> float:
    """Bound the difference of two right losses of the batch, of the size of `loss`.

    Either may round its logits to the models' dtype: a row's value is then off by at most
    `value_floors`, and the mean over rows by at most the largest of these, taken from a few rows.
    The float32 mean itself rounds by (2 + sqrt(R)) u, as in `fdd_kernels.testing.budgets`.
    """
    student, teacher = models.head_inputs(options, CHECKED_ROWS)
    heads = [m.get_output_embeddings().weight for m in (models.student, models.teacher)]
    call = Call(student, heads[0].detach(), teacher, heads[1])
    rounding = unit_roundoff(heads[0].dtype)
    about = steps.loss_options(models, options) | {"reduction": "none"}
    floors = value_floors(call, rounding=rounding, **about).loss
    rows = models.batch["labels"].numel()
    return 2 * (float(floors.max()) + (2 + rows**0.5) * unit_roundoff(torch.float32) * abs(loss))


def compare(models: Models, providers: list[Provider], report: Report) -> dict[str, dict]:
    """Check that dense and ours compute the same loss and gradients, for output KD and for FDD.

    Returns the check of each provider, in the form of records. Which of two that differ is wrong
    is not known: neither passes. One whose partner could not run is not compared.
    """
    checks: dict[str, dict] = {}
    for options in (steps.KD, {}):
        both = [p for p in providers if p.drops == options]
        found = []
        for provider in both:
            report("running", provider.name)
            found.append(loss_and_gradients(models, provider))
        check: dict[str, Any] = {"losses": [loss for loss, _ in found], "passed": True}
        if len(found) == 2:
            check |= _difference(models, options, *found)
        checks |= {provider.name: check for provider in both}
    report("running", None)
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


def time_steps(
    workload: Workload,
    providers: list[Provider],
    repeats: int,
    device: torch.device,
    report: Report,
) -> None:
    """Time steps with the losses in turn, `repeats` rounds after a warm-up round, on the same two
    models; in every round the GEMMs that FDD adds to output KD.

    Calls `report(key, value)`: ("running", provider), (provider, result), ("products", summary of
    the GEMMs). A provider whose loss is not its partner's is not timed: its result has the check
    alone.
    """
    models = steps.of_workload(workload, device)
    checks = compare(models, providers, report)
    able = [p for p in providers if checks[p.name]["passed"]]
    added = replace(workload, layers=LAYERS - 1)
    gemms = GemmTimes(added, build_problem(added, device))

    times: dict[str, list[tuple[float, float]]] = {p.name: [] for p in able}
    for _ in range(1 + repeats):
        gemms.measure(partial(clock, device))
        for provider in able:
            report("running", provider.name)
            times[provider.name].append(train(models, provider, device))
    report("running", None)
    gemms.drop_first()
    report("products", gemms.summary())
    for name, check in checks.items():
        if name not in times:
            report(name, {"check": check})
            continue
        (_, warm_up), *rounds = times[name]
        forward, total = (spread(list(of_round)) for of_round in zip(*rounds))
        result = {"check": check, "warm_up": warm_up, "forward": forward, "total": total}
        report(name, result | {"tokens_per_second": (workload.rows + 1) / total["median"]})


def step_memory(
    workload: Workload,
    providers: list[Provider],
    repeats: int,
    device: torch.device,
    report: Report,
) -> None:
    """Measure the peak memory of one training step in a fresh process: beyond the interpreter, and
    beyond both models.

    A step of a toy pair comes first, so that libraries, their code and their threads do not count;
    a step with few tokens makes the optimizer's state, which is there in every later step.
    """
    (provider,) = providers
    pair, dtype = steps.PAIRS[workload.pair], getattr(torch, workload.dtype)
    train(Models(pair.toy, (1, WARM_UP_TOKENS), dtype, device), provider, device)
    interpreter = begin_peak(device)
    models = steps.of_workload(workload, device)
    loaded = begin_peak(device)
    report("running", provider.name)
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
    report(provider.name, result)


MEASURES = {"time": time_steps, "memory": step_memory}

if __name__ == "__main__":
    do_job(sys.argv[1], LOSSES, MEASURES)
