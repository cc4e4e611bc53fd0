"""How much memory the loss and a training step around it will take, from shapes alone. Needs no
model and no transformers.

The loss: gradients it returns, plus what the backend allocates besides, as it states itself
(`Backend.memory`). For "cpu" and "triton" that is what the code allocates, for "torch" and the
dense loss what is alive at its peak. No GPU has measured it. What an allocator keeps of freed
memory comes on top: with glibc's defaults up to 1.7 times as much resident memory was measured
where one (rows x columns) tensor of the dense loss has less than 32 MiB. `python -m benchmarks`
prints how far every prediction of a run is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdd_kernels.common.sizes import MIB, show

if TYPE_CHECKING:  # without torch the command line can show its options
    from fdd_kernels.backends.call_shape import CallShape
    from fdd_kernels.objectives.fdd.plan import Plan

FLOAT = 4
DENSE_RUNTIME_BYTES = 4 * MIB  # buffers of the matrix library
# MKL's own buffers in the product that is the head's gradient, of 10 to 31 MiB that were seen
HEAD_PRODUCT_BYTES = 16 * MIB


@dataclass(frozen=True)
class LossShape:
    """One call of the loss: shapes as in `fused_fdd_loss`, `layers` counting the final state; None:
    no such term.
    """

    rows: int
    columns: int
    student_width: int
    teacher_width: int
    layers: int = 5
    itemsize: int = 4
    train_head: bool = True
    feature_space: bool = False
    output_in_dynamics: bool = False
    trajectory: str | None = "kl"
    derivative: str | None = "cosine"
    softcap: bool = False

    def plan(self) -> Plan:
        """What the call reads and sums."""
        from fdd_kernels.objectives.fdd.options import LossOptions
        from fdd_kernels.objectives.fdd.plan import build_plan

        options = LossOptions(
            alpha=float(self.trajectory is not None),
            trajectory=self.trajectory or "kl",
            derivative=self.derivative,
            beta=float(self.derivative is not None),
            output_in_dynamics=self.output_in_dynamics,
        )
        return build_plan(
            options,
            self.columns,
            self.layers,
            leading_shape=(self.rows,),
            feature_space=self.feature_space,
        )

    def call(self, threads: int, device: str, device_memory: int | None) -> CallShape:
        """The call as a backend sees it."""
        from fdd_kernels.backends.call_shape import CallShape

        plan = self.plan()
        return CallShape(
            layers=len(plan.layers),
            rows=self.rows,
            columns=self.columns,
            student_width=self.student_width,
            teacher_width=self.teacher_width,
            itemsize=self.itemsize,
            train_head=self.train_head,
            teacher_head=not self.feature_space,
            moments=len(plan.spec.moments),
            threads=threads,
            device=device,
            device_memory=device_memory,
        )


@dataclass(frozen=True)
class LossMemory:
    """Predicted bytes of one forward and backward pass by part; `inputs` are the caller's and not
    in `total`.
    """

    parts: dict[str, int]
    inputs: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def arithmetic(self) -> str:
        """The sum in words, largest first."""
        parts = sorted([*self.parts.items(), ("inputs", self.inputs)], key=lambda item: -item[1])
        return " + ".join(f"{name} {show(size)}" for name, size in parts if size >= MIB)


def input_bytes(shape: LossShape) -> int:
    """Hidden states and heads of both models."""
    width = shape.student_width + shape.teacher_width
    heads = shape.columns * (shape.student_width if shape.feature_space else width)
    return shape.itemsize * (shape.layers * shape.rows * width + heads)


def _gradients(shape: LossShape) -> dict[str, int]:
    hidden = shape.itemsize * shape.layers * shape.rows * shape.student_width
    head = shape.itemsize * shape.columns * shape.student_width if shape.train_head else 0
    return {"gradients of hidden states": hidden, "gradient of the head": head}


def _statistics(plan: Plan, rows: int) -> int:
    """Statistics, their gradients and what autograd keeps between them and the loss."""
    from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS

    numbers = (
        2 * len(plan.layers)
        + REQUEST_STATS * len(plan.spec.requests)
        + MOMENT_STATS * len(plan.spec.moments)
    )
    return 3 * FLOAT * rows * numbers


def dense_tensors(shape: LossShape) -> int:
    """How many float32 tensors of (rows x columns) the dense loss in plain PyTorch holds before the
    head's gradient.
    """
    plan = shape.plan()
    layers = len(plan.layers)
    if shape.feature_space:
        return 3 * layers + 1
    return (5 * layers - 1 if plan.derivative else 2 * layers + 3) + (
        layers if shape.softcap else 0
    )


def _dense(shape: LossShape) -> dict[str, int]:
    """The larger of two moments: all layers' logits are there, but no gradient; or, later, few of
    them, none in feature space, and the head's gradient as the sum so far, one layer's, and their
    new sum."""
    tensor, layers = FLOAT * shape.rows * shape.columns, len(shape.plan().layers)
    gradients = _gradients(shape)
    head = gradients["gradient of the head"]
    early = dense_tensors(shape) * tensor - sum(gradients.values())
    few = 0 if shape.feature_space else 2 * (layers - 2)
    late = (few * tensor + 2 * head if layers > 1 else tensor) + HEAD_PRODUCT_BYTES
    return {"logits and what is made of them": max(early, late, 0)}


def loss_memory(
    shape: LossShape,
    provider: str,
    *,
    threads: int = 1,
    device: str = "cpu",
    device_memory: int | None = None,
) -> LossMemory | None:
    """Predicted memory of one forward and backward pass of the loss.

    Args:
        provider: a backend, each of which states its own memory, or "dense".
        threads: of the cpu backend.
        device_memory: bytes of the GPU, which decide how much scratch the triton backend takes;
            None: enough.

    Returns:
        The parts, or None for a provider that is not modelled.
    """
    from fdd_kernels.backends import BACKENDS

    if provider == "dense":
        parts = _dense(shape) | {"runtime": DENSE_RUNTIME_BYTES}
    elif provider in BACKENDS and BACKENDS[provider].memory is not None:
        parts = BACKENDS[provider].memory(shape.call(threads, device, device_memory))
        parts |= {"statistics": _statistics(shape.plan(), shape.rows)}
    else:
        return None
    return LossMemory(_gradients(shape) | parts, input_bytes(shape))
