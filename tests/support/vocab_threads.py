"""Split heads in one process: each rank is a thread, and collectives meet at a barrier."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from fdd_kernels.engine import agreement, vocab_parallel
from fdd_kernels.testing import Outcome, Problem, evaluate

SECONDS = 60  # of waiting for the other ranks


class Group:
    """Stand in for a gloo process group; `reduced` records what this rank gives to all_reduce."""

    def __init__(self, rank: int, size: int, slots: dict[int, Tensor], barrier: threading.Barrier):
        self._rank, self._size, self.slots, self.barrier = rank, size, slots, barrier
        self.reduced: list[Tensor] = []

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor, in the order of ranks."""
        self.slots[self._rank] = tensor.clone()
        self.barrier.wait(SECONDS)
        found = [self.slots[rank] for rank in range(self._size)]
        self.barrier.wait(SECONDS)
        return found


def _all_gather(parts: list[Tensor], tensor: Tensor, group: Group) -> None:
    for part, found in zip(parts, group.exchange(tensor), strict=True):
        part.copy_(found)


def _all_reduce(tensor: Tensor, group: Group) -> None:
    group.reduced.append(tensor.clone())
    tensor.copy_(sum(group.exchange(tensor)))


DISTRIBUTED = SimpleNamespace(
    ProcessGroup=Group,
    is_available=lambda: True,
    get_backend_config=lambda group: "cpu:gloo",
    all_gather=_all_gather,
    all_reduce=_all_reduce,
)


def in_parts(
    problem: Problem, bounds: tuple[int, ...], upstream: float = 1.0, **options
) -> tuple[Outcome, list[list[Tensor]]]:
    """Call `fused_fdd_loss` with the vocabulary split at `bounds`, one thread a rank.

    Return the whole outcome, and each rank's shares of the hidden states' gradients, (R, D) each in
    the order of layers, before they are summed. For reductions to a scalar.
    """
    size, outcomes, errors = len(bounds) - 1, {}, []
    slots, barrier = {}, threading.Barrier(size)
    groups = [Group(rank, size, slots, barrier) for rank in range(size)]
    ends = [*bounds[:-1], None]  # rows beyond the compared vocabulary belong to the last rank

    def work(rank: int) -> None:
        torch.set_num_threads(1)  # of this thread alone
        rows = slice(ends[rank], ends[rank + 1])
        heads = {
            name: tensor.detach()[rows].requires_grad_(tensor.requires_grad)
            for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
            if (tensor := getattr(problem, name)) is not None
        }
        try:
            outcomes[rank] = evaluate(
                replace(problem, **heads), upstream=upstream, vocab_group=groups[rank], **options
            )
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    with contextlib.ExitStack() as stack:
        for module in (agreement, vocab_parallel):
            stack.enter_context(mock.patch.object(module, "dist", DISTRIBUTED))
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    first, *others = (outcomes[rank] for rank in range(size))
    of_heads = [name for name in first.gradients if not name.startswith("student_hidden")]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first.terms, other.terms))
    gradients = first.gradients | {
        name: torch.cat([outcomes[rank].gradients[name] for rank in range(size)])
        for name in of_heads
    }
    width = problem.student_hidden[0].shape[-1]
    shares = [[t for t in group.reduced if t.shape[1:] == (width,)] for group in groups]
    return Outcome(first.terms, gradients), shares
