"""The Trainer of `fdd-kernels distill`, and what it prints."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from fdd_kernels.backends import resolve_backend
from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.cli.loading import as_user_error
from fdd_kernels.common.progress import Activity
from fdd_kernels.data import Windows, pad_windows
from fdd_kernels.integrations import FDDTrainer
from fdd_kernels.integrations.checkpoints import last_checkpoint
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.teacher_cache import WindowCache

KEPT_CHECKPOINTS = 2
TERMS = ("loss", "output_kd", "trajectory", "derivative", "ce", "router")
# The argument's name since transformers 5, and before.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(TrainingArguments, name)
)


class ResumableTrainer(FDDTrainer):
    """An FDDTrainer whose checkpoints hold no pickled objects but tensors."""

    report: Report

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nobody loads: run.json has the same.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _compare_options(self, checkpoint: Path) -> None:
        """Do nothing: the options are those of run.json, or `settle_run` has refused them."""


class Report(TrainerCallback):
    """Show progress with the last loss terms, and a line per evaluation and checkpoint; without a
    terminal also a line per logged loss.
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
            self._print(state, f"validation: {'  '.join(self._terms(logs, 'eval_'))}")
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


def shown_terms(config: FDDConfig) -> list[str]:
    """The loss, its terms of nonzero weight at some step, and the router's term, which only some
    students have.
    """
    derivative = config.derivative is not None and config.ever("beta")
    weights = (*map(config.ever, ("output_kd_weight", "alpha")), derivative)
    weights = (1, *weights, config.ever("ce_weight"), 1)
    return [name for name, weight in zip(TERMS, weights) if weight]


def make_trainer(
    options: DistillOptions,
    student: nn.Module,
    teacher: nn.Module | WindowCache,
    config: FDDConfig,
    windows: Windows,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    console: Console,
) -> ResumableTrainer:
    """The trainer of a run of `steps` optimizer steps.

    Raises:
        UserError: models, loss and backend do not go together.
    """
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
    report = Report(console, shown_terms(config))
    with as_user_error("cannot distil these models"):
        resolve_backend(config.backend, arguments.device)
        trainer = ResumableTrainer(
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
