"""`fdd-kernels distill`: one's own checkpoints and text, resumable at any moment."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from fdd_kernels.backends import resolve_backend
from fdd_kernels.cli.distill.model_card import model_card
from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.cli.distill.processes import Processes, require_data_parallelism, together
from fdd_kernels.cli.distill.run_folder import (
    ADAPTER_FOLDER,
    METRICS_FILE,
    STUDENT_FOLDER,
    require_more,
    settle_run,
    steps_of,
)
from fdd_kernels.cli.loading import (
    as_user_error,
    computing_dtype,
    embeddings,
    first_line,
    fit_vocabularies,
    load_student,
    load_vocabulary,
    open_cache,
    require_shared,
    window_length,
    with_lora,
)
from fdd_kernels.cli.teacher_options import load_teacher
from fdd_kernels.cli.vocabulary import Vocabulary
from fdd_kernels.common.atomic import atomic_directory, clear_unfinished, only_process, write_text
from fdd_kernels.common.errors import RunStopped, SaidElsewhere, UserError
from fdd_kernels.common.progress import Activity
from fdd_kernels.data import Windows, pad_windows
from fdd_kernels.data.progress import read_windows
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.integrations.checkpoints import PREFIX, CheckpointError, last_checkpoint
from fdd_kernels.integrations.finite import NonFiniteLossError, as_json, require_finite
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.teacher_cache import SummaryCache, WindowCache
from fdd_kernels.version import __version__

KEPT_CHECKPOINTS = 2
# Its name since transformers 5, and before.
_CHECKPOINTING = next(
    n
    for n in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(TrainingArguments, n)
)
_TERMS = ("loss", "output_kd", "trajectory", "derivative", "ce", "router")


def distill(options: DistillOptions, console: Console | None = None) -> dict[str, Any]:
    """Distil, or go on with a distillation that was interrupted or is to be longer, and write the
    student.

    Writes to `options.output`: run.json (what this run is), checkpoint-N (the last two), student/
    (a plain transformers directory, adapters merged), adapter/ (with LoRA), and at the very end
    metrics.json. Everything appears under its name only when it is on disk completely. Under
    torchrun every process calls this; the first one writes.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: models, data or options that do not go together, a directory of another run, a
            full disk.
        RunStopped: the loss is no number; the last good checkpoint is kept.
    """
    transformers.utils.logging.disable_progress_bar()
    require_data_parallelism()
    _require_reporters(options.report_to)
    connecting = TrainingArguments(
        output_dir=str(options.output), report_to="none", use_cpu=not _has_accelerator()
    )
    with together(connecting) as processes, contextlib.ExitStack() as held:
        console = (console or Console(stderr=True)) if processes.rank == 0 else Console(quiet=True)
        finished = processes.first(lambda: _settle(options, processes.count, held))
        if finished is not None:
            console.print(f"{options.output} holds this run, finished; nothing to do")
            return finished
        run = processes.all(lambda: _prepare(options, processes, console))
        last = last_checkpoint(options.output)
        if last is not None:
            console.print(f"going on from {last.name}")
        try:
            with _as_user_errors(processes):
                run.trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            run.trainer.report.stop()
        return _finish(options, run, processes, console)


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def _require_reporters(names: Sequence[str]) -> None:
    """Raises UserError for what transformers cannot report to here."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"report_to={name} is not one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if name not in get_available_reporting_integrations():
            raise UserError(
                f"report_to={name} needs {name}, which is not installed: pip install {name}"
            )


def _settle(
    options: DistillOptions, processes: int, held: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Take the directory for this run until `held` is closed; the metrics if the run is
    finished.
    """
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{options.output}: cannot be made a directory: {error.strerror}") from None
    held.enter_context(only_process(options.output))
    clear_unfinished(options.output)
    return settle_run(options, processes)


@dataclass
class _Run:
    """What is trained, on what."""

    trainer: _ResumableTrainer
    tokenizer: Any
    windows: Windows
    config: FDDConfig
    max_length: int


def _prepare(options: DistillOptions, processes: Processes, console: Console) -> _Run:
    """Load models and text, and compare them."""
    dtype = computing_dtype(options.dtype, processes.device)
    with Activity(console, "loading the teacher"):
        if options.teacher_cache is not None:
            teacher = open_cache(options.teacher_cache)
            vocabulary = load_vocabulary(
                str(teacher.tokenizer_folder), options.student, options.config.vocab_size
            )
            require_shared(teacher, vocabulary)
            if (
                isinstance(teacher, SummaryCache)
                and options.config.train_head
                and not options.lora_rank
            ):
                raise UserError(
                    f"teacher_cache={options.teacher_cache} holds statistics for one head that "
                    "does not change: train adapters "
                    "beside it (lora_rank), freeze it (train_head=False), or use a cache of states"
                )
        else:
            vocabulary = load_vocabulary(
                options.teacher, options.student, options.config.vocab_size
            )
            teacher = load_teacher(
                options, computing_dtype(options.teacher_dtype or options.dtype, processes.device)
            )
    for note in vocabulary.notes:
        console.print(note, soft_wrap=True)
    transformers.set_seed(options.seed)
    with Activity(console, "loading the student"):
        student, initialised = load_student(options.student)
    if isinstance(teacher, WindowCache):
        rows, windows = teacher.vocabulary, teacher.windows
        max_length = window_length(teacher.max_length, student=student)
    else:
        rows, max_length = (
            embeddings(teacher),
            window_length(options.max_length, student=student, teacher=teacher),
        )
        windows = _read(options, vocabulary, max_length, console)
    config = fit_vocabularies(
        options.config, {"student": embeddings(student), "teacher": rows}, vocabulary
    )
    tokens = len(vocabulary.tokenizer)
    if (
        config.vocab_size is not None
        and config.vocab_size < tokens
        and config.ce_weight
        and not vocabulary.unshared
    ):
        raise UserError(
            f"vocab_size={config.vocab_size} leaves out some of the tokenizer's {tokens} tokens, "
            "which cross-entropy "
            f"(ce_weight={config.ce_weight:g}) has to count: leave vocab_size out, or give at "
            f"least {tokens}"
        )
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
    trainer = _trainer(
        options, student, teacher, config, windows, steps, dtype, processes.device, console
    )
    return _Run(trainer, vocabulary.tokenizer, windows, config, max_length)


def _read(
    options: DistillOptions, vocabulary: Vocabulary, max_length: int, console: Console
) -> Windows:
    """Windows to train on, and those held out: a part of them, or another text."""

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
    return (
        windows
        if options.eval_data is None
        else replace(windows, held_out=read(options.eval_data, 0.0).train)
    )


@contextlib.contextmanager
def _as_user_errors(processes: Processes) -> Iterator[None]:
    """One line for what training raises that the user can put right: our own checks, memory, a disk
    that is full.
    """
    try:
        yield
    except CheckpointError as error:
        raise UserError(
            f"{error.problem}. Make room and run the same command to go on from there"
        ) from error
    except NonFiniteLossError as error:  # in every process
        stopped = RunStopped(f"{error}; start again with --no-resume or another --output")
        raise (stopped if processes.rank == 0 else SaidElsewhere(stopped.exit_status)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{first_line(error)}. Give a smaller batch_size with more gradient_accumulation, a "
            "smaller max_length, "
            "gradient_checkpointing, lora_rank or a quantised teacher; fdd-kernels plan says what "
            "takes the memory"
        ) from error
    except (ValueError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).is_relative_to(Path(__file__).parents[2]):
            raise UserError(f"these models cannot be distilled so: {first_line(error)}") from error
        raise


class _ResumableTrainer(FDDTrainer):
    """Its checkpoints hold no pickled objects but tensors."""

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing here reads: run.json says the same.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


class _Report(TrainerCallback):
    """Progress with the last loss terms; lines for evaluations and checkpoints, and without a
    terminal for losses.
    """

    def __init__(self, console: Console, names: list[str]) -> None:
        self.console, self.names, self.shown = console, names, contextlib.ExitStack()

    def _terms(self, logs: dict[str, float], prefix: str = "") -> list[str]:
        return [f"{name} {logs[prefix + name]:.4f}" for name in self.names if prefix + name in logs]

    def _print(self, state, text: str) -> None:
        self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", soft_wrap=True)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.activity = Activity(self.console, "distilling")
        self.activity.start_at(state.global_step, state.max_steps)
        self.shown.enter_context(self.activity)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.activity.update(state.global_step)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "eval_loss" in logs:
            self._print(state, f"held out: {'  '.join(self._terms(logs, 'eval_'))}")
        elif "loss" in logs:
            self.activity.update(terms=self._terms(logs))
            if not self.console.is_terminal:
                self._print(state, "  ".join(self._terms(logs)))

    def on_save(self, args, state, control, **kwargs) -> None:
        self.console.print(f"saved checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal in order, also after an exception."""
        self.shown.close()


def _shown_terms(config: FDDConfig) -> list[str]:
    """The loss and the terms that have a weight; the router's, which only some students have."""
    derivative = config.derivative is not None and config.beta
    weights = (1, config.output_kd_weight, config.alpha, derivative, config.ce_weight, 1)
    return [name for name, weight in zip(_TERMS, weights) if weight]


def _trainer(
    options: DistillOptions,
    student: nn.Module,
    teacher: nn.Module | WindowCache,
    config: FDDConfig,
    windows: Windows,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    console: Console,
) -> _ResumableTrainer:
    warmup = steps // 30 if options.warmup is None else options.warmup
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=math.ceil(steps * warmup) if warmup < 1 else round(warmup),
        weight_decay=options.weight_decay,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        **{_CHECKPOINTING: True} if options.gradient_checkpointing else {},
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        bf16=dtype == torch.bfloat16,
        seed=options.seed,
        eval_strategy="steps" if windows.held_out else "no",
        eval_steps=options.save_steps,
        eval_on_start=bool(windows.held_out) and last_checkpoint(options.output) is None,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        logging_steps=options.log_steps,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
    )
    report = _Report(console, _shown_terms(config))
    with as_user_error("these models cannot be distilled so"):
        resolve_backend(config.backend, arguments.device)
        trainer = _ResumableTrainer(
            model=student,
            args=arguments,
            teacher=teacher,
            fdd_config=config,
            train_dataset=windows.train,
            eval_dataset=windows.held_out or None,
            data_collator=pad_windows,
            callbacks=[report],
        )
    trainer.remove_callback(PrinterCallback)
    trainer.report = report
    return trainer


def _finish(
    options: DistillOptions, run: _Run, processes: Processes, console: Console
) -> dict[str, Any]:
    """Evaluate; in the first process write the student, then the metrics."""
    trainer, windows = run.trainer, run.windows
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    if windows.held_out and evaluations[-1]["step"] != trainer.state.global_step:
        with Activity(console, "evaluating"):
            evaluations.append(trainer.evaluate())

    def held_out(which: int) -> dict[str, float] | None:
        found = evaluations[which] if evaluations else {}
        return {name: found[f"eval_{name}"] for name in _TERMS if f"eval_{name}" in found} or None

    if evaluations:
        with _as_user_errors(processes):
            require_finite("the last evaluation", held_out(-1))
    metrics = {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "train_windows": len(windows.train),
        "train_tokens": windows.train_tokens,
        "held_out_windows": len(windows.held_out),
        "max_length": run.max_length,
        "student_layers": trainer.distiller.student_layers,
        "teacher_layers": trainer.distiller.teacher_layers,
        "vocab_size": run.config.vocab_size,
        "held_out_before": held_out(0),
        "held_out": held_out(-1),
        "history": trainer.state.log_history,
        "versions": {
            "fdd_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    with Activity(console, "writing the student"):
        processes.first(lambda: _write(options, run, metrics))
    if windows.held_out:
        table = Table("held out", "before", "after", title=f"after {metrics['steps']} steps")
        for name in [name for name in _shown_terms(run.config) if name in metrics["held_out"]]:
            table.add_row(
                name, *(f"{metrics[when][name]:.4f}" for when in ("held_out_before", "held_out"))
            )
        console.print(table)
    console.print(
        f"wrote {options.output / STUDENT_FOLDER} and {options.output / METRICS_FILE}",
        soft_wrap=True,
    )
    return metrics


def _write(options: DistillOptions, run: _Run, metrics: dict[str, Any]) -> None:
    """The adapter, the student with its card, and the metrics, each at once."""
    output, student = options.output, run.trainer.accelerator.unwrap_model(run.trainer.model)
    try:
        if options.lora_rank:
            with atomic_directory(output / ADAPTER_FOLDER) as folder:
                student.save_pretrained(folder)
            student = student.merge_and_unload()
        with atomic_directory(output / STUDENT_FOLDER) as folder:
            student.save_pretrained(folder)
            run.tokenizer.save_pretrained(folder)
            card = model_card(options, run.trainer.distiller, metrics, _shown_terms(run.config))
            card.save(folder / "README.md")
        write_text(
            output / METRICS_FILE, json.dumps(as_json(metrics), indent=1, allow_nan=False) + "\n"
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{output}: the student could not be written ({first_line(error)}); "
            f"{last_checkpoint(output).name} is "
            "complete. Make room and run the same command again"
        ) from error
