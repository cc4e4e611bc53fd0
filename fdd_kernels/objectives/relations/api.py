"""Distillation of relations between positions (MiniLM) and of attention, without their matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fdd_kernels.objectives.option_checks import require_int
from fdd_kernels.objectives.relations.call import (
    AttentionInputs,
    AttentionOptions,
    attention_loss,
)
from fdd_kernels.objectives.tensors import require_float


def fused_relation_kd(
    student_x: Tensor,
    student_y: Tensor,
    teacher_x: Tensor,
    teacher_y: Tensor,
    *,
    relation_heads: int,
    kind: str = "kl",
    mask: Tensor | None = None,
    causal: bool = False,
    exclude_self: bool = False,
    lengths: Sequence[int] | Tensor | None = None,
    positions: Tensor | None = None,
    k: int | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compare relations between positions, in memory that does not grow with positions squared.

    Both tensors of a model are cut into `relation_heads` heads of width d. The scores of row i of a
    head are x_i . y_j * scale over the positions j that it sees; q and p are their softmaxes, the
    student's and the teacher's. The value of a position is the mean over heads of::

        kind="kl"        KL(p || q)               (MiniLM; v2: Q-Q, K-K and V-V relations)
        kind="jeffreys"  KL(p || q) + KL(q || p)  (SeqPE)
        kind="mse"       the mean of (s - t)^2 over the columns that are seen  (TinyBERT, scores)

    Models may have different widths and numbers of heads; the relations' heads are as many.

    Scores are at hand for one block of rows at a time: at most 128 MiB on a CPU and 1 GiB
    elsewhere, or one row; in float32 or better. Gradients flow to both tensors of the student. They
    are formed in the forward pass (by "none" in the backward pass, from the scores computed again);
    evaluate under `torch.no_grad()`. The loss can be differentiated once.

    Args:
        student_x, student_y: (B, T, width), such as the last layer's queries and keys, or the same
            tensor twice.
        teacher_x, teacher_y: (B, T, width), constants.
        relation_heads: divides both widths.
        kind: as above.
        mask: (B, T) bool or int; positions that are 0 are left out, as rows and as columns.
        causal: row i sees columns j <= i only.
        exclude_self: row i does not see column i.
        lengths: of the sequences packed in the rows, in order; together they fill all rows. Rows
            see columns of their own sequence only.
        positions: (B, T) integers in place of `lengths`: position ids, which start again with each
            sequence.
        k: only the k columns of a row with the teacher's largest scores (TRG).
        student_scale, teacher_scale: multiply scores. None: 1 / sqrt(d), each model's own d.
        reduction: "mean" over the positions that are not left out and see a column, "sum", or
            "none": (B, T) with 0 at the others.
        num_items_in_batch: divide the sum by this number instead; a tensor of one number may be 0.
        backend: "auto", "torch" or "reference" (dense, differentiable any number of times).

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (B, T) with reduction="none").
        Without a position that counts it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work. Numbers on a GPU are looked at if FDD_KERNELS_DEBUG=1.
    """
    o = AttentionOptions(
        kind=kind,
        causal=causal,
        exclude_self=exclude_self,
        nearest=k,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        reduction=reduction,
        backend=backend,
    )
    require_int("relation_heads", relation_heads, minimum=1)
    tensors = {
        "student_x": student_x,
        "student_y": student_y,
        "teacher_x": teacher_x,
        "teacher_y": teacher_y,
    }
    _check_dimensions(tensors, 3, "(sequences, positions, width)")
    for name, tensor in tensors.items():
        if tensor.shape[:2] != student_x.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and student_x {tuple(student_x.shape)}: "
                "both models must have seen the same positions"
            )
        if tensor.shape[2] % relation_heads:
            raise ValueError(
                f"relation_heads={relation_heads} does not divide the width {tensor.shape[2]} of "
                f"{name}: choose a common divisor of the widths"
            )
    for model in ("student", "teacher"):
        widths = [tensors[f"{model}_{name}"].shape[2] for name in "xy"]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{model}_y has width {widths[1]} and {model}_x {widths[0]}: their inner products "
                "need one width"
            )
    inputs = AttentionInputs(tensors, mask, mask, "mask", lengths, positions, num_items_in_batch)
    inputs.check(o, "student_x")
    heads = {n: t.unflatten(2, (relation_heads, -1)).transpose(1, 2) for n, t in tensors.items()}
    return _loss(inputs, heads, o)


def fused_attention_kd(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    positions: Tensor | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL between the teacher's and the student's rows of attention, in memory that does not grow
    with positions squared.

    For attention transfer and for students whose attention is linear: a row's value is
    KL(softmax(q_t . k_t * teacher_scale) || softmax(q_s . k_s * student_scale)) over the keys that
    it sees, and that of a position the mean over its heads.

    Memory and gradients are as in `fused_relation_kd`; the student's queries and keys get gradient.

    Args:
        q_s, q_t: queries (B, H, T, d) after position embedding, as many heads of both models; d may
            differ.
        k_s, k_t: keys (B, H, T, d), or fewer heads that divide H: each is shared by as many
            consecutive heads of queries, as in grouped-query attention.
        causal: a query sees keys up to its own position only.
        mask: (B, T) bool or int; a key is seen where it is not 0.
        query_mask: (B, T) bool or int; queries that are 0 are left out, such as padding on the
            right, which sees keys.
        lengths, positions: of sequences packed in a row, as in `fused_relation_kd`.
        student_scale, teacher_scale: multiply scores. None: 1 / sqrt(d), each model's own d.
        reduction: "mean" over the positions that see a key, "sum", or "none": (B, T) with 0 at the
            others.
        num_items_in_batch: divide the sum by this number instead; a tensor of one number may be 0.
        backend: "auto", "torch" or "reference" (dense, differentiable any number of times).

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (B, T) with reduction="none").
        Without a row that counts it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work. Numbers on a GPU are looked at if FDD_KERNELS_DEBUG=1.
    """
    o = AttentionOptions(
        kind="kl",
        causal=causal,
        exclude_self=False,
        nearest=None,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        reduction=reduction,
        backend=backend,
    )
    tensors = {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t}
    _check_dimensions(tensors, 4, "(sequences, heads, positions, width)")
    for name, tensor in tensors.items():
        if (tensor.shape[0], tensor.shape[2]) != (q_s.shape[0], q_s.shape[2]):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and q_s {tuple(q_s.shape)}: queries and "
                "keys of both models must be of the same sequences and positions"
            )
    if q_t.shape[1] != q_s.shape[1]:
        raise ValueError(
            f"q_t has {q_t.shape[1]} heads and q_s {q_s.shape[1]}: heads are compared one "
            "by one, choose or average heads of the teacher first"
        )
    for name, keys, queries in (("k_s", k_s, q_s), ("k_t", k_t, q_t)):
        if not keys.shape[1] or queries.shape[1] % keys.shape[1]:
            raise ValueError(
                f"{name} has {keys.shape[1]} heads, which do not divide the {queries.shape[1]} "
                "heads of its queries: pass as many, or grouped keys"
            )
        if keys.shape[3] != queries.shape[3]:
            raise ValueError(
                f"{name} has width {keys.shape[3]} and its queries {queries.shape[3]}: scores are "
                "inner products"
            )
    inputs = AttentionInputs(
        tensors, mask, query_mask, "query_mask", lengths, positions, num_items_in_batch
    )
    inputs.check(o, "q_s")
    return _loss(inputs, tensors, o)


def _check_dimensions(tensors: dict[str, Tensor], dimensions: int, meaning: str) -> None:
    for name, tensor in tensors.items():
        require_float(name, tensor)
        if tensor.ndim != dimensions or tensor.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {meaning}")


def _loss(inputs: AttentionInputs, heads: dict[str, Tensor], o: AttentionOptions) -> Tensor:
    with torch.autocast(next(iter(heads.values())).device.type, enabled=False):
        return attention_loss(replace(inputs, tensors=heads), o)
