"""Differences between rows of hidden states, taken before a loss compares them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.objectives.features.groups import check_groups
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.option_checks import require_choice
from fdd_kernels.objectives.tensors import require_float
from fdd_kernels.objectives.validation import check_tokens

KINDS = ("deviation", "adjacent")


class RowDeltas(NamedTuple):
    """Deltas of rows, (..., T, D) or (..., T - 1, D), and which of them are valid, bool or None for
    all: the `mask` of a loss. With `as_layers` the rows are the two states of each delta.
    """

    rows: Tensor | tuple[Tensor, Tensor]
    mask: Tensor | None


def row_deltas(
    hidden: Tensor,
    kind: str = "deviation",
    *,
    reference: Tensor | str = "batch",
    groups: Tensor | str | None = None,
    mask: Tensor | None = None,
    detach_reference: bool | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    as_layers: bool = False,
) -> RowDeltas:
    """Subtract from each hidden state a point of reference, or the state before it.

    "deviation" is h - m with m the mean over the valid rows of a group, or a given tensor;
    "adjacent" is h_(t+1) - h_t within a sequence. Apply it to both models, each with its own
    states, then compare the deltas::

        s, t = row_deltas(student_hidden, mask=mask), row_deltas(teacher_hidden, mask=mask)
        fused_fdd_loss(s.rows, student_weight, t.rows, teacher_weight, mask=s.mask,
                       trajectory="mse", output_in_dynamics=True, output_kd_weight=0.0, beta=0.0)

    A head without bias and soft cap is linear, so these are the deltas of the logits: exact for
    "mse" and "cosine" of the logits. Log-probabilities have the same deltas but for a constant over
    the vocabulary. Leave out a head's bias, which cancels in every delta.

    A head with a soft cap is not linear. Then let the derivative compare the log-probabilities at
    both ends of each delta: they are the two layers of a call::

        s, t = (row_deltas(h, mask=mask, as_layers=True) for h in (student_hidden, teacher_hidden))
        fused_fdd_loss(s.rows, student_weight, t.rows, teacher_weight, mask=s.mask,
                       student_softcap=30.0, output_in_dynamics=True, output_kd_weight=0.0,
                       alpha=0.0)

    A deviation is then log softmax(z(h)) - log softmax(z(m)), from the prediction at the mean
    state m; the mean of capped logits over rows is not computed.

    Source: none has a formula; mean-squared deviations and differences of neighbours as features'
    dynamics.

    Args:
        hidden: (..., T, D).
        kind: "deviation" or "adjacent".
        reference: of a deviation: "batch", the mean, or a tensor that broadcasts to `hidden`, such
            as a stored mean (D,) or the means of each position's class (..., T, D).
        groups: of a deviation's mean: "all" rows (None), each "sequence", or an id (..., T) for
            each row. Of adjacent rows: ids (..., T) of the sequences packed in one; no difference
            crosses sequences.
        mask: (..., T) bool or int; rows that are 0 are in no mean and have no delta.
        detach_reference: whether the reference is a constant for autograd. None: a given tensor
            is, the batch's mean is not (the gradient's mean is then subtracted as well).
        process_group: take the mean over the rows of all its processes; with "all" rows only. The
            backward pass communicates as well: it adds up the gradients of all processes' losses.
        as_layers: return in place of each delta the states that it lies between, (m, h) or
            (h_t, h_(t+1)).

    Returns:
        `RowDeltas`: rows in the dtype of `hidden`, 0 where they are not valid.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or choice, named before any work.
    """
    require_choice("kind", kind, KINDS)
    _check(hidden, kind, reference, groups, mask, process_group)
    if not isinstance(as_layers, bool):
        raise TypeError(f"as_layers must be a bool, got {type(as_layers).__name__}")
    valid = None if mask is None else mask != 0
    if kind == "adjacent":
        valid = _both_valid(valid, groups if isinstance(groups, Tensor) else None)
        before, after = hidden[..., :-1, :], hidden[..., 1:, :]
        return _finished(before, after, valid, hidden.dtype, as_layers)
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(reference, Tensor):
        constant = detach_reference in (None, True)
    else:
        reference = _means(hidden, "all" if groups is None else groups, valid, process_group)
        constant = bool(detach_reference)
    if constant:
        reference = reference.detach()
    before = reference.to(work).expand(hidden.shape)
    return _finished(before, hidden.to(work), valid, hidden.dtype, as_layers)


def _finished(
    before: Tensor, after: Tensor, valid: Tensor | None, dtype: torch.dtype, as_layers: bool
) -> RowDeltas:
    """Return the deltas from `before` to `after`, or both, 0 where not valid."""
    found = [before, after] if as_layers else [after - before]
    if valid is not None:
        found = [torch.where(valid[..., None], rows, 0.0) for rows in found]
    found = tuple([rows.to(dtype) for rows in found])
    return RowDeltas(found if as_layers else found[0], valid)


def _both_valid(valid: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """Tell which neighbours are both valid, and of one sequence."""
    both = None if valid is None else valid[..., 1:] & valid[..., :-1]
    if ids is None:
        return both
    together = ids[..., 1:] == ids[..., :-1]
    return together if both is None else both & together


def _means(hidden: Tensor, groups: Tensor | str, valid: Tensor | None, process_group) -> Tensor:
    """Compute the mean over the valid rows of each row's group, in float64 sums.

    The result broadcasts to `hidden`. A group without a valid row has mean 0.
    """
    ones = hidden.new_ones(hidden.shape[:-1], dtype=torch.float64)
    if valid is not None:
        hidden, ones = torch.where(valid[..., None], hidden, 0.0), ones * valid
    if isinstance(groups, Tensor):
        of_row = groups.unique(return_inverse=True)[1].reshape(-1)
        rows, ones = hidden.flatten(0, -2).to(torch.float64), ones.reshape(-1)
        totals = rows.new_zeros(len(rows), rows.shape[1]).index_add(0, of_row, rows)
        counts = ones.new_zeros(len(rows)).index_add(0, of_row, ones)
        means = totals / counts.clamp(min=1)[:, None]
        return means[of_row].view(hidden.shape)
    dims = -2 if groups == "sequence" else tuple(range(hidden.ndim - 1))
    totals = hidden.sum(dims, keepdim=True, dtype=torch.float64)
    counts = ones[..., None].sum(dims, keepdim=True)
    if process_group is not None:
        from torch.distributed.nn import functional as collectives  # differentiable

        totals, counts = (
            collectives.all_reduce(tensor, group=process_group) for tensor in (totals, counts)
        )
    return totals / counts.clamp(min=1)


def _check(hidden, kind, reference, groups, mask, process_group) -> None:
    require_float("hidden", hidden)
    if hidden.ndim < 2 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: it must be (..., T, width)")
    inputs = LossInputs((hidden,), None, (), None, mask=mask)
    check_tokens(inputs)
    if groups is not None:
        check_groups(groups, inputs.leading_shape, hidden.device)
    if isinstance(reference, Tensor):
        require_float("reference", reference)
        try:
            fits = torch.broadcast_shapes(reference.shape, hidden.shape) == hidden.shape
        except RuntimeError:
            fits = False
        if not fits or reference.device != hidden.device:
            raise ValueError(
                f"reference has shape {tuple(reference.shape)} on {reference.device}: it must "
                f"broadcast to hidden, {tuple(hidden.shape)} on {hidden.device}"
            )
    else:
        require_choice("reference", reference, ("batch",))
    of_batch = kind == "deviation" and isinstance(reference, str)
    if process_group is not None and not (of_batch and groups in (None, "all")):
        raise ValueError(
            'process_group takes the mean over all rows: use kind="deviation", reference="batch" '
            'and groups="all", or leave process_group out'
        )
    if kind == "adjacent" and (isinstance(reference, Tensor) or groups == "all"):
        raise ValueError(
            'kind="adjacent" subtracts neighbours within a sequence: leave reference out, and pass '
            'groups=None, "sequence" or ids'
        )
    if kind == "deviation" and isinstance(reference, Tensor) and groups is not None:
        raise ValueError("groups are of the batch's mean, but reference is a tensor: pass one only")
