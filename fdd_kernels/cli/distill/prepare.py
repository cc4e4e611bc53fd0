"""Load the models and the text of a run, and check that they go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from torch import nn

from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.cli.distill.processes import Processes
from fdd_kernels.cli.distill.run_folder import require_more, steps_of
from fdd_kernels.cli.distill.trainer import ResumableTrainer, make_trainer
from fdd_kernels.cli.loading import (
    computing_dtype,
    embeddings,
    fit_vocabularies,
    load_student,
    load_vocabulary,
    open_cache,
    require_shared,
    window_length,
    with_lora,
)
from fdd_kernels.cli.reading import read_windows
from fdd_kernels.cli.teacher_options import load_teacher
from fdd_kernels.cli.vocabulary import Vocabulary
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.progress import Activity
from fdd_kernels.data import Windows
from fdd_kernels.integrations.checkpoints import PREFIX, last_checkpoint
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.teacher_cache import SummaryCache, WindowCache


@dataclass
class Run:
    """A trainer with its models and windows."""

    trainer: ResumableTrainer
    tokenizer: Any
    windows: Windows
    config: FDDConfig
    max_length: int


def prepare(options: DistillOptions, processes: Processes, console: Console) -> Run:
    """Load models and text and build the trainer.

    Raises:
        UserError: something cannot be loaded, or does not go together.
    """
    dtype = computing_dtype(options.dtype, processes.device)
    with Activity(console, "loading the teacher"):
        teacher, vocabulary = _load_teacher(options, processes)
    for note in vocabulary.notes:
        console.print(note, soft_wrap=True)
    transformers.set_seed(options.seed)
    with Activity(console, "loading the student"):
        student, initialised = load_student(options.student)
    if isinstance(teacher, WindowCache):
        rows, windows = teacher.vocabulary, teacher.windows
        max_length = window_length(teacher.max_length, student=student)
    else:
        rows = embeddings(teacher)
        max_length = window_length(options.max_length, student=student, teacher=teacher)
        windows = _read(options, vocabulary, max_length, console)
    config = fit_vocabularies(
        options.config, {"student": embeddings(student), "teacher": rows}, vocabulary
    )
    _require_labels_in_vocabulary(config, vocabulary)
    if options.lora_rank:
        student = with_lora(
            student.to(dtype), options.lora_rank, options.lora_alpha, options.lora_targets
        )
    if initialised:
        console.print(f"the student {options.student} has no weights: initialised at random")
    steps = steps_of(options, len(windows.train), processes.count)
    last = last_checkpoint(options.output)
    if last is not None:
        require_more(options.output, int(last.name.removeprefix(PREFIX)), steps)
    trainer = make_trainer(
        options, student, teacher, config, windows, steps, dtype, processes.device, console
    )
    return Run(trainer, vocabulary.tokenizer, windows, config, max_length)


def _load_teacher(
    options: DistillOptions, processes: Processes
) -> tuple[nn.Module | WindowCache, Vocabulary]:
    """The teacher, or the cache that replaces it, and the vocabulary it shares with the student."""
    compared = options.config.vocab_size
    if options.teacher_cache is None:
        vocabulary = load_vocabulary(options.teacher, options.student, compared)
        dtype = computing_dtype(options.teacher_dtype or options.dtype, processes.device)
        return load_teacher(options, dtype), vocabulary
    cache = open_cache(options.teacher_cache)
    vocabulary = load_vocabulary(str(cache.tokenizer_folder), options.student, compared)
    require_shared(cache, vocabulary)
    if isinstance(cache, SummaryCache) and options.config.train_head and not options.lora_rank:
        raise UserError(
            f"teacher_cache={options.teacher_cache} holds a summary for one head that does not "
            "change: train adapters beside it (lora_rank), freeze it (train_head=False), or use a "
            "cache of states"
        )
    return cache, vocabulary


def _require_labels_in_vocabulary(config: FDDConfig, vocabulary: Vocabulary) -> None:
    """Raise UserError if cross-entropy would meet labels that `vocab_size` leaves out."""
    tokens = len(vocabulary.tokenizer)
    if (
        config.vocab_size is not None
        and config.vocab_size < tokens
        and config.ever("ce_weight")
        and not vocabulary.unshared
    ):
        raise UserError(
            f"vocab_size={config.vocab_size} leaves out some of the tokenizer's {tokens} tokens, "
            f"but cross-entropy (ce_weight={config.ever('ce_weight'):g}) needs all of them: leave "
            f"vocab_size out, or give at least {tokens}"
        )


def _read(
    options: DistillOptions, vocabulary: Vocabulary, max_length: int, console: Console
) -> Windows:
    """Training windows, and validation windows from the same text or from `eval_data`."""

    def read(data: Path, eval_fraction: float) -> Windows:
        return read_windows(
            data,
            vocabulary.tokenizer,
            console,
            max_length=max_length,
            seed=options.seed,
            eval_fraction=eval_fraction,
            unshared=vocabulary.unshared,
        )

    windows = read(options.data, options.eval_fraction)
    if options.eval_data is None:
        return windows
    return replace(windows, held_out=read(options.eval_data, 0.0).train)
