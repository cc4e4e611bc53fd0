"""`pytest benchmarks`: FDD_BENCH_SUITE=tiny|quick|full|limits chooses the shapes (tiny),
FDD_BENCH_THREADS the threads.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """The threads asked for; tiny problems run on one."""
    before = torch.get_num_threads()
    default = 1 if os.environ.get("FDD_BENCH_SUITE", "tiny") == "tiny" else before
    torch.set_num_threads(int(os.environ.get("FDD_BENCH_THREADS", default)))
    yield
    torch.set_num_threads(before)
