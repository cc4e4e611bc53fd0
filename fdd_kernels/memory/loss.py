"""Predict the memory of one call of the loss from shapes alone. Needs no model and no transformers.

It is the gradients that the loss returns plus the buffers that the backend states
(`Backend.memory`). For "cpu" and "triton" these are all buffers the code allocates, for "torch" and
the dense loss the ones alive at the peak. No GPU has measured it. Memory that an allocator does not
return comes on top: with glibc's defaults up to 1.7 times as much resident memory was measured
where one (rows x vocabulary) tensor of the dense loss has less than 32 MiB. `python -m benchmarks`
prints the error of every prediction of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdd_kernels.common.sizes import MIB, show

if TYPE_CHECKING:  # the options of the command line need no torch
    from fdd_kernels.backends.call_shape import CallShape
    from fdd_kernels.objectives.fdd.options import LossOptions
    from fdd_kernels.objectives.fdd.plan import Plan

FLOAT = 4
DENSE_RUNTIME_BYTES = 4 * MIB  # buffers of the BLAS library
# Buffers of MKL in the GEMM of the head's gradient; 10 to 31 MiB were measured
HEAD_GEMM_BYTES = 16 * MIB


@dataclass(frozen=True)
class LossShape:
    """The shapes of one call of the loss, as in `fused_fdd_loss`.

    Args:
        rows: valid tokens.
        columns: tokens of the vocabulary.
        layers: hidden states of the student, the final state included.
        teacher_layers: of the teacher; None: as many.
        itemsize: bytes of a number of states and heads.
        options: of the loss; None: the defaults.
        softcap: the logits are soft-capped.
    """

    rows: int
    columns: int
    student_width: int
    teacher_width: int
    layers: int = 5
    itemsize: int = 4
    train_head: bool = True
    feature_space: bool = False
    options: LossOptions | None = None
    softcap: bool = False
    teacher_layers: int | None = None

    @property
    def depths(self) -> tuple[int, int]:
        """The hidden states of the student and of the teacher."""
        return self.layers, self.layers if self.teacher_layers is None else self.teacher_layers

    def fdd_plan(self) -> Plan:
        """The requests and pair moments of the call."""
        from fdd_kernels.objectives.fdd.options import LossOptions
        from fdd_kernels.objectives.fdd.plan import build_plan

        return build_plan(
            self.options or LossOptions(),
            self.columns,
            *self.depths,
            leading_shape=(self.rows,),
            feature_space=self.feature_space,
        )

    def call(self, threads: int, device: str, device_memory: int | None) -> CallShape:
        """The sizes of the call that a backend's memory depends on."""
        from fdd_kernels.backends.call_shape import CallShape

        plan = self.fdd_plan()
        return CallShape(
            layers=len(plan.student_layers),
            teacher_layers=len(plan.teacher_layers),
            rows=self.rows,
            columns=self.columns,
            student_width=self.student_width,
            teacher_width=self.teacher_width,
            itemsize=self.itemsize,
            train_head=self.train_head,
            teacher_head=not self.feature_space,
            spec=plan.spec,
            threads=threads,
            device=device,
            device_memory=device_memory,
        )


@dataclass(frozen=True)
class LossMemory:
    """Predicted bytes of one forward and backward pass by part. `inputs` belong to the caller and
    are not in `total`.
    """

    parts: dict[str, int]
    inputs: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def arithmetic(self) -> str:
        """The sum of the parts in words, largest first."""
        parts = sorted([*self.parts.items(), ("inputs", self.inputs)], key=lambda item: -item[1])
        return " + ".join(f"{name} {show(size)}" for name, size in parts if size >= MIB)


def input_bytes(shape: LossShape) -> int:
    """Bytes of the hidden states and heads of both models."""
    widths, columns = (shape.student_width, shape.teacher_width), shape.columns
    heads = columns * (shape.student_width if shape.feature_space else sum(widths))
    states = sum(layers * width for layers, width in zip(shape.depths, widths))
    return shape.itemsize * (shape.rows * states + heads)


def _gradients(shape: LossShape) -> dict[str, int]:
    hidden = shape.itemsize * shape.layers * shape.rows * shape.student_width
    head = shape.itemsize * shape.columns * shape.student_width if shape.train_head else 0
    return {"gradients of hidden states": hidden, "gradient of the head": head}


def _statistics(plan: Plan, rows: int) -> int:
    """Bytes of row statistics, their gradients and the tensors autograd saves between them and the
    loss.
    """
    from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS

    numbers = (
        2 * max(len(plan.student_layers), len(plan.teacher_layers))
        + REQUEST_STATS * len(plan.spec.requests)
        + MOMENT_STATS * len(plan.spec.moments)
    )
    return 3 * FLOAT * rows * numbers


def dense_tensors(shape: LossShape) -> int:
    """The number of float32 tensors (rows x vocabulary) that the dense loss in plain PyTorch holds
    before the head's gradient; of KL and the cosine, which take the fewest.
    """
    plan = shape.fdd_plan()
    students, teachers = len(plan.student_layers), len(plan.teacher_layers)
    pairs = 0  # beside one for each layer of the student
    if plan.options.pairs_all_layers:
        pairs = max(len(plan.trajectory) - len(plan.options.layer_weights), 0)
    if shape.feature_space:
        return 2 * students + teachers + 2 * pairs + 1
    # Logits, and with deltas log-softmax and deltas of both models.
    of_layers = students + teachers
    count = of_layers * 5 // 2 - 1 if plan.derivative else of_layers + 3
    return count + 2 * pairs + (students if shape.softcap else 0)


def _dense(shape: LossShape) -> dict[str, int]:
    """Bytes of the dense loss at the larger of two peaks.

    Early: the logits of all layers and no gradient. Late: the logits of few layers, none in feature
    space, with three tensors of the head's size: the gradient so far, that of one layer, their sum.
    """
    tensor, layers = FLOAT * shape.rows * shape.columns, len(shape.fdd_plan().student_layers)
    gradients = _gradients(shape)
    head = gradients["gradient of the head"]
    early = dense_tensors(shape) * tensor - sum(gradients.values())
    few = 0 if shape.feature_space else 2 * (layers - 2)
    late = (few * tensor + 2 * head if layers > 1 else tensor) + HEAD_GEMM_BYTES
    return {"logits and tensors of their size": max(early, late, 0)}


def loss_memory(
    shape: LossShape,
    provider: str,
    *,
    threads: int = 1,
    device: str = "cpu",
    device_memory: int | None = None,
) -> LossMemory | None:
    """Predict the memory of one forward and backward pass of the loss.

    Args:
        provider: a backend or "dense".
        threads: of the cpu backend.
        device_memory: bytes of the GPU, which limit the scratch of the triton backend; None: no
            limit.

    Returns:
        The parts, or None for a provider without a memory model.
    """
    from fdd_kernels.backends import BACKENDS

    if provider == "dense":
        parts = _dense(shape) | {"runtime": DENSE_RUNTIME_BYTES}
    elif provider in BACKENDS and BACKENDS[provider].memory is not None:
        parts = BACKENDS[provider].memory(shape.call(threads, device, device_memory))
        parts |= {"statistics": _statistics(shape.fdd_plan(), shape.rows)}
    else:
        return None
    return LossMemory(_gradients(shape) | parts, input_bytes(shape))
