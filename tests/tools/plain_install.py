"""Install the package by a plain `pip install .` and run the C++ kernels from another directory.

    python tests/tools/plain_install.py        (part of .ci/run)

A fresh environment uses the torch of this one, so nothing large is fetched; pip fetches setuptools
for its isolated build. The kernels are compiled at their first use, into a separate cache. Without
a compiler the message says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# Also what tests that run meanwhile write: hidden folders.
NOT_COPIED = (".*", "build", "runs", "tests", "benchmarks", "*.so", "*.egg-info", "__pycache__")
CALL = """
import sys, torch, fdd_kernels
from fdd_kernels import fused_fdd_loss
assert fdd_kernels.__file__.startswith(sys.prefix), fdd_kernels.__file__
states = [torch.randn(4, 8, requires_grad=True) for _ in range(3)]
teacher = [s.detach() + 0.1 for s in states]
loss = fused_fdd_loss(states, torch.randn(20, 8), teacher, torch.randn(20, 8), backend=sys.argv[1])
loss.backward()
print("loss", loss.item())
"""


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Its output and messages; they are shown, and the script ends, if it fails."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "FDD_KERNELS_BUILD", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def fresh_environment(folder: Path) -> tuple[str, Path]:
    """Make an environment in folder/venv with this torch; return its Python and its packages."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    packages = run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder
    ).strip()
    Path(packages, "torch_of_the_other_environment.pth").write_text(
        f"{Path(torch.__file__).parent.parent}\n"
    )
    return python, Path(packages)


def copy_sources(folder: Path) -> Path:
    """Copy what an installation needs to folder/sources: pip builds among the sources."""
    return shutil.copytree(ROOT, folder / "sources", ignore=shutil.ignore_patterns(*NOT_COPIED))


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python, packages = fresh_environment(folder)
        run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                str(copy_sources(folder)),
            ],
            folder,
        )
        demo = packages / "fdd_kernels" / "demo"
        assert (demo / "report.html.jinja").is_file()
        assert not (demo / "assets").exists()  # 9.8 MB, in the repository only
        print(f"installed, {time.monotonic() - started:.0f} s", flush=True)
        cache = {"FDD_KERNELS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        told = run(
            [python, "-c", CALL, "auto"], folder, PATH=str(folder / "venv" / "bin"), CXX="", **cache
        )
        assert (
            "there is no C++ compiler to compile the C++ kernels with: install a C++ compiler"
            in told
        ), told
        first = run([python, "-c", CALL, "cpu"], folder, **cache)
        assert "fdd_kernels: compiled the C++ kernels in " in first, first
        print(first.strip().splitlines()[-2], flush=True)
        second = run([python, "-c", CALL, "cpu"], folder, **cache)
        assert second.startswith("loss "), second
    print(f"a plain pip install works, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
