"""What compares two models' rows of attention, for a block of scores, and its dense form.

Shape suffixes: B sequences, T positions, g groups (one head of one sequence each), r rows of a
group, c columns (positions that are looked at).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.row_blocks import CAUSAL, PACKED, GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import (
    Hidden,
    kl_of_logits_,
    log_softmax_,
    logit_gradient_,
    sum_over_tokens,
)
from fdd_kernels.objectives.dense import expected_ratio

KINDS = ("kl", "jeffreys", "mse")
SELF, MASK = "self", "mask"  # what else leaves out columns
_KL, _REVERSE_KL = (DIVERGENCES[name].value for name in ("kl", "reverse_kl"))


def left_out(
    flags: str, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor, Tensor]
) -> Tensor | None:
    """Mark the columns that rows do not see, (g, r, c); None: they see all.

    `rows` are positions and ids of sequences (g, r); `columns` are the same and which columns there
    are, (g, c).
    """
    (at, ids), (column_at, column_ids, seen) = rows, columns
    at, column_at = at[:, :, None], column_at[:, None, :]
    marks = {
        MASK: lambda: ~seen[:, None, :],
        CAUSAL: lambda: column_at > at,
        SELF: lambda: column_at == at,
        PACKED: lambda: column_ids[:, None, :] != ids[:, :, None],
    }
    found = None
    for flag in flags.split(","):
        if flag:
            marked = marks[flag]()
            found = marked if found is None else found | marked
    return found


@row_function(of_attention=True)
def attention_rows(block: RowBlock, kind: str, flags: str) -> tuple[Tensor, GradOf]:
    """Compare the rows of attention (n, c) with n = g * r, the student's with the teacher's.

    "kl" KL(p || q) and "jeffreys" KL(p || q) + KL(q || p) of the softmaxes, "mse" the mean square
    of the scores' difference.
    """
    return _compare(kind, block.student, block.teacher, _hide(block, flags))


# The scores, and of the columns that are chosen both models' scores, indices of 8 bytes, and what a
# comparison holds besides.
@row_function(of_attention=True, matrices=8.5)
def nearest_rows(block: RowBlock, kind: str, flags: str, k: float) -> tuple[Tensor, GradOf]:
    """Compare rows of attention over the k columns with the teacher's largest scores."""
    _hide(block, flags)
    s = block.student
    t, at = block.teacher.topk(min(int(k), s.shape[-1]), -1)
    value, of_scores = _compare(kind, s.gather(-1, at), t, Hidden(t == -torch.inf))
    return value, lambda upstream: s.zero_().scatter_(-1, at, of_scores(upstream))


def _hide(block: RowBlock, flags: str) -> Hidden | None:
    """Set the scores of columns that are not seen to -inf, and mark them."""
    first = block.hidden_from if flags == CAUSAL else 0
    marked = left_out(flags, block.per_row, [t[:, first:] for t in block.shared])
    if marked is None:
        return None
    shape = len(block.student), block.student.shape[-1] - first
    marked = marked.expand(*block.per_row[0].shape, shape[-1]).reshape(shape)
    hidden = Hidden(marked, first)
    for scores in (block.student, block.teacher):
        hidden.fill_(scores, -torch.inf)
    return hidden


def _compare(kind: str, s: Tensor, t: Tensor, hidden: Hidden | None) -> tuple[Tensor, GradOf]:
    """Return values (n, 1) and the way to dL/ds; overwrites the scores."""
    if kind == "kl":
        return kl_of_logits_(s, t, hidden)
    return _mse(s, t, hidden) if kind == "mse" else _jeffreys(s, t)


def _mse(s: Tensor, t: Tensor, hidden: Hidden | None) -> tuple[Tensor, GradOf]:
    e, count = s.sub_(t), s.new_full((len(s), 1), s.shape[-1])
    if hidden is not None:
        hidden.fill_(e, 0.0)
        count = (count - hidden.count()).clamp_(min=1)
    value = sum_over_tokens(torch.square, e) / count
    return value, lambda upstream: e.mul_(2 * upstream / count)


def _jeffreys(s: Tensor, t: Tensor) -> tuple[Tensor, GradOf]:
    log_softmax_(s)
    log_softmax_(t)
    value = sum_over_tokens(_KL, s, t) + sum_over_tokens(_REVERSE_KL, s, t)

    def grad_of(upstream: Tensor) -> Tensor:
        # dL/dlog q is q (log q - log p) - p, but for a multiple of q.
        grad, q = s - t, s.exp()
        grad.mul_(q).masked_fill_(q == 0, 0.0)
        del q
        return logit_gradient_(grad.sub_(t.exp_()), s).mul_(upstream)

    return value, grad_of


def dense_rows(
    s: Tensor, t: Tensor, hidden: Tensor | None, kind: str, nearest: int | None
) -> Tensor:
    """Compute the same, (..., T), from all scores (..., T, T); differentiable at will."""
    hidden = torch.zeros_like(s, dtype=torch.bool) if hidden is None else hidden.expand_as(s)
    if nearest is not None and nearest < s.shape[-1]:
        at = t.masked_fill(hidden, -torch.inf).topk(nearest, -1).indices
        s, t, hidden = (x.gather(-1, at) for x in (s, t, hidden))
    if kind == "mse":
        e = torch.where(hidden, 0.0, s - t)
        return e.square().sum(-1) / (~hidden).sum(-1).clamp(min=1)
    some = hidden & ~hidden.all(-1, keepdim=True)  # the gradient of no score at all is NaN
    log_q, log_p = (
        torch.where(hidden, -torch.inf, x.masked_fill(some, -torch.inf).log_softmax(-1))
        for x in (s, t)
    )
    value = expected_ratio(log_p, log_q)
    value = value + expected_ratio(log_q, log_p) if kind == "jeffreys" else value
    return value[..., 0]
