"""The suite's cases under pytest-benchmark: forward and backward of every workload with every
provider.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.accuracy import TimedCallCheck
from benchmarks.inputs import build_problem
from benchmarks.measure import step
from benchmarks.providers import PROVIDERS
from benchmarks.workloads import suite

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUITE = os.environ.get("FDD_BENCH_SUITE", "tiny")
CASES = [
    (workload, provider)
    for workload in suite(SUITE)
    if "time" in workload.measures
    for provider in PROVIDERS.values()
    if workload.providers is None or provider.name in workload.providers
]


@pytest.mark.parametrize(
    ("workload", "provider"), CASES, ids=[f"{w.name}-{p.name}" for w, p in CASES]
)
def test_forward_and_backward(benchmark, workload, provider):
    reason = provider.unavailable(DEVICE) or provider.unsupported(workload)
    if reason:
        pytest.skip(f"{provider.name}: {reason}")
    if provider.name == "dense-compile" and SUITE == "tiny":
        pytest.skip("compiling takes far longer than a tiny case; choose FDD_BENCH_SUITE=full")
    benchmark.group = workload.name
    problem, options = build_problem(workload, DEVICE), provider.options(workload)
    _, _, gradients = step(provider, problem, options, DEVICE)
    check = TimedCallCheck(workload, problem).run(provider, gradients)
    assert check["passed"], f"gradient off by {check['error']:.2e}"
    benchmark.pedantic(step, args=(provider, problem, options, DEVICE), rounds=3, warmup_rounds=1)
