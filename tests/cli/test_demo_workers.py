"""The demo's processes: order, messages, errors, and that none is left."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from fdd_kernels.demo.workers import run_side_by_side


def work(item, send):
    """Send, and do what the item says: also fail or be killed."""
    if item == "raise":
        raise ValueError("of a worker")
    if item == "die":
        os.kill(os.getpid(), 9)
    send(("threads", torch.get_num_threads()))
    return item, os.getpid()


def test_one_process_is_this_one():
    threads, received = torch.get_num_threads(), []
    results = run_side_by_side(
        work, "abc", 1, lambda item, message: received.append((item, message))
    )
    assert results == [(item, os.getpid()) for item in "abc"]
    assert received == [(item, ("threads", 1)) for item in "abc"]
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_processes_answer_in_order_and_end():
    received = []
    results = run_side_by_side(
        work, "ab", 2, lambda item, message: received.append((item, message))
    )
    assert [item for item, _ in results] == ["a", "b"]
    assert os.getpid() not in {pid for _, pid in results}
    assert sorted(received) == [(item, ("threads", 1)) for item in "ab"]
    for item, match in (("raise", "ValueError: of a worker"), ("die", "exit code -9")):
        with pytest.raises(RuntimeError, match=match):
            run_side_by_side(work, [item], 2, lambda item, message: None)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes():
    def interrupt(item, message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side(work, "ab", 2, interrupt)
    assert not multiprocessing.active_children()
