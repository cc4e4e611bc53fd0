"""Several processes of one worker script, started together and none left running."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def start(worker: str, kind: str, world: int, folder: Path) -> list[subprocess.Popen]:
    """Start `world` processes `python -m WORKER KIND RANK WORLD FOLDER`, one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank in range(world):
        # a full pipe would stop a talkative process
        messages = folder / f"{kind}-{rank}-messages.txt"
        command = [sys.executable, "-m", worker, kind, str(rank), str(world), str(folder)]
        with messages.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file
            )
        process.messages = messages
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str]]:
    """Wait; return each process's exit status and messages, leaving none running.

    A process that takes longer is aborted and adds its stacks to its messages
    (`show_stack_when_asked`).
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
    try:
        return [
            (process.wait(30), process.messages.read_text(errors="replace"))
            for process in processes
        ]
    finally:
        for process in processes:
            process.kill()


def leave() -> None:
    """End a worker when all are done, without destructors of stores and groups.

    These may wait for processes that are gone: under load about one DDP run in thirty hung after
    its results were complete.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def show_stack_when_asked() -> None:
    """In a worker: a stack of each thread on its standard error when it is aborted."""
    faulthandler.enable()


def finish_well(processes: list[subprocess.Popen], seconds: float = 240) -> None:
    """Fail with the messages of the processes if one ended with an error."""
    found = finish(processes, seconds)
    messages = "\n".join(
        f"--- process {rank} ended with {status}\n{errors[-3000:]}"
        for rank, (status, errors) in enumerate(found)
    )
    assert not any(status for status, _ in found), messages
