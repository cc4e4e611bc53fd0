"""`pytest benchmarks`: forward and backward of a suite's workloads with every provider.

FDD_BENCH_SUITE, a suite of `python -m benchmarks`, chooses the shapes (tiny), and
FDD_BENCH_THREADS the threads.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.accuracy import TimedCallCheck
from benchmarks.inputs import build_problem
from benchmarks.measure import step
from benchmarks.providers import PROVIDERS, of_workload
from benchmarks.workloads import suite

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUITE = os.environ.get("FDD_BENCH_SUITE", "tiny")
CASES = [
    pytest.param(workload, provider, id=f"{workload.name}-{provider.name}")
    for workload in suite(SUITE)
    if "time" in workload.measures
    for provider in of_workload(workload, list(PROVIDERS.values()), DEVICE.type)
]


@pytest.fixture(autouse=True)
def _threads():
    """Set the threads asked for; tiny problems run on one."""
    before = torch.get_num_threads()
    default = 1 if SUITE == "tiny" else before
    torch.set_num_threads(int(os.environ.get("FDD_BENCH_THREADS", default)))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("workload", "provider"), CASES)
def test_forward_and_backward(benchmark, workload, provider):
    reason = provider.unavailable(DEVICE) or provider.unsupported(workload)
    if reason:
        pytest.skip(f"{provider.name}: {reason}")
    if provider.name == "dense-compile" and SUITE == "tiny":
        pytest.skip("compiling takes far longer than a tiny case; choose FDD_BENCH_SUITE=full")
    benchmark.group = workload.name
    call = provider, build_problem(workload, DEVICE), provider.options(workload), DEVICE
    check = TimedCallCheck(workload, call[1]).run(provider, step(*call)[2])
    assert check["passed"], f"gradient off by {check['error']:.2e}"
    benchmark.pedantic(step, args=call, rounds=3, warmup_rounds=1)
