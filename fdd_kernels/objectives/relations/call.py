"""One call that compares rows of attention, checked, and the way to its loss.

Shape suffixes: B sequences, H heads, T positions, d the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.backends import backend_names, resolve_row_backend
from fdd_kernels.engine.row_blocks import Extra, asks_for_gradient, row_sum, row_values
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.row_blocks import CAUSAL, PACKED, RowSpec
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.objectives.numbers import check_numbers
from fdd_kernels.objectives.option_checks import (
    REDUCTIONS,
    require_choice,
    require_int,
    require_number,
)
from fdd_kernels.objectives.reduction import loss_denominator, reduce_rows
from fdd_kernels.objectives.relations.formulas import (
    KINDS,
    MASK,
    SELF,
    dense_rows,
    left_out,
)
from fdd_kernels.objectives.relations.packing import sequence_ids, visible
from fdd_kernels.objectives.tensors import MASKS, check_entries
from fdd_kernels.objectives.validation import (
    check_num_items,
    check_places,
    check_transforms,
)


@dataclass(frozen=True)
class AttentionOptions:
    """What the two functions that compare rows of attention share."""

    kind: str
    causal: bool
    exclude_self: bool
    nearest: int | None
    student_scale: float | None
    teacher_scale: float | None
    reduction: str
    backend: str

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, KINDS)
        require_choice("causal", self.causal, (True, False))
        require_choice("exclude_self", self.exclude_self, (True, False))
        if self.nearest is not None:
            require_int("k", self.nearest, minimum=1)
        for name in ("student_scale", "teacher_scale"):
            require_number(name, getattr(self, name), positive=True, optional=True)
        require_choice("reduction", self.reduction, REDUCTIONS)
        require_choice("backend", self.backend, backend_names())
        resolve_row_backend(self.backend)


@dataclass(frozen=True)
class AttentionInputs:
    """The tensors of one call, by the names of the public function.

    Attributes:
        tensors: queries and keys (B, H, T, d) of the student and of the teacher, by name; keys may
            have fewer heads.
        mask: (B, T), or None; positions that are not seen.
        row_mask: (B, T), or None; rows that are left out.
    """

    tensors: dict[str, Tensor]
    mask: Tensor | None
    row_mask: Tensor | None
    row_mask_name: str
    lengths: Sequence[int] | Tensor | None
    positions: Tensor | None
    num_items_in_batch: Tensor | float | None
    labels: None = None
    token_weights: None = None

    def named_floats(self) -> dict[str, Tensor | None]:
        """Name every tensor of floating point."""
        return dict(self.tensors)

    def check(self, o: AttentionOptions, first: str) -> None:
        """Check what both functions have in common; `first` is the tensor that others must fit.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        student = self.tensors[first]
        shape = student.shape[0], student.shape[-2]
        for name, tensor in (("mask", self.mask), (self.row_mask_name, self.row_mask)):
            if tensor is not None:
                remedy = f": it must be (sequences, positions), {shape}"
                check_entries(name, tensor, MASKS, shape, student.device, first, remedy)
        check_num_items(o.reduction, self.num_items_in_batch)
        check_places(self.named_floats(), first, student)
        check_transforms(self, resolve_row_backend(o.backend))
        check_numbers(self)


def attention_loss(inputs: AttentionInputs, o: AttentionOptions) -> Tensor:
    """Compare the rows of attention of checked inputs, (B, H, T, d) each."""
    query = next(iter(inputs.tensors.values()))
    sequences, heads, length, _ = query.shape
    ids = sequence_ids(inputs.lengths, inputs.positions, (sequences, length), query.device)
    seen = torch.ones((sequences, length), dtype=torch.bool, device=query.device)
    valid = seen if inputs.row_mask is None else inputs.row_mask != 0
    seen = seen if inputs.mask is None else inputs.mask != 0
    valid = valid & (visible(seen, ids, o.causal, o.exclude_self) > 0)
    tensors = [
        _only(tensor, keep if given is not None else None)
        for tensor, keep, given in zip(
            inputs.tensors.values(),
            (valid, seen) * 2,
            (inputs.row_mask, inputs.mask) * 2,
        )
    ]
    scales = [
        1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        for q, scale in zip(tensors[::2], (o.student_scale, o.teacher_scale))
    ]
    given = (CAUSAL, o.causal), (SELF, o.exclude_self), (PACKED, ids is not None)
    given = (*given, (MASK, inputs.mask is not None))
    flags = ",".join([flag for flag, holds in given if holds])
    at = torch.arange(length, dtype=torch.int32, device=query.device).expand(sequences, length)
    ids = torch.zeros_like(at) if ids is None else ids
    divisor = loss_denominator(
        o.reduction, valid.numel(), valid, valid.device, inputs.num_items_in_batch
    )
    backend = resolve_row_backend(o.backend) if length else "reference"
    if backend == "reference":
        values = _dense(tensors, scales, flags, (at, ids), (at, ids, seen), o)
    else:
        numbers = tuple([float(n) for n in (o.nearest,) if n is not None])
        head = LensSpec(length, (), (), scales[0], None, scales[1], None)
        name = "nearest_rows" if numbers else "attention_rows"
        spec = RowSpec(head, name, (o.kind, flags), numbers, 1)
        # Compiled code refuses one tensor in two places.
        rows, columns = [at, ids], [at.clone(), ids.clone(), seen]
        extra = Extra(*[[t.reshape(-1) for t in tensors] for tensors in (rows, columns)])
        flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
        of_kernel = LensInputs([flat[0]], flat[1], None, [flat[2]], flat[3], None, None, None)
        known = not (isinstance(divisor, Tensor) and divisor.requires_grad)
        if known and o.reduction != "none" and asks_for_gradient(of_kernel):
            weights = valid[:, None].expand(sequences, heads, length).to(of_kernel.statistics_dtype)
            weights = weights / (heads if divisor is None else heads * divisor)
            return row_sum(spec, of_kernel, extra, backend, weights.reshape(-1, 1))
        values = row_values(spec, of_kernel, extra, backend)
    values = values.view(sequences, heads, length).mean(1).view(-1)
    shape = (sequences, length) if o.reduction == "none" else None
    return reduce_rows(values, valid.view(-1), shape, divisor)


def _only(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """Set positions that nobody looks at to 0, so that NaN there goes nowhere."""
    return tensor if keep is None else torch.where(keep[:, None, :, None], tensor, 0.0)


def _dense(tensors: list[Tensor], scales, flags: str, rows, columns, o) -> Tensor:
    """Compute the values (B, H, T) from the matrices of scores."""
    hidden, scores = left_out(flags, rows, columns), []
    double = any(t.dtype == torch.float64 for t in tensors)
    for q, k, scale in zip(tensors[::2], tensors[1::2], scales):
        q, k = (t.to(torch.float64 if double else torch.float32) for t in (q, k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores.append(scale * (q @ k.mT))
    hidden = None if hidden is None else hidden[:, None]
    return dense_rows(*scores, hidden, o.kind, o.nearest)
