"""The shape of a call: the argument of the backends' `memory` and of Triton's strategy rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fdd_kernels.lens.spec import LensSpec

FLOAT = 4


@dataclass(frozen=True)
class CallShape:
    """The numbers that decide how much memory a backend allocates, and how it cuts the work.

    Attributes:
        layers: L of the student, of the layers that a request or a pair uses.
        rows: R.
        columns: V.
        student_width, teacher_width: D of each model.
        itemsize: bytes of an element of states and heads; 2 is taken as bfloat16.
        train_head: the student's head gets a gradient.
        teacher_head: the teacher has logits; False where its states are compared as they are.
        spec: the requests and pairs of the call; None stands for KL alone.
        threads: the CPU's.
        device: its type, such as "cpu" or "cuda".
        device_memory: the GPU's bytes; None where they are not known.
        teacher_layers: L of the teacher, likewise; None stands for as many as the student has.
        backward: gradients are computed; without them, the statistics alone.
    """

    layers: int
    rows: int
    columns: int
    student_width: int
    teacher_width: int
    itemsize: int
    train_head: bool = True
    teacher_head: bool = True
    spec: LensSpec | None = None
    threads: int = 1
    device: str = "cpu"
    device_memory: int | None = None
    teacher_layers: int | None = None
    backward: bool = True

    @property
    def depths(self) -> tuple[int, int]:
        """Count the layers of the student and of the teacher."""
        return self.layers, self.layers if self.teacher_layers is None else self.teacher_layers

    def with_equal_layers(self) -> CallShape:
        """Count as many layers of both models, as `LensInputs.with_equal_layers`."""
        return replace(self, layers=max(self.depths), teacher_layers=None)

    @property
    def narrow(self) -> bool:
        """Tell whether inputs are 16-bit, so that sums are of another dtype."""
        return self.itemsize < FLOAT

    @property
    def heads(self) -> int:
        """Count the models that have logits."""
        return 2 if self.teacher_head else 1
