"""`fdd-kernels demo`: distil a small teacher into smaller students on the source of Python's
standard library, and report.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from fdd_kernels.backends import resolve_backend
from fdd_kernels.common.processor import processor
from fdd_kernels.common.progress import Activity
from fdd_kernels.demo import report
from fdd_kernels.demo.corpus import standard_library_texts, token_stream
from fdd_kernels.demo.students import Budget, Evaluation, choose, train_students
from fdd_kernels.demo.teacher import (
    CONTEXT,
    RECORD_FILE,
    SHIPPED_TEACHER,
    held_out_windows,
    train_teacher,
)

FULL, QUICK = Budget(steps=250), Budget(steps=60, evaluations=4, evaluation_windows=24)
DEFAULT_SEEDS = {False: 2, True: 1}
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
        quick: fewer steps and one seed.
        retrain_teacher: train tokenizer and teacher again, in output/teacher (over an hour; minutes
            with `quick`).
        seeds: number of seeds; each has its own initial weights and batches.
        teacher: a directory written by `python -m fdd_kernels.demo.teacher`; None: the one in the
            repository.
        objectives: names of `students.OBJECTIVES` and `students.FURTHER`; None: the former.

    Raises:
        ValueError: `seeds` is below 1, an objective is unknown, or there is no teacher.
        OSError: `output` cannot be written.
    """
    seeds = DEFAULT_SEEDS[quick] if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    chosen = choose(objectives)
    started, console, budget = time.monotonic(), Console(), QUICK if quick else FULL
    progress = Console(stderr=True)  # results go to stdout
    transformers_logging.disable_progress_bar()
    folder = output / "teacher" if retrain_teacher else _find_teacher(teacher)
    output.mkdir(parents=True, exist_ok=True)
    if retrain_teacher:
        train_teacher(folder, TEACHER_STEPS[quick])
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = json.loads((folder / RECORD_FILE).read_text())
    console.print(
        f"Teacher: {record['parameters'] / 1e6:.1f} M parameters, trained on "
        f"{record['tokens_seen'] / 1e6:.1f} M tokens of {record['text']}"
    )
    with Activity(progress, "reading the standard library"):
        stream = token_stream(tokenizer, standard_library_texts(held_out=False))
        held_out = token_stream(tokenizer, standard_library_texts(held_out=True))
        evaluation = Evaluation(model, held_out_windows(held_out, budget.evaluation_windows))
    console.print(
        f"Text: {len(stream):,} training and {len(held_out):,} validation tokens of Python "
        f"{platform.python_version()}'s standard library; the teacher's validation loss is "
        f"{evaluation.teacher_loss:.3f} nats per token"
    )
    runs, samples = [], {}
    for seed in range(seeds):
        with Activity(
            progress, f"training {len(chosen)} students, seed {seed}", budget.steps
        ) as activity:
            new_runs, students = train_students(
                model, stream, evaluation, budget, seed, activity, chosen
            )
        runs += new_runs
        if seed == 0:
            prompt = held_out_windows(held_out, 1)[:, :PROMPT_TOKENS]
            with Activity(progress, "generating samples"):
                samples = _continuations({"teacher": model, **students}, tokenizer, prompt)
    result = report.Result(
        budget=budget,
        runs=runs,
        teacher=record,
        teacher_held_out_loss=evaluation.teacher_loss,
        backend=resolve_backend("auto", torch.device("cpu")),
        machine=(
            f"{processor()[0]}, {torch.get_num_threads()} threads, Python "
            f"{platform.python_version()}, torch {torch.__version__}"
        ),
        seconds=time.monotonic() - started,
        samples=samples,
    )
    report.print_table(result, console)
    report.write_report(result, output)
    console.print(
        f"{result.seconds:.0f} seconds. Report: {output / 'report.html'}   Numbers: "
        f"{output / 'metrics.json'}"
    )
    return result


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
