"""The contrastive losses of a block of scores (r, C), and their dense forms.

Tensors of every row function, per row: its own column's index, its tag and the teachers' weights
(r, M), and labels (r,) for InfoNCE; shared: tags of columns, and which columns there are.

Shape suffixes: r rows of a block, C columns, M teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import (
    Hidden,
    RowSoftmax,
    kl_of_logits_,
    log_softmax_,
    logit_gradient_,
    subtract_max_,
    sum_over_tokens,
)
from fdd_kernels.objectives.dense import expected_ratio


def _left_out(
    exclude: str, there: str, own: Tensor, tags: Tensor, column_tags: Tensor, present: Tensor
) -> Hidden | None:
    """Mark the columns that a row is not compared with, (r, C); None: it is with all.

    `there` says whether "all" columns are present, or "some".
    """
    marked = None
    if exclude == "same_tag":
        marked = tags[:, None] == column_tags
    elif exclude == "self":
        marked = own[:, None] == torch.arange(len(present), device=present.device)
    if there == "some":
        marked = (~present).expand(len(own), -1) if marked is None else marked | ~present
    return None if marked is None else Hidden(marked)


def _without(z: Tensor, left_out: Hidden | None) -> Tensor:
    return z if left_out is None else left_out.fill_(z, -torch.inf)


def _positives(tags: Tensor, column_tags: Tensor, left_out: Hidden | None) -> Tensor:
    """Mark the columns of a row's tag, (r, C)."""
    marked = tags[:, None] == column_tags
    return marked if left_out is None else marked.logical_and_(~left_out.mask)


@row_function(matrices=1.25)
def infonce(block: RowBlock, exclude: str, there: str) -> tuple[Tensor, GradOf]:
    """Compute -log q of the label's column, which is never left out."""
    own, tags, _, labels = block.per_row
    at, z = labels[:, None], block.student
    of_label = z.gather(-1, at)
    _without(z, _left_out(exclude, there, own, tags, *block.shared)).scatter_(-1, at, of_label)
    largest_at = subtract_max_(z)[1]
    of_label = z.gather(-1, at)
    q = RowSoftmax.of_exps_(z.exp_(), largest_at)

    def grad_of(upstream: Tensor) -> Tensor:
        _, lacks = q.at_columns(at)
        return q.probabilities_(upstream).scatter_(-1, at, -lacks * upstream)

    return q.others.log1p() - of_label, grad_of


@row_function
def contrastive_kl(block: RowBlock, exclude: str, there: str) -> tuple[Tensor, GradOf]:
    """Compute KL(p || q) with p the weighted mean of the teachers' softmaxes."""
    own, tags, weights = block.per_row
    left_out = _left_out(exclude, there, own, tags, *block.shared)
    z_s = _without(block.student, left_out)
    if weights.shape[-1] == 1:
        return kl_of_logits_(z_s, _without(block.teacher, left_out), left_out)
    log_p = None
    for of_teacher, log_weight in zip(_teachers(block), weights.log().unbind(-1)):
        log_softmax_(_without(of_teacher, left_out))
        of_teacher += log_weight[:, None]
        log_p = of_teacher if log_p is None else torch.logaddexp(log_p, of_teacher, out=log_p)
    # The weights' sum drops out in the softmax.
    return kl_of_logits_(z_s, log_p, left_out)


def _teachers(block: RowBlock) -> Iterator[Tensor]:
    yield block.teacher
    for compute in block.others:
        yield compute()


@row_function
def supcon(block: RowBlock, exclude: str, there: str) -> tuple[Tensor, GradOf]:
    """Compute -mean of log q over the positives, the columns of the row's tag; 0 without any."""
    own, tags, _ = block.per_row
    left_out = _left_out(exclude, there, own, tags, *block.shared)
    positive = _positives(tags, block.shared[0], left_out)
    log_q = _without(block.student, left_out)
    del left_out
    log_softmax_(log_q)
    count = positive.sum(-1, keepdim=True).clamp_(min=1)

    def grad_of(upstream: Tensor) -> Tensor:
        return logit_gradient_(positive * (-upstream / count), log_q)

    return -torch.where(positive, log_q, 0.0).sum(-1, keepdim=True) / count, grad_of


@row_function
def supcon_of_teacher(block: RowBlock, exclude: str, there: str) -> tuple[Tensor, GradOf]:
    """Compute the mean over the positives t of lse_j(a . s_j) - a . t; 0 without any.

    The first half of the columns are the student's s, in the softmax, the others the teacher's t.
    """
    own, tags, _ = block.per_row
    (column_tags, present), z = block.shared, block.student
    half = z.shape[-1] // 2
    left_out = _left_out(exclude, there, own, tags, column_tags[:half], present[:half])
    positive = _positives(tags, column_tags[:half], left_out)
    log_q, scores = z.split(half, -1)
    lse = log_softmax_(_without(log_q, left_out))
    count = positive.sum(-1, keepdim=True)
    mean = torch.where(positive, scores, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)

    def grad_of(upstream: Tensor) -> Tensor:
        counted = upstream.where(count > 0, 0.0)
        log_q.exp_().mul_(counted)
        torch.mul(positive, -counted / count.clamp(min=1), out=scores)
        return z

    return torch.where(count > 0, lse - mean, 0.0), grad_of


@row_function
def margin_mse(block: RowBlock, exclude: str, there: str) -> tuple[Tensor, GradOf]:
    """Compute 2 Var_c(s - t), the mean of squared differences of margins over all pairs of columns.

    With e the difference from its mean over the C columns, the gradient is 4 e / C.
    """
    own, tags, _ = block.per_row
    left_out = _left_out(exclude, there, own, tags, *block.shared)
    e = block.student.sub_(block.teacher)
    count = e.new_full((len(e), 1), e.shape[-1])
    if left_out is not None:
        count = (count - left_out.count()).clamp_(min=1)
        left_out.fill_(e, 0.0)
    e.sub_(e.sum(-1, keepdim=True) / count)
    if left_out is not None:
        left_out.fill_(e, 0.0)

    def grad_of(upstream: Tensor) -> Tensor:
        return e.mul_(4 * upstream / count)

    return 2 * sum_over_tokens(torch.square, e) / count, grad_of


def dense(name: str) -> Callable[..., Tensor]:
    """Return the dense form of a loss, which autograd can differentiate any number of times."""

    def of_scores(s: Tensor, t: Tensor | list[Tensor] | None, own, tags, weights, *rest) -> Tensor:
        *labels, column_tags, present, exclude, there = rest
        if name == "supcon_of_teacher":
            s, scores = s.chunk(2, -1)
            column_tags, present = column_tags[: s.shape[-1]], present[: s.shape[-1]]
        hidden = _left_out(exclude, there, own, tags, column_tags, present)
        left_out = s.new_zeros(s.shape, dtype=torch.bool) if hidden is None else hidden.mask
        if name == "margin_mse":
            count = (~left_out).sum(-1, keepdim=True).clamp(min=1)
            e = torch.where(left_out, 0.0, s - t)
            e = torch.where(left_out, 0.0, e - e.sum(-1, keepdim=True) / count)
            return 2 * e.square().sum(-1, keepdim=True) / count
        if name == "infonce":
            at = labels[0][:, None]
            left_out = left_out.scatter(-1, at, False)
            return -s.masked_fill(left_out, -torch.inf).log_softmax(-1).gather(-1, at)
        some = left_out & ~left_out.all(-1, keepdim=True)  # the gradient of no logit at all is NaN
        lse = s.masked_fill(some, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.where(left_out, -torch.inf, s - lse)
        if name == "contrastive_kl":
            return expected_ratio(_mixture(t, weights, left_out), log_q)
        positive = (tags[:, None] == column_tags) & ~left_out
        count = positive.sum(-1, keepdim=True).clamp(min=1)
        scores = log_q if name == "supcon" else scores - lse
        return -torch.where(positive, scores, 0.0).sum(-1, keepdim=True) / count

    return of_scores


def _mixture(t: Tensor | list[Tensor], weights: Tensor, left_out: Tensor) -> Tensor:
    """Compute the log of the weighted mean of the teachers' softmaxes, (r, C)."""
    weights = weights / weights.sum(-1, keepdim=True)
    none = left_out.all(-1, keepdim=True)
    total = 0.0
    for of_teacher, weight in zip([t] if isinstance(t, Tensor) else t, weights.unbind(-1)):
        z = of_teacher.masked_fill(left_out & ~none, -torch.inf)
        total = total + weight[:, None] * z.softmax(-1)
    return total.masked_fill(left_out, 0.0).log()
