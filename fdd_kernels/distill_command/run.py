"""`fdd-kernels distill`: one's own checkpoints and text, resumable at any moment."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from fdd_kernels.atomic import atomic_directory, clear_unfinished, only_process, write_text
from fdd_kernels.backends import resolve_backend
from fdd_kernels.config import FDDConfig
from fdd_kernels.data import Windows, pad_windows
from fdd_kernels.data.progress import read_windows
from fdd_kernels.distill_command.model_card import model_card
from fdd_kernels.distill_command.run_folder import ADAPTER_FOLDER, METRICS_FILE, STUDENT_FOLDER, DistillOptions, settle_run
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.integrations.checkpoints import CheckpointError, last_checkpoint
from fdd_kernels.integrations.finite import NonFiniteLossError, as_json
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
    with_lora,
)  # fmt: skip
from fdd_kernels.teacher_cache import WindowCache
from fdd_kernels.user_error import RunStopped, UserError
from fdd_kernels.version import __version__

KEPT_CHECKPOINTS = 2
# Its name since transformers 5, and before.
_CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
_TERMS = ("loss", "output_kd", "trajectory", "derivative", "ce", "router")


def distill(options: DistillOptions, console: Console | None = None) -> dict[str, Any]:
    """Distil, or go on with a distillation that was interrupted, and write the student.

    Writes to `options.output`: run.json (what this run is), checkpoint-N (the last two), student/ (a plain transformers
    directory, adapters merged), adapter/ (with LoRA), and at the very end metrics.json. Everything appears under its name
    only when it is on disk completely.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: models, data or options that do not go together, a directory of another run, a full disk.
        RunStopped: the loss is no number; the last good checkpoint is kept.
    """
    console = console or Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    output = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made a directory: {error.strerror}") from None
    with only_process(output):
        clear_unfinished(output)
        finished = settle_run(options)
        if finished is not None:
            console.print(f"{output} holds this run, finished; nothing to do")
            return finished
        device = TrainingArguments(output_dir=str(output), report_to="none").device
        dtype = computing_dtype(options.dtype, device)
        if options.teacher_cache is not None:
            teacher = open_cache(options.teacher_cache)
            tokenizer = load_tokenizer(str(teacher.tokenizer_folder), options.student)
        else:
            tokenizer = load_tokenizer(options.teacher, options.student)
            teacher = load_model(options.teacher, "teacher").to(dtype).requires_grad_(False)
        transformers.set_seed(options.seed)
        student, initialised = load_student(options.student)
        if isinstance(teacher, WindowCache):
            rows, windows = teacher.vocabulary, teacher.windows
            max_length = window_length(teacher.max_length, student=student)
        else:
            rows, max_length = embeddings(teacher), window_length(options.max_length, student=student, teacher=teacher)
            windows = read_windows(options.data, tokenizer, console, max_length=max_length,
                                   eval_fraction=options.eval_fraction, seed=options.seed)  # fmt: skip
        config = fit_vocabularies(options.config, {"student": embeddings(student), "teacher": rows}, tokenizer)
        if options.lora_rank:
            student = with_lora(student.to(dtype), options.lora_rank)
        if initialised:
            console.print(f"the student {options.student} has no weights: initialised at random")
        trainer = _trainer(options, student, teacher, config, windows, dtype, device, console)
        last = last_checkpoint(output)
        if last is not None:
            console.print(f"going on from {last.name}")
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except CheckpointError as error:
            raise UserError(f"{error.problem}. Make room and run the same command to go on from there") from error
        except NonFiniteLossError as error:
            raise RunStopped(f"{error}; start again with --no-resume or another --output") from error
        finally:
            trainer.report.stop()
        return _finish(options, trainer, tokenizer, windows, config, max_length, console)


class _ResumableTrainer(FDDTrainer):
    """Its checkpoints hold no pickled objects but tensors."""

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing here reads: run.json says the same.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)


class _Report(TrainerCallback):
    """A progress bar with the last loss terms; lines for evaluations and checkpoints, and without a terminal for losses."""

    def __init__(self, console: Console, names: list[str]) -> None:
        self.console, self.names = console, names
        self.progress = Progress(
            TextColumn("distilling"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def _terms(self, logs: dict[str, float], prefix: str = "") -> str:
        return "  ".join(f"{name} {logs[prefix + name]:.4f}" for name in self.names if prefix + name in logs)

    def _print(self, state, text: str) -> None:
        self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", soft_wrap=True)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, terms="")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "eval_loss" in logs:
            self._print(state, f"held out: {self._terms(logs, 'eval_')}")
        elif "loss" in logs:
            self.progress.update(self.task, terms=self._terms(logs))
            if not self.console.is_terminal:
                self._print(state, self._terms(logs))

    def on_save(self, args, state, control, **kwargs) -> None:
        self.console.print(f"saved checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal in order, also after an exception."""
        self.progress.stop()


def _shown_terms(config: FDDConfig) -> list[str]:
    """The loss and the terms that have a weight; the router's, which only some students have."""
    derivative = config.derivative is not None and config.beta
    weights = (1, config.output_kd_weight, config.alpha, derivative, config.ce_weight, 1)
    return [name for name, weight in zip(_TERMS, weights) if weight]


def _trainer(options: DistillOptions, student: nn.Module, teacher: nn.Module | WindowCache, config: FDDConfig,
             windows: Windows, dtype: torch.dtype, device: torch.device, console: Console) -> _ResumableTrainer:  # fmt: skip
    steps_an_epoch = math.ceil(len(windows.train) / (options.batch_size * options.gradient_accumulation))
    steps = options.max_steps or math.ceil(options.epochs * steps_an_epoch)
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 30,
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
        report_to="none",
        disable_tqdm=True,
    )
    report = _Report(console, _shown_terms(config))
    with as_user_error("these models cannot be distilled so"):
        resolve_backend(config.backend, arguments.device)
        trainer = _ResumableTrainer(
            model=student, args=arguments, teacher=teacher, fdd_config=config, train_dataset=windows.train,
            eval_dataset=windows.held_out or None, data_collator=pad_windows, callbacks=[report],
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.report = report
    return trainer


def _finish(options: DistillOptions, trainer: _ResumableTrainer, tokenizer, windows: Windows, config: FDDConfig,
            max_length: int, console: Console) -> dict[str, Any]:  # fmt: skip
    """Evaluate, write the student, then the metrics."""
    output, history = options.output, trainer.state.log_history
    evaluations = [log for log in history if "eval_loss" in log]
    if windows.held_out and evaluations[-1]["step"] != trainer.state.global_step:
        evaluations.append(trainer.evaluate())
    if windows.held_out and not math.isfinite(evaluations[-1]["eval_loss"]):
        raise RunStopped(f"{output}: the held-out loss of the student in the end is not finite; it is not written")

    def held_out(which: int) -> dict[str, float] | None:
        found = evaluations[which] if evaluations else {}
        return {name: found[f"eval_{name}"] for name in _TERMS if f"eval_{name}" in found} or None

    metrics = {
        "steps": trainer.state.global_step,
        "train_windows": len(windows.train),
        "train_tokens": windows.train_tokens,
        "held_out_windows": len(windows.held_out),
        "max_length": max_length,
        "student_layers": trainer.distiller.student_layers,
        "teacher_layers": trainer.distiller.teacher_layers,
        "vocab_size": config.vocab_size,
        "held_out_before": held_out(0),
        "held_out": held_out(-1),
        "history": history,
        "versions": {"fdd_kernels": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    student = trainer.accelerator.unwrap_model(trainer.model)
    try:
        if options.lora_rank:
            with atomic_directory(output / ADAPTER_FOLDER) as folder:
                student.save_pretrained(folder)
            student = student.merge_and_unload()
        with atomic_directory(output / STUDENT_FOLDER) as folder:
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            model_card(options, trainer.distiller, metrics, _shown_terms(config)).save(folder / "README.md")
        write_text(output / METRICS_FILE, json.dumps(as_json(metrics), indent=1, allow_nan=False) + "\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{output}: the student could not be written ({first_line(error)}); {last_checkpoint(output).name} is "
            "complete. Make room and run the same command again"
        ) from error
    if windows.held_out:
        table = Table("held out", "before", "after", title=f"after {metrics['steps']} steps")
        for name in [name for name in _shown_terms(config) if name in metrics["held_out"]]:
            table.add_row(name, *(f"{metrics[when][name]:.4f}" for when in ("held_out_before", "held_out")))
        console.print(table)
    console.print(f"wrote {output / STUDENT_FOLDER} and {output / METRICS_FILE}", soft_wrap=True)
    return metrics
