"""Distillation of logits by divergences and mixtures that need a row of both models at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.backends.torch_stream import logits_of_rows
from fdd_kernels.lens.divergence_text import NamedDivergence, parse_divergence
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import (
    log_softmax_,
    logit_gradient_,
    map_over_tokens,
    sum_over_tokens,
)
from fdd_kernels.objectives.dense import dense_logits
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.logits.teachers import (
    call_of_teacher,
    check_teachers,
    heads_of,
    log_weights_of,
)
from fdd_kernels.objectives.logits.temperature import (
    at_temperature,
    at_temperature_,
    encode_temperature,
    student_at_temperature_,
)
from fdd_kernels.objectives.option_checks import require_divergence

AKL, KL_AND_REVERSE, RELATIVE_MSE = "akl", "kl+reverse_kl", "relative_mse"
_KL, _REVERSE_KL = NamedDivergence("kl"), NamedDivergence("reverse_kl")
_PARAMETERS = {AKL: ("mu", 0.5), KL_AND_REVERSE: ("w", 0.5), RELATIVE_MSE: None}
_FORMS = tuple([f"{name}[:{p[0]}]" if p else name for name, p in _PARAMETERS.items()])


def fused_logit_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    divergence: str = "kl",
    teachers: Sequence[tuple[Tensor, ...]] | None = None,
    teacher_weights: Tensor | None = None,
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
    backend: str = "auto",
) -> Tensor:
    """Distillation of logits by mixtures of divergences, of teachers, or at each row's standard
    deviation, in memory that does not grow with tokens x vocabulary.

    With p the teacher's and q the student's softmax of the logits z over the temperature, per
    token::

        "akl:mu"           w KL(p || q) + (1 - w) KL(q || p), w = sum of |p - q| over the head of p
                           divided by the sum over all tokens, a constant
        "kl+reverse_kl:w"  w KL(p || q) + (1 - w) KL(q || p)
        "relative_mse"     |z_s - z_t|^2 / |z_t|^2, of the logits themselves
        others             as `trajectory` in `fused_fdd_loss`: "kl", "jsd:0.5", ...

    The head of p are its likeliest tokens as long as their sum is at most mu, or the first alone.
    Where p = q, w is 1/2.

    Sources: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
    Language Models", COLING 2025, and the authors' code (wutaiqiang/LLM_KD_AKL), which leaves the
    token that crosses mu out of the head; SquareHead (Kurtic et al., 2023) for "relative_mse";
    MIX-KD (hchoi71/MIX-KD) for temperature="std".

    With several `teachers` p is the mixture sum_m w_m p_m. Its gradient under "kl" is also that of
    sum_m w_m KL(p_m || q), the loss of MST-Distill, which is larger by a constant.

    Logits are at hand for one block of rows at a time: at most 128 MiB on a CPU and 1 GiB
    elsewhere, or one row. Gradients are formed in the forward pass (by "none" in the backward pass,
    from the logits computed again) and wait in float32; evaluate under `torch.no_grad()`. The loss
    can be differentiated once.

    Args:
        student_hidden, teacher_hidden: final, normed hidden states (..., Ds) and (..., Dt).
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt) as in `nn.Linear`.
        divergence: as above. Without parameters "akl:0.5" and "kl+reverse_kl:0.5".
        teachers: instead of a teacher (hidden, weight) or (hidden, weight, bias) of each of M
            teachers, of any widths and one vocabulary.
        teacher_weights: (M,) or (M, ...) floats at least 0, constants: weights w of the teachers,
            the same everywhere or for each position. They are divided by their sum. Equal if None.
        temperature: divides the logits; "std" divides each row's by their standard deviation
            (unbiased, over tokens that can occur), of each model its own, with gradient through it.
        student_bias, teacher_bias: (V,) added to the GEMM's result; -inf marks a token that cannot
            occur. "relative_mse" leaves out tokens that a model excludes.
        labels: (...) int64 or int32 tokens that the head has; positions equal to `ignore_index`
            drop out, and the others have no part in the loss.
        teacher_softcap, teacher_logit_scale: of all teachers.
        Other arguments: as in `fused_decoupled_kd`.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none").
        Without a valid token it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work. Weights of teachers that are negative, not finite or sum to 0: on a CPU
            always, on a GPU if FDD_KERNELS_DEBUG=1.
    """
    parse_logit_divergence(divergence)
    uniform, number = encode_temperature(temperature, scale_by_t2)
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        Model(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        Positions(labels, mask, token_weights, ignore_index, shift),
        Reduction(reduction, num_items_in_batch, scale_by_t2),
        temperature=uniform,
        vocab_size=vocab_size,
        backend=backend,
    )
    if teachers is None:
        if teacher_weights is not None:
            raise ValueError("teacher_weights was given without teachers: pass teachers=[...] too")
        call = LogitCall.of(inputs, options)
        return call.loss(Formula("logit_kd", (divergence, ""), (number,), _dense))
    check_teachers(teachers, inputs)
    calls = [
        call_of_teacher(f"teachers[{m}]", teacher, inputs, options)
        for m, teacher in enumerate(teachers)
    ]
    if divergence == RELATIVE_MSE and len(calls) > 1:
        raise ValueError(
            f'divergence="{RELATIVE_MSE}" compares logits, which a mixture of {len(calls)} '
            "teachers does not have: pass one teacher, or another divergence"
        )
    call, *others = calls
    log_w = log_weights_of(teacher_weights, len(calls), call)
    rows = [other.rows for other in others]
    shared = [t for row in rows for t in (row.teacher_weight, row.teacher_bias) if t is not None]
    has_bias = "".join([str(int(row.teacher_bias is not None)) for row in rows])
    numbers = number, float(teacher_logit_scale), float(teacher_softcap or 0.0)
    formula = Formula("logit_kd", (divergence, has_bias), numbers, _dense)
    return call.loss(formula, log_w, *[row.teacher_hidden[0] for row in rows], shared=shared)


def parse_logit_divergence(text: str) -> NamedDivergence:
    """Parse a divergence of `fused_logit_kd`.

    Raises:
        TypeError, ValueError: says what is legal.
    """
    name, colon, given = text.partition(":") if isinstance(text, str) else ("", "", "")
    if name not in _PARAMETERS:
        require_divergence("divergence", text, _FORMS)
        return parse_divergence(text)
    parameter = _PARAMETERS[name]
    if parameter is None:
        if colon:
            raise ValueError(f"divergence={text!r} gives a parameter: write {name!r}")
        return NamedDivergence(name)
    letter, value = parameter
    if colon:
        try:
            value = float(given)
        except ValueError:
            raise ValueError(
                f"divergence={text!r} has no number {letter}: write {name}[:{letter}]"
            ) from None
    if not 0 <= value <= 1:
        raise ValueError(f"divergence={text!r} has {letter} {value:g}, which is not in [0, 1]")
    return NamedDivergence(name, (value,))


class _Part(NamedTuple):
    """A divergence of the registry with its factor, a number or (r, 1)."""

    named: NamedDivergence
    factor: float | Tensor


def _parts(text: str, log_q: Tensor, log_p: Tensor) -> list[_Part]:
    """Write a divergence of log-probabilities (r, V) as a sum of divergences of the registry."""
    named = parse_logit_divergence(text)
    if named.name not in _PARAMETERS:
        return [_Part(named, 1.0)]
    (factor,) = named.parameters
    if named.name == AKL:
        factor = _share_of_head(log_q, log_p, factor)
    return [_Part(_KL, factor), _Part(_REVERSE_KL, 1 - factor)]


def _share_of_head(log_q: Tensor, log_p: Tensor, mu: float) -> Tensor:
    """Compute the share of |p - q| that is in the head of p, (r, 1); equal p are all in or out."""
    ordered = log_p.exp().sort(-1, descending=True).values
    count = (ordered.cumsum(-1) <= mu).sum(-1, keepdim=True).clamp(min=1)
    least = ordered.gather(-1, count - 1)
    del ordered

    def gaps(log_q: Tensor, log_p: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs()

    def of_head(log_q: Tensor, log_p: Tensor) -> Tensor:
        return gaps(log_q, log_p).masked_fill(log_p.exp() < least, 0.0)

    total = sum_over_tokens(gaps, log_q, log_p)
    return torch.where(total > 0, sum_over_tokens(of_head, log_q, log_p) / total, 0.5)


@row_function(matrices=8)
def logit_kd(
    block: RowBlock,
    divergence: str,
    has_bias: str,
    temperature: float,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, GradOf]:
    """Compute the loss of a row block; see `_mixed` for the other teachers."""
    z, chain = student_at_temperature_(block.student, temperature)
    log_p = at_temperature_(block.teacher, temperature)
    if divergence == RELATIVE_MSE:
        return _relative_mse(z, log_p, chain)
    log_softmax_(log_p)
    if block.per_row:
        log_w, *hidden = block.per_row
        log_p += log_w[:, :1]
        for m, tensors in enumerate(heads_of(hidden, block.shared, has_bias), 1):
            u = logits_of_rows(*tensors, logit_scale, softcap or None, z.dtype)
            log_softmax_(at_temperature_(u, temperature))
            torch.logaddexp(log_p, u.add_(log_w[:, m : m + 1]), out=log_p)
            del u
    log_softmax_(z)
    log_q, parts = z, _parts(divergence, z, log_p)
    value = torch.zeros_like(z[:, :1])
    for named, factor in parts:
        value += factor * sum_over_tokens(named.value, log_q, log_p)

    def grad_of(upstream: Tensor) -> Tensor:
        def of_tokens(log_q: Tensor, log_p: Tensor) -> Tensor:
            return sum(
                factor * DIVERGENCES[named.name].grad(log_q, log_p, *named.parameters)
                for named, factor in parts
            )

        grad = map_over_tokens(of_tokens, log_q, log_p)
        return chain(logit_gradient_(grad, log_q).mul_(upstream))

    return value, grad_of


def _relative_mse(z_s: Tensor, z_t: Tensor, chain) -> tuple[Tensor, GradOf]:
    excluded = (z_s == -torch.inf) | (z_t == -torch.inf)
    size = z_t.masked_fill_(excluded, 0.0).square().sum(-1, keepdim=True)
    size = torch.where(size > 0, size, torch.inf)
    difference = z_s.masked_fill(excluded, 0.0).sub_(z_t)
    del excluded
    value = difference.square().sum(-1, keepdim=True) / size
    return value, lambda upstream: chain(difference.mul_(2 * upstream / size))


def _dense(u_s: Tensor, u_t: Tensor, *rest: Tensor | str | float) -> Tensor:
    """Compute the loss densely, mixtures as sums of probabilities."""
    tensors = [t for t in rest if isinstance(t, Tensor)]
    divergence, has_bias, temperature, *scaling = rest[len(tensors) :]
    z_s, z_t = at_temperature(u_s, temperature), at_temperature(u_t, temperature)
    if divergence == RELATIVE_MSE:
        excluded = (z_s == -torch.inf) | (z_t == -torch.inf)
        z_s, z_t = z_s.masked_fill(excluded, 0.0), z_t.masked_fill(excluded, 0.0)
        size = z_t.square().sum(-1, keepdim=True)
        difference = (z_s - z_t).square().sum(-1, keepdim=True)
        return difference / torch.where(size > 0, size, torch.inf)
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if tensors:
        (scale, softcap), (log_w, *others) = scaling, tensors
        hidden, shared = others[: len(has_bias)], others[len(has_bias) :]
        p = log_p.exp() * log_w[:, :1].exp()
        for m, (h, *head) in enumerate(heads_of(hidden, shared, has_bias), 1):
            u = dense_logits(h.to(p.dtype), *head, scale, softcap or None, None)
            p = p + log_w[:, m : m + 1].exp() * at_temperature(u, temperature).softmax(-1)
        log_p = p.log()
    parts = _parts(divergence, log_q.detach(), log_p)
    return sum(f * named.value(log_q, log_p).sum(-1, keepdim=True) for named, f in parts)
