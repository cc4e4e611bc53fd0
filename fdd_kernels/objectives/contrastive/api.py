"""Contrastive distillation: InfoNCE, KL between similarities, SupCon and margin MSE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdd_kernels.backends import resolve_row_backend
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.spec import LensSpec
from fdd_kernels.objectives.contrastive.formulas import dense
from fdd_kernels.objectives.contrastive.inputs import ContrastiveInputs, ContrastiveOptions
from fdd_kernels.objectives.contrastive.sides import Side, own_offset
from fdd_kernels.objectives.logits.arguments import LogitOptions
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.objectives.teacher_weights import weights_of_rows


def fused_contrastive_kd(
    student_a: Tensor,
    student_b: Tensor,
    teacher_a: Tensor | None = None,
    teacher_b: Tensor | None = None,
    *,
    loss: str = "infonce",
    scale: Tensor | float = 1.0,
    teacher_scale: Sequence[float] | float | None = None,
    normalize: bool | None = None,
    labels: Tensor | None = None,
    row_tags: Tensor | None = None,
    column_tags: Tensor | None = None,
    exclude: str = "none",
    positives: str = "student",
    symmetric: bool = False,
    teachers: Sequence[tuple[Tensor, Tensor]] | None = None,
    teacher_weights: Sequence[float] | Tensor | None = None,
    mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    backend: str = "auto",
    process_group=None,
) -> Tensor:
    """Compare every row of one side with every row of the other, in memory that does not grow with
    rows x columns.

    Scores are s_ij = scale * a_i . b_j and t_ij = teacher_scale * ta_i . tb_j of vectors of length
    1. With q and p the softmaxes of row i over the columns j, the value of row i is::

        loss="infonce"     -log q of the label's column, or of column i
        loss="kl"          KL(p || q); with several teachers p is the weighted mean of their
                           softmaxes (MobileCLIP2), whose cross-entropy has the same gradient
        loss="supcon"      -mean of log q over the columns j of the row's tag; 0 without any (Khosla
                           et al., 2020)
        loss="margin_mse"  2 Var_j(s_ij - t_ij), the mean of squared differences of margins over all
                           pairs of columns (sentence-transformers); of the vectors as they are

    With positives="teacher" (COCONUT) SupCon's positives are the teacher's columns: the mean over
    them of logsumexp_j s_ij - scale * a_i . tb_j.

    Scores are at hand for one block of rows at a time: at most 128 MiB on a CPU and 1 GiB
    elsewhere, or one row. Vectors are normalised, and scores computed, in float32 (float64 for
    float64 inputs), also under autocast: at a scale of 100 unit vectors in bfloat16 move scores by
    0.1. A vector of zeros has scores and gradients of 0. Gradients flow to both student tensors and
    to a scale that requires grad. They are formed in the forward pass (by "none" in the backward
    pass, from the scores computed again); evaluate under `torch.no_grad()`. The loss can be
    differentiated once.

    Args:
        student_a: rows (N, D).
        student_b: columns (C, D), such as the other modality, class prototypes or a queue.
        teacher_a, teacher_b: the teacher's (N, Dt) and (C, Dt), constants.
        loss: as above.
        scale: multiplies the student's scores, 1 / tau; a float or a tensor of one number.
        teacher_scale: the teacher's, or one for each teacher. None: the number in `scale`.
        normalize: divide vectors by their lengths, which count as 1e-12 if smaller. None: yes, but
            not for "margin_mse".
        labels: (N,) int64 or int32 columns of InfoNCE's positives. None: column i for row i. Rows
            equal to `ignore_index` drop out.
        row_tags, column_tags: (N,) and (C,) integers, such as classes. Without `column_tags` those
            of rows hold for columns.
        exclude: columns that a row is not compared with: "none", "self" column i, "same_tag" those
            of the row's tag. Never InfoNCE's positive.
        positives: of "supcon", "student" or "teacher", as above.
        symmetric: the mean of both directions, each side as rows.
        teachers: several teachers' [(teacher_a, teacher_b), ...] in place of one.
        teacher_weights: (M,) weights of the teachers, or (M, N) for each row; divided by their sum.
            None: the mean.
        mask, column_mask: (N,) and (C,) bool or int; entries that are 0 are left out, as rows and
            as columns. A row whose positive is left out gives 0.
        reduction: "mean" over rows that are not left out, "sum", or "none": (N,) with 0 at the
            others. Rows without positives, or without columns, give 0 and count.
        num_items_in_batch: divide the sum by this number instead; a tensor of one number may be 0.
        backend: "auto", "torch" or "reference" (dense, differentiable any number of times).
        process_group: compare with the columns of all its processes, which must have as many rows
            each. Row i's own column is that of its process; labels count all columns in the order
            of ranks. The loss is of this process's rows, and the backward pass adds up the
            gradients of all processes' losses: average over processes, as DDP does.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (N,) with reduction="none").

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work. Numbers on a GPU are looked at if FDD_KERNELS_DEBUG=1 (labels: by an assertion
            on the device).
    """
    o = ContrastiveOptions(
        loss=loss,
        exclude=exclude,
        positives=positives,
        normalize=normalize,
        symmetric=symmetric,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )
    inputs = ContrastiveInputs(
        student_a=student_a,
        student_b=student_b,
        pairs=_pairs(teacher_a, teacher_b, teachers, o),
        several=teachers is not None,
        scale=scale,
        teacher_scale=teacher_scale,
        teacher_weights=teacher_weights,
        labels=labels,
        row_tags=row_tags,
        column_tags=column_tags,
        mask=mask,
        column_mask=column_mask,
        num_items_in_batch=num_items_in_batch,
    )
    inputs.check(o, process_group is not None)
    with torch.autocast(student_a.device.type, enabled=False):
        return _loss(inputs, o, process_group)


def _pairs(
    teacher_a, teacher_b, teachers, o: ContrastiveOptions
) -> tuple[tuple[Tensor | None, Tensor], ...]:
    """Return the teachers' vectors, two of each."""
    if teachers is None:
        if teacher_a is None and teacher_b is None:
            return ()
        if teacher_b is None or (teacher_a is None and (o.has_teachers or o.symmetric)):
            missing = "teacher_b" if teacher_b is None else "teacher_a"
            raise ValueError(f"{missing} is None: pass teacher_a and teacher_b, or neither")
        return ((teacher_a, teacher_b),)
    if teacher_a is not None or teacher_b is not None:
        raise ValueError("teachers was given beside teacher_a or teacher_b: pass one of them")
    if not isinstance(teachers, Sequence) or not all(
        isinstance(pair, Sequence) and len(pair) == 2 for pair in teachers
    ):
        raise TypeError(
            "teachers must be a list of pairs (teacher_a, teacher_b), got "
            f"{type(teachers).__name__}"
        )
    if not teachers:
        raise ValueError("teachers is empty: pass at least one pair (teacher_a, teacher_b)")
    return tuple([tuple(pair) for pair in teachers])


def _loss(inputs: ContrastiveInputs, o: ContrastiveOptions, group) -> Tensor:
    """Compute the loss of checked inputs."""
    rank = 0
    if group is not None:
        counts = inputs.rows, inputs.columns
        rank = own_offset(group, inputs.student_a.device, counts)
        import torch.distributed as dist

        inputs.check_labels(o.ignore_index, inputs.columns * dist.get_world_size(group))
    else:
        inputs.check_labels(o.ignore_index, inputs.columns)
    a, b = (side.ready(o.normalizes) for side in _sides(inputs, o.ignore_index, rank))
    scales = inputs.teacher_scale
    if scales is None:
        scales = inputs.scale
        scales = scales.detach().to(a.student).reshape(()) if isinstance(scales, Tensor) else scales
    if not isinstance(scales, Sequence):
        scales = [scales] * len(inputs.pairs)
    losses = []
    for rows, columns in ((a, b), (b, a))[: 1 + o.symmetric]:
        columns = columns if group is None else columns.gathered(group)
        rows = rows.scaled(inputs.scale, scales)
        losses.append(_direction(inputs, o, rows, columns))
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


def _sides(inputs: ContrastiveInputs, ignore_index: int, rank: int) -> tuple[Side, Side]:
    """Return both sides, as they were given."""
    zeros = inputs.student_a.new_zeros
    tags = inputs.row_tags, inputs.column_tags
    if tags[0] is None:
        tags = tuple([zeros(n, dtype=torch.int32) for n in (inputs.rows, inputs.columns)])
    elif tags[1] is None:
        tags = tags[0], tags[0]
    sides = []
    for i, student in enumerate((inputs.student_a, inputs.student_b)):
        mask, count = (inputs.mask, inputs.column_mask)[i], len(student)
        teachers = tuple([pair[i] for pair in inputs.pairs if pair[i] is not None])
        present = zeros(count, dtype=torch.bool).logical_not() if mask is None else mask != 0
        if i == 0 and inputs.labels is not None:
            present = present & (inputs.labels != ignore_index)
        own = torch.arange(count, device=student.device) + rank * count
        whole = mask is None and (i == 1 or inputs.labels is None)
        of_side = tags[i].to(torch.int64, copy=True)
        sides.append(Side(student, teachers, of_side, present, own, whole))
    return tuple(sides)


def _direction(
    inputs: ContrastiveInputs, o: ContrastiveOptions, rows: Side, columns: Side
) -> Tensor:
    """Compute the loss of one side's rows."""
    valid, labels, head = rows.present, None, columns.student
    if o.loss == "infonce":
        labels = rows.own.clone()  # compiled code refuses one tensor in two places
        if inputs.labels is not None:
            labels = inputs.labels.long().masked_fill(~valid, 0)
    count = len(valid)
    divisor = loss_denominator(o.reduction, count, valid, valid.device, inputs.num_items_in_batch)
    if labels is not None:
        valid = valid & columns.present[labels]
    column_tags, present = columns.tags, columns.present
    if o.positives == "teacher":
        head = torch.cat([head, columns.teachers[0].to(head.dtype)])
        column_tags, present = torch.cat([column_tags] * 2), torch.cat([present] * 2)
    teachers = list(rows.teachers) if o.has_teachers else []
    their_columns = columns.teachers[0] if len(teachers) == 1 else None
    if len(teachers) > 1:
        their_columns = torch.cat(columns.teachers, 1)
    whole = rows.whole and (labels is None or columns.whole)
    scores = LensInputs(
        [rows.student],
        head,
        None,
        teachers,
        their_columns,
        None,
        None if whole else valid,
        None,
    )
    per_row = [rows.own, rows.tags, _weights(inputs, rows, count)]
    per_row += [] if labels is None else [labels]
    options = LogitOptions(reduction=o.reduction, backend=o.backend)
    spec = LensSpec(len(head), (), (), 1.0, None, 1.0, None)
    backend = resolve_row_backend(o.backend)
    call = LogitCall(options, spec, backend, (count,), scores, divisor, None)
    formula = Formula(
        o.row_function, (o.exclude, "all" if columns.whole else "some"), (), dense(o.row_function)
    )
    return call.loss(formula, *per_row, shared=(column_tags, present))


def _weights(inputs: ContrastiveInputs, rows: Side, count: int) -> Tensor:
    """Return the teachers' weights for each row, (N, M)."""
    weights, student = inputs.teacher_weights, rows.student
    if weights is None:
        weights = [1.0] * max(1, len(inputs.pairs))
    weights = torch.as_tensor(weights, dtype=student.dtype, device=student.device)
    return weights_of_rows(weights, count, student.dtype).contiguous()
