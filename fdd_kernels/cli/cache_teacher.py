"""`fdd-kernels cache-teacher`: run a teacher over your text once and store its states on disk."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import nn

from fdd_kernels.cli.cache_options import CacheOptions
from fdd_kernels.cli.loading import (
    as_user_error,
    computing_dtype,
    embeddings,
    first_line,
    fit_vocabularies,
    load_student,
    load_vocabulary,
    make_directory,
    open_cache,
    window_length,
)
from fdd_kernels.cli.reading import read_windows
from fdd_kernels.cli.teacher_options import load_teacher
from fdd_kernels.cli.vocabulary import Vocabulary
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.progress import Activity
from fdd_kernels.common.sizes import show
from fdd_kernels.data.sources import open_source
from fdd_kernels.hf.layers import layer_grid
from fdd_kernels.hf.teachers import place_teacher
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions
from fdd_kernels.teacher_cache import (
    SummaryCache,
    WindowCache,
    write_summary_cache,
    write_teacher_cache,
)


def cache_teacher(options: CacheOptions, console: Console | None = None) -> WindowCache:
    """Cache the states or the summary of a teacher; resume an interrupted cache.

    Raises:
        UserError: teacher, data or options do not go together, the directory holds something else,
            or the disk is full.
    """
    console = console or Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    output = options.output
    make_directory(output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = load_vocabulary(options.teacher, options.student, options.vocab_size)
    for note in vocabulary.notes:
        console.print(note, soft_wrap=True)
    with Activity(console, "loading the teacher"):
        teacher = load_teacher(options, computing_dtype(options.teacher_dtype, device))
    student = None
    if options.student is not None:
        with Activity(console, "loading the student"):
            student = load_student(options.student)[0].to(teacher.dtype).requires_grad_(False)
    max_length = window_length(
        options.max_length, teacher=teacher, **{} if student is None else {"student": student}
    )
    source = open_source(options.data)
    windows = read_windows(
        source,
        vocabulary.tokenizer,
        console,
        max_length=max_length,
        seed=options.seed,
        eval_fraction=options.eval_fraction,
        unshared=vocabulary.unshared,
    )
    data = source.digests()
    with Activity(console, "caching windows") as activity:

        def advance(done: int, total: int) -> None:
            if activity.total is None:
                activity.start_at(done, total)
            activity.update(done, total=total)

        try:
            layers = options.teacher_layers
            if layers is None:
                layers = layer_grid(
                    teacher.config.get_text_config().num_hidden_layers,
                    options.num_layers,
                    options.layer_grid,
                )
            common = {
                "layers": layers,
                "apply_final_norm": options.apply_final_norm,
                "batch_size": options.batch_size,
                "shard_size": options.shard_size,
                "tokenizer": vocabulary.tokenizer,
                "data": data,
                "resume": options.resume,
                "advance": advance,
            }
            place_teacher(teacher, device)
            if student is None:
                cache = write_teacher_cache(
                    output, teacher, windows, codec=options.dtype or "bfloat16", **common
                )
            else:
                loss = _loss_options(options, teacher, student, vocabulary)
                cache = write_summary_cache(
                    output, teacher, student.to(device), windows, options=loss, **common
                )
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{output} could not be written ({first_line(error)}); whole shards are kept. Make "
                "room and run the same command again to resume"
            ) from error
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"cannot cache this teacher: {first_line(error)}") from error
    if options.verify:
        verify_cache(output, console)
    _report(cache, console)
    return cache


def _loss_options(
    options: CacheOptions, teacher: nn.Module, student: nn.Module, vocabulary: Vocabulary
) -> LossOptions:
    """The options of the loss that the summary depends on."""
    rows = {"student": embeddings(student), "teacher": embeddings(teacher)}
    config = fit_vocabularies(FDDConfig(vocab_size=options.vocab_size), rows, vocabulary)
    return LossOptions(
        temperature=options.temperature,
        derivative_temperature=options.derivative_temperature,
        output_temperature=options.output_temperature,
        output_in_dynamics=options.output_in_dynamics,
        vocab_size=config.vocab_size,
    )


def verify_cache(output: Path, console: Console | None = None) -> None:
    """Compare every checksum of a cache.

    Raises:
        UserError: there is none, it is not complete, or it is damaged.
    """
    cache = open_cache(output)
    with as_user_error("the cache cannot be used"):
        cache.verify()
    (console or Console(stderr=True)).print(f"{output}: every checksum is right", soft_wrap=True)


def _report(cache: WindowCache, console: Console) -> None:
    rows = cache.files.contents["windows"]["rows"]
    table = Table(
        cache.kind, "stored as", "error, mean", "error, worst position", title=str(cache.path)
    )
    for name, spec in cache.files.arrays.items():
        error = cache.relative_error[name]
        table.add_row(name, spec.codec, f"{error['mean']:.2g}", f"{error['worst_row']:.2g}")
    console.print(table)
    per_position = sum(spec.bytes_per_row for spec in cache.files.arrays.values())
    logits = 2 * cache.vocabulary * (len(cache.layers) + 1)
    derivative = " --derivative cosine" * isinstance(cache, SummaryCache)
    console.print(
        f"{len(cache)} windows, {rows} valid tokens, {show(cache.files.bytes)}; {per_position} "
        f"bytes a token, where bfloat16 logits would take {logits}. Train with fdd-kernels "
        f"distill --teacher-cache {cache.path}{derivative}",
        soft_wrap=True,
    )
