"""The processes of one run: those that torchrun or accelerate started, or one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from transformers import TrainingArguments

from fdd_kernels.common.errors import SaidElsewhere, UserError

T = TypeVar("T")


class Processes:
    """Count and rank of the processes, and the device of this one."""

    def __init__(self, arguments: TrainingArguments) -> None:
        self.device = arguments.device  # connects the processes
        self.count, self.rank = arguments.world_size, arguments.process_index

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process and give its result to all.

        Raises:
            UserError: as `work` does, in the first process.
            SaidElsewhere: in the other processes, if `work` failed.
        """
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except UserError as failed:
                error = failed
        if self.count > 1:
            shared = [(result, error is not None)]
            torch.distributed.broadcast_object_list(shared, src=0, device=self.device)
            result, failed = shared[0]
            if failed and error is None:
                raise SaidElsewhere
        if error is not None:
            raise error
        return result

    def all(self, work: Callable[[], T]) -> T:
        """Do `work` in every process; if it fails in one, all raise.

        Raises:
            UserError: as `work` does, in the first process where it failed.
            SaidElsewhere: in the other processes.
        """
        result, error = None, None
        try:
            result = work()
        except UserError as failed:
            error = failed
        if self.count > 1:
            failures: list[bool] = [False] * self.count
            torch.distributed.all_gather_object(failures, error is not None)
            if any(failures) and failures.index(True) != self.rank:
                raise SaidElsewhere
        if error is not None:
            raise error
        return result


def require_data_parallelism() -> None:
    """Raise UserError if accelerate is set to shard the model, which this command does not do."""
    for library, variable in (
        ("FSDP", "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
    ):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                f"{library} shards the model, which this command does not do: start it with "
                "torchrun or with plain data parallelism, or use FDDTrainer in a script of your "
                "own (examples/trainer.py)"
            )


@contextlib.contextmanager
def together(arguments: TrainingArguments) -> Iterator[Processes]:
    """Connect the processes of this run while the block runs."""
    processes = Processes(arguments)
    try:
        yield processes
    finally:
        if processes.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
