"""Measure a computation's allocations within the process: the same on every processor."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def allocated_peak(function: Callable[[], object]) -> int:
    """Return the peak of bytes that torch's allocator holds while `function` runs.

    It is the same on every processor; resident memory also has pages and the matrix library's
    buffers in it.
    """
    kept = []  # its result stays allocated to the end
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept.append(function())
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(
        itertools.accumulate(
            event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
        )
    )


class Allocations(TorchDispatchMode):
    """Record shapes and sizes of tensors computed into memory of their own."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in given
            ):
                self.shapes.add(tuple(tensor.shape))
                self.sizes.append(tensor.numel())
        return out

    def watching(self, operation: Callable) -> Callable:
        """Watch a backend's operation: a mode around an operator of torch sees nothing within
        it.
        """

        def run(*args):
            with self:
                return operation(*args)

        return run
