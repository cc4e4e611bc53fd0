"""From per-row statistics to the loss: the distances of layer deltas, the weights and the reductions, once for all.

Everything here is ordinary PyTorch on tensors of shape (R,); autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.config import FDDLossTerms, LossOptions
from fdd_kernels.plan import Plan
from fdd_kernels.spec import COUNT, LSE_S, LSE_T, M_DD, M_SS, M_ST, M_TT, MEAN_S, MEAN_T, OWN, VALUE

_COMPARED_ELEMENTS = 2**22  # of the hidden states that are compared at a time


class RowTerms(NamedTuple):
    """The four terms per row, (R,) each, before weights; None: not computed. Means over layers and pairs are taken."""

    output_kd: Tensor | None
    trajectory: Tensor | None
    derivative: Tensor | None
    ce: Tensor | None


def _safe_sqrt(x: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0."""
    return torch.where(x <= 0, 0.0, torch.where(x <= 0, 1.0, x).sqrt())  # NaN stays


def _cosine_distance(ss: Tensor, tt: Tensor, st: Tensor, dd: Tensor) -> Tensor:
    """1 - cos of vectors s and t from s.s, t.t, s.t and |s - t|^2; 1, with gradient 0, where either has length 0.

    For vectors that nearly agree, 1 - s.t / (|s||t|) would lose every digit, while
    (|s - t|^2 - (|s| - |t|)^2) / (2 |s||t|), the same number, keeps them.
    """
    norm_s, norm_t = _safe_sqrt(ss), _safe_sqrt(tt)
    product = norm_s * norm_t
    defined = product != 0  # NaN stays
    product = torch.where(defined, product, 1.0)
    difference = (ss - tt) / torch.where(defined, norm_s + norm_t, 1.0)
    near = (dd - difference.square()) / (2 * product)
    far = 1 - st / product
    return torch.where(defined, torch.where(2 * dd < ss + tt, near, far), 1.0)


def static_deltas(plan: Plan, student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor]) -> Tensor | None:
    """Where a model's delta has length 0 because both its hidden states are equal: (2, pairs, R) bool; None: no angle is taken.

    The hidden states are of the spec's layers. Products of equal states may differ in their last bits, which would be the
    direction of a delta that has none; no bound on its length tells it from a short one, but the states themselves do.
    """
    if not plan.derivative or plan.options.derivative == "mse":
        return None
    pairs = [plan.spec.moments[index] for index in plan.derivative]
    return torch.stack([
        torch.stack([_equal_rows(states[first].detach(), states[second].detach()) for first, second in pairs])
        for states in (student_hidden, teacher_hidden)
    ])  # fmt: skip


def _equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """(R,) bool: which rows of two (R, D) tensors are equal; a part of them at a time."""
    rows = max(1, _COMPARED_ELEMENTS // a.shape[1])
    if torch.compiler.is_compiling() or len(a) <= rows:
        return (a == b).all(-1)
    return torch.cat([(x == y).all(-1) for x, y in zip(a.split(rows), b.split(rows))])


def _moment_distance(kind: str, moment: Tensor, shift_s: Tensor | float, shift_t: Tensor | float,
                     static: tuple[Tensor, Tensor] | None = None) -> Tensor:  # fmt: skip
    """Distance of a moment target's vectors after `shift` is subtracted from each: (R,).

    `static` says for each model which vectors have length 0, whatever their computed length is.
    """
    ss, tt, st, dd = moment[M_SS], moment[M_TT], moment[M_ST], moment[M_DD]
    if kind != "centered_cosine":
        count, mean_s, mean_t = moment[COUNT], moment[MEAN_S] - shift_s, moment[MEAN_T] - shift_t
        ss, tt, st = ss + count * mean_s.square(), tt + count * mean_t.square(), st + count * mean_s * mean_t
        dd = dd + count * (mean_s - mean_t).square()
    if kind == "mse":
        return dd / moment[COUNT].clamp(min=1)
    if static is not None:
        ss, tt = torch.where(static[0], 0.0, ss), torch.where(static[1], 0.0, tt)
    return _cosine_distance(ss, tt, st, dd)


def row_terms_from_statistics(plan: Plan, pivots: Tensor, reads: Tensor, moments: Tensor,
                              static: Tensor | None = None) -> RowTerms:  # fmt: skip
    """The terms of every row from the statistics of `spec.py`; `static` is of `static_deltas`."""
    options, spec = plan.options, plan.spec
    trajectory = derivative = None
    if plan.trajectory:
        per_layer = []
        for index in plan.trajectory:
            if options.trajectory in ("mse", "cosine"):
                first, layer = spec.moments[index]
                assert first == OWN
                # Statistics are relative to the pivots; the features themselves are compared here.
                shifts = -pivots[:, layer] / spec.moment_temperature
                per_layer.append(_moment_distance(options.trajectory, moments[index], shifts[0], shifts[1]))
            else:
                per_layer.append(reads[index, VALUE])
        trajectory = torch.stack(per_layer).mean(0)
    if plan.derivative:
        per_pair = []
        for pair, index in enumerate(plan.derivative):
            shift_s = shift_t = 0.0
            if plan.derivative_reads:
                first, second = plan.derivative_reads[pair]
                shift_s = reads[second, LSE_S] - reads[first, LSE_S]
                shift_t = reads[second, LSE_T] - reads[first, LSE_T]
            of_pair = None if static is None else static[:, pair]
            per_pair.append(_moment_distance(options.derivative, moments[index], shift_s, shift_t, of_pair))
        derivative = torch.stack(per_pair).mean(0)
    return RowTerms(
        output_kd=None if plan.output_kd is None else reads[plan.output_kd, VALUE],
        trajectory=trajectory,
        derivative=derivative,
        ce=None if plan.ce is None else reads[plan.ce, VALUE],
    )


def normaliser_of(options: LossOptions, rows: int, valid: Tensor | None, num_items_in_batch: Tensor | float | None):
    """What divides the sum over rows; None: nothing does."""
    if num_items_in_batch is None and options.reduction == "mean":
        return max(rows, 1) if valid is None else valid.sum().clamp(min=1)
    return num_items_in_batch


def combine(terms: RowTerms, options: LossOptions, valid: Tensor | None, leading_shape: tuple[int, ...],
            normaliser: Tensor | float | None) -> FDDLossTerms:  # fmt: skip
    """Weights, temperature factor and reduction; rows with `valid` False count as 0. `normaliser`: of `normaliser_of`."""
    like = next(term for term in terms if term is not None)
    if isinstance(normaliser, Tensor):
        normaliser = normaliser.reshape(()).to(like.device)

    def reduce(term: Tensor | None) -> Tensor:
        if term is None:
            return like.new_zeros(leading_shape if options.reduction == "none" else ())
        if valid is not None:
            term = torch.where(valid, term, 0.0)
        if options.reduction == "none":
            return term.view(leading_shape)
        return term.sum() if normaliser is None else term.sum() / normaliser

    output_kd = reduce(terms.output_kd)
    if options.scale_by_t2:
        output_kd = output_kd * options.output_temperature**2
    trajectory, derivative, ce = reduce(terms.trajectory), reduce(terms.derivative), reduce(terms.ce)
    loss = (
        options.output_kd_weight * output_kd + options.alpha * trajectory + options.beta * derivative + options.ce_weight * ce
    )
    return FDDLossTerms(loss, output_kd, trajectory, derivative, ce)
