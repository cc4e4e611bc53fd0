"""Several gloo processes against one: gradients of data-parallel students, and processes that die."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hf_models import one_thread  # noqa: F401
from parallel_worker import CONFIG, batches, models

from fdd_kernels import Distiller

TESTS = Path(__file__).parent


def start(kind: str, world: int, folder: Path) -> list[subprocess.Popen]:
    command = [sys.executable, str(TESTS / "parallel_worker.py"), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)], cwd=TESTS.parent, env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
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


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp-tied", 2)])
def test_gradients_equal_those_of_one_process(tmp_path, kind, world):
    for status, errors in finish(start(kind, world, tmp_path)):
        assert status == 0, errors[-3000:]
    student, teacher = models(tied=kind.endswith("tied"))
    distiller = Distiller(student, teacher, CONFIG)
    parts = batches(world)
    items = sum(distiller.count_positions(batch) for batch in parts)
    loss = sum(distiller(batch, num_items_in_batch=items).loss for batch in parts)
    loss.backward()
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=0)
    scale = max(float(p.grad.abs().max()) for p in student.parameters())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            found["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    (status, errors), (killed, _) = finish(start("killed", 2, tmp_path), seconds=120)
    assert killed == 9
    assert status not in (0, None)
    assert "Error" in errors
    assert not (tmp_path / "found.pt").exists()


def test_a_head_that_is_spread_over_processes_is_refused(tmp_path):
    for status, errors in finish(start("sharded-head", 2, tmp_path)):
        assert status != 0
        assert "the teacher's head is a DTensor" in errors
