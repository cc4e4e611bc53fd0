"""`fdd-kernels demo`: distil the shipped teacher into small students on the standard library's
source, and report.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from fdd_kernels.backends import resolve_backend
from fdd_kernels.common.progress import Activity
from fdd_kernels.demo import report
from fdd_kernels.demo.corpus import standard_library_texts, token_stream
from fdd_kernels.demo.students import OBJECTIVES, Budget, Evaluation, train_students
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
    output: Path, quick: bool = False, retrain_teacher: bool = False, seeds: int | None = None
) -> report.Result:
    """Train students under five objectives and write `metrics.json` and `report.html` to `output`.

    Args:
        output: a directory, created if missing.
        quick: fewer steps and one seed.
        retrain_teacher: train tokenizer and teacher again, to output/teacher (over an hour; minutes
            with `quick`), instead of using the shipped one.
        seeds: how many seeds; each has its own initial weights and batches.

    Raises:
        ValueError: `seeds` below 1.
        OSError: `output` cannot be written.
    """
    seeds = DEFAULT_SEEDS[quick] if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds={seeds} must be at least 1")
    started, console, budget = time.monotonic(), Console(), QUICK if quick else FULL
    told = Console(stderr=True)  # what it is doing, beside its results
    transformers_logging.disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    folder = SHIPPED_TEACHER
    if retrain_teacher:
        folder = output / "teacher"
        train_teacher(folder, TEACHER_STEPS[quick])
    teacher = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    record = json.loads((folder / RECORD_FILE).read_text())
    console.print(
        f"Teacher: {record['parameters'] / 1e6:.1f} M parameters, trained on "
        f"{record['tokens_seen'] / 1e6:.1f} M tokens of "
        f"{record['text']}"
    )
    with Activity(told, "reading the standard library"):
        stream = token_stream(tokenizer, standard_library_texts(held_out=False))
        held_out = token_stream(tokenizer, standard_library_texts(held_out=True))
        evaluation = Evaluation(teacher, held_out_windows(held_out, budget.evaluation_windows))
    console.print(
        f"Text: {len(stream):,} training and {len(held_out):,} held-out tokens of Python "
        f"{platform.python_version()}'s "
        f"standard library; the teacher's held-out loss is {evaluation.teacher_loss:.3f} nats per "
        "token"
    )
    runs, samples = [], {}
    for seed in range(seeds):
        with Activity(
            told, f"training {len(OBJECTIVES)} students, seed {seed}", budget.steps
        ) as activity:
            new_runs, students = train_students(teacher, stream, evaluation, budget, seed, activity)
        runs += new_runs
        if seed == 0:
            prompt = held_out_windows(held_out, 1)[:, :PROMPT_TOKENS]
            with Activity(told, "letting the models write"):
                samples = _continuations({"teacher": teacher, **students}, tokenizer, prompt)
    result = report.Result(
        budget=budget,
        runs=runs,
        teacher=record,
        teacher_held_out_loss=evaluation.teacher_loss,
        backend=resolve_backend("auto", torch.device("cpu")),
        machine=(
            f"{_processor()}, {torch.get_num_threads()} threads, Python "
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


def _continuations(
    models: dict[str, LlamaForCausalLM], tokenizer, prompt: torch.Tensor
) -> dict[str, str]:
    """The prompt and each model's greedy continuation of it."""
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


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
