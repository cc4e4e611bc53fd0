"""Kills what writes checkpoints or caches with SIGKILL at random moments and checks what is left
behind each time.

    python tests/robustness/crash_many.py --kills 60 [--only train command cache from_cache]

train is `FDDTrainer`, command `fdd-kernels distill`, cache `fdd-kernels cache-teacher`, from_cache
`distill --teacher-cache`. After every kill each checkpoint that is there must load and hold, bit
for bit, the weights that a run without kills had at that step, and a cache must be refused or be
the whole one, byte for byte; and a run that was killed a few times must end with the weights and
logs, or the cache, of the one that was not.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from fdd_kernels import FDDConfig
from fdd_kernels.cli.cache_teacher import CacheOptions, cache_teacher
from fdd_kernels.cli.distill import run as distill_run
from fdd_kernels.cli.distill import trainer as distill_trainer
from fdd_kernels.cli.distill.run_folder import DistillOptions
from fdd_kernels.data import pad_windows
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.integrations.checkpoints import checkpoints
from fdd_kernels.teacher_cache import TeacherCache
from tests.support.cache_inputs import digests
from tests.support.hf_models import tiny_model, tiny_tokenizer
from tests.support.training import lora_student, require_same, weights

STEPS = 12


def windows(count: int = 24) -> list[dict[str, list[int]]]:
    draw = random.Random(0)
    rows = [[draw.randrange(1, 97) for _ in range(draw.randrange(5, 14))] for _ in range(count)]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]


def train(folder: Path, keep_all: bool = False) -> None:
    """LoRA with dropout, accumulation over micro-batches of unequal length, evaluation, the best
    student at the end.
    """
    data = windows()
    trainer = FDDTrainer(
        model=lora_student(),
        teacher=tiny_model("gpt2", depth=3, seed=2),
        fdd_config=FDDConfig.paper(num_layers=2),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-2,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=None if keep_all else 2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_trajectory",
            greater_is_better=False,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=data[:20],
        eval_dataset=data[20:],
        data_collator=pad_windows,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) is not None)
    trainer.save_model(str(folder / "student"))
    best = {"best": trainer.state.best_global_step, "metric": trainer.state.best_metric}
    (folder / "result.json").write_text(json.dumps([best, *trainer.state.log_history[:-1]]))


def distill(folder: Path, keep_all: bool, **source) -> None:
    """The same through the command."""
    distill_trainer.KEPT_CHECKPOINTS = None if keep_all else 2
    metrics = distill_run.distill(
        DistillOptions(
            student=str(folder.parent / "models/student"),
            output=folder,
            config=FDDConfig.paper(num_layers=2),
            max_steps=STEPS,
            learning_rate=3e-3,
            batch_size=2,
            gradient_accumulation=2,
            save_steps=2,
            log_steps=1,
            dtype="float32",
            lora_rank=2,
            **source,
        )
    )
    (folder / "result.json").write_text(json.dumps(metrics["history"][:-1]))


def texts(folder: Path) -> dict:
    """Return the options of the data, with and without a cache."""
    models = folder.parent / "models"
    return {
        "teacher": str(models / "teacher"),
        "data": models / "data.txt",
        "max_length": 24,
        "eval_fraction": 0.2,
    }


def command(folder: Path, keep_all: bool = False) -> None:
    distill(folder, keep_all, **texts(folder))


def cache(folder: Path, keep_all: bool = False) -> None:
    """A cache of many shards."""
    options = CacheOptions(
        output=folder, num_layers=2, batch_size=2, shard_size=10_000, **texts(folder)
    )
    cache_teacher(options, Console(file=io.StringIO()))


def from_cache(folder: Path, keep_all: bool = False) -> None:
    distill(folder, keep_all, teacher_cache=folder.parent / "cache")


def result(folder: Path) -> list[dict]:
    timed = ("runtime", "per_second")
    logs = json.loads((folder / "result.json").read_text())
    return [
        {key: value for key, value in log.items() if not any(word in key for word in timed)}
        for log in logs
    ]


def in_child(run: Callable[[Path], None], folder: Path) -> int:
    """Start `run(folder)` in a process of its own, its output in folder.log; the process id."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def finish(pid: int, folder: Path) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (
        f"{folder} ended with {status}:\n{folder.with_suffix('.log').read_text()[-3000:]}"
    )


def killed(pid: int, seconds: float) -> bool:
    """Kill the process after so long; False if it had come to its end."""
    time.sleep(seconds)
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        assert status == 0, f"a run ended with {os.waitstatus_to_exitcode(status)}"
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def checkpoints_left(folder: Path, whole: Path) -> list[str]:
    """Check that every checkpoint loads without pickle and holds the whole run's weights; return
    further events to count.
    """
    saved = checkpoints(folder)
    for checkpoint in saved:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, weights_only=True)
        assert (checkpoint / "rng_state.pth").stat().st_size > 5000
        require_same(weights(checkpoint), weights(whole / checkpoint.name), str(checkpoint))
    amid = ["while a folder was being written or removed"] * (folder / ".unfinished").exists()
    return amid + ["with a checkpoint to go on from"] * bool(saved)


def trained(folder: Path, whole: Path) -> None:
    """A finished run has the student and the logs of the whole one."""
    require_same(weights(folder / "student"), weights(whole / "student"), f"{folder}/student")
    for logged, expected in itertools.zip_longest(result(folder), result(whole)):
        assert logged == expected, f"{folder}: logged {logged}, not {expected}"
    assert "while a folder was being written or removed" not in checkpoints_left(folder, whole)


def cache_left(folder: Path, whole: Path) -> list[str]:
    """Check that the cache opens only if it is complete."""
    try:
        TeacherCache(folder)
    except (FileNotFoundError, ValueError) as error:
        if not any(
            reason in str(error) for reason in ("is not complete", "holds no teacher cache")
        ):
            raise
        return ["with a shard to go on from"] * any(folder.glob("shard-*.safetensors"))
    cached(folder, whole)
    return []


def cached(folder: Path, whole: Path) -> None:
    TeacherCache(folder).verify()
    assert digests(folder) == digests(whole), f"{folder}: another cache than that of the whole run"


@dataclass(frozen=True)
class Job:
    """A run to kill, and checks of its folder against a run without kills: after each kill, and
    at the end.
    """

    run: Callable[..., None]
    left: Callable[[Path, Path], list[str]]
    done: Callable[[Path, Path], None]


JOBS = {
    run.__name__: Job(run, *checks)
    for run, checks in (
        (train, (checkpoints_left, trained)),
        (command, (checkpoints_left, trained)),
        (cache, (cache_left, cached)),
        (from_cache, (checkpoints_left, trained)),
    )
}


def crash(name: str, base: Path, kills: int, draw: random.Random) -> str:
    """`kills` kills of a job, over several runs."""
    job, whole = JOBS[name], base / f"{name}-whole"
    whole.mkdir()
    started = time.monotonic()
    finish(in_child(lambda folder: job.run(folder, keep_all=True), whole), whole)
    seconds = time.monotonic() - started
    assert len(checkpoints(whole)) == (0 if job.left is cache_left else STEPS // 2)
    done = runs = 0
    notes: Counter[str] = Counter()
    while done < kills:
        folder = base / f"{name}-{runs}"
        folder.mkdir()
        for _ in range(draw.randrange(1, 6)):
            if done == kills or not killed(in_child(job.run, folder), draw.uniform(0, seconds)):
                break
            done += 1
            notes.update(job.left(folder, whole))
        finish(in_child(job.run, folder), folder)
        job.done(folder, whole)
        shutil.rmtree(folder)
        runs += 1
    counted = "".join(f", {count} {note}" for note, count in sorted(notes.items()))
    return (
        f"{name}: {done} kills in {runs} runs{counted}; all that was left and all results equal "
        "bit for bit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="of each (%(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the moments; where they fall depends on the machine too",
    )
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="some of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        tokenizer = tiny_tokenizer()
        for role, family, seed in (("teacher", "gpt2", 2), ("student", "llama", 1)):
            tiny_model(family, depth=3, vocab_size=len(tokenizer), seed=seed).save_pretrained(
                base / "models" / role
            )
            tokenizer.save_pretrained(base / "models" / role)
        (base / "models/data.txt").write_text("one and two is three, the word and a " * 40)
        cache(base / "cache")
        for name in options.only:
            print(crash(name, base, options.kills, random.Random(options.seed)), flush=True)


if __name__ == "__main__":
    main()
