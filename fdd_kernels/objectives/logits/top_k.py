"""Distillation from a teacher's top-k log-probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdd_kernels.lens.divergence_text import NamedDivergence, parse_divergence
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import log_softmax_, logit_gradient_
from fdd_kernels.objectives.dense import expected_ratio
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.logits.ids import check_ids, check_logprobs, check_top_k
from fdd_kernels.objectives.option_checks import require_choice, require_divergence

TAILS = ("bucket", "drop", "renormalize")
_DIVERGENCES = ("kl", "reverse_kl", "jsd")
# The least probability of the teacher's tail.
_LEAST_TAIL = 2.0**-40
_MOST_LOG_MASS = math.log1p(-_LEAST_TAIL)


def fused_topk_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    tail: str = "bucket",
    divergence: str = "kl",
    temperature: float = 1.0,
    scale_by_t2: bool = False,
    student_bias: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Distillation from the K likeliest tokens of a teacher, in memory that does not grow with
    tokens x vocabulary.

    For teachers behind an inference server, or cached as top-k log-probabilities. With p_k the
    teacher's and q_k the student's probability of token `ids[k]`, q over the whole vocabulary, per
    token of text::

        tail="bucket"       D over K + 1 classes, the last one all other tokens together:
                            p_r = 1 - sum p_k, q_r = the sum of q over them
        tail="drop"         the K terms of D alone, such as sum p_k log(p_k / q_k); may be negative
        tail="renormalize"  D(p / sum p_k, q / sum q_k) over the K tokens

    Sources: TRL's server distillation ("bucket" is its tail; "drop" is what it computes without)
    and Megatron-LM's ghost token. The tail's q_r is a sum over its tokens, so it is exact however
    confident the student is.

    Probabilities that sum above 1 by no more than what rounding every log-probability to bfloat16
    explains, sum_k p_k^(1 + 2^-8) <= 1 + 2^-14, are clamped: they are divided by a number such that
    p_r is 2^-40, the least that it may be. Where the ids are all tokens that the student has, they
    are normalised.

    Logits are at hand for one block of rows at a time: at most 128 MiB on a CPU and 1 GiB
    elsewhere, or one row. Gradients are formed in the forward pass (by "none" in the backward pass,
    from the logits computed again) and wait in float32; evaluate under `torch.no_grad()`. The loss
    can be differentiated once.

    Args:
        student_hidden: final, normed hidden states (..., D).
        student_weight: LM head (V, D) as in `nn.Linear`.
        ids: (..., K) int64 or int32 tokens, no token twice in a row. An entry -1 whose
            log-probability is -inf is padding, for rows with fewer than K tokens. A row of padding
            alone has the loss 0 and stays in the divisor.
        logprobs: (..., K) the teacher's natural log-probabilities at `temperature`, over the whole
            vocabulary; constants.
        tail: "bucket", "drop" or "renormalize", as above.
        divergence: D: "kl" KL(p || q), "reverse_kl" KL(q || p), or "jsd[:beta]", the generalised
            Jensen-Shannon divergence (TRL's convention, beta 0.5 if not given).
        temperature: divides the student's logits.
        scale_by_t2: multiply the loss by temperature squared.
        student_bias: (V,) added to the GEMM's result; -inf marks a token that cannot occur.
        labels: (...) int64 or int32 tokens that the head has; positions equal to `ignore_index`
            drop out, and the others have no part in the loss.
        mask: (...) bool or int; positions that are 0 drop out. Never shifted.
        token_weights: (...) floats, finite and at least 0, without gradient: factors of the
            positions. They do not change the divisor; a position of weight 0 is not computed. Never
            shifted.
        shift: labels are those of a causal LM, unshifted: position t drops out with labels[..., t +
            1], and the last position drops out. Hidden states, ids and logprobs are never shifted.
        student_softcap: cap * tanh(logits / cap) after the scale.
        student_logit_scale: multiplies the logits.
        reduction: "mean" over valid tokens, "sum", or "none": (...) with 0 at the others.
        num_items_in_batch: divide the sum by this number instead; a tensor of one number may be 0.
        vocab_size: the softmax is over the first `vocab_size` tokens only.
        backend: "auto", "torch" or "reference" (dense, differentiable any number of times).

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none").
        Without a valid token it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work. Ids out of range or twice in a row, and probabilities that sum too far above
            1, on a CPU always, on a GPU if FDD_KERNELS_DEBUG=1, where the check waits for the
            device. Such a call on a GPU without it is undefined.
    """
    require_choice("tail", tail, TAILS)
    if isinstance(divergence, str) and divergence.partition(":")[0] not in _DIVERGENCES:
        raise ValueError(
            f"divergence={divergence!r} is not one of kl, reverse_kl, jsd[:beta], which top-k "
            "probabilities offer"
        )
    require_divergence("divergence", divergence)
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        None,
        Positions(labels, mask, token_weights, ignore_index, shift),
        Reduction(reduction, num_items_in_batch, scale_by_t2),
        temperature=temperature,
        vocab_size=vocab_size,
        backend=backend,
    )
    check_ids("ids", ids, student_hidden, "student_hidden")
    check_logprobs("logprobs", logprobs, ids, student_hidden, "student_hidden")
    call = LogitCall.of(inputs, options, ids=ids, logprobs=logprobs)
    ids, logprobs = ids.reshape(-1, ids.shape[-1]).long(), logprobs.reshape(-1, ids.shape[-1])
    check_top_k(ids, logprobs, call.rows.valid, call.head.columns)
    call = call.where((ids >= 0).any(-1))
    formula = Formula("top_k", (tail, divergence), (float(temperature),), _dense)
    return call.loss(formula, ids, logprobs.detach())


@row_function
def top_k(block: RowBlock, tail: str, divergence: str, temperature: float) -> tuple[Tensor, GradOf]:
    """Compute the loss of a row block with ids and logprobs (r, K).

    The classes of D are the K tokens and, but for "renormalize", all others together. With g_c the
    gradient of a class's student logit, a token of the last class has q's share within it of g_r.
    """
    (ids, log_p), z = block.per_row, block.student.div_(temperature)
    absent, at, log_p = ids < 0, ids.clamp(min=0), log_p.to(z.dtype)
    log_q = z.gather(-1, at).masked_fill_(absent, -torch.inf)
    if tail == "renormalize":
        log_p = log_p.clone()
        log_softmax_(log_p)
    else:
        z.masked_fill_(_chosen(ids, z.shape[-1]), -torch.inf)
        others = log_softmax_(z)
        log_q, log_p = torch.cat([log_q, others], -1), _with_tail(log_p, others == -torch.inf)
    log_softmax_(log_q)
    named = parse_divergence(divergence)

    def grad_of(upstream: Tensor) -> Tensor:
        # Of these divergences it is the whole derivative, no multiple of q is missing.
        grad = DIVERGENCES[named.name].grad(log_q, log_p, *named.parameters)
        if tail == "drop":
            grad[:, -1] = 0.0
        grad = logit_gradient_(grad, log_q).mul_(upstream / temperature)
        if tail == "renormalize":
            z.zero_()
        else:
            z.exp_().mul_(grad[:, -1:])
        return z.scatter_add_(-1, at, grad[:, : ids.shape[-1]].masked_fill(absent, 0.0))

    return _divergence(named, tail, log_q, log_p), grad_of


def _chosen(ids: Tensor, columns: int) -> Tensor:
    """Mark the tokens of ids (r, K) among all, (r, V) bool; -1 marks none."""
    marks = torch.zeros((len(ids), columns + 1), dtype=torch.bool, device=ids.device)
    return marks.scatter_(-1, ids + 1, True)[:, 1:]


def _with_tail(log_p: Tensor, has_none: Tensor) -> Tensor:
    """Add the tail's log-probability to those of the K tokens: (r, K + 1).

    Where there are no other tokens, `has_none` (r, 1), the K are normalised.
    """
    log_mass = log_softmax_(log_p.clone())
    excess = torch.where(has_none, log_mass, (log_mass - _MOST_LOG_MASS).clamp(min=0))
    log_tail = (-log_mass.clamp(max=_MOST_LOG_MASS).expm1()).log()
    log_tail = torch.where(has_none, -torch.inf, log_tail)
    return torch.cat([log_p - excess, log_tail], -1)


def _divergence(named: NamedDivergence, tail: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Compute D over the classes (r, C), or over all of them but the last ("drop"): (r, 1).

    The registry's KL adds the sum of r - p, which is 0 over all classes alone; JSD adds nothing.
    """
    if tail == "drop":
        log_q, log_p = log_q[:, :-1], log_p[:, :-1]
        if named.name == "kl":
            return expected_ratio(log_p, log_q)
        if named.name == "reverse_kl":
            return expected_ratio(log_q, log_p)
    return named.value(log_q, log_p).sum(-1, keepdim=True)


def _dense(
    u: Tensor, _: None, ids: Tensor, log_p: Tensor, tail: str, divergence: str, temperature: float
) -> Tensor:
    """Compute the loss densely."""
    absent, log_p = ids < 0, log_p.to(u.dtype)
    z = u / temperature
    chosen = _chosen(ids, u.shape[-1])
    log_q = z.gather(-1, ids.clamp(min=0)).masked_fill(absent, -torch.inf)
    if tail == "renormalize":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    else:
        others = z.masked_fill(chosen, -torch.inf).logsumexp(-1, keepdim=True)
        log_q, log_p = torch.cat([log_q, others], -1), _with_tail(log_p, others == -torch.inf)
    return _divergence(parse_divergence(divergence), tail, log_q.log_softmax(-1), log_p)
