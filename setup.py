"""Compile the C++ kernels if torch can be imported; all other settings are in pyproject.toml.

pip's build isolation hides torch from this script. Then the kernels are compiled at first use from
the sources in the package (fdd_kernels/backends/cpu/extension.py). `pip install
--no-build-isolation .` and the Makefile compile them here.

FDD_KERNELS_BUILD=auto (default) compiles them and continues without them if that fails; 1 makes a
failure an error; 0 does not try. FDD_KERNELS_SANITIZE=1 compiles with AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fdd_kernels import _build

BUILD = os.environ.get("FDD_KERNELS_BUILD", "auto")
if BUILD not in ("auto", "0", "1"):
    sys.exit(f"FDD_KERNELS_BUILD={BUILD!r} is not one of auto, 0, 1")


def extension() -> dict:
    """Make the arguments of setup() that build fdd_kernels._C."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD == "1":
                    raise
                print(
                    f"fdd_kernels: the C++ kernels were not built ({error}); the package works "
                    "without",
                    file=sys.stderr,
                )

    module = _build.extension(Path("csrc"), optional=BUILD == "auto")
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


class BuildWithSources(build_py):
    """Copy the sources of the kernels into the package, to be compiled at first use."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc", Path(self.build_lib, "fdd_kernels", "csrc"), dirs_exist_ok=True)


arguments = {"cmdclass": {}}
if BUILD != "0":
    try:
        arguments = extension()
    except ImportError as error:
        if BUILD == "1":
            sys.exit(
                "FDD_KERNELS_BUILD=1 compiles the C++ kernels now, which needs torch here "
                f"({error}): install torch and add --no-build-isolation, or leave "
                "FDD_KERNELS_BUILD unset, and they are compiled at first use"
            )
        print("fdd_kernels: the C++ kernels are compiled at first use", file=sys.stderr)
arguments["cmdclass"]["build_py"] = BuildWithSources
setup(**arguments)
