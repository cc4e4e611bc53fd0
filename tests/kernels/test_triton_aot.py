"""Compile the Triton kernels ahead of time: no spills, within shared memory, onto tensor cores.

Each compiler has a process of its own: Triton looks at TRITON_INTERPRET when it is imported, and
another test may have set it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
OTHERS = ("cuda:89", "cuda:120", "hip:gfx950")
ONE_PASS = {"lens_stats_kernel", "divergence_stats_kernel", "lens_grad_kernel"}
OF_ROWS = {"cached_stats_kernel", "cached_second_pass_kernel", "cached_grad_kernel"}


def reports(path: Path, targets: tuple[str, ...], *arguments: str) -> dict[str, list[dict]]:
    """Compile the quick subset in one process, without a problem: the reports of each target."""
    command = ["-m", "benchmarks.aot", "--quick", "--json", str(path), "--target", *targets]
    done = python(*command, *arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads(path.read_text())
    return {target: [r for r in found if r["target"] == target] for target in targets}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_compile(tmp_path):
    for target, found in reports(tmp_path / "aot.json", TARGETS).items():
        assert {r["kernel"] for r in found} >= ONE_PASS | OF_ROWS, target
        assert all(
            r["tensor_core_instructions"] > 0
            for r in found
            if "f32" not in r["case"] and r["num_warps"] == 8
        ), target


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_row_kernels_compile_elsewhere_too(tmp_path):
    for target, found in reports(tmp_path / "aot.json", OTHERS, "--kernels", "cached").items():
        assert {r["kernel"] for r in found} >= OF_ROWS, target


STARVED = """
import dataclasses
from benchmarks import aot

case = next(aot.cases(quick=True))
jobs = (aot.job("cuda:90", case, one) for one in aot.launches(case, "sm_90"))
job = next(j for j in jobs if j.kernel in aot.HEAVY)
options = tuple({**dict(job.options), "maxnreg": 128}.items())
aot.HARDWARE["cuda:90"] = dataclasses.replace(aot.HARDWARE["cuda:90"], shared_limit=1024)
aot.TENSOR_CORE["cuda"] = "no such instruction"
print(*aot.compile_job(dataclasses.replace(job, options=options)).problems, sep="; ")
"""


def test_problems_are_found():
    """The gate closes: a kernel with half the registers, on a target with no shared memory to speak
    of.
    """
    done = python("-c", STARVED)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"spills \d+ bytes; \d+ bytes of shared memory of 1024; no tensor-core instruction",
        done.stdout,
    )


SCATTERED = """
import dataclasses
from benchmarks import aot

case = next(aot.cases(quick=True))
jobs = (aot.job("cuda:90", case, one) for one in aot.launches(case, "sm_90"))
job = next(job for job in jobs if job.kernel == "cached_stats_kernel")
divisible = tuple(name for name in job.divisible if not name.startswith("ld_"))
print(*aot.compile_job(dataclasses.replace(job, divisible=divisible)).problems, sep="; ")
"""


@pytest.mark.slow
def test_rows_that_are_read_number_by_number_are_found():
    done = python("-c", SCATTERED)
    assert done.returncode == 0, done.stderr
    assert "0 loads of 128 bits, fewer than 16" in done.stdout, done.stdout
