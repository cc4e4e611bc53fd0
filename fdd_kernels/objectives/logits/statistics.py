"""Numbers per position of two models, for weights, gates and reports."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.lens.divergence_text import NamedDivergence
from fdd_kernels.lens.row_blocks import RowBlock, row_function
from fdd_kernels.lens.softmax import log_softmax_, sum_over_tokens
from fdd_kernels.objectives.dense import expected_ratio
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall


class RowStatistics(NamedTuple):
    """Numbers per position, each (...), of the logits over the temperature; no gradient.

    lse_s, lse_t: log-sum-exps of the student's and the teacher's logits.
    entropy_s, entropy_t: entropies, in nats.
    kl: KL(teacher || student).
    agree: whether both models' largest logit is the same token.
    label_logprob: the student's log-probability of the label; None without labels.
    correct: whether the student's largest logit is the label; None without labels.

    Without a teacher lse_t, entropy_t, kl and agree are None. Of equal largest logits the first
    counts. Positions that are not valid have 0 and False.
    """

    lse_s: Tensor
    lse_t: Tensor | None
    entropy_s: Tensor
    entropy_t: Tensor | None
    kl: Tensor | None
    agree: Tensor | None
    label_logprob: Tensor | None
    correct: Tensor | None


_OF_TEACHER = ("lse_t", "entropy_t", "kl", "agree")
_OF_LABELS = ("label_logprob", "correct")


@torch.no_grad()
def row_statistics(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> RowStatistics:
    """Numbers per position of two models, or of the student alone, in memory that does not grow
    with tokens x vocabulary.

    For weights of positions (`token_weights`), such as 3 where the student's entropy is above the
    teacher's, for gates between forward and reverse KL, and for reports. Entropies and KL are exact
    however confident the models are and however close. No gradient. Logits are at hand for one
    block of rows at a time: at most 128 MiB on a CPU and 1 GiB elsewhere, or one row.

    Args:
        student_hidden, teacher_hidden: final, normed hidden states (..., Ds) and (..., Dt).
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt) as in `nn.Linear`. Without
            `teacher_hidden` and `teacher_weight` the student's head alone is multiplied.
        labels: (...) int64 or int32 tokens, or None. Positions equal to `ignore_index` are not
            computed.
        temperature: divides the logits.
        student_bias, teacher_bias: (V,) added to the GEMM's result; -inf marks a token that cannot
            occur.
        mask: (...) bool or int; positions that are 0 are not computed. Never shifted.
        shift: labels are those of a causal LM, unshifted: position t is compared with labels[..., t
            + 1] and the last position is not computed.
        student_softcap, teacher_softcap: cap * tanh(logits / cap) after the scale.
        student_logit_scale, teacher_logit_scale: multiply the logits.
        vocab_size: compare only the first `vocab_size` tokens.
        backend: "auto", "torch" or "reference" (dense).

    Returns:
        `RowStatistics`, float32 (float64 for float64 inputs) and bool.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work.
    """
    given = teacher_hidden, teacher_weight, teacher_bias, teacher_softcap
    is_alone = all(argument is None for argument in given) and teacher_logit_scale == 1.0
    teacher = teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        None if is_alone else Model(*teacher),
        Positions(labels, mask, None, ignore_index, shift),
        Reduction("none"),
        temperature=temperature,
        vocab_size=vocab_size,
        backend=backend,
    )
    call = LogitCall.of(inputs, options, predicts_labels=True)
    per_row = () if labels is None else (call.rows.labels,)
    absent = (_OF_TEACHER if is_alone else ()) + (_OF_LABELS if labels is None else ())
    names = [name for name in RowStatistics._fields if name not in absent]
    formula = Formula("statistics", (), (float(temperature),), _dense, len(names))
    found = call.values(formula, *per_row).unbind(-1)
    found = {name: t.view(call.leading_shape) for name, t in zip(names, found)}
    found |= {name: found[name] != 0 for name in ("agree", "correct") if name in found}
    return RowStatistics(**dict.fromkeys(absent), **found)


@row_function
def statistics(block: RowBlock, temperature: float) -> tuple[Tensor, None]:
    """Compute `RowStatistics` of a row block as numbers (r, n), without those of labels (r,) or of
    a teacher that it does not have.
    """
    log_q = block.student.div_(temperature)
    top_s = log_q.argmax(-1, keepdim=True)
    lse_s = log_softmax_(log_q)
    entropy_s = sum_over_tokens(_entropy_of, log_q)
    if block.teacher is None:
        found = [lse_s, entropy_s]
    else:
        log_p = block.teacher.div_(temperature)
        agree = top_s == log_p.argmax(-1, keepdim=True)
        lse_t = log_softmax_(log_p)
        entropy_t = sum_over_tokens(_entropy_of, log_p)
        kl = sum_over_tokens(NamedDivergence("kl").value, log_q, log_p)
        found = [lse_s, lse_t, entropy_s, entropy_t, kl, agree]
    if block.per_row:
        labels = block.per_row[0][:, None].long()
        found += [log_q.gather(-1, labels), top_s == labels]
    return torch.cat([t.to(log_q.dtype) for t in found], -1), None


def _entropy_of(log_p: Tensor) -> Tensor:
    """Compute -p log p; 0 of a token of probability 0."""
    return torch.where(log_p == -torch.inf, 0.0, -log_p.exp() * log_p)


def _dense(u_s: Tensor, u_t: Tensor | None, *labels_and_temperature: Tensor | float) -> Tensor:
    *labels, temperature = labels_and_temperature
    z_s = u_s / temperature
    log_q, top = z_s.log_softmax(-1), z_s.argmax(-1)
    found = [z_s.logsumexp(-1), _entropy_of(log_q).sum(-1)]
    if u_t is not None:
        z_t = u_t / temperature
        log_p = z_t.log_softmax(-1)
        kl = expected_ratio(log_p, log_q)[:, 0]
        found = [found[0], z_t.logsumexp(-1), found[1], _entropy_of(log_p).sum(-1)]
        found += [kl, top == z_t.argmax(-1)]
    for label in labels:
        found += [log_q.gather(-1, label[:, None].long())[:, 0], top == label]
    return torch.stack([t.to(u_s.dtype) for t in found], -1)
