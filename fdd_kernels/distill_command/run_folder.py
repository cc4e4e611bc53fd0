"""The directory of a distillation: whose it is, and what is complete in it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdd_kernels.atomic import remove_directory, write_text
from fdd_kernels.config import FDDConfig
from fdd_kernels.data.sources import open_source
from fdd_kernels.integrations.checkpoints import NOT_FINITE, PREFIX, checkpoints
from fdd_kernels.loading import open_cache
from fdd_kernels.user_error import UserError

RUN_FILE, METRICS_FILE, STUDENT_FOLDER, ADAPTER_FOLDER = "run.json", "metrics.json", "student", "adapter"
DTYPES = ("auto", "float32", "bfloat16")
# What may differ between a run and its continuation.
_FREE_OPTIONS = ("output", "resume", "save_steps", "log_steps")


@dataclass(frozen=True)
class DistillOptions:
    """What to distil and how.

    Args:
        student, teacher: directories or names of transformers causal LMs that share a tokenizer. A student directory with
            a config.json and no weights is initialised at random.
        data: files, or a data set by its name or folder; see `fdd_kernels.data.open_source`.
        teacher_cache: a directory written by `fdd-kernels cache-teacher`, in place of teacher and data: windows, their
            length and the part held out are its own.
        output: where checkpoints, student/, metrics.json and run.json go.
        config: layers and loss.
        epochs, max_steps: the length; max_steps, if given, wins.
        max_length: tokens in a window; None: 512, or less if a model has fewer positions.
        dtype: of the teacher and of products; the student's own weights stay float32 (under LoRA, its adapters).
            "auto" is bfloat16 on a GPU that has it.
        eval_fraction: the part of the windows that is held out; None: 0.05.
        lora_rank: 0 trains all weights.
        save_steps, log_steps: how many optimizer steps lie between checkpoints (and evaluations) and between log lines.
        resume: go on from the last checkpoint in `output`; False starts again and removes them.
    """

    student: str
    output: Path
    teacher: str | None = None
    data: Path | None = None
    teacher_cache: Path | None = None
    config: FDDConfig = field(default_factory=FDDConfig)
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 1e-4
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int | None = None
    dtype: str = "auto"
    seed: int = 0
    eval_fraction: float | None = None
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    save_steps: int = 100
    log_steps: int = 10
    resume: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("gradient_accumulation", 1), ("max_length", 2), ("max_steps", 1),
                            ("save_steps", 1), ("log_steps", 1), ("lora_rank", 0), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.teacher_cache is None:
            for name in ("teacher", "data"):
                if getattr(self, name) is None:
                    raise UserError(f"--{name} is missing: give --teacher and --data, or --teacher-cache")
            if self.eval_fraction is None:
                object.__setattr__(self, "eval_fraction", 0.05)
        else:
            for name in ("teacher", "data", "max_length", "eval_fraction"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name}={getattr(self, name)} was given beside teacher_cache, which holds windows of its own: leave "
                        "it out, or make another cache"
                    )
        if self.eval_fraction is not None and not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction={self.eval_fraction} must be at least 0 and below 1")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")


def settle_run(options: DistillOptions) -> dict[str, Any] | None:
    """Make `output` this run's directory; the metrics if it is finished.

    Raises:
        UserError: it belongs to another run.
    """
    output, run = options.output, run_record(options)
    record, saved = output / RUN_FILE, checkpoints(output)
    if not options.resume:
        for name in (METRICS_FILE, RUN_FILE):
            (output / name).unlink(missing_ok=True)
        for folder in (*saved, *output.glob(f"{PREFIX}*{NOT_FINITE}"), output / STUDENT_FOLDER, output / ADAPTER_FOLDER):
            if folder.is_dir():
                remove_directory(folder)
    elif record.exists():
        try:
            before = json.loads(record.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{record}: not readable ({error}); start again with --no-resume or another --output") from None
        different = [f"{key} was {before.get(key)!r}, is {run.get(key)!r}" for key in {**before, **run}
                     if before.get(key) != run.get(key)]  # fmt: skip
        if different and (saved or (output / METRICS_FILE).exists()):
            raise UserError(
                f"{output} holds another run ({'; '.join(different)}): give the same options to go on with it, "
                "another --output, or --no-resume to remove them and start again"
            )
        if not different and (output / METRICS_FILE).exists():
            return json.loads((output / METRICS_FILE).read_text("utf-8"))
    elif saved:
        raise UserError(f"{output} holds {saved[-1].name} but no {RUN_FILE}: it is not of this command; use another --output")
    try:
        write_text(record, json.dumps(run, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{record}: cannot be written: {error.strerror}") from None
    return None


def run_record(options: DistillOptions) -> dict[str, Any]:
    """What a run is: its options, the content of its data, and names and times of the models' files, as JSON."""
    run = dataclasses.asdict(options)
    for name in _FREE_OPTIONS:
        del run[name]
    run |= {f"config.{name}": value for name, value in run.pop("config").items()}
    if options.teacher_cache is not None:  # its index holds the checksums of everything in it
        run["teacher_cache"] = open_cache(options.teacher_cache).digest
    if options.data is not None:
        run["data"] = open_source(options.data).digests()
    for role in ("teacher", "student"):
        folder = run[role] and Path(run[role])
        if folder and folder.is_dir():
            files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
            run[role] = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return json.loads(json.dumps(run))
