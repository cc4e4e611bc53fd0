"""Several processes of one worker script, started together and none left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


def start(worker: str, kind: str, world: int, folder: Path) -> list[subprocess.Popen]:
    """`world` processes of tests/<worker>: python <worker> KIND RANK WORLD FOLDER, one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / worker), kind, str(rank), str(world), str(folder)], cwd=TESTS.parent, env=environment,
            text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str]]:
    """Exit status and messages of each process; none is left running."""
    end = time.monotonic() + seconds
    try:
        return [(p.wait(max(1, end - time.monotonic())), p.stderr.read()) for p in processes]
    finally:
        for process in processes:
            process.kill()


def finish_well(processes: list[subprocess.Popen], seconds: float = 240) -> None:
    """Fail with the messages of a process that ended with an error."""
    for status, errors in finish(processes, seconds):
        assert status == 0, errors[-3000:]
