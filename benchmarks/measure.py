"""The measurements, and the process of its own for one of them: `python -m benchmarks.measure
JOB.json`, started by `runner.py`.

The process appends one JSON line per event to the file named in its job, so that finished results
survive a crash.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import TimedCallCheck, small_check
from benchmarks.gemms import GemmTimes
from benchmarks.inputs import build_problem
from benchmarks.providers import PROVIDERS, Provider, gradients_of
from benchmarks.workloads import Workload
from fdd_kernels.testing import Problem

Report = Callable[[str, Any], None]
# How peak memory is measured on each kind of device, as records name it.
MEMORY_IN_USE = {
    "cuda": "max_memory_allocated",
    "cpu": "resident high-water, freed memory given back",
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device, run: Callable[[], object]) -> float:
    """Run a function: its seconds until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def step(
    provider: Provider, problem: Problem, options: dict, device: torch.device
) -> tuple[float, float, dict]:
    """Run one forward and backward pass: seconds of the forward, of both, gradients by name."""
    middle = 0.0

    def loss_of(problem: Problem, options: dict) -> torch.Tensor:
        nonlocal middle
        loss = provider.loss(problem, options)
        synchronize(device)
        middle = time.perf_counter()
        return loss

    problem = problem.map(lambda t: t)
    synchronize(device)
    start = time.perf_counter()
    _, gradients = gradients_of(loss_of, problem, options)
    synchronize(device)
    return middle - start, time.perf_counter() - start, gradients


def spread(values: list[float]) -> dict[str, Any]:
    """Summarise times: median, smallest, largest and all of them."""
    ends = {"min": min(values), "max": max(values), "all": values}
    return {"median": statistics.median(values)} | ends


def time_workload(
    workload: Workload,
    providers: list[Provider],
    repeats: int,
    device: torch.device,
    report: Report,
) -> None:
    """Time the providers in turn, `repeats` rounds after a warm-up round, GEMMs in every round, and
    the call beside it by this package's backends.

    Calls `report(key, value)`: ("running", provider) before each warm-up, (provider, result),
    ("products", summary of the GEMMs).
    """
    problem = build_problem(workload, device)
    gemms, check = GemmTimes(workload, problem), TimedCallCheck(workload, problem)
    found: dict[str, dict[str, Any]] = {}

    timed = partial(clock, device)
    gemms.measure(timed)
    for provider in providers:
        report("running", provider.name)
        _, warm_up, gradients = step(provider, problem, provider.options(workload), device)
        found[provider.name] = {"warm_up": warm_up, "check": check.run(provider, gradients)}
        found[provider.name] |= {"forward": [], "total": []}
        del gradients
    besides = [p for p in providers if p.kind == "backends" and workload.beside]
    for provider in besides:
        step(provider, problem, workload.options_beside, device)
        found[provider.name]["beside"] = []
    report("running", None)
    gemms.drop_first()
    for _ in range(repeats):
        gemms.measure(timed)
        for provider in providers:
            forward, total, _ = step(provider, problem, provider.options(workload), device)
            found[provider.name]["forward"].append(forward)
            found[provider.name]["total"].append(total)
        for provider in besides:
            _, total, _ = step(provider, problem, workload.options_beside, device)
            found[provider.name]["beside"].append(total)
    report("products", gemms.summary())
    for name, result in found.items():
        rate = workload.rows / statistics.median(result["total"])
        times = {
            key: spread(result[key]) for key in ("forward", "total", "beside") if key in result
        }
        report(name, result | times | {"tokens_per_second": rate})


def check_accuracy(
    workload: Workload,
    providers: list[Provider],
    repeats: int,
    device: torch.device,
    report: Report,
) -> None:
    """Run the small check of every provider; call `report(provider, result)`."""
    check = small_check(workload, device)
    for provider in providers:
        report("running", provider.name)
        report(provider.name, check.run(provider))
    report("running", None)


def status_bytes(field: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_high_water() -> None:
    """Set this process's high-water mark of resident memory to the memory of now."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back_memory() -> None:
    """Free cycles, and return freed memory to the system where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def begin_peak(device: torch.device) -> int:
    """Begin to watch the peak of memory; the bytes in use now."""
    give_back_memory()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset_high_water()
    return status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use since `begin_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


def measure_memory(
    workload: Workload,
    providers: list[Provider],
    repeats: int,
    device: torch.device,
    report: Report,
) -> None:
    """Measure peak memory of one forward and backward pass beyond the inputs, in a fresh process.

    A call of tiny shape comes first, so that libraries, their code and their threads do not count.
    On a CPU the peak is of resident memory, in a process whose allocator gives freed memory back
    (`runner.RETURN_FREED_MEMORY`). The gradients are part of it, and are also reported alone.
    """
    (provider,) = providers
    widths = min(workload.student_width, 64), min(workload.teacher_width, 64)
    tiny = workload.resized(min(workload.rows, 64), min(workload.columns, 256), *widths)
    step(provider, build_problem(tiny, device), provider.options(tiny), device)
    if provider.rows is not None:  # another path through the code may load modules of its own
        rows = provider.rows(build_problem(tiny, device), provider.options(tiny)).sum()
        if rows.requires_grad:
            rows.backward()
    problem = build_problem(workload, device)
    report("running", provider.name)
    before = begin_peak(device)
    _, seconds, gradients = step(provider, problem, provider.options(workload), device)
    peak = peak_memory(device)
    inputs = [*problem.student_hidden, problem.student_weight, *problem.teacher_hidden]
    inputs += [] if problem.teacher_weight is None else [problem.teacher_weight]
    result = {
        "beyond_inputs": peak - before,
        "gradients": sum(t.nbytes for t in gradients.values()),
        "process_peak": peak,
        "inputs": sum(t.nbytes for t in inputs),
        "measure": MEMORY_IN_USE[device.type],
        "seconds": seconds,
    }
    report(provider.name, result)


def do_job(
    job_file: str,
    providers: dict[str, Provider],
    measures: dict[str, Callable[..., None]],
) -> None:
    """Do a job and report: `measures[name](workload, providers, repeats, device, report)`."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    workload, device = Workload.from_json(job["workload"]), torch.device(job["device"])
    chosen = [providers[name] for name in job["providers"]]
    with open(job["events"], "a") as events:

        def report(key: str, value: Any) -> None:
            events.write(json.dumps([key, value]) + "\n")
            events.flush()

        measures[job["measure"]](workload, chosen, job["repeats"], device, report)


MEASURES = {"time": time_workload, "accuracy": check_accuracy, "memory": measure_memory}

if __name__ == "__main__":
    do_job(sys.argv[1], PROVIDERS, MEASURES)
