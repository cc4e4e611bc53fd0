"""Objectives of the order of logits or probabilities: ULD and ListMLE."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import log_softmax_, logit_gradient_, sum_over_tokens
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.logits.temperature import (
    at_temperature,
    at_temperature_,
    encode_temperature,
    student_at_temperature_,
)
from fdd_kernels.objectives.option_checks import require_choice, require_int

KINDS = ("uld", "listmle")
_FAR_BELOW = -1e30


def fused_rank_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str,
    k: int | None = None,
    temperature: float | str = 1.0,
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
    """Distillation of an order, in memory that does not grow with tokens x vocabulary.

    With p the teacher's and q the student's softmax of the logits over the temperature, per token::

        kind="uld"      sum over i of |q_(i) - p_(i)|, both sorted from the largest, the shorter
                        one padded with 0
        kind="listmle"  sum over i <= k of logsumexp(s_i, ..., s_V) - s_i, with s the student's
                        logits in the order of the teacher's, from the largest

    Sources: Boizard et al., "Towards Cross-Tokenizer Distillation", 2024, as in TRL and
    songmzhang/DSKD, which takes vocabularies of different sizes; ListMLE of the first k, as in
    CPRD (its own code was not found).

    The gradient of "uld" is that of sum |q_(i) - p_(i)| at the student's present order; two equal
    sorted probabilities add 0 to it. In "listmle" a token that a model cannot produce (a bias of
    -inf) has no part. Tokens that the teacher gives equal logits have any order.

    Logits are at hand for one block of rows at a time: at most 128 MiB on a CPU and 1 GiB
    elsewhere, or one row. Gradients are formed in the forward pass (by "none" in the backward pass,
    from the logits computed again) and wait in float32; evaluate under `torch.no_grad()`. The loss
    can be differentiated once.

    Args:
        student_hidden, teacher_hidden: final, normed hidden states (..., Ds) and (..., Dt).
        student_weight, teacher_weight: LM heads (V, Ds) and (Vt, Dt) as in `nn.Linear`; Vt is V but
            for "uld".
        kind: "uld" or "listmle", as above.
        k: how many of the teacher's first tokens are ranked, all of them if None; for "listmle".
        temperature: divides the logits; "std" divides each row's by their standard deviation
            (unbiased, over tokens that can occur), with gradient through it.
        labels: (...) int64 or int32 tokens that the head has; positions equal to `ignore_index`
            drop out, and the others have no part in the loss.
        vocab_size: compare only the first `vocab_size` tokens, of the student alone with "uld".
        teacher_vocab_size: the same of the teacher, with "uld".
        Other arguments: as in `fused_decoupled_kd`.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none").
        Without a valid token it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work.
    """
    require_choice("kind", kind, KINDS)
    if k is not None:
        require_int("k", k, minimum=1)
    if kind == "uld" and k is not None:
        raise ValueError(f'k={k} was given with kind="uld", which sorts all tokens: leave it out')
    if kind != "uld" and teacher_vocab_size is not None:
        raise ValueError(
            f'teacher_vocab_size={teacher_vocab_size} was given with kind="{kind}", which ranks '
            "the tokens of one vocabulary: pass vocab_size"
        )
    uniform, number = encode_temperature(temperature, scale_by_t2)
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        Model(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        Positions(labels, mask, token_weights, ignore_index, shift),
        Reduction(reduction, num_items_in_batch, scale_by_t2),
        temperature=uniform,
        vocab_size=vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        backend=backend,
    )
    call = LogitCall.of(inputs, options, own_vocabularies=kind == "uld")
    if kind == "uld":
        return call.loss(Formula("uld", (), (number,), _dense_uld))
    if k is not None and k > call.head.columns:
        raise ValueError(
            f"k={k} is larger than the vocabulary, of which {call.head.columns} tokens are "
            "compared: pass at most that, or None for all"
        )
    ranked = float(call.head.columns if k is None else k)
    return call.loss(Formula("listmle", (), (ranked, number), _dense_listmle))


@row_function(matrices=8)
def uld(block: RowBlock, temperature: float) -> tuple[Tensor, GradOf]:
    """Compute the loss of a row block; its gradient with respect to log q is q sign(q - p)."""
    p = at_temperature_(block.teacher, temperature)
    log_softmax_(p)
    p.copy_(p.exp_().sort(-1, descending=True).values)
    log_q, chain = student_at_temperature_(block.student, temperature)
    log_softmax_(log_q)
    q, order = log_q.exp().sort(-1, descending=True)
    common = min(p.shape[-1], q.shape[-1])
    gap = p[:, :common].sub_(q[:, :common])
    value = sum_over_tokens(torch.abs, p)  # beyond the student's last token, p itself
    value += q[:, common:].sum(-1, keepdim=True)

    def grad_of(upstream: Tensor) -> Tensor:
        q[:, :common] *= gap.sign_().neg_()
        grad = torch.empty_like(q).scatter_(-1, order, q)
        return chain(logit_gradient_(grad, log_q).mul_(upstream))

    return value, grad_of


def _dense_uld(u_s: Tensor, u_t: Tensor, temperature: float) -> Tensor:
    columns = max(u_s.shape[-1], u_t.shape[-1])
    q, p = (
        torch.nn.functional.pad(
            at_temperature(u, temperature).softmax(-1).sort(-1, descending=True).values,
            (0, columns - u.shape[-1]),
        )
        for u in (u_s, u_t)
    )
    return (q - p).abs().sum(-1, keepdim=True)


@row_function(matrices=10)
def listmle(block: RowBlock, k: float, temperature: float) -> tuple[Tensor, GradOf]:
    """Compute the loss of a row block.

    With l_i the log-sum-exp from rank i on, the gradient at rank j is exp(s_j) times the sum of
    exp(-l_i) over i <= min(j, k), less 1 if j <= k.
    """
    z, chain = student_at_temperature_(block.student, temperature)
    ids = _in_teachers_order(z, block.teacher, int(k))
    ranked = z.gather(-1, ids)
    absent = ranked == -torch.inf
    rest = z.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    lse = _suffix_lse(ranked, rest)
    values = (lse - ranked).masked_fill_(absent, 0.0).sum(-1, keepdim=True)

    def grad_of(upstream: Tensor) -> Tensor:
        log_sums = (-lse).masked_fill_(absent, -torch.inf).logcumsumexp(-1)
        own = (ranked + log_sums).exp_().sub_(1).masked_fill_(absent, 0.0)
        grad = z.add_(log_sums[:, -1:]).exp_().scatter_(-1, ids, own)
        return chain(grad.mul_(upstream))

    return values, grad_of


def _in_teachers_order(z_s: Tensor, z_t: Tensor, k: int) -> Tensor:
    """Return the teacher's first k tokens, (r, k), those last that a model excludes."""
    return z_t.masked_fill(z_s == -torch.inf, -torch.inf).topk(k, -1).indices


def _suffix_lse(ranked: Tensor, rest: Tensor) -> Tensor:
    """Compute the log-sum-exps of each of (r, k) logits, all after it and the rest's (r, 1)."""
    return torch.cat([rest, ranked.flip(-1)], -1).logcumsumexp(-1)[:, 1:].flip(-1)


def _dense_listmle(u_s: Tensor, u_t: Tensor, k: float, temperature: float) -> Tensor:
    z_s, z_t = at_temperature(u_s, temperature), at_temperature(u_t, temperature)
    order = _in_teachers_order(z_s, z_t, z_s.shape[-1])
    ranked = z_s.gather(-1, order)
    absent = ranked == -torch.inf
    # autograd of logcumsumexp makes NaN of -inf
    ranked = ranked.masked_fill(absent, _FAR_BELOW)
    losses = ranked.flip(-1).logcumsumexp(-1).flip(-1) - ranked
    return losses.masked_fill(absent, 0.0)[:, : int(k)].sum(-1, keepdim=True)
