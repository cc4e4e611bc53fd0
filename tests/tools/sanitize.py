"""Build the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer beside the tree and
run their tests.

    python -m tests.tools.sanitize        (or: make sanitize)

The sanitised package lies in build/sanitize. Leaks are not looked for: Python's own would drown any
of ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
TESTS = [
    [
        "tests/kernels/test_cpu_kernels.py",
        "-k",
        "way or ragged or strided or unaligned or half or sets or bits or who_else or pairing",
    ],
    ["tests/kernels/test_cpu_formulas.py", "-k", "not instruction_set"],
    ["tests/numerics/test_backends.py", "-k", "cpu and float32"],
    ["tests/numerics/test_layer_costs.py", "-k", "cpu and any_number"],
]


def build() -> None:
    """Copy the Python files and build the extension next to them."""
    shutil.copytree(
        ROOT / "fdd_kernels",
        BUILD / "fdd_kernels",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    environment = os.environ | {"FDD_KERNELS_BUILD": "1", "FDD_KERNELS_SANITIZE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(BUILD),
        "--build-temp",
        str(BUILD / "objects"),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def run_tests() -> int:
    """Run the tests; return the exit status of the first failing run, or 0."""
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "FDD_TEST_BACKENDS": "cpu",
        "FDD_TEST_PACKAGE": str(BUILD / "fdd_kernels"),
    }
    for path, *selection in TESTS:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            f"pythonpath={BUILD} {ROOT}",
            str(ROOT / path),
            *selection,
        ]
        status = subprocess.run(command, cwd=BUILD, env=environment, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    build()
    sys.exit(run_tests())
