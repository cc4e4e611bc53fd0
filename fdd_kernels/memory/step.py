"""Predict the memory of a training step by part, and suggest changes if it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fdd_kernels.memory.alignment import costs_memory, planned_pairs
from fdd_kernels.memory.loss import LossShape, loss_memory
from fdd_kernels.memory.models import ModelShape
from fdd_kernels.objectives.alignment.methods import RANK

if TYPE_CHECKING:  # the options of the command line need no torch
    from fdd_kernels.objectives.fdd.options import LossOptions

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of a weight in the blocks of a quantised model; embedding and head are not quantised.
QUANTISED_BYTES = {"int8": 1.0, "int4": 0.5}
# Bytes of optimizer state for each trained weight.
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2, "lion": 4, "sgd-momentum": 4, "sgd": 0}


@dataclass(frozen=True)
class Setup:
    """A training step.

    Args:
        tokens: of one micro-batch.
        layers: compared layers of the student without the final state.
        teacher_layers: of the teacher; None: as many.
        backend: "auto" is the default one on the device.
        checkpointing: gradient checkpointing in the student.
        teacher_elsewhere: the teacher's states come from a cache or another device.
        lora_rank: None: all weights are trained.
        teacher_dtype: None: that of the student.
        device_memory: bytes of the GPU.
        objective: options of the loss; None: the defaults.
        alignment: how layers are paired, as `FDDConfig.layer_alignment`.
    """

    student: ModelShape
    teacher: ModelShape
    tokens: int
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    layers: int = 4
    backend: str = "auto"
    device: str = "cuda"
    train_head: bool = True
    checkpointing: bool = False
    teacher_elsewhere: bool = False
    lora_rank: int | None = None
    teacher_dtype: str | None = None
    device_memory: int | None = None
    objective: LossOptions | None = None
    teacher_layers: int | None = None
    alignment: str = RANK

    @property
    def chosen_backend(self) -> str:
        """The backend whose memory is predicted."""
        from fdd_kernels.backends import BACKENDS, preference

        if self.backend != "auto":
            return self.backend
        spec = self.loss.fdd_plan().spec
        return next(b for b in preference(self.device) if BACKENDS[b].refusal(spec) is None)

    @property
    def paired_objective(self) -> LossOptions | None:
        """The options of the loss, with the pairs that the alignment may find."""
        if self.alignment == RANK:
            return self.objective
        from fdd_kernels.objectives.fdd.options import LossOptions

        layers = self.layers, self.layers if self.teacher_layers is None else self.teacher_layers
        return planned_pairs(self.objective or LossOptions(), self.alignment, *layers)

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def trained(self) -> int:
        """The number of trained weights."""
        return (
            self.student.parameters
            if self.lora_rank is None
            else self.student.adapters(self.lora_rank)
        )

    @property
    def teacher_bytes(self) -> int:
        """Bytes of the teacher's weights."""
        kind = self.teacher_dtype or self.dtype
        of_blocks = QUANTISED_BYTES.get(kind) or DTYPE_BYTES[kind]
        return (
            round(self.teacher.blocks * of_blocks) + self.teacher.embeddings * self.teacher_itemsize
        )

    @property
    def teacher_itemsize(self) -> int:
        """Bytes of a number in the teacher's head and states."""
        return DTYPE_BYTES.get(self.teacher_dtype or self.dtype, self.itemsize)

    @property
    def loss(self) -> LossShape:
        return LossShape(
            rows=self.tokens,
            columns=min(self.student.vocabulary, self.teacher.vocabulary),
            layers=self.layers + 1,
            student_width=self.student.width,
            teacher_width=self.teacher.width,
            itemsize=self.itemsize,
            train_head=self.train_head and self.lora_rank is None,
            options=self.paired_objective,
            softcap=self.student.softcap,
            teacher_layers=None if self.teacher_layers is None else self.teacher_layers + 1,
        )


def step_memory(setup: Setup, *, dense: bool = False) -> dict[str, int]:
    """Predict the bytes of a training step by part, with the fused or the dense loss. All parts are
    assumed to exist at the same time.
    """
    adapters = 0 if setup.lora_rank is None else setup.trained
    teacher_head = setup.teacher.vocabulary * setup.teacher.width * setup.teacher_itemsize
    loss = loss_memory(
        setup.loss,
        "dense" if dense else setup.chosen_backend,
        device=setup.device,
        device_memory=setup.device_memory,
    )
    # The head's gradient is already in "gradients".
    in_loss = loss.total - loss.parts["gradient of the head"]
    if setup.alignment != RANK and not dense:  # the costs of all pairs, before the loss
        where = {"device": setup.device, "device_memory": setup.device_memory}
        costs = costs_memory(setup.loss, setup.chosen_backend, **where)
        in_loss = max(in_loss, costs.total)
    return {
        "student weights": (setup.student.parameters + adapters) * setup.itemsize,
        "gradients": setup.trained * setup.itemsize,
        "optimizer": setup.trained * OPTIMIZERS[setup.optimizer],
        "activations": setup.student.activations(
            setup.tokens, setup.itemsize, checkpointing=setup.checkpointing
        ),
        "teacher weights": 0 if setup.teacher_elsewhere else setup.teacher_bytes,
        "teacher head": teacher_head if setup.teacher_elsewhere else 0,
        "teacher states": setup.loss.depths[1]
        * setup.tokens
        * setup.teacher.width
        * setup.teacher_itemsize,
        "loss": in_loss,
    }


@dataclass(frozen=True)
class Advice:
    """A change, and the memory of the step with it."""

    change: str
    total: int
    fits: bool


def advise(setup: Setup, limit: int) -> list[Advice]:
    """Suggest changes until the step with the fused loss fits, the least intrusive first, each on
    top of those before.
    """
    found: list[Advice] = []

    def add(change: str, changed: Setup) -> Setup:
        total = sum(step_memory(changed).values())
        found.append(Advice(change, total, total <= limit))
        return changed

    if not setup.checkpointing:
        setup = add("gradient checkpointing in the student", replace(setup, checkpointing=True))
    if not setup.teacher_elsewhere:
        setup = add(
            "teacher states computed beforehand or on another device (its head stays)",
            replace(setup, teacher_elsewhere=True),
        )
    if OPTIMIZERS[setup.optimizer] > OPTIMIZERS["adamw8bit"]:
        setup = add("an 8-bit AdamW", replace(setup, optimizer="adamw8bit"))
    most = most_tokens(setup, limit)
    if most and most < setup.tokens:
        add(f"micro-batches of {most} tokens, gradients accumulated", replace(setup, tokens=most))
    first = next((i for i, a in enumerate(found) if a.fits), None)
    return found if first is None else found[: first + 1]


def most_tokens(setup: Setup, limit: int) -> int:
    """The largest multiple of 64 tokens whose step fits, found by bisection; 0 if none fits.

    Scratch comes in whole row blocks, so memory does not grow strictly with tokens: in rare cases a
    few more tokens would fit.
    """

    def fits(blocks: int) -> bool:
        return sum(step_memory(replace(setup, tokens=64 * blocks)).values()) <= limit

    low, high = 0, max(1, setup.tokens // 64)
    if fits(high):
        return 64 * high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return 64 * low
