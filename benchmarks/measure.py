"""The measurements themselves, in the process that they are called in; see `worker.py` for whose
process that is.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import SmallCheck, TimedCallCheck
from benchmarks.inputs import build_problem
from benchmarks.products import BareProducts
from benchmarks.providers import Provider
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

Report = Callable[[str, Any], None]
MIB = 2**20
# How peak memory is measured on each kind of device, as records name it.
MEMORY_IN_USE = {
    "cuda": "max_memory_allocated",
    "cpu": "resident high-water, freed memory given back",
}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs another and returns its seconds."""

    def run(function: Callable[[], object]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        return time.perf_counter() - start

    return run


def step(
    provider: Provider, problem: Problem, options: dict, device: torch.device
) -> tuple[float, float, dict]:
    """One forward and backward pass: seconds of the forward, seconds of both, and the gradients by
    name.
    """
    problem = problem.map(lambda t: t)
    leaves = problem.leaves
    _synchronize(device)
    start = time.perf_counter()
    loss = provider.loss(problem, options)
    _synchronize(device)
    middle = time.perf_counter()
    # In feature space the final state has no term and so no gradient.
    found = torch.autograd.grad(
        loss, list(leaves.values()), materialize_grads=True, allow_unused=True
    )
    _synchronize(device)
    return middle - start, time.perf_counter() - start, dict(zip(leaves, found))


def spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and all of them."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": values,
    }


def time_workload(
    workload: Workload,
    providers: list[Provider],
    repeats: int,
    device: torch.device,
    report: Report,
) -> None:
    """Time the providers in turn, `repeats` rounds after one warm-up round, the bare products in
    every round.

    Calls `report(key, value)`: ("running", provider) before each warm-up, (provider, result),
    ("products", summary).
    """
    problem = build_problem(workload, device)
    products = BareProducts(workload, problem)
    check = TimedCallCheck(workload, problem)
    seconds: dict[str, tuple[list[float], list[float]]] = {}
    checks, warm_up = {}, {}
    clock = timed(device)
    products.measure(clock)
    for provider in providers:
        report("running", provider.name)
        options = provider.options(workload)
        forward, total, gradients = step(provider, problem, options, device)
        checks[provider.name] = check.run(provider, gradients)
        warm_up[provider.name] = total
        seconds[provider.name] = ([], [])
        del gradients
    report("running", None)
    products.drop_first()
    for _ in range(repeats):
        products.measure(clock)
        for provider in providers:
            forward, total, gradients = step(provider, problem, provider.options(workload), device)
            seconds[provider.name][0].append(forward)
            seconds[provider.name][1].append(total)
            del gradients
    report("products", products.summary())
    for provider in providers:
        forward, total = seconds[provider.name]
        report(
            provider.name,
            {
                "forward": spread(forward),
                "total": spread(total),
                "warm_up": warm_up[provider.name],
                "tokens_per_second": workload.rows / statistics.median(total),
                "check": checks[provider.name],
            },
        )


def check_accuracy(
    workload: Workload, providers: list[Provider], device: torch.device, report: Report
) -> None:
    """The small check of every provider; calls `report(provider, result)`."""
    check = SmallCheck(workload, device)
    for provider in providers:
        report("running", provider.name)
        report(provider.name, check.run(provider))
    report("running", None)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_high_water() -> None:
    """Set this process's high-water mark of resident memory to what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def _trim() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure_memory(
    workload: Workload, provider: Provider, device: torch.device, report: Report
) -> None:
    """Peak memory of one forward and backward pass beyond the inputs, in a process that has done
    nothing else.

    A call of tiny shape comes first, so that libraries, their code and their threads do not count.
    On a CPU the peak is that of resident memory, in a process whose allocator keeps nothing that is
    freed (`runner.RETURN_FREED_MEMORY`); the gradients, which the caller keeps, are part of it and
    also given alone.
    """
    width = min(workload.teacher_width, 64)
    tiny = replace(
        workload,
        rows=min(workload.rows, 64),
        columns=width if workload.feature_space else min(workload.columns, 256),
        student_width=min(workload.student_width, 64),
        teacher_width=width,
    )
    step(provider, build_problem(tiny, device), provider.options(tiny), device)
    if provider.rows is not None:  # another way through the code may load modules of its own
        provider.rows(build_problem(tiny, device), provider.options(tiny)).sum().backward()
    problem = build_problem(workload, device)
    report("running", provider.name)
    _trim()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _reset_high_water()
        before = _status("VmRSS")
    _, seconds, gradients = step(provider, problem, provider.options(workload), device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")
    report(
        provider.name,
        {
            "beyond_inputs": peak - before,
            "gradients": sum(g.numel() * g.element_size() for g in gradients.values()),
            "process_peak": peak,
            "inputs": sum(
                t.numel() * t.element_size()
                for t in (
                    *problem.student_hidden,
                    problem.student_weight,
                    *problem.teacher_hidden,
                    problem.teacher_weight,
                )
                if t is not None
            ),
            "measure": MEMORY_IN_USE[device.type],
            "seconds": seconds,
        },
    )
