"""The process around the measuring one. It imports no torch: it starts the runner, kills it where a
step hangs, and starts another for the next steps.

A kernel that hangs cannot be interrupted, and one that reads where it may not leaves the device
unusable to its process. So the steps run in a child. The record names the running step and its end,
and a new child takes the steps after it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, RecordError, read_json, save, source_digest

RECORD = "gpu.json"
FORMAT = 1
GRACE = 15.0  # seconds between a step's cap, at which it is interrupted, and the end of its process
STARTING = 90.0  # seconds a child may take to its first step
DONE, FAILED, WRONG, RESTART = 0, 1, 3, 75


def resumed(path: Path, *, dry: bool, fresh: bool) -> dict[str, Any]:
    """Load the record to resume; one of other code is put aside under another name."""
    about = {"format": FORMAT, "sources": source_digest(), "dry_run": dry}
    new = about | {"device": None, "running": None, "steps": {}}
    if not path.exists():
        return new
    try:
        old = read_json(path)
    except RecordError:
        old = {}
    if not fresh and all(old.get(key) == value for key, value in about.items()):
        return old
    set_aside(path)
    return new


def set_aside(path: Path) -> None:
    """Rename a record so that it stays beside the next."""
    number = 1
    while (aside := path.with_name(f"gpu-{number}.json")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} is of other code, another device or unwanted: it is {aside.name} now")


def _environment(dry: bool) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # no step needs the C++ kernels, which a first use would compile
    environment = os.environ | {"PYTHONPATH": path, "FDD_KERNELS_BUILD": "0"}
    if dry:  # triton reads it when it is imported; the interpreter warns of masked elements
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONWARNINGS": "ignore::RuntimeWarning"}
    return environment


def supervise(
    output: Path,
    minutes: float,
    *,
    dry: bool,
    fresh: bool = False,
    only: Sequence[str] = (),
    starting: float = STARTING,
    grace: float = GRACE,
    command: Sequence[str] | None = None,
) -> int:
    """Run the steps that the record lacks within `minutes`; 0, 1 for a step that failed, 3 for
    wrong numbers.
    """
    path, until = output / RECORD, time.time() + 60 * minutes
    save(path, resumed(path, dry=dry, fresh=fresh) | {"running": None})
    arguments = [str(path), str(until), *(["--dry-run"] if dry else [])]
    arguments += [f"--step={name}" for name in only]
    command = [*(command or [sys.executable, "-m", "benchmarks.gpu.runner"]), *arguments]
    while time.time() < until:
        child = subprocess.Popen(command, env=_environment(dry), cwd=Path.cwd())
        try:
            code = _watch(child, path, time.time() + starting, grace)
        except BaseException:
            child.kill()
            child.wait()
            raise
        if code in (DONE, WRONG):
            break
        if not _blame(path, code):
            return FAILED  # no step was running: the next child would end the same way
    statuses = {entry["status"] for entry in read_json(path)["steps"].values()}
    return WRONG if "wrong" in statuses else FAILED if statuses & {"failed", "killed"} else DONE


def _watch(child: subprocess.Popen, path: Path, until: float, grace: float) -> int:
    """Wait for the child; its exit status. It is killed when its running step is over time, or when
    none has begun by `until`.
    """
    while True:
        try:
            return child.wait(timeout=0.25)
        except subprocess.TimeoutExpired:
            running = read_json(path)["running"]
            if time.time() > (running["until"] + grace if running else until):
                child.kill()
                return child.wait()
            if running is not None:
                until = time.time() + grace  # between two steps


def _blame(path: Path, code: int) -> bool:
    """Close the record of the step during which a child ended; False if there was none."""
    data = read_json(path)
    running, data["running"] = data["running"], None
    if running is None:
        return code == RESTART
    entry = data["steps"].setdefault(running["step"], {"results": {}})
    hung = time.time() > running["until"]
    why = "it hung: its process was killed" if hung else f"its process ended with {code}"
    entry |= {"status": "killed", "reason": why, "seconds": time.time() - running["since"]}
    print(f"{running['step']:40} killed: {why}", flush=True)
    save(path, data)
    return True
