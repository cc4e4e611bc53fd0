"""Relational knowledge distillation: distances between all pairs and angles of all triples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.objectives.features.inputs import FeatureInputs
from fdd_kernels.objectives.features.streams import count_rows, in_float64, sum_over_rows
from fdd_kernels.objectives.option_checks import require_number

# The angles of R samples take R^3 D operations: 512 samples of width 768 take 4e11 for both models.
MOST_SAMPLES_WITH_ANGLES = 512
# Two samples whose squared distance is below this part of their squared lengths are the same one:
# of the difference of float64 sums of a thousand products nothing else is certain.
_SAME = 2.0**-46


def relational_kd(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Compare distances between samples and angles at samples (RKD).

    With d_ij the distance of samples i and j over the mean of all distances that are not 0, and
    a_ijk the cosine of the angle at i between j and k::

        loss = distance_weight * mean over (i, j) of huber(d_s - d_t)
               + angle_weight * mean over (i, j, k) of huber(a_s - a_t)

    huber(x) is x^2 / 2 up to 1 and |x| - 1/2 beyond. Means are over all pairs and triples, those of
    equal samples among them, which are 0. Gradient flows through the mean distance.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, as in mdistiller's RKD.

    Distances are computed in blocks of samples, in float64, and again in the backward pass: no
    (R, R) tensor is held. Angles take R^3 D operations.

    Args:
        student_features, teacher_features: (..., Ds) and (..., Dt): R samples, such as one pooled
            state for each sequence.
        distance_weight, angle_weight: weights; a term of weight 0 costs nothing.
        mask: (...) bool or int; samples that are 0 are left out.

    Returns:
        A scalar, float32, or float64 if either side is. Two samples whose distance is below 1.2e-7
        of their lengths about the mean count as the same one: distance 0, gradient 0.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or weight, or angles of more than 512
            samples; named before any work.
    """
    require_number("distance_weight", distance_weight)
    require_number("angle_weight", angle_weight)
    inputs = FeatureInputs.of(student_features, teacher_features, mask=mask)
    samples = inputs.student.shape[:-1].numel()
    if angle_weight and samples > MOST_SAMPLES_WITH_ANGLES:
        raise ValueError(
            f"angle_weight={angle_weight} with {samples} samples: the angles of R samples take R^3 "
            f"times the width operations, so at most {MOST_SAMPLES_WITH_ANGLES} samples are taken: "
            "pass angle_weight=0, or fewer samples (pooled states, a random choice of positions)"
        )
    valid = inputs.valid()
    valid = None if valid is None else valid.reshape(-1)
    ours, theirs = (_centred(h.flatten(0, -2), valid) for h in (inputs.student, inputs.teacher))
    count = count_rows(ours, valid).clamp(min=1)
    loss = ours.new_zeros(())
    if distance_weight:
        loss = loss + distance_weight * _distances(ours, theirs, valid) / count.square()
    if angle_weight:
        loss = loss + angle_weight * _angles(ours, theirs, valid) / count**3
    return loss.to(inputs.dtype)


def _centred(features: Tensor, valid: Tensor | None) -> Tensor:
    """Subtract a constant near the mean: no distance depends on it, and sums then round less."""
    rows = in_float64(features, valid)
    return rows - rows.detach().mean(0)


def _block_distances(block: Tensor, rows: Tensor, valid_block, valid) -> Tensor:
    """Compute the distances (r, R) of a block of samples to all; 0 where one is not valid."""
    sizes = block.square().sum(1, keepdim=True) + rows.square().sum(1)
    squares = sizes - 2 * block @ rows.mT
    same = squares <= _SAME * sizes
    if valid is not None:
        same = same | ~(valid_block[:, None] & valid)
    return squares.masked_fill(same, 1.0).sqrt().masked_fill(same, 0.0)


def _distances(ours: Tensor, theirs: Tensor, valid: Tensor | None) -> Tensor:
    """Sum the Huber distances of all pairs; both samples (R, D) in float64."""

    def mean_of(rows: Tensor) -> Tensor:
        def add(block, valid_block):
            found = _block_distances(block, rows, valid_block, valid)
            return found.sum(), (found > 0).sum().double()

        total, pairs = sum_over_rows(add, (rows, valid), len(rows))
        return total / pairs.clamp(min=1)

    means = [mean_of(rows) for rows in (ours, theirs)]
    per_mean = [mean.masked_fill(mean == 0, torch.inf).reciprocal() for mean in means]

    def huber(block_s, block_t, valid_block):
        s = _block_distances(block_s, ours, valid_block, valid) * per_mean[0]
        t = _block_distances(block_t, theirs, valid_block, valid) * per_mean[1]
        return [F.smooth_l1_loss(s, t, reduction="sum")]

    return sum_over_rows(huber, (ours, theirs, valid), len(ours))[0]


def _angles(ours: Tensor, theirs: Tensor, valid: Tensor | None) -> Tensor:
    """Sum the Huber distances of the angles at all triples; both samples (R, D) in float64."""

    def directions(block, rows, valid_block):
        apart = rows - block[:, None]
        squares = apart.square().sum(-1)
        zero = squares == 0
        if valid is not None:
            zero = zero | ~(valid_block[:, None] & valid)
        return apart * squares.masked_fill(zero, torch.inf).rsqrt()[..., None]

    def huber(block_s, block_t, valid_block):
        s = directions(block_s, ours, valid_block)
        t = directions(block_t, theirs, valid_block)
        return [F.smooth_l1_loss(s @ s.mT, t @ t.mT, reduction="sum")]

    numbers = len(ours) * max(len(ours), ours.shape[1], theirs.shape[1])
    return sum_over_rows(huber, (ours, theirs, valid), numbers)[0]
