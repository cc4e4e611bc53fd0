"""Compile the C++ kernels: setup.py ahead of time, or `python -m fdd_kernels._build FOLDER` at
first use.

FDD_KERNELS_SANITIZE=1 compiles with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# The instruction sets of GEMMs and row kernels are chosen at run time, so no flag depends on this
# machine. -Werror=switch: a divergence missing in a switch would be computed as another one. -g0:
# Python adds -g, which is most of the library's size.
FLAGS = (
    "-O3",
    "-g0",
    "-std=c++20",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",
    "-Werror=switch",
)
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
)


def source_folder() -> Path:
    """The folder csrc: in the installed package, or beside the package in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def sources(folder: Path) -> list[Path]:
    """All source files of the kernels, in a fixed order."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".cpp", ".h"))


def openmp() -> tuple[list[str], list[str]]:
    """Flags of the compiler and of the linker for OpenMP.

    Without them at::parallel_for (ATen/Parallel.h) runs in one thread. On macOS clang knows the
    option behind -Xclang alone, and torch's wheel brings omp.h and the runtime. The runtime is
    loaded with torch, and the linker looks up its symbols then (-undefined dynamic_lookup, which
    Python sets for every extension). One thread if this torch has no omp.h.
    """
    if sys.platform != "darwin":
        return ["-fopenmp"], ["-fopenmp"]
    torch = importlib.util.find_spec("torch")
    if torch is None or not Path(torch.origin).parent.joinpath("include", "omp.h").is_file():
        return [], []
    return ["-Xclang", "-fopenmp"], []


def flags() -> tuple[list[str], list[str]]:
    """Flags of the compiler and of the linker."""
    compiling, linking = openmp()
    compiling = [*FLAGS, *compiling]
    if os.environ.get("FDD_KERNELS_SANITIZE", "0") == "1":
        compiling += [*SANITIZERS, "-O1"]
        linking += SANITIZERS
    return compiling, linking


def extension(folder: Path, **options: Any):
    """Make the setuptools extension fdd_kernels._C from the sources in `folder`. Imports torch."""
    from torch.utils.cpp_extension import CppExtension

    compiling, linking = flags()
    files = sources(folder)
    return CppExtension(
        "fdd_kernels._C",
        [str(file) for file in files if file.suffix == ".cpp"],
        depends=[str(file) for file in files if file.suffix != ".cpp"],
        extra_compile_args=compiling,
        extra_link_args=linking,
        **options,
    )


def compile_into(folder: Path) -> None:
    """Compile the extension into folder/built/fdd_kernels/."""
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    distribution = Distribution(
        {"name": "fdd_kernels", "ext_modules": [extension(source_folder())]}
    )
    command = BuildExtension(distribution)
    command.build_lib, command.build_temp = str(folder / "built"), str(folder / "objects")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    compile_into(Path(sys.argv[1]))
