"""One call of an objective of the logits, checked, and the way to its values and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fdd_kernels.backends import resolve_row_backend
from fdd_kernels.engine.row_blocks import Extra, asks_for_gradient, row_sum, row_values
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.row_blocks import RowFunction, RowSpec
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.objectives.dense import dense_logits
from fdd_kernels.objectives.logits.arguments import LogitInputs, LogitOptions
from fdd_kernels.objectives.numbers import check_labels, check_numbers
from fdd_kernels.objectives.reduction import loss_denominator, reduce_rows
from fdd_kernels.objectives.validation import (
    check_num_items,
    check_shift,
    check_tokens,
    check_transforms,
    compared_tokens,
)


@dataclass(frozen=True)
class Formula:
    """One objective, and its parameters.

    Attributes:
        function, words, numbers, outputs: of the `RowSpec`.
        dense: `dense(u_s, u_t, *per_row, *shared, *words, *numbers)` -> values (R, outputs) from
            the logits (R, V) of all rows, in operations that autograd can differentiate. Of several
            teachers u_t is a list.
    """

    function: str | RowFunction
    words: tuple[str, ...]
    numbers: tuple[float, ...]
    dense: Callable[..., Tensor]
    outputs: int = 1


@dataclass(frozen=True)
class LogitCall:
    """One call, checked: R rows, of which the valid ones are computed.

    `denominator` and `weights` are those of the loss; see `reduce_rows`.
    """

    options: LogitOptions
    head: LensSpec
    backend: str
    leading_shape: tuple[int, ...]
    rows: LensInputs
    denominator: Tensor | float | None
    weights: Tensor | None

    @staticmethod
    def of(
        inputs: LogitInputs,
        options: LogitOptions,
        *,
        predicts_labels: bool = False,
        own_vocabularies: bool = False,
        **more: Tensor,
    ) -> LogitCall:
        """Check a call before any work.

        Args:
            predicts_labels: labels are tokens that are compared, not only marks of positions.
            own_vocabularies: each model has its own; `vocab_size` is then the student's.
            more: further tensors of the call, by name.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        inputs = inputs.checked()
        of_student = replace(inputs, teacher_hidden=()) if own_vocabularies else inputs
        columns = compared_tokens(of_student, options.vocab_size)
        if own_vocabularies:
            _check_teacher_vocabulary(inputs, options.teacher_vocab_size)
        check_tokens(inputs)
        check_shift(options.shift, inputs.labels)
        check_num_items(options.reduction, inputs.num_items_in_batch)
        backend = resolve_row_backend(options.backend)
        check_transforms(inputs, backend, **more)
        check_numbers(inputs)
        if options.shift:
            inputs = inputs.shifted(options.ignore_index)
        rows = inputs.flattened(options.ignore_index, (0,), (0,))
        if rows.labels is not None:
            labelled = columns if predicts_labels else len(inputs.student_weight)
            check_labels(rows.labels, options.ignore_index, labelled)
        denominator = loss_denominator(
            options.reduction, rows.rows, rows.valid, rows.device, inputs.num_items_in_batch
        )
        rows, weights = inputs.weighted(rows)
        if inputs.teacher_hidden:
            last = options.teacher_vocab_size if own_vocabularies else columns
            bias = rows.teacher_bias if rows.teacher_bias is None else rows.teacher_bias[:last]
            rows = rows._replace(teacher_weight=rows.teacher_weight[:last], teacher_bias=bias)
        head = LensSpec(
            columns=columns,
            requests=(),
            moments=(),
            student_logit_scale=options.student_logit_scale,
            student_softcap=options.student_softcap,
            teacher_logit_scale=options.teacher_logit_scale,
            teacher_softcap=options.teacher_softcap,
        )
        return LogitCall(options, head, backend, inputs.leading_shape, rows, denominator, weights)

    def where(self, counted: Tensor) -> LogitCall:
        """Leave out the rows that are not marked in `counted` (R,)."""
        valid = counted if self.rows.valid is None else self.rows.valid & counted
        return replace(self, rows=self.rows._replace(valid=valid))

    def values(self, formula: Formula, *per_row: Tensor, shared: Sequence[Tensor] = ()) -> Tensor:
        """Compute the values of all rows, (R, outputs); 0 where a row is not valid."""
        inputs = self.rows._replace(labels=None)
        if self.backend == "reference":
            with torch.autocast(inputs.device.type, enabled=False):
                return self._dense_values(formula, per_row, shared)
        extra = Extra(list(per_row), list(shared))
        return row_values(self._spec(formula), inputs, extra, self.backend)

    def loss(self, formula: Formula, *per_row: Tensor, shared: Sequence[Tensor] = ()) -> Tensor:
        """Compute the loss from a formula with one value per row."""
        options, divisor = self.options, self.denominator
        divides = isinstance(divisor, Tensor) and divisor.requires_grad
        is_known = options.reduction != "none" and self.backend != "reference" and not divides
        if not is_known or not asks_for_gradient(self.rows):
            return self._reduced(self.values(formula, *per_row, shared=shared))
        weights = self.weights
        if weights is None:
            weights = self.rows.student_weight.new_ones(
                self.rows.rows, dtype=self.rows.statistics_dtype
            )
        weights = weights * options.factor
        if divisor is not None:
            weights = (weights / divisor).to(weights.dtype)
        inputs = self.rows._replace(labels=None)
        spec, extra = self._spec(formula), Extra(list(per_row), list(shared))
        return row_sum(spec, inputs, extra, self.backend, weights[:, None])

    def dense_logits(self, rows: Tensor | slice) -> list[Tensor | None]:
        """Compute both models' logits of `rows`, (r, V); None unless there is one teacher."""
        inputs, head = self.rows, self.head
        student = inputs.student_weight, inputs.student_bias
        teacher = inputs.teacher_weight, inputs.teacher_bias
        of_student = head.student_logit_scale, head.student_softcap, head.columns
        of_teacher = head.teacher_logit_scale, head.teacher_softcap, None
        return [
            dense_logits(h[0][rows].to(inputs.statistics_dtype), *of_head) if len(h) == 1 else None
            for h, *of_head in (
                (inputs.student_hidden, *student, *of_student),
                (inputs.teacher_hidden, *teacher, *of_teacher),
            )
        ]

    def _reduced(self, values: Tensor) -> Tensor:
        shape = self.leading_shape if self.options.reduction == "none" else None
        rows = self.rows.valid, shape, self.denominator, self.weights
        return reduce_rows(values[:, 0] * self.options.factor, *rows)

    def _spec(self, formula: Formula) -> RowSpec:
        parts = formula.function, formula.words, formula.numbers, formula.outputs
        return RowSpec(self.head, *parts)

    def _dense_values(
        self, formula: Formula, per_row: tuple[Tensor, ...], shared: Sequence[Tensor]
    ) -> Tensor:
        """Compute the valid rows' values densely, and put them in their places."""
        inputs = self.rows
        valid = torch.arange(inputs.rows, device=inputs.device)
        if inputs.valid is not None:
            valid = inputs.valid.nonzero()[:, 0]
        u_s, u_t = self.dense_logits(valid)
        if len(inputs.teacher_hidden) > 1:  # their heads lie side by side
            dtype, states = inputs.statistics_dtype, inputs.teacher_hidden
            heads = inputs.teacher_weight.split([h.shape[1] for h in states], dim=1)
            u_t = [h[valid].to(dtype) @ w.to(dtype).T for h, w in zip(states, heads)]
        per_row = [t[valid] for t in per_row]
        found = formula.dense(u_s, u_t, *per_row, *shared, *formula.words, *formula.numbers)
        return found.new_zeros((inputs.rows, formula.outputs)).index_copy(0, valid, found)


def _check_teacher_vocabulary(inputs: LogitInputs, size: int | None) -> None:
    if size is not None and not inputs.teacher_hidden:
        raise ValueError(f"teacher_vocab_size={size} was given without a teacher: leave it out")
    if size is not None and size > len(inputs.teacher_weight):
        raise ValueError(
            f"teacher_vocab_size={size} is larger than the teacher's vocabulary, which has "
            f"{len(inputs.teacher_weight)} tokens"
        )
