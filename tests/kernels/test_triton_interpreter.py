"""Run the Triton kernels in Triton's interpreter, through the public functions, on CPU tensors.

Triton looks at TRITON_INTERPRET when it is imported, so every test here starts a process: for
tests/numerics/test_backends.py with the backend "triton", and for the files of tests/kernels/ that
test these kernels alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: there is nothing to interpret")

ROOT = Path(__file__).parents[2]


def interpreted_tests(*arguments: str) -> None:
    """Run pytest with the interpreter on, and fail with its report if it fails."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "FDD_TEST_BACKENDS": "triton",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


NAMES = ("interpreted", "strategies", "layers", "formulas")
KERNELS = [f"tests/kernels/triton_{name}.py" for name in NAMES]
BACKENDS = "tests/numerics/test_backends.py"


def test_smoke():
    """The fast tests of the kernels, and every option of the loss in few calls."""
    interpreted_tests(*KERNELS, f"{BACKENDS}::test_smoke", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_alone():
    interpreted_tests(*KERNELS, "-m", "slow")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_as_a_backend():
    interpreted_tests(BACKENDS, "-k", "triton and not smoke")
