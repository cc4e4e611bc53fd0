"""The Triton kernels compile ahead of time without spills, within shared memory, onto tensor cores: a quick subset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_kernels_compile(target, tmp_path):
    report = tmp_path / "aot.json"
    command = [sys.executable, "-m", "benchmarks.aot", "--quick", "--target", target, "--json", str(report)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert report.stat().st_size > 100


def test_roofline_prints_a_table_for_every_pair():
    done = subprocess.run([sys.executable, "-m", "benchmarks.roofline"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout
    assert all(name in done.stdout for name in ("GPT-2", "Llama", "Qwen"))
