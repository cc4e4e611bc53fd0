"""Compile the C++ kernels for AArch64, and run their row kernels there if an emulator is installed.

    python -m tests.tools.cross_compile                  (minutes; no part of .ci/run)
    python -m tests.tools.cross_compile --only macOS --torch FOLDER      (with the target's torch)

| target | compiler | Debian or Python package |
|---|---|---|
| Linux | aarch64-linux-gnu-g++ | g++-aarch64-linux-gnu |
| Linux, macOS | clang with the headers of both | ziglang |
| to run the row kernels | qemu-aarch64 | qemu-user |

A target without a compiler is skipped, and a line says so. Every source is compiled; only the row
kernels are optimised, and their code must use NEON. Nothing is linked against torch. FOLDER is the
folder "torch" of an unpacked wheel for the target. With that of macOS, whose omp.h Linux lacks, the
code is compiled with OpenMP as on macOS.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fdd_kernels import _build

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = Path(__file__).with_name("row_kernels_numbers.cpp")
EMULATOR = "qemu-aarch64"
UNIT = 2.0**-24
# Both architectures round on their own, in float32. Log-probabilities there are above -10 and come
# of logits at most 8 below the shift at temperature 2: they are off by (4 + 10) UNIT. Their
# difference x is at least 1/8, hence e^x - 1 - x is off by 2 * 14 * 2 / |x| UNIT = 448 UNIT of
# itself. exp is off by 4 UNIT, of which e^x - 1 - x keeps a thirteenth: 52. A lane adds 300 / 4
# numbers: 75. Together below 600.
TOLERANCE = 2 * 600 * UNIT
# No arithmetic, or one that is exact.
SAME_BITS = (
    "largest",
    "to_bfloat16",
    "from_bfloat16",
    "from_half",
    "interleave",
    "separate",
    "transpose",
)


@dataclass(frozen=True)
class Target:
    name: str
    command: tuple[str, ...]
    openmp: tuple[str, ...]  # where the target's omp.h is there
    missing: str | None = None  # why it cannot be compiled for


def targets() -> list[Target]:
    gnu = "aarch64-linux-gnu-g++"
    missing = None if shutil.which(gnu) else f"no {gnu} (package g++-aarch64-linux-gnu)"
    found = [Target("Linux, g++", (gnu,), ("-fopenmp",), missing)]
    missing = None if importlib.util.find_spec("ziglang") else "no clang (package ziglang)"
    for name, triple in (("Linux", "aarch64-linux-gnu"), ("macOS", "aarch64-macos")):
        command = (sys.executable, "-m", "ziglang", "c++", "-target", triple)
        found.append(Target(f"{name}, clang", command, ("-Xclang", "-fopenmp"), missing))
    return found


def run(command: list[str]) -> str:
    """Run a command and return what it prints; show it and end the script if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def neon(assembly: str) -> tuple[int, int, int]:
    """Count multiply-adds of 4 floats, comparisons of 4 floats, and comparisons of one."""
    vector = r"(?:\.4s\s|\s+v[0-9]+\.4s)"
    return (
        len(re.findall(rf"\bfml[as]{vector}", assembly)),
        len(re.findall(rf"\bfcm(?:eq|g[et]|l[et]){vector}", assembly)),
        len(re.findall(r"\bfcmpe?\s+s", assembly)),
    )


def compile_for(target: Target, torch: Path, work: Path) -> str:
    """Compile every source for a target and say what the row kernels became; end if one fails."""
    flags = [*_build.FLAGS, "-fPIC", "-DTORCH_EXTENSION_NAME=_C"]
    if target.command[0].endswith("g++") or (torch / "include" / "omp.h").is_file():
        flags += target.openmp
    for folder in (
        torch / "include",
        torch / "include" / "torch" / "csrc" / "api" / "include",
        sysconfig.get_path("include"),
    ):
        flags += ["-isystem", str(folder)]
    sources = [file for file in _build.sources(_build.source_folder()) if file.suffix == ".cpp"]
    for file in sources:
        if file.stem != "row_kernels_generic":
            # Not -fsyntax-only: zig would first compile the libraries of a linked program.
            run([*target.command, *flags, "-O0", "-c", str(file), "-o", str(work / "checked.o")])
            continue
        run([*target.command, *flags, "-S", str(file), "-o", str(work / "row_kernels.s")])
        adds, compared, compared_alone = neon((work / "row_kernels.s").read_text(errors="replace"))
        if not adds or compared < compared_alone:
            sys.exit(
                f"{target.name}: the row kernels do not use NEON: {adds} multiply-adds and "
                f"{compared} comparisons of 4 floats, {compared_alone} comparisons of one float"
            )
    return (
        f"{len(sources)} files; NEON: {adds} multiply-adds and {compared} comparisons of 4 floats, "
        f"{compared_alone} comparisons of one"
    )


def differences(here: str, there: str) -> dict[str, float]:
    """Largest difference of each result as a part of its tolerance, which is 0 for copies.

    Takes what row_kernels_numbers.cpp printed on both architectures, without the first line.
    """
    worst: dict[str, float] = {}
    for mine, other in zip(here.splitlines(), there.splitlines(), strict=True):
        (name, *a), (other_name, *b) = mine.split(), other.split()
        assert (name, len(a)) == (other_name, len(b)), f"{mine}\n{other}"
        pairs = [(float(x), float(y)) for x, y in zip(a, b)]
        far = [abs(x - y) for x, y in pairs]
        allowed = 0.0 if name in SAME_BITS else TOLERANCE * max(abs(x) for x, _ in pairs[1:])
        if not all(gap < math.inf for gap in far) or (max(far) > 0 and not allowed):  # NaN too
            worst[name] = math.inf
        else:
            worst[name] = max(worst.get(name, 0.0), max(far) / (allowed or 1.0))
    return worst


def run_numbers(target: Target, work: Path) -> str:
    """Run the row kernels here and emulated, and compare what they compute; end if it differs."""
    source = _build.source_folder()
    files = [NUMBERS, source / "row_kernels_generic.cpp", source / "divergences.cpp"]
    printed = []
    for name, compiler, options, emulator in (
        ("here", ["c++"], [], []),
        ("there", [*target.command], ["-static"], [EMULATOR]),
    ):
        program = str(work / name)
        flags = [*_build.FLAGS, f"-I{source}", *options]
        run([*compiler, *flags, *map(str, files), "-o", program])
        printed.append(run([*emulator, program]).partition("\n"))
    (here_set, _, here), (there_set, _, there) = printed
    worst = differences(here, there)
    if max(worst.values()) > 1:
        sys.exit(f"{here_set} and {there_set} differ; parts of the tolerance: {worst}")
    name = max(worst, key=worst.get)
    return (
        f"{len(worst)} results of {there_set}, emulated, agree with {here_set} here; the worst is "
        f"{name} at {worst[name]:.3f} of the tolerance"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--torch", type=Path, help="folder torch of an unpacked wheel for the target (this one's)")
    add("--only", default="", metavar="TEXT", help="targets whose name contains it, as macOS")
    arguments = parser.parse_args()
    torch = arguments.torch or Path(importlib.util.find_spec("torch").origin).parent
    if not (torch / "include").is_dir():
        sys.exit(f"--torch {torch} has no folder include: give the folder torch of a wheel")
    chosen = [target for target in targets() if arguments.only in target.name]
    if not chosen:
        sys.exit(
            f"--only {arguments.only} is in no target: give a part of Linux, g++; macOS, clang"
        )
    for target in chosen:
        if target.missing:
            print(f"{target.name}: skipped, {target.missing}", flush=True)
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            said = compile_for(target, torch, Path(work))
            print(f"{target.name}: {said}; {time.monotonic() - started:.0f} s", flush=True)
            if not target.command[0].endswith("g++"):
                continue
            if shutil.which(EMULATOR):
                print(f"{target.name}: {run_numbers(target, Path(work))}", flush=True)
            else:
                print(f"{target.name}: not run, no {EMULATOR} (package qemu-user)", flush=True)


if __name__ == "__main__":
    main()
