"""The loss in plain PyTorch as a reader of the papers would write it: dense logits in the inputs'
dtype, softmax in float32. It shares nothing with the package's own reference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.testing import Problem


def log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    cap: float | None = None,
    temperature: float = 1.0,
    *,
    upcast: bool = False,
) -> Tensor:
    """Compute the log-softmax of one model's logits, (R, V).

    `upcast` makes the logits float32 before the softmax, as `.float()` in most training code does.
    """
    logits = F.linear(hidden, weight)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    if upcast:
        logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.log_softmax(logits, dim=-1, dtype=wide)


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Compute KL(p || q) per row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Compute beta KL(p || m) + (1 - beta) KL(q || m), the generalised JSD of GKD."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)


def skew_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Compute KL(p || alpha p + (1 - alpha) q) of DistiLLM."""
    return kl(torch.log(alpha * log_p.exp() + (1 - alpha) * log_q.exp()), log_p)


def alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    """Compute the alpha-beta divergence of ABKD."""
    s = alpha + beta
    powers = (alpha * torch.exp(s * log_p) + beta * torch.exp(s * log_q)) / s
    return (powers - torch.exp(alpha * log_p + beta * log_q)).sum(-1) / (alpha * beta)


DIVERGENCES = {
    "kl": kl,
    "reverse_kl": lambda log_q, log_p: kl(log_p, log_q),
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": lambda log_q, log_p, alpha: skew_kl(log_p, log_q, alpha),
    "tv": lambda log_q, log_p: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
    "alpha_beta": alpha_beta,
}


def divergence(text: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Compute a divergence with its parameters, such as "jsd:0.5", per row."""
    name, _, numbers = text.partition(":")
    return DIVERGENCES[name](log_q, log_p, *[float(x) for x in numbers.split(",") if x])


def one_minus_cosine(s: Tensor, t: Tensor, log_w: Tensor | None = None) -> Tensor:
    """Compute 1 - cos of two deltas (R, V) per row; with log-weights both are centred and
    weighted.
    """
    if log_w is None:
        return 1 - F.cosine_similarity(s, t, dim=-1)
    w = log_w.exp()
    s, t = (x - (w * x).sum(-1, keepdim=True) for x in (s, t))
    norms = torch.sqrt((w * s * s).sum(-1) * (w * t * t).sum(-1))
    return 1 - (w * s * t).sum(-1) / norms


def row_losses(
    student_hidden: list[Tensor],
    student_weight: Tensor,
    teacher_hidden: list[Tensor],
    teacher_weight: Tensor,
    options: dict,
    *,
    upcast: bool = False,
) -> Tensor:
    """Compute the loss per row, (R,), at temperature 1, from states and heads.

    Of the options it knows the soft caps and those of `row_losses_of`.
    """

    def model(states: list[Tensor], weight: Tensor, cap: float | None) -> list[Tensor]:
        return [log_probabilities(h, weight, cap, upcast=upcast) for h in states]

    student = model(student_hidden, student_weight, options.get("student_softcap"))
    with torch.no_grad():
        teacher = model(teacher_hidden, teacher_weight, options.get("teacher_softcap"))
    return row_losses_of(student, teacher, options)


def row_losses_of(student: list[Tensor], teacher: list[Tensor], options: dict) -> Tensor:
    """Compute output KD + trajectory (KL) + derivative per row, (R,), from the log-probabilities
    of the sampled layers and the output, (R, V) each.

    Of the options it knows output_divergence, derivative and teacher_mix.
    """
    target, mix = teacher, options.get("teacher_mix", 1.0)
    if mix != 1:
        mixed = [(1 - mix) * q.detach() + mix * p for q, p in zip(student, teacher)]
        target = [F.log_softmax(z, dim=-1) for z in mixed]
    loss = divergence(options.get("output_divergence", "kl"), student[-1], target[-1])
    layers = len(student) - 1
    if layers:
        loss = loss + sum(kl(q, p) for q, p in zip(student[:-1], target[:-1])) / layers
    weighted = options.get("derivative") == "weighted_cosine"
    for i in range(layers - 1):
        deltas = student[i + 1] - student[i], teacher[i + 1] - teacher[i]
        of_pair = one_minus_cosine(*deltas, teacher[i + 1] if weighted else None)
        loss = loss + of_pair / (layers - 1)
    return loss


def feature_row_losses(
    student_hidden: list[Tensor], projection: Tensor, teacher_hidden: list[Tensor]
) -> Tensor:
    """Compute MSE of projected states and of their differences from layer to layer, per row,
    (R,).
    """
    student = [F.linear(h, projection).float() for h in student_hidden]
    teacher = [h.float() for h in teacher_hidden]
    loss = sum((s - t).square().mean(-1) for s, t in zip(student, teacher)) / len(student)
    for i in range(len(student) - 1):
        delta = (student[i + 1] - student[i]) - (teacher[i + 1] - teacher[i])
        loss = loss + delta.square().mean(-1) / (len(student) - 1)
    return loss


def fdd_rows(problem: Problem, options: dict) -> Tensor:
    """Compute the rows' losses of `fused_fdd_loss`, (R,)."""
    student, teacher = list(problem.student_hidden), list(problem.teacher_hidden)
    if problem.teacher_weight is None:
        return feature_row_losses(student, problem.student_weight, teacher)
    loss = row_losses(student, problem.student_weight, teacher, problem.teacher_weight, options)
    return loss if problem.token_weights is None else loss * problem.token_weights
