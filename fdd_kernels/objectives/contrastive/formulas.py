"""The contrastive losses of a block of scores (r, C), and their dense forms.

Tensors of every row function, per row: its own column's index, its tag and the teachers' weights
(r, M), and labels (r,) for InfoNCE; shared: tags of columns, and which columns there are.

Shape suffixes: r rows of a block, C columns, M teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import log_softmax_, logit_gradient_, sum_over_tokens
from fdd_kernels.objectives.dense import expected_ratio

_KL = DIVERGENCES["kl"].value


def _left_out(
    exclude: str, own: Tensor, tags: Tensor, column_tags: Tensor, present: Tensor
) -> Tensor:
    """Mark the columns that a row is not compared with, (r, C)."""
    if exclude == "same_tag":
        return (tags[:, None] == column_tags).logical_or_(~present)
    if exclude == "self":
        columns = torch.arange(len(present), device=present.device)
        return (own[:, None] == columns).logical_or_(~present)
    return (~present).expand(len(own), -1)


def _without(z: Tensor, left_out: Tensor) -> Tensor:
    return z.masked_fill_(left_out, -torch.inf)


@row_function
def infonce(block: RowBlock, exclude: str) -> tuple[Tensor, GradOf]:
    """Compute -log q of the label's column, which is never left out."""
    own, tags, _, labels = block.per_row
    at = labels[:, None]
    left_out = _left_out(exclude, own, tags, *block.shared)
    log_q = _without(block.student, left_out.clone().scatter_(-1, at, False))
    log_softmax_(log_q)
    value = -log_q.gather(-1, at)

    def grad_of(upstream: Tensor) -> Tensor:
        return logit_gradient_(torch.zeros_like(log_q).scatter_(-1, at, -upstream), log_q)

    return value, grad_of


@row_function
def contrastive_kl(block: RowBlock, exclude: str) -> tuple[Tensor, GradOf]:
    """Compute KL(p || q) with p the weighted mean of the teachers' softmaxes."""
    own, tags, weights = block.per_row
    left_out = _left_out(exclude, own, tags, *block.shared)
    log_q, log_p = _without(block.student, left_out), None
    log_softmax_(log_q)
    for of_teacher, log_weight in zip(_teachers(block), weights.log().unbind(-1)):
        log_softmax_(_without(of_teacher, left_out))
        if weights.shape[-1] > 1:
            of_teacher += log_weight[:, None]
        log_p = of_teacher if log_p is None else torch.logaddexp(log_p, of_teacher, out=log_p)
    if weights.shape[-1] > 1:
        # The weights' sum drops out, and the likeliest column's probability is exact again.
        log_softmax_(log_p)

    def grad_of(upstream: Tensor) -> Tensor:
        return logit_gradient_(log_p.exp_().neg_(), log_q).mul_(upstream)

    return sum_over_tokens(_KL, log_q, log_p), grad_of


def _teachers(block: RowBlock) -> Iterator[Tensor]:
    yield block.teacher
    for compute in block.others:
        yield compute()


@row_function
def supcon(block: RowBlock, exclude: str) -> tuple[Tensor, GradOf]:
    """Compute -mean of log q over the positives, the columns of the row's tag; 0 without any."""
    own, tags, _ = block.per_row
    left_out = _left_out(exclude, own, tags, *block.shared)
    positive = (tags[:, None] == block.shared[0]).logical_and_(~left_out)
    log_q = _without(block.student, left_out)
    del left_out
    log_softmax_(log_q)
    count = positive.sum(-1, keepdim=True).clamp_(min=1)

    def grad_of(upstream: Tensor) -> Tensor:
        return logit_gradient_(positive * (-upstream / count), log_q)

    return -torch.where(positive, log_q, 0.0).sum(-1, keepdim=True) / count, grad_of


@row_function
def supcon_of_teacher(block: RowBlock, exclude: str) -> tuple[Tensor, GradOf]:
    """Compute the mean over the positives t of lse_j(a . s_j) - a . t; 0 without any.

    The first half of the columns are the student's s, in the softmax, the others the teacher's t.
    """
    own, tags, _ = block.per_row
    (column_tags, present), z = block.shared, block.student
    half = z.shape[-1] // 2
    left_out = _left_out(exclude, own, tags, column_tags[:half], present[:half])
    positive = (tags[:, None] == column_tags[:half]).logical_and_(~left_out)
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
def margin_mse(block: RowBlock, exclude: str) -> tuple[Tensor, GradOf]:
    """Compute 2 Var_c(s - t), the mean of squared differences of margins over all pairs of columns.

    With e the difference from its mean over the C columns, the gradient is 4 e / C.
    """
    own, tags, _ = block.per_row
    left_out = _left_out(exclude, own, tags, *block.shared)
    count = (left_out.shape[-1] - left_out.sum(-1, keepdim=True)).clamp_(min=1)
    e = block.student.sub_(block.teacher).masked_fill_(left_out, 0.0)
    e.sub_(e.sum(-1, keepdim=True) / count).masked_fill_(left_out, 0.0)

    def grad_of(upstream: Tensor) -> Tensor:
        return e.mul_(4 * upstream / count)

    return 2 * sum_over_tokens(torch.square, e) / count, grad_of


def dense(name: str) -> Callable[..., Tensor]:
    """Return the dense form of a loss, which autograd can differentiate any number of times."""

    def of_scores(s: Tensor, t: Tensor | list[Tensor] | None, own, tags, weights, *rest) -> Tensor:
        *labels, column_tags, present, exclude = rest
        if name == "supcon_of_teacher":
            s, scores = s.chunk(2, -1)
            column_tags, present = column_tags[: s.shape[-1]], present[: s.shape[-1]]
        left_out = _left_out(exclude, own, tags, column_tags, present)
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
