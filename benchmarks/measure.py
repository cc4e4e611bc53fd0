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
from dataclasses import dataclass
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

# How peak memory is measured on each kind of device, as records name it.
MEMORY_IN_USE = {
    "cuda": "max_memory_allocated",
    "cpu": "resident high-water, freed memory given back",
}


@dataclass(frozen=True)
class Job:
    """One measurement of some providers on one workload.

    Attributes:
        repeats: rounds of a measurement of time, after its warm-up.
        report: `report(key, value)` writes an event: ("running", provider or None), (provider,
            result), ("products", summary of the GEMMs).
    """

    workload: Workload
    providers: list[Provider]
    repeats: int
    device: torch.device
    report: Callable[[str, Any], None]


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


def time_step(
    device: torch.device,
    loss: Callable[..., torch.Tensor],
    run: Callable[[Callable[..., torch.Tensor]], Any],
) -> tuple[float, float, Any]:
    """Time `run(loss)`: seconds until the loss is there, seconds of all, and what it returns."""
    middle = 0.0

    def timed(*arguments: Any) -> torch.Tensor:
        nonlocal middle
        found = loss(*arguments)
        synchronize(device)
        middle = time.perf_counter()
        return found

    synchronize(device)
    start = time.perf_counter()
    found = run(timed)
    synchronize(device)
    return middle - start, time.perf_counter() - start, found


def step(
    provider: Provider, problem: Problem, options: dict, device: torch.device
) -> tuple[float, float, dict]:
    """Run one forward and backward pass: seconds of the forward, of both, gradients by name."""
    fresh = problem.map(lambda t: t)
    return time_step(device, provider.loss, lambda loss: gradients_of(loss, fresh, options)[1])


def spread(values: list[float]) -> dict[str, Any]:
    """Summarise times: median, smallest, largest and all of them."""
    ends = {"min": min(values), "max": max(values), "all": values}
    return {"median": statistics.median(values)} | ends


def time_workload(job: Job) -> None:
    """Time the providers in turn, `repeats` rounds after a warm-up round, GEMMs in every round, and
    the call beside it by this package's backends.
    """
    workload, providers, device = job.workload, job.providers, job.device
    problem = build_problem(workload, device)
    gemms, check = GemmTimes(workload, problem), TimedCallCheck(workload, problem)
    found: dict[str, dict[str, Any]] = {}

    timed = partial(clock, device)
    gemms.measure(timed)
    for provider in providers:
        job.report("running", provider.name)
        _, warm_up, gradients = step(provider, problem, provider.options(workload), device)
        found[provider.name] = {"warm_up": warm_up, "check": check.run(provider, gradients)}
        found[provider.name] |= {"forward": [], "total": []}
        del gradients
    besides = [p for p in providers if p.kind == "backends" and workload.beside]
    for provider in besides:
        step(provider, problem, workload.options_beside, device)
        found[provider.name]["beside"] = []
    job.report("running", None)
    gemms.drop_first()
    for _ in range(job.repeats):
        gemms.measure(timed)
        for provider in providers:
            forward, total, _ = step(provider, problem, provider.options(workload), device)
            found[provider.name]["forward"].append(forward)
            found[provider.name]["total"].append(total)
        for provider in besides:
            _, total, _ = step(provider, problem, workload.options_beside, device)
            found[provider.name]["beside"].append(total)
    job.report("products", gemms.summary())
    for name, result in found.items():
        rate = workload.rows / statistics.median(result["total"])
        times = {
            key: spread(result[key]) for key in ("forward", "total", "beside") if key in result
        }
        job.report(name, result | times | {"tokens_per_second": rate})


def check_accuracy(job: Job) -> None:
    """Run the small check of every provider."""
    check = small_check(job.workload, job.device)
    for provider in job.providers:
        job.report("running", provider.name)
        job.report(provider.name, check.run(provider))
    job.report("running", None)


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


def measure_memory(job: Job) -> None:
    """Measure peak memory of one forward and backward pass beyond the inputs, in a fresh process.

    A call of tiny shape comes first, so that libraries, their code and their threads do not count.
    On a CPU the peak is of resident memory, in a process whose allocator gives freed memory back
    (`runner.RETURN_FREED_MEMORY`). The gradients are part of it, and are also reported alone.
    """
    (provider,), workload, device = job.providers, job.workload, job.device
    widths = min(workload.student_width, 64), min(workload.teacher_width, 64)
    tiny = workload.resized(min(workload.rows, 64), min(workload.columns, 256), *widths)
    step(provider, build_problem(tiny, device), provider.options(tiny), device)
    if provider.rows is not None:  # another path through the code may load modules of its own
        rows = provider.rows(build_problem(tiny, device), provider.options(tiny)).sum()
        if rows.requires_grad:
            rows.backward()
    problem = build_problem(workload, device)
    job.report("running", provider.name)
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
    job.report(provider.name, result)


def do_job(
    job_file: str, providers: dict[str, Provider], measures: dict[str, Callable[[Job], None]]
) -> None:
    """Do the job of a file, in the form that `runner.py` writes."""
    about: dict[str, Any] = json.loads(Path(job_file).read_text())
    torch.set_num_threads(about["threads"])
    with open(about["events"], "a") as events:

        def report(key: str, value: Any) -> None:
            events.write(json.dumps([key, value]) + "\n")
            events.flush()

        job = Job(
            Workload.from_json(about["workload"]),
            [providers[name] for name in about["providers"]],
            about["repeats"],
            torch.device(about["device"]),
            report,
        )
        measures[about["measure"]](job)


MEASURES = {"time": time_workload, "accuracy": check_accuracy, "memory": measure_memory}

if __name__ == "__main__":
    do_job(sys.argv[1], PROVIDERS, MEASURES)
