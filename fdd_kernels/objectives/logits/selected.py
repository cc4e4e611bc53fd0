"""Log-probabilities of given tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.lens.row_blocks import GradOf, RowBlock, row_function
from fdd_kernels.lens.softmax import log_softmax_, logit_gradient_
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.logits.ids import check_ids
from fdd_kernels.objectives.numbers import check_labels

_ABSENT = -1


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities of given tokens, in memory that does not grow with tokens x vocabulary.

    The building block of sequence log-probabilities, of policy gradients (MiniLLM) and of
    preference losses: log softmax(softcap(logit_scale * (h W^T + b)) / temperature) at `ids`. Exact
    also where a token has nearly all probability: it is then -log1p of the others' share.

    Logits are at hand for one block of rows at a time: at most 128 MiB on a CPU and 1 GiB
    elsewhere, or one row. The backward pass computes them again. Gradients flow to `hidden`,
    `weight` and `bias`, once.

    Args:
        hidden: final, normed hidden states (..., D).
        weight: LM head (V, D) as in `nn.Linear`.
        ids: (...) or (..., K) int64 or int32 tokens. Where equal to `ignore_index`, the result is 0
            without gradient; a position without any other is not computed. Tokens may repeat.
        bias: (V,) added to the GEMM's result; -inf marks a token that cannot occur.
        temperature: divides the logits.
        softcap: cap * tanh(logits / cap) after the scale.
        logit_scale: multiplies the logits.
        vocab_size: the softmax is over the first `vocab_size` tokens only.
        backend: "auto", "torch" or "reference" (dense, differentiable any number of times).

    Returns:
        Log-probabilities in the shape of `ids`, float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work.
    """
    inputs, options = logit_arguments(
        Model(hidden, weight, bias, logit_scale, softcap),
        None,
        Positions(ignore_index=ignore_index),
        Reduction(),
        temperature=temperature,
        vocab_size=vocab_size,
        backend=backend,
        prefix="",
    )
    check_ids("ids", ids, hidden, "hidden", may_be_single=True)
    call = LogitCall.of(inputs, options, ids=ids)
    check_labels(ids, ignore_index, call.head.columns, "ids")
    count = 1 if ids.ndim < hidden.ndim else ids.shape[-1]
    per_row = ids.reshape(call.rows.rows, count).long()
    ignored = per_row == ignore_index
    call = call.where(~ignored.all(-1))
    formula = Formula("selected", (), (float(temperature),), _dense, per_row.shape[1])
    return call.values(formula, per_row.masked_fill(ignored, _ABSENT)).view(ids.shape)


@row_function
def selected(block: RowBlock, temperature: float) -> tuple[Tensor, GradOf]:
    """Compute the log-probabilities of tokens (r, K), 0 where one is -1."""
    (ids,), log_q = block.per_row, block.student.div_(temperature)
    absent, at = ids < 0, ids.clamp(min=0)
    log_softmax_(log_q)
    values = log_q.gather(-1, at).masked_fill_(absent, 0.0)

    def grad_of(upstream: Tensor) -> Tensor:
        grad = torch.zeros_like(log_q).scatter_add_(-1, at, upstream.masked_fill(absent, 0.0))
        return logit_gradient_(grad, log_q).div_(temperature)

    return values, grad_of


def _dense(u: Tensor, _: None, ids: Tensor, temperature: float) -> Tensor:
    log_q = (u / temperature).log_softmax(-1)
    return torch.where(ids < 0, 0.0, log_q.gather(-1, ids.clamp(min=0)))
