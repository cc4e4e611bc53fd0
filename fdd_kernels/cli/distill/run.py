"""`fdd-kernels distill`: a training on your own models and text that can be killed and resumed at
any moment.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from fdd_kernels.cli.distill.options import DistillOptions
from fdd_kernels.cli.distill.prepare import prepare
from fdd_kernels.cli.distill.processes import Processes, require_data_parallelism, together
from fdd_kernels.cli.distill.result import evaluations_of, write_result
from fdd_kernels.cli.distill.run_folder import settle_run
from fdd_kernels.cli.loading import first_line, make_directory
from fdd_kernels.common.atomic import clear_unfinished, only_process
from fdd_kernels.common.errors import RunStopped, SaidElsewhere, UserError
from fdd_kernels.integrations.checkpoints import CheckpointError, last_checkpoint
from fdd_kernels.integrations.finite import NonFiniteLossError


def distill(options: DistillOptions, console: Console | None = None) -> dict[str, Any]:
    """Distil and write the student; resume or lengthen an earlier run of the same options.

    Writes to `options.output`: run.json (options and inputs of the run), checkpoint-N (the last
    two), student/ (a plain transformers directory, adapters merged), adapter/ (with LoRA), and
    metrics.json at the very end. A file or directory gets its name only when it is complete and on
    disk. Under torchrun every process calls this, and the first one writes.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: models, data or options do not go together, the directory belongs to another run,
            or the disk is full.
        RunStopped: the loss is not finite; the last good checkpoint stays.
    """
    transformers.utils.logging.disable_progress_bar()
    require_data_parallelism()
    _require_reporters(options.report_to)
    connecting = TrainingArguments(
        output_dir=str(options.output),
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )
    with together(connecting) as processes, contextlib.ExitStack() as lock:
        console = (console or Console(stderr=True)) if processes.rank == 0 else Console(quiet=True)
        finished = processes.first(lambda: _settle(options, processes.count, lock))
        if finished is not None:
            console.print(f"{options.output} holds this run, finished; nothing to do")
            return finished
        run = processes.all(lambda: prepare(options, processes, console))
        last = last_checkpoint(options.output)
        if last is not None:
            console.print(f"resuming from {last.name}")
        try:
            with _as_user_errors(processes):
                run.trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            run.trainer.report.stop()
        with _as_user_errors(processes):
            evaluations = evaluations_of(run, console)
        return write_result(options, run, evaluations, processes, console)


def _require_reporters(names: Sequence[str]) -> None:
    """Raise UserError for a name that transformers cannot report to here."""
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
    options: DistillOptions, processes: int, lock: contextlib.ExitStack
) -> dict[str, Any] | None:
    """Take the output directory until `lock` closes; the metrics if the run is finished."""
    make_directory(options.output)
    lock.enter_context(only_process(options.output))
    clear_unfinished(options.output)
    return settle_run(options, processes)


@contextlib.contextmanager
def _as_user_errors(processes: Processes) -> Iterator[None]:
    """Turn errors of training that the user can fix into one line: our own checks, memory, a full
    disk.
    """
    try:
        yield
    except CheckpointError as error:
        raise UserError(
            f"{error.problem}. Make room and run the same command again to resume"
        ) from error
    except NonFiniteLossError as error:  # in every process
        stopped = RunStopped(f"{error}; start again with --no-resume or another --output")
        raise (stopped if processes.rank == 0 else SaidElsewhere(stopped.exit_status)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{first_line(error)}. Give a smaller batch_size with more gradient_accumulation, a "
            "smaller max_length, gradient_checkpointing, lora_rank or a quantised teacher; "
            "fdd-kernels plan shows what takes the memory"
        ) from error
    except (ValueError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).is_relative_to(Path(__file__).parents[2]):
            raise UserError(f"cannot distil these models: {first_line(error)}") from error
        raise
