"""Find the compiled C++ kernels: in the package, else compiled at first use, else a reason why
there are none.

Kernels compiled at first use lie under FDD_KERNELS_CACHE (default ~/.cache/fdd_kernels), one folder
per version of torch, Python and the sources. FDD_KERNELS_BUILD=0 never compiles; 1 retries a build
that failed in an earlier process. The search runs at the first use of `kernels`, `why_missing` or
`origin`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import torch

from fdd_kernels import _build
from fdd_kernels.common.environment import cache_folder
from fdd_kernels.common.heartbeat import Heartbeat

NEEDED = "a C++ compiler (g++ 12 or clang 15)"
LOG_FILE, FAILURE_FILE = "build.log", "failed.json"
_loading = threading.Lock()


# The number of kBuiltFor in csrc/module.cpp.
INTERFACE = 11


class _Missing(Exception):
    """Says why there are no kernels, and the remedy."""


def missing_reason() -> str | None:
    """Say why there are no C++ kernels, and the remedy; None if there are. Compiles them if
    needed.
    """
    if "why_missing" not in globals():
        with _loading:
            if "why_missing" not in globals():
                _find()
    return globals()["why_missing"]


# As torch.compiler.assume_constant_result, which would import half of torch: the function runs
# while tracing and is not traced.
missing_reason._dynamo_marked_constant = True


def __getattr__(name: str):
    if name not in ("kernels", "why_missing", "origin"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    missing_reason()
    return globals()[name]


def _find() -> None:
    """Set `kernels`, `origin` (their file) and `why_missing`."""
    kernels = origin = reason = None
    try:
        kernels, origin = _ahead_of_time() or _at_first_use()
    except _Missing as missing:
        reason = str(missing)
    globals().update(kernels=kernels, origin=origin, why_missing=reason)


def built_for(file: Path) -> tuple[str, int] | None:
    """Find the version of torch and the interface that an extension was compiled for.

    Reads the file without loading it. None if the file does not say; interface 1 did not say its
    number.
    """
    found = re.search(
        rb"fdd_kernels built for torch ([0-9.]+)[^;]*;(?: interface ([0-9]+);)?", file.read_bytes()
    )
    return found and (found[1].decode(), int(found[2] or 1))


def _release(version: str) -> str:
    """Drop a local version label: 2.13.0 of 2.13.0+cpu."""
    return re.match(r"[0-9.]*[0-9]", version)[0]


def _ahead_of_time() -> tuple[ModuleType, str] | None:
    """Load the extension of the installation, if it is for this torch and this package."""
    spec = importlib.util.find_spec("fdd_kernels._C")
    if spec is None or spec.origin is None:
        return None
    wanted, found = (_release(torch.__version__), INTERFACE), built_for(Path(spec.origin))
    if found is not None and found != wanted:
        if _forbidden():
            raise _Missing(
                f"the package's C++ kernels were compiled for torch {found[0]}, interface "
                f"{found[1]}, and this is torch {torch.__version__}, interface {INTERFACE}: "
                "install the package again, or leave FDD_KERNELS_BUILD unset and they are "
                "compiled at their first use"
            )
        return None
    return _loaded(Path(spec.origin))


def _loaded(file: Path) -> tuple[ModuleType, str]:
    try:
        spec = importlib.util.spec_from_file_location("fdd_kernels._C", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise _Missing(
            f"the C++ kernels do not load ({error}): remove {file} and install the package again"
        ) from None
    sys.modules["fdd_kernels._C"] = module
    return module, str(file)


def _forbidden() -> bool:
    return os.environ.get("FDD_KERNELS_BUILD", "auto") == "0"


def _key(sources: list[Path]) -> str:
    """Name the folder of a compiled file by everything that it depends on."""
    digest = hashlib.sha256()
    for part in (
        torch.__version__,
        sysconfig.get_config_var("EXT_SUFFIX"),
        platform.machine(),
        *map(str, _build.flags()),
    ):
        digest.update(f"{part}\0".encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"torch-{torch.__version__}-{digest.hexdigest()[:16]}"


def _at_first_use() -> tuple[ModuleType, str]:
    """Load the extension from the cache; compile it first if needed. One process compiles, others
    wait.

    Raises:
        _Missing: compiling is forbidden, impossible, or failed.
    """
    if _forbidden():
        raise _Missing(
            "the package was installed without C++ kernels, and FDD_KERNELS_BUILD=0 forbids "
            "compiling them: leave it unset"
        )
    sources = _build.sources(_build.source_folder())
    if not sources:
        raise _Missing(
            f"the package brings neither C++ kernels nor their sources ({_build.source_folder()}): "
            "install it again"
        )
    try:
        folder = cache_folder() / "extensions" / _key(sources)
        file = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile_once(folder, file)
        _require_own(file)
    except (OSError, RuntimeError) as error:
        raise _Missing(
            f"the C++ kernels cannot be compiled into a cache ({error}): set FDD_KERNELS_CACHE to "
            "a folder of your own"
        ) from None
    return _loaded(file)


def _require_own(file: Path) -> None:
    """Refuse to load a file that another user could have written.

    Raises:
        OSError: it belongs to another user than this one and root, or others may write it.
    """
    status = file.stat()
    if hasattr(os, "getuid") and (status.st_uid not in (0, os.getuid()) or status.st_mode & 0o002):
        raise OSError(f"{file} belongs to another user, or others may write it")


def _compile_once(folder: Path, file: Path) -> None:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with Heartbeat(
            lambda seconds: _say(
                f"another process compiles the C++ kernels, waited {seconds:.0f} s"
            )
        ):
            lock.acquire()
    try:
        if not file.exists():
            _compile(folder, file)
    finally:
        lock.release()


def compiler() -> str | None:
    """Find the command of the C++ compiler."""
    return (
        os.environ.get("CXX")
        or shutil.which("c++")
        or shutil.which("g++")
        or shutil.which("clang++")
    )


def _compile(folder: Path, file: Path) -> None:
    command = compiler()
    if command is None:
        raise _Missing(
            f"there is no C++ compiler to compile the C++ kernels with: install {NEEDED}"
        )
    failure = folder / FAILURE_FILE
    retry = os.environ.get("FDD_KERNELS_BUILD", "auto") == "1"
    if failure.exists() and not retry:
        try:
            before = json.loads(failure.read_text())
            known = before["reason"] if before["compiler"] == command else None
        except (ValueError, KeyError, TypeError):  # cut off while it was written
            known = None
        if known is not None:
            raise _Missing(known)
    # A new folder: the compiler of a killed process may still write into its own.
    work = Path(tempfile.mkdtemp(prefix="work-", dir=folder))
    _say(
        f"compiling the C++ kernels for torch {torch.__version__}, once, with {command} "
        "(FDD_KERNELS_BUILD=0: do not)"
    )
    with Heartbeat(lambda seconds: _say(f"compiling the C++ kernels, {seconds:.0f} s")) as running:
        done = subprocess.run(
            [sys.executable, "-m", "fdd_kernels._build", str(work)],
            env=_environment(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=work,
            check=False,
        )
    built = next((work / "built" / "fdd_kernels").glob("_C*"), None)
    if done.returncode or built is None:
        (folder / LOG_FILE).write_text(done.stdout)
        reason = (
            f"the C++ kernels could not be compiled ({_first_error(done.stdout)}; all messages: "
            f"{folder / LOG_FILE}): they need {NEEDED} and Python's headers; FDD_KERNELS_BUILD=1 "
            "tries again"
        )
        failure.write_text(json.dumps({"compiler": command, "reason": reason}))
        shutil.rmtree(work, ignore_errors=True)
        raise _Missing(reason)
    os.replace(built, file)
    shutil.rmtree(work, ignore_errors=True)
    failure.unlink(missing_ok=True)
    _say(f"compiled the C++ kernels in {running.seconds:.0f} s: {file}")


def _environment(command: str) -> dict[str, str]:
    """Let the compiling process import the same modules and find this environment's ninja."""
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    modules = [str(_build.PACKAGE.parent), *filter(None, sys.path)]
    return os.environ | {
        "CXX": command,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join(modules),
    }


def _first_error(messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (named or lines[-1:] or ["no message"])[0][:300]


def _say(text: str) -> None:
    print(f"fdd_kernels: {text}", file=sys.stderr, flush=True)
