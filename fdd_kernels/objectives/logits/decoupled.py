"""Decoupled knowledge distillation (DKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.lens.divergence_text import NamedDivergence
from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import log_softmax_, logit_gradient_, sum_over_tokens
from fdd_kernels.objectives.dense import expected_ratio
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.option_checks import require_number

_KL = NamedDivergence("kl").value


def fused_decoupled_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    temperature: float = 4.0,
    scale_by_t2: bool = False,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Decoupled knowledge distillation, in memory that does not grow with tokens x vocabulary.

    With y the label, p the teacher's and q the student's softmax of the logits over the
    temperature, and p', q' the same without the label, per token::

        loss = target_weight * KL([p_y, 1 - p_y] || [q_y, 1 - q_y])
               + nontarget_weight * KL(p' || q')

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, and the authors' code
    (megvii-research/mdistiller), which multiplies the loss by the temperature squared
    (`scale_by_t2=True`) and raises it over the first 20 epochs (left to the caller).

    It is exact however confident a model is: 1 - p_y is the sum over the other tokens. Where these
    are none (a vocabulary of one token) the loss is 0. Logits are at hand for one block of rows
    at a time: at most 128 MiB on a CPU and 1 GiB elsewhere, or one row. Gradients are formed in the
    forward pass (by "none" in the backward pass, from the logits computed again) and wait in
    float32; evaluate under `torch.no_grad()`. The loss can be differentiated once.

    Args:
        student_hidden, teacher_hidden: final, normed hidden states (..., Ds) and (..., Dt).
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt) as in `nn.Linear`.
        labels: (...) int64 or int32 tokens. Positions equal to `ignore_index` drop out.
        target_weight, nontarget_weight: weights of the two parts (the papers' alpha and beta).
        temperature: divides the logits.
        scale_by_t2: multiply the loss by temperature squared.
        student_bias, teacher_bias: (V,) added to the GEMM's result; -inf marks a token that cannot
            occur.
        mask: (...) bool or int; positions that are 0 drop out. Never shifted.
        token_weights: (...) floats, finite and at least 0, without gradient: factors of the
            positions. They do not change the divisor; a position of weight 0 is not computed. Never
            shifted.
        shift: labels are those of a causal LM, unshifted: position t is compared with labels[..., t
            + 1] and the last position drops out.
        student_softcap, teacher_softcap: cap * tanh(logits / cap) after the scale.
        student_logit_scale, teacher_logit_scale: multiply the logits.
        reduction: "mean" over valid tokens, "sum", or "none": (...) with 0 at the others.
        num_items_in_batch: divide the sum by this number instead; a tensor of one number may be 0.
        vocab_size: compare only the first `vocab_size` tokens.
        backend: "auto", "torch" or "reference" (dense, differentiable any number of times).

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none").
        Without a valid token it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range, a teacher tensor
            that requires grad; named, before any work. Set FDD_KERNELS_DEBUG=1 to refuse NaN too.
    """
    require_number("target_weight", target_weight)
    require_number("nontarget_weight", nontarget_weight)
    if not target_weight and not nontarget_weight:
        raise ValueError(
            f"nothing to compute: target_weight={target_weight} and "
            f"nontarget_weight={nontarget_weight}: give one of them a weight"
        )
    if labels is None:
        raise ValueError("labels is None: the loss sets the label's token apart, pass labels")
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        Model(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        Positions(labels, mask, token_weights, ignore_index, shift),
        Reduction(reduction, num_items_in_batch, scale_by_t2),
        temperature=temperature,
        vocab_size=vocab_size,
        backend=backend,
    )
    call = LogitCall.of(inputs, options, predicts_labels=True)
    numbers = float(target_weight), float(nontarget_weight), float(temperature)
    return call.loss(Formula("decoupled_kd", (), numbers, _dense), call.rows.labels)


@row_function
def decoupled_kd(
    block: RowBlock, target_weight: float, nontarget_weight: float, temperature: float
) -> tuple[Tensor, GradOf]:
    """Compute the loss of a row block with labels (r,).

    With the margin m = z_y - logsumexp of the others, p_y = sigmoid(m), and the gradient is
    target_weight (sigmoid(m_s) - sigmoid(m_t)) (1_y - q') + nontarget_weight (q' - p').
    """
    labels = block.per_row[0][:, None].long()
    margin_s, log_q = _apart(block.student.div_(temperature), labels)
    margin_t, log_p = _apart(block.teacher.div_(temperature), labels)
    value = torch.zeros_like(margin_s)
    if target_weight:
        value += target_weight * _binary_kl(margin_s, margin_t)
    if nontarget_weight:
        value += nontarget_weight * sum_over_tokens(_KL, log_q, log_p)

    def grad_of(upstream: Tensor) -> Tensor:
        of_target = target_weight * _sigmoid_difference(margin_s, margin_t)
        grad = logit_gradient_(log_p.exp_().neg_(), log_q).mul_(nontarget_weight)
        grad.addcmul_(log_q, of_target, value=-1)  # q' by now
        return grad.scatter_(-1, labels, of_target).mul_(upstream / temperature)

    return value, grad_of


def _apart(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Set the labels (r, 1) apart: their margins (r, 1), and in place of z (r, V) the
    log-probabilities among the other tokens, -inf at the label.
    """
    of_label = z.gather(-1, labels)
    others = log_softmax_(z.scatter_(-1, labels, -torch.inf))
    return of_label - others, z


def _binary_kl(margin_s: Tensor, margin_t: Tensor) -> Tensor:
    """Compute KL([p, 1 - p] || [q, 1 - q]) with p and q the sigmoids of margins."""
    parts = [_KL(F.logsigmoid(s), F.logsigmoid(t)) for s, t in _both_signs(margin_s, margin_t)]
    return parts[0] + parts[1]


def _both_signs(margin_s: Tensor, margin_t: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (margin_s, margin_t), (-margin_s, -margin_t)


def _sigmoid_difference(a: Tensor, b: Tensor) -> Tensor:
    """Compute sigmoid(a) - sigmoid(b), which for large or nearly equal numbers would cancel."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    gap = torch.where(high == low, 0.0, high - low)
    size = -torch.expm1(-gap) * high.sigmoid() * (-low).sigmoid()
    return torch.where(a < b, -size, size)


def _dense(
    u_s: Tensor,
    u_t: Tensor,
    labels: Tensor,
    target_weight: float,
    nontarget_weight: float,
    temperature: float,
) -> Tensor:
    """Compute the loss densely: the two-element KL from margins, the other with the label at -inf,
    both as sums of p (log p - log q).
    """
    labels = labels[:, None].long()
    margins, others = [], []
    for u in (u_s, u_t):
        z = u / temperature
        rest = z.scatter(-1, labels, -torch.inf)
        lse = rest.logsumexp(-1, keepdim=True)
        margins.append(z.gather(-1, labels) - lse)
        others.append(rest - torch.where(lse == -torch.inf, 0.0, lse))
    value = target_weight * _dense_binary_kl(*margins)
    return value + nontarget_weight * expected_ratio(*reversed(others))


def _dense_binary_kl(margin_s: Tensor, margin_t: Tensor) -> Tensor:
    pairs = _both_signs(margin_s, margin_t)
    log_q, log_p = (torch.cat([F.logsigmoid(m) for m in side], -1) for side in zip(*pairs))
    return expected_ratio(log_p, log_q)
