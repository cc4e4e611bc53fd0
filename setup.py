"""Build script: everything declarative is in pyproject.toml; this builds the C++ kernels where a compiler allows.

FDD_KERNELS_BUILD=auto (default) builds them and goes on without them if that fails; 1 fails; 0 does not try.
FDD_KERNELS_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

BUILD = os.environ.get("FDD_KERNELS_BUILD", "auto")
SANITIZE = os.environ.get("FDD_KERNELS_SANITIZE", "0") == "1"
if BUILD not in ("auto", "0", "1"):
    sys.exit(f"FDD_KERNELS_BUILD={BUILD!r} is not one of auto, 0, 1")


def extension() -> dict:
    """The arguments of setup() that build fdd_kernels._C."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The products and the row kernels choose their instruction set at run time: nothing here depends on this machine.
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
    flags += ["-Werror=switch"]  # a divergence that a switch leaves out would be computed as another
    # torch's own thread pool, through ATen/Parallel.h; its wheels bring the OpenMP runtime of g++.
    link = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags += link
    if SANITIZE:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
        flags += [*sanitizers, "-O1"]
        link += sanitizers

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD == "1":
                    raise
                print(f"fdd_kernels: the C++ kernels were not built ({error}); the package works without", file=sys.stderr)

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    module = CppExtension(
        "fdd_kernels._C",
        sources,
        depends=[str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").glob(pattern)],
        extra_compile_args=flags,
        extra_link_args=link,
        optional=BUILD == "auto",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


arguments = {}
if BUILD != "0":
    try:
        arguments = extension()
    except ImportError as error:
        if BUILD == "1":
            raise
        print(f"fdd_kernels: no C++ kernels, torch cannot be imported to build them ({error})", file=sys.stderr)
setup(**arguments)
