"""The shape of a call, as the backends' `memory` functions take it."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4


@dataclass(frozen=True)
class CallShape:
    """What of a call decides how much memory a backend takes.

    `layers` are those that something reads, `itemsize` is that of states and heads (2 is taken as
    bfloat16). `teacher_head` False: the teacher's states are compared as they are. `moments` counts
    the pairs of vectors whose moments are taken. `threads` are the CPU's, `device_memory` the GPU's
    bytes, None where they are not known.
    """

    layers: int
    rows: int
    columns: int
    student_width: int
    teacher_width: int
    itemsize: int
    train_head: bool = True
    teacher_head: bool = True
    moments: int = 0
    threads: int = 1
    device: str = "cpu"
    device_memory: int | None = None

    @property
    def narrow(self) -> bool:
        """Inputs are 16-bit, and sums are not."""
        return self.itemsize < FLOAT
