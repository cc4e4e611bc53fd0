"""The processes of one run, as torchrun or accelerate started them, or this one alone."""

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
    """How many there are and which one this is. `device` is this process's."""

    def __init__(self, arguments: TrainingArguments) -> None:
        self.device = arguments.device  # connects the processes
        self.count, self.rank = arguments.world_size, arguments.process_index

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process alone; its result, or its error, is that of all.

        Raises:
            UserError: as `work` does; elsewhere than in the first process one that is not shown.
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
        """Do `work` in every process; if it fails in one, all of them end.

        Raises:
            UserError: as `work` does, in the first process where it failed; in the others one that
                is not shown.
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
    """Raises UserError where accelerate was told to shard the model, which this command does not
    do.
    """
    for library, variable in (
        ("FSDP", "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
    ):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                f"{library} shards the model, which this command does not do: start it with "
                "torchrun or with plain data "
                "parallelism, or use FDDTrainer in a script of your own (examples/trainer.py)"
            )


@contextlib.contextmanager
def together(arguments: TrainingArguments) -> Iterator[Processes]:
    """The processes of this run, connected for the time of the block."""
    processes = Processes(arguments)
    try:
        yield processes
    finally:
        if processes.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
