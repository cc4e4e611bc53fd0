"""Distances between the features of single positions: attention transfer, norm and direction."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.objectives.features.inputs import FeatureInputs
from fdd_kernels.objectives.numbers import check_labels
from fdd_kernels.objectives.tensors import require_float


def attention_transfer(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Compare where in a sequence the features are large.

    With m_j = mean over the width of h_j^2 at position j of a sequence, per position::

        loss_j = (m_s,j / |m_s| - m_t,j / |m_t|)^2        |m|: length over the sequence's positions

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, with squares,
    as in mdistiller's AT.

    Args:
        student_features, teacher_features: (..., T, Ds) and (..., T, Dt).
        mask: (..., T) bool or int; positions that are 0 are left out, also of the lengths.
        reduction: "mean" over valid positions, "sum", or "none": (..., T).
        num_items_in_batch: divide the sum by this number instead.

    Returns:
        float32, or float64 if either side is. A sequence of zeros has a map of zeros.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or choice, named before any work.
    """
    inputs = FeatureInputs.of(
        student_features,
        teacher_features,
        mask=mask,
        num_items_in_batch=num_items_in_batch,
        reduction=reduction,
    )
    valid = inputs.valid()
    ours, theirs = (_map(features, valid) for features in (inputs.student, inputs.teacher))
    return inputs.reduced((ours - theirs).square(), valid, reduction)


def norm_direction_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    class_means: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Pull features to the direction of the teacher's class mean, and to at least its length.

    With c_y the mean of the teacher's features over class y, per position::

        loss = 1 - h_s . c_y / (|c_y| max(|h_s|, |h_t|))

    Source: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and
    Direction", 2023, and its code: where |h_s| = |h_t| the gradient is that of |h_s|.

    Args:
        student_features, teacher_features: (..., D); the widths are equal.
        class_means: (C, D), over the training data; a constant.
        labels: (...) int64 or int32 classes; positions equal to `ignore_index` are left out.
        mask: (...) bool or int; positions that are 0 are left out.
        reduction: "mean" over valid positions, "sum", or "none": (...).
        num_items_in_batch: divide the sum by this number instead.

    Returns:
        float32, or float64 if either side is. Where c_y, or h_s and h_t, are 0 the loss is 1, with
        gradient 0.

    Raises:
        TypeError, ValueError: a wrong type, shape, device, choice or class, named before any work.
    """
    inputs = FeatureInputs.of(
        student_features,
        teacher_features,
        mask=mask,
        labels=labels,
        num_items_in_batch=num_items_in_batch,
        reduction=reduction,
        dimensions=1,
        equal_widths=True,
    )
    if labels is None:
        raise TypeError("labels is None: pass the class of each position, (...) int64")
    width = inputs.student.shape[-1]
    require_float("class_means", class_means)
    if class_means.ndim != 2 or class_means.shape[1] != width or not len(class_means):
        raise ValueError(
            f"class_means has shape {tuple(class_means.shape)}: it must be (classes, {width})"
        )
    if class_means.device != inputs.device:
        raise ValueError(
            f"class_means is on {class_means.device} and student_features on {inputs.device}: "
            "move it"
        )
    check_labels(labels, ignore_index, len(class_means))
    valid = inputs.valid(ignore_index)
    classes = torch.where(valid, labels, 0)
    student, teacher, centre = (
        torch.where(valid[..., None], h.to(inputs.dtype), 0.0)
        for h in (inputs.student, inputs.teacher, class_means.detach()[classes])
    )
    loss = _norm_and_direction(student, teacher, centre)
    return inputs.reduced(loss, valid, reduction)


def _map(features: Tensor, valid: Tensor | None) -> Tensor:
    """Compute the sum of squares of each position (..., T) over the length of all sums, float64.

    The mean over the width differs from the sum by a factor that the length removes.
    """
    if valid is not None:
        features = torch.where(valid[..., None], features, 0.0)
    squares = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float64).square()
    return squares * _inverse_length(squares)[..., None]


def _inverse_length(vectors: Tensor) -> Tensor:
    """Compute 1 / |v| over the last dimension; 0, with gradient 0, for a vector of zeros."""
    squares = vectors.square().sum(-1)
    return squares.masked_fill(squares == 0, torch.inf).rsqrt()


def _norm_and_direction(s: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Compute 1 - s.c / (|c| max(|s|, |t|)) as a sum of terms that are not negative.

    With n the larger length it is (n - |s|) / n + |s| |s / |s| - c / |c||^2 / (2 n), which keeps
    its digits where s has the direction of c.
    """
    per_s, per_t, per_c = (_inverse_length(vector) for vector in (s, t, c))
    length_s, length_t = s.square().sum(-1) * per_s, t.square().sum(-1) * per_t
    larger = torch.where(length_s >= length_t, length_s, length_t)
    per_larger = larger.masked_fill(larger == 0, torch.inf).reciprocal()
    apart = (s * per_s[..., None] - c * per_c[..., None]).square().sum(-1)
    loss = (larger - length_s + length_s * apart / 2) * per_larger
    return torch.where((per_c > 0) & (larger > 0), loss, 1.0)
