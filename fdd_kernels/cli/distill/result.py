"""The end of a run: the last evaluation, the student, the metrics."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from fdd_kernels.cli.distill.alignment import draw_alignment, print_alignment
from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.cli.distill.prepare import Run
from fdd_kernels.cli.distill.processes import Processes
from fdd_kernels.cli.distill.run_folder import (
    ADAPTER_FOLDER,
    ALIGNMENT_FILE,
    METRICS_FILE,
    STUDENT_FOLDER,
)
from fdd_kernels.cli.distill.trainer import TERMS, shown_terms
from fdd_kernels.cli.loading import first_line
from fdd_kernels.common.atomic import atomic_directory, write_text
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.progress import Activity
from fdd_kernels.data.sources import open_source
from fdd_kernels.evaluation.metrics import is_metric
from fdd_kernels.integrations.checkpoints import last_checkpoint
from fdd_kernels.integrations.finite import as_json, require_finite
from fdd_kernels.integrations.model_card import model_card, validation_rows
from fdd_kernels.version import __version__

_ON_THE_CARD = (
    "learning_rate",
    "batch_size",
    "gradient_accumulation",
    "dtype",
    "seed",
    "lora_rank",
)


def evaluations_of(run: Run, console: Console) -> list[dict[str, float]]:
    """Return the terms of the loss and the metrics of every evaluation of a run, the last one after
    its last step; nothing without a validation split.

    Raises:
        NonFiniteLossError: the last loss is not finite.
    """
    trainer = run.trainer
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    if run.windows.held_out and logs[-1]["step"] != trainer.state.global_step:
        with Activity(console, "evaluating"):
            logs.append(trainer.evaluate())
    named = [{key.removeprefix("eval_"): value for key, value in log.items()} for log in logs]
    found = [{n: v for n, v in log.items() if n in TERMS or is_metric(n)} for log in named]
    if found:  # not the metrics: an infinite perplexity is null in a checkpoint
        terms = {name: value for name, value in found[-1].items() if name in TERMS}
        require_finite("the last evaluation", terms)
    return found


def write_result(
    options: DistillOptions,
    run: Run,
    evaluations: list[dict[str, float]],
    processes: Processes,
    console: Console,
) -> dict[str, Any]:
    """Write the student and then the metrics, in the first process; print both.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: the disk is full.
    """
    trainer, windows = run.trainer, run.windows
    alignment = trainer.distiller.alignment
    found = alignment is not None and alignment.weights is not None  # not without dynamics
    metrics = {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "train_windows": len(windows.train),
        "train_tokens": windows.train_tokens,
        "held_out_windows": len(windows.held_out),
        "max_length": run.max_length,
        "student_layers": trainer.distiller.student_layers,
        "teacher_layers": trainer.distiller.teacher_layers,
        "layer_alignment": alignment.state_dict() if found else None,
        "vocab_size": run.config.vocab_size,
        "held_out_before": evaluations[0] if evaluations else None,
        "held_out": evaluations[-1] if evaluations else None,
        "history": trainer.state.log_history,
        "versions": {
            "fdd_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    with Activity(console, "writing the student"):
        processes.first(lambda: _write(options, run, metrics, console))
    if windows.held_out:
        table = Table("validation", "before", "after", title=f"after {metrics['steps']} steps")
        for row in validation_rows(metrics, shown_terms(run.config)):
            table.add_row(*row)
        console.print(table)
    if found:
        print_alignment(metrics["layer_alignment"], console)
    console.print(
        f"wrote {options.output / STUDENT_FOLDER} and {options.output / METRICS_FILE}",
        soft_wrap=True,
    )
    return metrics


def _data_names(options: DistillOptions, run: Run) -> list[str]:
    """Return the names of the files or data sets of a run, of paths the last part."""
    if options.teacher_cache is None:
        return list(open_source(options.data).names())
    return [Path(file).name for file in run.trainer.distiller.teacher.files.contents["data"] or ()]


def _write(options: DistillOptions, run: Run, metrics: dict[str, Any], console: Console) -> None:
    """Write the adapter, the student with its card, and the metrics, each completely or not at
    all; before the metrics the plot of the layers' pairing.
    """
    output, student = options.output, run.trainer.accelerator.unwrap_model(run.trainer.model)
    try:
        if options.lora_rank:
            with atomic_directory(output / ADAPTER_FOLDER) as folder:
                student.save_pretrained(folder)
            student = student.merge_and_unload()
        with atomic_directory(output / STUDENT_FOLDER) as folder:
            student.save_pretrained(folder)
            run.tokenizer.save_pretrained(folder)
            card = model_card(
                str(options.student),
                run.trainer.distiller,
                data=_data_names(options, run),
                training={name: getattr(options, name) for name in _ON_THE_CARD},
                metrics=metrics,
                terms=shown_terms(run.config),
            )
            card.save(folder / "README.md")
        if metrics["layer_alignment"] is not None:
            draw_alignment(metrics["layer_alignment"], output / ALIGNMENT_FILE, console)
        write_text(
            output / METRICS_FILE, json.dumps(as_json(metrics), indent=1, allow_nan=False) + "\n"
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{output}: the student could not be written ({first_line(error)}); "
            f"{last_checkpoint(output).name} is complete. Make room and run the same command again"
        ) from error
