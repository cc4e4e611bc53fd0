"""Distillation across tokenizers (GOLD): a divergence of matched tokens, the order of others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import log_softmax_, logit_gradient_
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.numbers import describe, looks_at
from fdd_kernels.objectives.option_checks import require_number
from fdd_kernels.objectives.reduction import reduce_rows
from fdd_kernels.objectives.tensors import require_float

_VALUE, _BOTH = "value", "value and derivative"


def fused_gold_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    matched_ids: Tensor,
    *,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    jsd_beta: float = 0.5,
    student_log_scale: Tensor | None = None,
    teacher_log_scale: Tensor | None = None,
    temperature: float = 1.0,
    scale_by_t2: bool = False,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
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
    teacher_vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Distillation from a teacher with another tokenizer, in memory that does not grow with tokens
    x vocabulary.

    With q = softmax(z_s / temperature) e^student_log_scale and p likewise of the teacher, which
    need not sum to 1, per aligned position::

        matched   = sum over matched tokens of b p log(p / m) + (1 - b) q log(q / m),
                    m = b p + (1 - b) q; p log(p / q) for b = 0, q log(q / p) for b = 1
        unmatched = sum over i of |q_(i) - p_(i)| of the other tokens, both sorted from the largest,
                    the shorter padded with 0; 0 where a model has no other token
        loss      = matched_weight * matched + unmatched_weight * unmatched

    Source: TRL's GOLD trainer, which clamps matched probabilities at 1e-8; here nothing is clamped.
    For spans of several tokens it multiplies one distribution of the span by the probabilities of
    the span's other tokens: pass the sum of their logarithms (`selected_logprobs`) as log-scales.

    Logits are at hand for one block of rows at a time: at most 128 MiB on a CPU and 1 GiB
    elsewhere, or one row. Gradients are formed in the forward pass (by "none", and where
    `student_log_scale` asks for one, in the backward pass, from the logits computed again) and wait
    in float32; evaluate under `torch.no_grad()`. The loss can be differentiated once.

    Args:
        student_hidden, teacher_hidden: hidden states (..., Ds) and (..., Dt) of aligned positions.
        student_weight, teacher_weight: LM heads (V, Ds) and (Vt, Dt) as in `nn.Linear`.
        matched_ids: (2, M) int64 or int32, the student's and the teacher's ids of the same tokens,
            none twice.
        matched_weight, unmatched_weight: both, or None for M / Vt and the rest to 1, as in TRL.
        jsd_beta: b, in [0, 1].
        student_log_scale, teacher_log_scale: (...) floats, or None for 0. Gradient flows to the
            student's.
        temperature: divides the logits.
        labels: (...) int64 or int32 tokens that the head has; positions equal to `ignore_index`
            drop out, and the others have no part in the loss.
        vocab_size, teacher_vocab_size: use only the first tokens of each vocabulary.
        Other arguments: as in `fused_decoupled_kd`.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none").
        Without a valid token it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work. Ids out of range or twice: on a CPU always, on a GPU if FDD_KERNELS_DEBUG=1.
    """
    require_number("jsd_beta", jsd_beta)
    if jsd_beta > 1:
        raise ValueError(f"jsd_beta={jsd_beta} is not in [0, 1]")
    weights = {"matched_weight": matched_weight, "unmatched_weight": unmatched_weight}
    for name, weight in weights.items():
        require_number(name, weight, optional=True)
    if (matched_weight is None) != (unmatched_weight is None):
        raise ValueError(
            f"matched_weight={matched_weight} and unmatched_weight={unmatched_weight}: pass both, "
            "or neither for the share of matched tokens"
        )
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        Model(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        Positions(labels, mask, token_weights, ignore_index, shift),
        Reduction(reduction, num_items_in_batch, scale_by_t2),
        temperature=temperature,
        vocab_size=vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        backend=backend,
    )
    call = LogitCall.of(inputs, options, own_vocabularies=True)
    columns = call.head.columns, len(call.rows.teacher_weight)
    shared = _columns(matched_ids, columns, call.rows.device)
    scales = [
        _log_scale(name, scale, call)
        for name, scale in (
            ("student_log_scale", student_log_scale),
            ("teacher_log_scale", teacher_log_scale),
        )
    ]
    if matched_weight is None:
        matched_weight = matched_ids.shape[1] / columns[1]
        unmatched_weight = 1 - matched_weight
    numbers = float(matched_weight), float(unmatched_weight), float(jsd_beta), float(temperature)
    scale = scales[0]
    if call.backend == "reference" or not (scale.requires_grad and torch.is_grad_enabled()):
        return call.loss(Formula("gold", (_VALUE,), numbers, _dense), *scales, shared=shared)
    formula = Formula("gold", (_BOTH,), numbers, _dense, outputs=2)
    values, of_scale = call.values(formula, scale.detach(), scales[1], shared=shared).unbind(-1)
    # Zeros whose gradient is that of the log-scales.
    zeros = (scale - scale.detach()).nan_to_num(0.0)
    values = (values + of_scale.detach() * zeros) * options.factor
    shape = call.leading_shape if reduction == "none" else None
    return reduce_rows(values, call.rows.valid, shape, call.denominator, call.weights)


def _columns(ids: Tensor, columns: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Check matched ids; return those of both models, and the ids that are left of both."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = describe(ids) if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"matched_ids must be a tensor of int64 or int32, got {got}")
    if ids.ndim != 2 or len(ids) != 2:
        raise ValueError(f"matched_ids has shape {tuple(ids.shape)}: it must be (2, M)")
    if ids.device != device:
        raise ValueError(f"matched_ids is on {ids.device} and student_hidden on {device}: move it")
    matched, left = [], []
    for side, of_side, count in zip(("student", "teacher"), ids.long(), columns):
        if looks_at(of_side):
            wrong = (of_side < 0) | (of_side >= count)
            if wrong.any():
                raise ValueError(
                    f"matched_ids contains {int(of_side[wrong][0])}, which is no token of the "
                    f"{side} in [0, {count}): correct it"
                )
            if len(of_side.unique()) < len(of_side):
                raise ValueError(
                    f"matched_ids has a token of the {side} twice: match each token once"
                )
        is_left = torch.ones(count, dtype=torch.bool, device=device).index_fill(0, of_side, False)
        matched.append(of_side.clone())
        # Those that are left come first, in their order.
        order = is_left.to(torch.int8).argsort(descending=True, stable=True)
        left.append(order[: count - len(of_side)])
    return [*matched, *left]


def _log_scale(name: str, scale: Tensor | None, call: LogitCall) -> Tensor:
    """Check a log-scale, and return it as (R,)."""
    rows = call.rows
    if scale is None:
        return rows.student_weight.new_zeros(rows.rows, dtype=rows.statistics_dtype)
    require_float(name, scale)
    if tuple(scale.shape) != call.leading_shape or scale.device != rows.device:
        raise ValueError(
            f"{name} is a {describe(scale)}: it must have shape {call.leading_shape} and be on "
            f"{rows.device}, one number for each position"
        )
    if name.startswith("teacher") and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but the teacher gets none: pass .detach()")
    return scale.reshape(-1).to(rows.statistics_dtype)


@row_function(matrices=10)
def gold(
    block: RowBlock,
    results: str,
    matched_weight: float,
    unmatched_weight: float,
    beta: float,
    temperature: float,
) -> tuple[Tensor, GradOf]:
    """Compute the loss of a row block, and for _BOTH its derivative by the student's log-scale.

    The gradient with respect to log q is (1 - b) q (log q - log m) of a matched token, and
    q sign(q - p) of another; their sum is the derivative by the log-scale.
    """
    (scale_s, scale_t), (ids_s, ids_t, left_s, left_t) = block.per_row, block.shared
    log_q, log_p = block.student.div_(temperature), block.teacher.div_(temperature)
    log_softmax_(log_q), log_softmax_(log_p)
    grad = torch.zeros_like(log_q)
    x, y = log_q[:, ids_s].add_(scale_s[:, None]), log_p[:, ids_t].add_(scale_t[:, None])
    value = matched_weight * _divergence(x, y, beta).sum(-1, keepdim=True)
    grad[:, ids_s] = _derivative(x, y, beta).mul_(matched_weight)
    del x, y
    if len(left_s) and len(left_t):
        p = log_p[:, left_t].add_(scale_t[:, None]).exp_().sort(-1, descending=True).values
        q, order = log_q[:, left_s].add_(scale_s[:, None]).exp_().sort(-1, descending=True)
        common = min(len(left_s), len(left_t))
        gap = q[:, :common] - p[:, :common]
        rest = q[:, common:].sum(-1, keepdim=True) + p[:, common:].sum(-1, keepdim=True)
        value += unmatched_weight * (gap.abs().sum(-1, keepdim=True) + rest)
        q[:, :common] *= gap.sign_()
        grad[:, left_s] = torch.empty_like(q).scatter_(-1, order, q.mul_(unmatched_weight))
    of_scale = grad.sum(-1, keepdim=True)

    def grad_of(upstream: Tensor) -> Tensor:
        return logit_gradient_(grad, log_q).mul_(upstream[:, :1] / temperature)

    return value if results == _VALUE else torch.cat([value, of_scale], -1), grad_of


def _log_mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _times(log_weight: Tensor, x: Tensor) -> Tensor:
    """Compute e^log_weight x, 0 where the weight is 0."""
    return torch.where(log_weight == -torch.inf, 0.0, log_weight.exp() * x)


def _divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _times(log_p, log_p - log_q)
    if beta == 1:
        return _times(log_q, log_q - log_p)
    log_m = _log_mixture(log_q, log_p, beta)
    return beta * _times(log_p, log_p - log_m) + (1 - beta) * _times(log_q, log_q - log_m)


def _derivative(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return -log_p.exp()
    if beta == 1:
        return _times(log_q, log_q - log_p + 1)
    return (1 - beta) * _times(log_q, log_q - _log_mixture(log_q, log_p, beta))


def _dense(
    u_s: Tensor,
    u_t: Tensor,
    scale_s: Tensor,
    scale_t: Tensor,
    ids_s: Tensor,
    ids_t: Tensor,
    left_s: Tensor,
    left_t: Tensor,
    _: str,
    matched_weight: float,
    unmatched_weight: float,
    beta: float,
    temperature: float,
) -> Tensor:
    log_q = (u_s / temperature).log_softmax(-1) + scale_s[:, None]
    log_p = (u_t / temperature).log_softmax(-1) + scale_t[:, None]
    value = matched_weight * _divergence(log_q[:, ids_s], log_p[:, ids_t], beta).sum(-1)
    if len(left_s) and len(left_t):
        columns = max(len(left_s), len(left_t))
        q, p = (
            torch.nn.functional.pad(
                log[:, left].exp().sort(-1, descending=True).values, (0, columns - len(left))
            )
            for log, left in ((log_q, left_s), (log_p, left_t))
        )
        value = value + unmatched_weight * (q - p).abs().sum(-1)
    return value[:, None]
