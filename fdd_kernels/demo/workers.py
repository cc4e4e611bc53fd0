"""Call a function for several items in processes of one thread each, side by side."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Send = Callable[[Any], None]


def run_side_by_side(
    work: Callable[[Any, Send], Any],
    items: Sequence[Any],
    processes: int,
    receive: Callable[[Any, Any], None],
) -> list[Any]:
    """Call `work(item, send)` for every item with one torch thread, at most `processes` at once.

    One thread whatever `processes` is: results do not depend on it, to the last bit. With one
    process everything runs in this one. Otherwise `work` and `items` must be picklable. When this
    function ends, also by an exception or Ctrl-C, no process of it is left. If this process is
    killed, the others end at their next message.

    Args:
        receive: called here as `receive(item, message)` for every `send(message)` there.

    Returns:
        What `work` returned, in the order of `items`.

    Raises:
        RuntimeError: `work` raised an exception in another process, whose traceback is in the
            message, or that process was killed.
    """
    if processes == 1:
        with _one_thread():
            return [work(item, lambda message, item=item: receive(item, message)) for item in items]
    context = multiprocessing.get_context("spawn")
    waiting, running, results = list(enumerate(items)), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                index, item = waiting.pop(0)
                here, there = context.Pipe()
                process = context.Process(target=_child, args=(there,), daemon=True)
                running[here] = process, index
                with _interrupts_ignored():  # which a process inherits: Ctrl-C is for this one
                    process.start()
                there.close()  # so that the end of the process is the end of the pipe
                here.send((work, item))
            for here in wait(list(running)):
                process, index = running[here]
                kind, content = _next(here, process)
                if kind == "message":
                    receive(items[index], content)
                    continue
                results[index] = content
                del running[here]
                process.join()
    finally:
        for process, _ in running.values():
            if process.pid is not None:
                process.kill()
                process.join()
    return [results[index] for index in range(len(items))]


def _next(pipe: Connection, process: multiprocessing.Process) -> tuple[str, Any]:
    """Receive a message or the result.

    Raises:
        RuntimeError: see `run_side_by_side`.
    """
    try:
        kind, content = pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a process of the demo ended with exit code {process.exitcode} before its work was "
            "done; -9 is often too little memory: set OMP_NUM_THREADS=1 to use one process"
        ) from None
    if kind == "error":
        raise RuntimeError(f"in a process of the demo:\n{content}")
    return kind, content


def _child(pipe: Connection) -> None:
    """Receive work and item; send what the work sends, returns or raises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        work, item = pipe.recv()
        answer = "result", work(item, lambda message: pipe.send(("message", message)))
    except (BrokenPipeError, EOFError):  # the first process has ended
        return
    except Exception:
        answer = "error", traceback.format_exc()
    pipe.send(answer)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C while the block runs; in another thread than the main one do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread of torch while the block runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
