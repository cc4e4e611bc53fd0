"""A call as the C++ kernels take it, what they cannot compute, and the tensors they write to."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.backends.cpu import extension
from fdd_kernels.backends.cpu.tiling import COLUMN_PADDING, CpuTiles
from fdd_kernels.lens.divergences import expectation_of
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import MOMENT_STATS, REQUEST_STATS, Statistics
from fdd_kernels.lens.spec import NLL, LensSpec

F32 = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def unavailable(device: torch.device) -> str | None:
    """Say why these kernels cannot run on `device`, and the remedy."""
    if device.type != "cpu":
        return f'its kernels run on the CPU, not on "{device}"; use backend="auto"'
    return extension.missing_reason()


def compiled_divergences() -> tuple[str, ...]:
    """List the divergences that the kernels know; empty without kernels."""
    return () if extension.kernels is None else tuple(extension.kernels.divergences())


# As of `extension.missing_reason`.
compiled_divergences._dynamo_marked_constant = True


def refusal(spec: LensSpec) -> str | None:
    """Say which part of a spec the kernels cannot compute, or None."""
    known = compiled_divergences()
    for request in spec.requests:
        if (request.divergence or "") not in known:
            return f"its C++ kernels were compiled without a divergence {request.divergence!r}"
    return None


def problem_of(
    inputs: LensInputs,
    spec: LensSpec,
    rows: Tensor,
    tiles: CpuTiles,
    in_gradient: tuple[bool, bool] = (False, False),
    *,
    in_place: bool = False,
):
    """Build the C++ side's view of a call, restricted to some rows, int64 positions.

    `in_gradient` is of `tiling.in_gradient`, `in_place` of `teacher_in_place`.
    """
    student_scale = (spec.student_logit_scale, spec.student_softcap or 0.0)
    teacher_scale = (spec.teacher_logit_scale, spec.teacher_softcap or 0.0)
    return extension.kernels.Problem(
        (inputs.student_hidden, inputs.student_weight, inputs.student_bias, *student_scale),
        (inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, *teacher_scale),
        spec.needs_teacher,
        spec.columns,
        rows,
        inputs.labels if any(request.divergence == NLL for request in spec.requests) else None,
        [
            (
                request.student_layer,
                request.teacher_layer,
                request.temperature,
                request.divergence or "",
                expectation_of(request.divergence) or "",
                request.parameters,
                request.teacher_mix,
            )
            for request in spec.requests
        ],
        spec.moments,
        (tiles.rows, tiles.columns, tiles.panel),
        tiles.whole,
        in_place,
        in_gradient,
    )


def teacher_in_place(inputs: LensInputs, spec: LensSpec) -> bool:
    """Say whether the teacher's hidden states are its logits and can be read where they lie."""
    return (
        spec.needs_teacher
        and inputs.teacher_weight is None
        and inputs.teacher_bias is None
        and spec.teacher_logit_scale == 1
        and not spec.teacher_softcap
        and spec.columns % COLUMN_PADDING == 0
        and all(
            h.dtype == torch.float32 and h.stride(1) == 1 and h.stride(0) >= spec.columns
            for h in inputs.teacher_hidden
        )
    )


def valid_rows(inputs: LensInputs) -> Tensor:
    """List the valid rows as int64 positions, ascending."""
    if inputs.valid is None:
        return torch.arange(inputs.rows, device="cpu")
    return inputs.valid.nonzero().squeeze(1)


def zero_statistics(inputs: LensInputs, spec: LensSpec) -> Statistics:
    """Allocate statistics of zeros; the kernels write those of the valid rows into them."""
    return Statistics(
        torch.zeros(2, inputs.layers, inputs.rows, **F32),
        torch.zeros(len(spec.requests), REQUEST_STATS, inputs.rows, **F32),
        torch.zeros(len(spec.moments), MOMENT_STATS, inputs.rows, **F32),
    )


def new_gradients(
    inputs: LensInputs, spec: LensSpec, needed: list[bool], rows: Tensor
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    """Allocate the wanted gradients: one per layer, the head's, the bias's in float32.

    They are zeros, but for what is written later: of the hidden states if all rows are among the
    valid `rows`, of the head if there are any.
    """
    *needs_hidden, needs_weight, needs_bias = needed
    new = torch.empty_like if len(rows) == inputs.rows else torch.zeros_like
    grad_hidden = [
        new(h, memory_format=torch.contiguous_format) if need else None
        for h, need in zip(inputs.student_hidden, needs_hidden)
    ]
    grad_weight = None
    if needs_weight:
        grad_weight = extension.kernels.gradient_memory(inputs.student_weight)
        grad_weight[spec.columns if len(rows) else 0 :] = 0
    grad_bias = torch.zeros(len(inputs.student_bias), **F32) if needs_bias else None
    return grad_hidden, grad_weight, grad_bias


def low_halves(grad_weight: Tensor | None) -> Tensor | None:
    """Allocate what a 16-bit gradient of the head needs to be summed by several calls of the
    kernels (csrc/head_gradient.h); None for a float32 one.
    """
    if grad_weight is None or grad_weight.dtype == torch.float32:
        return None
    return torch.empty(grad_weight.shape, dtype=torch.int16, device="cpu")


def place(sums: Tensor, rows: Tensor, grad_hidden: list[Tensor | None]) -> None:
    """Round the float32 sums (L, rows, width) into the gradients of those rows."""
    first, last = int(rows[0]), int(rows[-1])
    where = slice(first, last + 1) if last - first == len(rows) - 1 else rows
    for total, out in zip(sums, grad_hidden):
        if out is not None:
            out[where] = total.to(out.dtype)


def wanted(
    inputs: LensInputs, grad_hidden: list, grad_weight: Tensor | None, grad_bias: Tensor | None
) -> list[Tensor]:
    """Collect the gradients that were asked for, in the order of `needed`."""
    if grad_bias is not None:
        grad_bias = grad_bias.to(inputs.student_bias.dtype)
    return [g for g in (*grad_hidden, grad_weight, grad_bias) if g is not None]
