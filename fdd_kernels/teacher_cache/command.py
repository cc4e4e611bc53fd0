"""`fdd-kernels cache-teacher`: a teacher over one's own text, once, onto the disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from torch import nn

from fdd_kernels.config import LAYER_GRIDS, FDDConfig, LossOptions
from fdd_kernels.data.progress import read_windows
from fdd_kernels.data.sources import open_source
from fdd_kernels.layers import layer_grid
from fdd_kernels.loading import (
    as_user_error,
    computing_dtype,
    embeddings,
    first_line,
    fit_vocabularies,
    load_model,
    load_student,
    load_tokenizer,
    open_cache,
    window_length,
)  # fmt: skip
from fdd_kernels.planner.loss import show
from fdd_kernels.teacher_cache.cache import WindowCache
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.statistics import write_statistics_cache
from fdd_kernels.teacher_cache.writer import SHARD_SIZE, write_teacher_cache
from fdd_kernels.user_error import UserError

KINDS = ("states", "statistics")
TEACHER_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class CacheOptions:
    """What to cache and how.

    Args:
        teacher: a directory or name of a transformers causal LM with its tokenizer.
        kind: "states" (any student, any objective), or "statistics": for the frozen head of `student`, by KL.
        student, temperature, output_temperature, output_in_dynamics, vocab_size: for statistics, which hold for these alone.
        data: files, or a data set by its name or folder; see `fdd_kernels.data.open_source`.
        output: the cache's directory.
        num_layers, layer_grid, teacher_layers: which layers, as for `FDDConfig`; explicit ones win.
        apply_final_norm: read them through the final norm.
        dtype: how states are stored: float32, bfloat16 (the default), int8 or float8 (both with a scale per position).
            Statistics are float32.
        teacher_dtype: what the teacher computes in; "auto" is bfloat16 on a GPU that has it.
        max_length: tokens in a window; None: 512, or less if the teacher has fewer positions.
        batch_size: windows that the teacher reads at a time.
        eval_fraction, seed: the part of the windows that is held out, and which.
        shard_size: bytes of a shard.
        resume: go on with an interrupted cache in `output`; False removes it and starts again.
        verify: read everything again at the end and compare checksums.
    """

    teacher: str
    data: Path
    output: Path
    kind: str = "states"
    student: str | None = None
    temperature: float = 1.0
    output_temperature: float = 1.0
    output_in_dynamics: bool = False
    vocab_size: int | None = None
    num_layers: int = 4
    layer_grid: str = "floor"
    teacher_layers: tuple[int, ...] | None = None
    apply_final_norm: bool = True
    dtype: str | None = None
    teacher_dtype: str = "auto"
    max_length: int | None = None
    batch_size: int = 8
    eval_fraction: float = 0.05
    seed: int = 0
    shard_size: int = SHARD_SIZE
    resume: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_layers", 0), ("max_length", 2), ("batch_size", 1), ("seed", 0), ("shard_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction={self.eval_fraction} must be at least 0 and below 1")
        named = {"kind": KINDS, "dtype": (None, *CODECS), "teacher_dtype": TEACHER_DTYPES, "layer_grid": LAYER_GRIDS}
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(c for c in choices if c)}")
        if self.kind == "statistics":
            if self.student is None:
                raise UserError("kind='statistics' needs student: statistics are made for the head of one student")
            if self.dtype not in (None, "float32"):
                raise UserError(
                    f"dtype={self.dtype!r}: statistics are stored in float32, since small differences are taken of them"
                )
            return
        defaults = {f.name: f.default for f in fields(self)}
        for name in ("student", "temperature", "output_temperature", "output_in_dynamics", "vocab_size"):
            if getattr(self, name) != defaults[name]:
                raise UserError(f"{name}={getattr(self, name)!r} is for kind='statistics'; states serve any student and loss")


def cache_teacher(options: CacheOptions, console: Console | None = None) -> WindowCache:
    """Cache the states or the statistics of a teacher, or go on with a cache that was interrupted.

    Raises:
        UserError: teacher, data or options that do not go together, a directory with something else, a full disk.
    """
    console = console or Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    output = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made a directory: {error.strerror}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(options.teacher, options.student)
    teacher = load_model(options.teacher, "teacher").to(computing_dtype(options.teacher_dtype, device)).requires_grad_(False)
    student = None
    if options.student is not None:
        student = load_student(options.student)[0].to(teacher.dtype).requires_grad_(False)
    max_length = window_length(options.max_length, teacher=teacher, **{} if student is None else {"student": student})
    source = open_source(options.data)
    windows = read_windows(source, tokenizer, console, max_length=max_length, eval_fraction=options.eval_fraction,
                           seed=options.seed)  # fmt: skip
    data = source.digests()
    progress = Progress(TextColumn("caching"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"),
                        TimeRemainingColumn(), console=console, disable=not console.is_terminal)  # fmt: skip
    with progress:
        task = progress.add_task("", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        try:
            layers = options.teacher_layers
            if layers is None:
                layers = layer_grid(teacher.config.get_text_config().num_hidden_layers, options.num_layers, options.layer_grid)
            common = {
                "layers": layers, "apply_final_norm": options.apply_final_norm, "batch_size": options.batch_size,
                "shard_size": options.shard_size, "tokenizer": tokenizer, "data": data, "resume": options.resume,
                "advance": advance,
            }  # fmt: skip
            teacher.to(device)
            if student is None:
                cache = write_teacher_cache(output, teacher, windows, codec=options.dtype or "bfloat16", **common)
            else:
                loss = _loss_options(options, teacher, student, tokenizer)
                cache = write_statistics_cache(output, teacher, student.to(device), windows, options=loss, **common)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{output} could not be written ({first_line(error)}); whole shards are kept. Make room and run the same "
                "command to go on from there"
            ) from error
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"cannot cache this teacher: {first_line(error)}") from error
    if options.verify:
        verify_cache(output, console)
    _report(cache, console)
    return cache


def _loss_options(options: CacheOptions, teacher: nn.Module, student: nn.Module, tokenizer) -> LossOptions:
    """What of the loss the statistics depend on."""
    rows = {"student": embeddings(student), "teacher": embeddings(teacher)}
    config = fit_vocabularies(FDDConfig(vocab_size=options.vocab_size), rows, tokenizer)
    return LossOptions(
        temperature=options.temperature, output_temperature=options.output_temperature,
        output_in_dynamics=options.output_in_dynamics, vocab_size=config.vocab_size,
    )  # fmt: skip


def verify_cache(output: Path, console: Console | None = None) -> None:
    """Read a cache and compare every checksum.

    Raises:
        UserError: there is none, it is not complete, or damaged.
    """
    cache = open_cache(output)
    with as_user_error("the cache cannot be used"):
        cache.verify()
    (console or Console(stderr=True)).print(f"{output}: every checksum is right", soft_wrap=True)


def _report(cache: WindowCache, console: Console) -> None:
    rows = cache.reader.contents["windows"]["rows"]
    table = Table(cache.kind, "stored as", "error, mean", "error, worst position", title=str(cache.path))
    for name, spec in cache.reader.arrays.items():
        error = cache.relative_error[name]
        table.add_row(name, spec.codec, f"{error['mean']:.2g}", f"{error['worst_row']:.2g}")
    console.print(table)
    per_position = sum(spec.bytes_per_row for spec in cache.reader.arrays.values())
    logits = 2 * cache.vocabulary * (len(cache.layers) + 1)
    console.print(
        f"{len(cache)} windows, {rows} positions that count, {show(cache.reader.bytes)}; {per_position} bytes a position, "
        f"where bfloat16 logits would take {logits}. Train with fdd-kernels distill --teacher-cache {cache.path}",
        soft_wrap=True,
    )
