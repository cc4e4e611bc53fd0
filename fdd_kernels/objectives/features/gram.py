"""Distances between Gram matrices, from cross-covariances of width x width.

For rows S (R, Ds) and T (R, Dt) the Gram matrices S S^T and T T^T are (R, R). Every objective here
is a function of S^T S, S^T T and T^T T, and perhaps of one more pass over the rows. Sums are
float64. Where the widths are equal they are sums over S and E = S - T, since S S^T - T T^T =
E S^T + T E^T keeps the digits that a difference of sums would lose where the models nearly agree.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.lens.distances import DISTANCES, Sums
from fdd_kernels.objectives.features.groups import check_groups, split_into_groups
from fdd_kernels.objectives.features.inputs import FeatureInputs
from fdd_kernels.objectives.features.streams import again, count_rows, in_float64, sum_over_rows
from fdd_kernels.objectives.option_checks import require_choice


def gram_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    kind: str = "sp",
    *,
    mask: Tensor | None = None,
    groups: Tensor | str | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """Compare how the positions of a batch, or the channels, resemble one another in two models.

    With S (N, Ds) and T (N, Dt) the valid positions of a group, and normalise() dividing each row
    of a matrix by its length::

        "sp"    |normalise(S S^T) - normalise(T T^T)|^2 / N^2
        "cka"   1 - |S'^T T'|^2 / (|S'^T S'| |T'^T T'|), where ' subtracts the group's mean
        "nst"   (mean over (i, j) of (S^T S)_ij^2 - 2 mean of (S^T T)_ij^2) / N
        "ickd"  |normalise(S^T S) - normalise(T^T T)|^2 / D

    Sources: "sp" Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019; "cka"
    Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, linear
    kernel; "nst" Huang and Wang, "Like What You Like", 2017, as in VidLanKD's code: without
    normalisation and without the constant term of the teacher (there summed over sequences, here
    by reduction="sum"); "ickd" Liu et al., "Exploring Inter-Channel Correlation for
    Diversity-Preserved Knowledge Distillation", ICCV 2021, as in DisWOT's code.

    No (N, N) tensor is formed: memory for sums is a few tensors of width x width in float64, and
    row blocks are computed again in the backward pass. Where the features of two models of equal
    width agree to a part e, up to a common factor, value and gradient are exact to u / e of
    themselves with u = 1e-16. With different widths, or features that agree after a rotation, a
    value below 1e-14 is rounding.

    Args:
        student_features, teacher_features: (..., T, Ds) and (..., T, Dt). "ickd" needs Ds = Dt.
        mask: (..., T) bool or int; positions that are 0 are left out.
        groups: "all" positions together, each "sequence" (the last dimension but one) by itself,
            or an id (..., T) for each position, as in packed sequences. None: "all" for "sp" and
            "cka", "sequence" for "nst" and "ickd".
        reduction: "mean" over the groups that have a valid position, "sum", or "none": one number
            a group, in the order of sequences or of ids.
        num_items_in_batch: divide the sum over groups by this number instead.

    Returns:
        float32, or float64 if either side is. A group without a valid position gives 0. A row of
        zeros stays 0 when normalised; without any variance "cka" is 1, with gradient 0.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or choice, named before any work.
    """
    require_choice("kind", kind, tuple(_KINDS))
    inputs = FeatureInputs.of(
        student_features,
        teacher_features,
        mask=mask,
        num_items_in_batch=num_items_in_batch,
        reduction=reduction,
        equal_widths=kind == "ickd",
    )
    if groups is None:
        groups = "sequence" if kind in ("nst", "ickd") else "all"
    check_groups(groups, inputs.leading_shape, inputs.device)
    # "sp" goes over the rows twice: the two parts of a gradient are not added in 16 bits.
    student = inputs.student.to(torch.promote_types(inputs.student.dtype, torch.float32))
    tensors = [student, inputs.teacher, inputs.valid()]
    parts = split_into_groups(tensors, len(inputs.leading_shape), groups)
    of_group = functools.partial(_group_value, kind)
    if len(parts) > 1:  # or the sums of every group would wait for the backward pass
        of_group = functools.partial(again, of_group)
    values = torch.stack([of_group(*part) for part in parts])
    filled = None
    if inputs.mask is not None:
        filled = torch.stack([valid.any() for *_, valid in parts])
    return inputs.reduced(values, filled, reduction)


@dataclass(frozen=True)
class _Frame:
    """How rows become those that are summed: minus a mean, the teacher's times a scale.

    With `near` the second factor of the sums is X = S - T, otherwise X = T.
    """

    near: bool
    scale: Tensor | float = 1.0
    mean_s: Tensor | float = 0.0
    mean_t: Tensor | float = 0.0

    def block(self, s: Tensor, t: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return S, X and T of a row block in float64."""
        s = in_float64(s - self.mean_s, valid)
        t = in_float64(t - self.mean_t, valid) * self.scale
        return s, s - t if self.near else t, t


@dataclass(frozen=True)
class _Covariances:
    """S^T S, S^T X and X^T X."""

    near: bool
    ss: Tensor
    sx: Tensor
    xx: Tensor

    @staticmethod
    def of(rows: tuple, frame: _Frame) -> _Covariances:
        """Sum over all rows (s, t, valid)."""

        def sums(s, t, valid):
            s, x, _ = frame.block(s, t, valid)
            return s.mT @ s, s.mT @ x, x.mT @ x

        return _Covariances(frame.near, *sum_over_rows(sums, rows, _width(rows)))

    @property
    def tt(self) -> Tensor:
        """T^T T."""
        return self.ss - self.sx - self.sx.mT + self.xx if self.near else self.xx

    @property
    def st(self) -> Tensor:
        """S^T T."""
        return self.ss - self.sx if self.near else self.sx


def _group_value(kind: str, s: Tensor, t: Tensor, valid: Tensor | None) -> Tensor:
    """Compute one group's value in float64, from rows (r, Ds), (r, Dt) and valid (r,)."""
    return _KINDS[kind]((s, t, valid), count_rows(s, valid))


def _sp(rows: tuple, count: Tensor) -> Tensor:
    frame = _scaled(rows, _Frame(_equal_widths(rows)))
    sums = _Covariances.of(rows, frame)
    of_teacher = sums.tt

    def distances(s, t, valid):
        s, x, t = frame.block(s, t, valid)
        ss, tt = _form(s, sums.ss, s), _form(t, of_teacher, t)
        if frame.near:
            dd = _form(x, sums.ss, x) + 2 * _form(x, sums.sx, t) + _form(t, sums.xx, t)
            return [_apart(ss, tt, (ss + tt - dd) / 2, dd).sum()]
        st = _form(s, sums.sx, t)
        return [_apart(ss, tt, st, ss + tt - 2 * st).sum()]

    (total,) = sum_over_rows(distances, rows, _width(rows))
    return total / count.clamp(min=1).square()


def _cka(rows: tuple, count: Tensor) -> Tensor:
    def add(s, t, valid):
        return in_float64(s, valid).sum(0), in_float64(t, valid).sum(0)

    means = [m / count.clamp(min=1) for m in sum_over_rows(add, rows, _width(rows))]
    sums = _Covariances.of(rows, _scaled(rows, _Frame(_equal_widths(rows), 1.0, *means)))
    of_teacher = sums.tt
    ss, tt = sums.ss.square().sum(), of_teacher.square().sum()
    if sums.near:
        of_both = sums.sx.mT - sums.xx  # X^T T
        dd = (sums.ss * sums.xx + 2 * sums.sx * of_both + sums.xx * of_teacher).sum()
        value = _one_minus_cosine(ss, tt, (ss + tt - dd) / 2, dd)
    else:
        st = sums.st.square().sum()
        value = _one_minus_cosine(ss, tt, st, ss + tt - 2 * st)
    return torch.where(count > 0, value, 0.0)


def _nst(rows: tuple, count: Tensor) -> Tensor:
    sums = _Covariances.of(rows, _Frame(_equal_widths(rows)))
    value = sums.ss.square().mean() - 2 * sums.st.square().mean()
    return value / count.clamp(min=1)


def _ickd(rows: tuple, count: Tensor) -> Tensor:
    sums = _Covariances.of(rows, _scaled(rows, _Frame(near=True)))
    of_teacher, difference = sums.tt, sums.sx + sums.sx.mT - sums.xx
    ss, tt, dd = ((m * m).sum(-1) for m in (sums.ss, of_teacher, difference))
    return _apart(ss, tt, (sums.ss * of_teacher).sum(-1), dd).mean()


_KINDS = {"sp": _sp, "cka": _cka, "nst": _nst, "ickd": _ickd}


def _equal_widths(rows: tuple) -> bool:
    return rows[0].shape[-1] == rows[1].shape[-1]


def _width(rows: tuple) -> int:
    return rows[0].shape[-1] + rows[1].shape[-1]


@torch.no_grad()
def _scaled(rows: tuple, frame: _Frame) -> _Frame:
    """Give the teacher's rows the student's size, so that S - T is small for parallel models too.

    The objectives do not depend on it: it is a constant for autograd.
    """
    if not frame.near:
        return frame

    def squares(s, t, valid):
        s, _, t = frame.block(s, t, valid)
        return s.square().sum(), t.square().sum()

    ours, theirs = sum_over_rows(squares, rows, _width(rows))
    scale = torch.where((ours > 0) & (theirs > 0), (ours / theirs).sqrt(), 1.0)
    return _Frame(True, scale, frame.mean_s, frame.mean_t)


def _form(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """Compute the bilinear form of each row, (r,)."""
    return ((left @ matrix) * right).sum(-1)


def _one_minus_cosine(ss: Tensor, tt: Tensor, st: Tensor, dd: Tensor) -> Tensor:
    """Compute 1 - cos of vectors s and t from s.s, t.t, s.t and |s - t|^2, of one shape."""
    sums = Sums(torch.ones_like(ss)[None], torch.stack([ss, tt])[None], st[None], dd[None])
    return DISTANCES["cosine"].value(sums)[0]


def _apart(ss: Tensor, tt: Tensor, st: Tensor, dd: Tensor) -> Tensor:
    """Compute |s / |s| - t / |t||^2, where a vector of length 0 stays 0."""
    return 2 * _one_minus_cosine(ss, tt, st, dd) - (ss <= 0).double() - (tt <= 0).double()
