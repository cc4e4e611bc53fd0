"""Kill `cache-teacher` and `distill --teacher-cache` at random moments, again and again, and check what is left each time.

python -m benchmarks.crash --kills 60
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from transformers import LlamaConfig

from fdd_kernels import FDDConfig
from fdd_kernels.demo.corpus import standard_library_texts
from fdd_kernels.demo.teacher import SHIPPED_TEACHER, llama
from fdd_kernels.distill_command.run import distill
from fdd_kernels.distill_command.run_folder import DistillOptions, checkpoints
from fdd_kernels.teacher_cache import TeacherCache
from fdd_kernels.teacher_cache.command import CacheOptions, cache_teacher
from fdd_kernels.user_error import UserError

CHARACTERS = 60_000


def quiet() -> Console:
    return Console(file=io.StringIO())


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Names and content of the files in a directory."""
    found = [path for path in folder.rglob(pattern) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def check_cache(folder: Path, whole: dict[str, bytes]) -> bool:
    """A cache that opens is the whole one; anything else must be refused. Returns whether it is complete."""
    try:
        cache = TeacherCache(folder)
    except FileNotFoundError:
        return False
    except ValueError as error:
        if "not complete" not in str(error):
            raise
        return False
    cache.verify()
    if files(folder) != whole:
        raise AssertionError(f"{folder} is complete, but not the cache of the uninterrupted run")
    return True


def check_run(folder: Path, whole: dict[str, bytes]) -> bool:
    """Every checkpoint loads; a finished run has the student of the uninterrupted one. Returns whether it is finished."""
    for checkpoint in checkpoints(folder):
        load_file(checkpoint / "model.safetensors")
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
        json.loads((checkpoint / "trainer_state.json").read_text())
    if not (folder / "metrics.json").exists():
        return False
    if files(folder / "student", "*.safetensors") != whole:
        raise AssertionError(f"{folder} has another student than the uninterrupted run")
    return True


def torment(what: str, work: Callable[[Path], None], check: Callable[[Path], bool], folder: Path, seconds: float, kills: int,
            generator: random.Random) -> tuple[int, int]:  # fmt: skip
    """Start `work` over and over, killing it at random moments, until it was killed `kills` times.

    Returns how often it was killed, and how often it got to the end and was found right.
    """
    killed = finished = attempt = 0
    progress = iter(track(range(kills), description=what, console=Console(stderr=True)))
    next(progress)
    while killed < kills:
        process = multiprocessing.get_context("fork").Process(target=work, args=(folder / str(attempt),))
        process.start()
        process.join(generator.uniform(0.02, 0.9) * seconds)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            next(progress, None)
        elif process.exitcode:
            raise AssertionError(f"{what} ended by itself with exit code {process.exitcode}: {folder / str(attempt)} is kept")
        if check(folder / str(attempt)):
            finished += 1
            shutil.rmtree(folder / str(attempt))
            attempt += 1
    work(folder / str(attempt))  # what the last kill left must still lead to the end
    if not check(folder / str(attempt)):
        raise AssertionError(f"{folder / str(attempt)} did not get to the end")
    return killed, finished + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="of each command (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the results are compared bit by bit, and processes are forked
    generator, root = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="crash-"))
    (root / "data.txt").write_text("\n".join(standard_library_texts(held_out=True))[:CHARACTERS], encoding="utf-8")
    config: LlamaConfig = llama(hidden_size=48, num_layers=4, num_heads=2).config
    config.save_pretrained(root / "student")

    def cache(folder: Path) -> None:
        cache_teacher(CacheOptions(teacher=str(SHIPPED_TEACHER), data=root / "data.txt", output=folder, num_layers=2,
                                   max_length=64, shard_size=2**21), quiet())  # fmt: skip

    def train(folder: Path) -> None:
        distill(DistillOptions(teacher_cache=root / "cache", student=str(root / "student"), output=folder, max_steps=12,
                               batch_size=4, save_steps=2, config=FDDConfig(num_layers=2)), quiet())  # fmt: skip

    started = time.monotonic()
    cache(root / "cache")
    seconds = {"cache-teacher": time.monotonic() - started}
    started = time.monotonic()
    train(root / "run")
    seconds["distill --teacher-cache"] = time.monotonic() - started
    whole, student = files(root / "cache"), files(root / "run" / "student", "*.safetensors")
    jobs = {
        "cache-teacher": (cache, lambda folder: check_cache(folder, whole)),
        "distill --teacher-cache": (train, lambda folder: check_run(folder, student)),
    }
    for what, (work, check) in jobs.items():
        try:
            killed, finished = torment(what, work, check, root, seconds[what], arguments.kills, generator)
        except (AssertionError, UserError, ValueError, OSError) as error:
            print(f"{what}: {error}")
            return 1
        print(
            f"{what}: killed {killed} times, {finished} times gone on with to the end, each time equal to the uninterrupted one"
        )
        shutil.rmtree(root / "0", ignore_errors=True)
        for folder in root.glob("[0-9]*"):
            shutil.rmtree(folder)
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
