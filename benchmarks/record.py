"""The record of a run: one JSON file with every figure and its conditions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fdd_kernels.common.atomic import write_text
from fdd_kernels.common.processor import generation, processor

FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PARTIAL = "unfinished.json"
_REQUIRED = ("format", "suite", "date", "device", "threads", "machine", "versions", "git")
_REQUIRED += ("sources", "results")
_PACKAGES = ("fdd_kernels", "torch", "triton", "liger-kernel", "trl", "orda-kernel")
_PACKAGES += ("transformers",)
# Instruction sets that figures depend on, the fastest first, and how tables name them.
_INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bfloat16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "sve": "SVE",
    "asimd": "NEON",
}


class RecordError(Exception):
    """A record that cannot be used; the message names the file and what is wrong."""


def machine(device: str) -> dict[str, Any]:
    """Describe the machine, as far as figures depend on it."""
    name, flags = processor()
    info: dict[str, Any] = {"processor": name, "cores": os.cpu_count()}
    info |= {
        "generation": generation(),
        "system": platform.platform(),
        "instructions": [f for f in reversed(_INSTRUCTIONS) if f in flags],
    }
    try:
        memory = Path("/proc/meminfo").read_text().split()
        info["memory"] = int(memory[memory.index("MemTotal:") + 1]) * 1024
    except (OSError, ValueError):
        pass
    if device == "cuda":
        import torch

        info["gpu"] = torch.cuda.get_device_name()
    return info


def versions() -> dict[str, str]:
    """List the versions of Python and of every package that computes something here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def git_revision() -> dict[str, Any]:
    """Name the commit, and whether package, kernels or benchmarks differ from it."""
    parts = ("fdd_kernels", "csrc", "benchmarks")
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", *parts)
        return {"revision": _git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"revision": "unknown", "changed": None}


def source_digest() -> str:
    """Hash the package with its extension, csrc, and these benchmarks."""
    package, digest = ROOT / "fdd_kernels", hashlib.sha256()
    files = [*package.rglob("*.py"), *package.glob("_C*"), *(ROOT / "csrc").glob("*")]
    files += (ROOT / "benchmarks").rglob("*.py")
    for path in sorted(filter(Path.is_file, files)):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        RecordError: it is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path}: is not JSON ({error}); it was damaged or is something else"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        RecordError: it is missing, no JSON, or not a record of this format.
    """
    data = read_json(path)
    missing = [key for key in _REQUIRED if not isinstance(data, dict) or key not in data]
    if missing:
        raise RecordError(f"{path}: is no benchmark record: it lacks {', '.join(missing)}")
    if data["format"] != FORMAT:
        raise RecordError(
            f"{path}: has format {data['format']}, this version reads {FORMAT}; run the suite again"
        )
    for result in data["results"]:
        complete = isinstance(result, dict) and {"workload", "providers"} <= result.keys()
        if not complete or "name" not in result["workload"]:
            raise RecordError(f"{path}: a result lacks its workload or providers; it was damaged")
    return data


def save(path: Path, data: dict[str, Any]) -> None:
    """Write a record so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=1) + "\n")


def kind(data: dict[str, Any]) -> str:
    """Name the kind of processor or GPU that a record is of: its tables stand beside those of
    other kinds.
    """
    about = data["machine"]
    sets = about.get("instructions", [])
    widest = next((text for name, text in _INSTRUCTIONS.items() if name in sets), None)
    name = about.get("gpu") or about.get("generation") or about["processor"]
    return name if widest is None or about.get("gpu") else f"{name}, {widest}"


def newest_of_each_suite(folder: Path) -> list[Path]:
    """Find the newest finished record of each suite and kind of processor in a folder, by their own
    dates, oldest first. A record of a part of its suite does not count.

    Raises:
        RecordError: there is none.
    """
    found: dict[tuple[str, str], tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != PARTIAL and not (data := load(path)).get("part"):
            key = data["suite"], kind(data)
            found[key] = max(found.get(key, ("", path)), (data["date"], path))
    if not found:
        raise RecordError(
            f"{folder}: has no record of a whole suite; run `python -m benchmarks run` first"
        )
    return [path for _, path in sorted(found.values())]


def newest(folder: Path, suite: str) -> dict[str, Any] | None:
    """Load the newest record of a suite, of whatever kind; None without one."""
    records = map(load, reversed(newest_of_each_suite(folder)))
    return next((data for data in records if data["suite"] == suite), None)
