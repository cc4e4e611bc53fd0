"""`fdd-kernels demo`: distil a small teacher into smaller students on the source of Python's
standard library, and report.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from fdd_kernels.backends import resolve_backend
from fdd_kernels.common.processor import processor
from fdd_kernels.common.progress import Activity
from fdd_kernels.demo import report
from fdd_kernels.demo.corpus import standard_library_texts, token_stream
from fdd_kernels.demo.students import Budget, Evaluation, Run, choose, train_students
from fdd_kernels.demo.teacher import (
    CONTEXT,
    RECORD_FILE,
    SHIPPED_TEACHER,
    held_out_loss,
    held_out_windows,
    train_teacher,
)
from fdd_kernels.demo.workers import Send, run_side_by_side

FULL = Budget(steps=600, batch_size=1, evaluations=10)
QUICK = replace(FULL, steps=120, evaluations=4, evaluation_windows=24)
SEEDS, WARMUP = 4, 60
EVERY = 5.0  # seconds between two lines of progress
TEACHER_STEPS = {False: 6000, True: 300}
PROMPT_TOKENS, SAMPLE_TOKENS = 48, 64


def run_demo(
    output: Path,
    quick: bool = False,
    retrain_teacher: bool = False,
    seeds: int | None = None,
    teacher: Path | None = None,
    objectives: Sequence[str] | None = None,
) -> report.Result:
    """Train students, one per objective; write `metrics.json` and `report.html` to `output`.

    Args:
        output: a directory, created if missing.
        quick: fewer steps.
        retrain_teacher: train tokenizer and teacher again, in output/teacher (over an hour; minutes
            with `quick`).
        seeds: number of seeds (4 if not given); each has its own initial weights and batches. As
            many are trained side by side as torch has threads; the numbers do not depend on it.
        teacher: a directory written by `python -m fdd_kernels.demo.teacher`; None: the one in the
            repository.
        objectives: names of `students.OBJECTIVES` and `students.FURTHER`; None: the former.

    Raises:
        RuntimeError: a process that trains was killed.
        ValueError: `seeds` is below 1, an objective is unknown, or there is no teacher.
        OSError: `output` cannot be written.
    """
    seeds = SEEDS if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    names = tuple(choose(objectives))
    started, console, budget = time.monotonic(), Console(), QUICK if quick else FULL
    progress = Console(stderr=True)  # results go to stdout
    transformers_logging.disable_progress_bar()
    folder = output / "teacher" if retrain_teacher else _find_teacher(teacher)
    output.mkdir(parents=True, exist_ok=True)
    if retrain_teacher:
        train_teacher(folder, TEACHER_STEPS[quick])
    record = json.loads((folder / RECORD_FILE).read_text())
    console.print(
        f"Teacher: {record['parameters'] / 1e6:.1f} M parameters, trained on "
        f"{record['tokens_seen'] / 1e6:.1f} M tokens of {record['text']}",
        soft_wrap=True,
    )
    with Activity(progress, "reading the standard library", every=EVERY):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        stream, held_out = (
            token_stream(tokenizer, standard_library_texts(held_out=split))
            for split in (False, True)
        )
        windows = held_out_windows(held_out, budget.evaluation_windows)
        teacher_loss = held_out_loss(_load(folder), windows)
    console.print(
        f"Text: {len(stream):,} training and {len(held_out):,} validation tokens of Python "
        f"{platform.python_version()}'s standard library; the teacher's validation loss is "
        f"{teacher_loss:.3f} nats per token",
        soft_wrap=True,
    )
    backend = resolve_backend("auto", torch.device("cpu"))  # compiled here, not in each process
    tasks = [
        _Task(seed, names, budget, folder, stream.numpy(), windows.numpy()) for seed in range(seeds)
    ]
    processes = min(seeds, torch.get_num_threads())
    what = f"training {len(names)} students with each of {seeds} seeds"
    with Activity(progress, what, seeds * budget.steps, every=EVERY) as activity:
        board = _Board(activity, progress)
        answers = run_side_by_side(_train, tasks, processes, board.receive)
    result = report.Result(
        budget=budget,
        runs=[run for runs, _ in answers for run in runs],
        teacher=record,
        teacher_held_out_loss=teacher_loss,
        backend=backend,
        machine=(
            f"{processor()[0]}, {processes} process{'es' * (processes > 1)} of one thread, Python "
            f"{platform.python_version()}, torch {torch.__version__}"
        ),
        seconds=time.monotonic() - started,
        samples=answers[0][1],
    )
    report.print_table(result, console)
    report.write_report(result, output)
    console.print(
        f"{result.seconds:.0f} seconds. Report: {output / 'report.html'}   Numbers: "
        f"{output / 'metrics.json'}",
        soft_wrap=True,
    )
    return result


@dataclass(frozen=True)
class _Task:
    """The students of one seed, and all that their training needs; it is sent to a process."""

    seed: int
    objectives: tuple[str, ...]
    budget: Budget
    teacher: Path
    stream: np.ndarray
    windows: np.ndarray


def _train(task: _Task, send: Send) -> tuple[list[Run], dict[str, str]]:
    """Train the students of a task; return their records, and samples from the first seed."""
    transformers_logging.disable_progress_bar()
    teacher = _load(task.teacher)
    windows = torch.from_numpy(task.windows)
    runs, students = train_students(
        teacher,
        torch.from_numpy(task.stream),
        Evaluation(teacher, windows),
        task.budget,
        task.seed,
        _Sender(send),
        choose(task.objectives),
        warmup=WARMUP,
        window_curves=True,
    )
    if task.seed:
        return runs, {}
    tokenizer = AutoTokenizer.from_pretrained(task.teacher)
    prompt = windows[:1, :PROMPT_TOKENS]
    return runs, _continuations({"teacher": teacher, **students}, tokenizer, prompt)


@dataclass(frozen=True)
class _Sender:
    """Stands for the `Activity` in a process that trains: sends each update."""

    send: Send

    def update(self, done: int, *, terms: Sequence[str]) -> None:
        self.send((done, tuple(terms)))


class _Board:
    """Shows the updates of all seeds: their steps together, and a line at each evaluation."""

    def __init__(self, activity: Activity, console: Console) -> None:
        self.activity, self.console = activity, console
        self.done: dict[int, int] = {}
        self.terms: dict[int, tuple[str, ...]] = {}

    def receive(self, task: _Task, update: tuple[int, tuple[str, ...]]) -> None:
        done, terms = update
        self.done[task.seed] = done
        if terms != self.terms.get(task.seed, ()):
            self.terms[task.seed] = terms
            text = ", ".join(terms)
            self.console.print(f"seed {task.seed}, step {done}: KL {text}", soft_wrap=True)
        self.activity.update(sum(self.done.values()))


def _load(folder: Path) -> LlamaForCausalLM:
    """Load the teacher."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _find_teacher(given: Path | None) -> Path:
    """The directory of the given teacher, or of the one in the repository."""
    folder = given or SHIPPED_TEACHER
    if (folder / RECORD_FILE).is_file():
        return folder
    if given is not None:
        raise ValueError(
            f"{given} holds no {RECORD_FILE}: give a directory that python -m "
            "fdd_kernels.demo.teacher --output DIR has written"
        )
    raise ValueError(
        "the demo's teacher (9.8 MB) is in the repository and not in the installed package: run "
        "`make demo` in a clone of the repository, or give --teacher CLONE/fdd_kernels/demo/assets/"
        "teacher, or train one with --retrain-teacher (over an hour; minutes with --quick)"
    )


def _continuations(
    models: dict[str, LlamaForCausalLM], tokenizer, prompt: torch.Tensor
) -> dict[str, str]:
    """The prompt, and each model's greedy continuation of it."""
    samples = {"the beginning": tokenizer.decode(prompt[0])}
    length = min(SAMPLE_TOKENS, CONTEXT - prompt.shape[1])
    for name, model in models.items():
        model.eval()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            do_sample=False,
            repetition_penalty=1.2,
        )
        samples[name] = tokenizer.decode(tokens[0, prompt.shape[1] :])
    return samples
