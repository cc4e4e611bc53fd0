"""Optimal transport between the predictions of a group of rows (SinKD)."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.engine.pair_costs import pair_costs
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.objectives.features.groups import check_groups, split_into_groups
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import LogitCall
from fdd_kernels.objectives.logits.eager import outside_compiler
from fdd_kernels.objectives.option_checks import require_int, require_number
from fdd_kernels.objectives.reduction import loss_denominator, reduce_rows


@outside_compiler("the number of groups and of their rows decides what is computed")
def fused_sinkhorn_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    groups: Tensor | str = "all",
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
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
    """Sinkhorn distance between the student's and the teacher's predictions of a group of rows, in
    memory that does not grow with rows x vocabulary.

    With p_j the teacher's and q_i the student's softmax of the logits over the temperature, per
    group of b rows::

        W_ij = sum over tokens of |q_i - p_j|                   (b, b)
        P    = exp(-W / epsilon), `iterations` times its rows and then its columns divided by
               their sums
        loss = sum of P W

    Source: Cui et al., "SinKD: Sinkhorn Distance Minimization for Knowledge Distillation", COLING
    2024, and the authors' code (2018cx/SinKD), in which a batch is one group and the weight 0.0008.
    The gradient flows through all iterations, as there. It is computed in the log domain, so that
    no small epsilon underflows.

    W is streamed over tiles of the vocabulary, in two walks; the backward pass takes two more. A
    group whose vocabulary fits one tile, at most 128 MiB on a CPU and 1 GiB elsewhere, computes its
    logits once in each direction. Of each group, 2 x `iterations` matrices (b, b) wait for the
    backward pass. Its time grows with b^2 x vocabulary.
    Two equal probabilities add 0 to the gradient. The loss can be differentiated once. Under
    torch.compile the call is left to eager mode, and with fullgraph=True it is an error.

    Args:
        student_hidden, teacher_hidden: final, normed hidden states (..., Ds) and (..., Dt).
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt) as in `nn.Linear`.
        groups: "all" positions together, each "sequence" (the last dimension but one) by itself, or
            an id (...) for each position. Only valid positions belong to a group.
        temperature: divides the logits.
        epsilon: the weight of entropy, in units of W, which is between 0 and 2.
        iterations: of rows and columns.
        labels: (...) int64 or int32 tokens that the head has; positions equal to `ignore_index`
            drop out, and the others have no part in the loss.
        reduction: "mean" over the groups that have a valid position, "sum", or "none": one number
            per group, in the order of sequences or of ids, 0 where a group has none.
        num_items_in_batch: divide the sum over groups by this number instead.
        Other arguments: as in `fused_decoupled_kd`.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work.
        RuntimeError: under torch.compile with fullgraph=True.
    """
    require_number("epsilon", epsilon, positive=True)
    require_int("iterations", iterations, minimum=1)
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        Model(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        Positions(labels, mask, None, ignore_index, shift),
        Reduction(reduction, num_items_in_batch),
        temperature=temperature,
        vocab_size=vocab_size,
        backend=backend,
    )
    call = LogitCall.of(inputs, options)
    check_groups(groups, call.leading_shape, call.rows.device)
    rows = _rows_of_groups(call, groups)
    found = [of_group for of_group in rows if len(of_group)]
    filled = torch.tensor([len(of_group) > 0 for of_group in rows], device=call.rows.device)
    values = call.rows.student_weight.new_zeros(len(rows), dtype=call.rows.statistics_dtype)
    costs = _costs(call, found, float(temperature))
    if found:
        of_found = torch.stack([sinkhorn_distance(W, epsilon, iterations) for W in costs])
        values = values.index_put((filled.nonzero()[:, 0],), of_found)
    denominator = loss_denominator(
        reduction, len(rows), filled, call.rows.device, num_items_in_batch
    )
    shape = (len(rows),) if reduction == "none" else None
    result = reduce_rows(values, filled, shape, denominator)
    # Without a valid position too the student's gradients are 0, not absent.
    return result if found else result + 0.0 * _touch(call.rows)


def sinkhorn_distance(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Compute the sum of P W with P after `iterations` of rows and columns of exp(-W / epsilon)."""
    log_p = -cost / epsilon
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
        log_p = log_p - log_p.logsumexp(0, keepdim=True)
    return (log_p.exp() * cost).sum()


def _rows_of_groups(call: LogitCall, groups: Tensor | str) -> list[Tensor]:
    """List the valid rows of each group, int64 positions."""
    rows, leading = call.rows, call.leading_shape
    leading = leading or (1,)  # one position alone
    positions = torch.arange(rows.rows, device=rows.device).view(leading)
    parts = [part[0] for part in split_into_groups([positions], len(leading), groups)]
    return parts if rows.valid is None else [part[rows.valid[part]] for part in parts]


def _costs(call: LogitCall, groups: list[Tensor], temperature: float) -> list[Tensor]:
    """Compute W of each group, (b, b)."""
    if call.backend != "reference":
        inputs = call.rows._replace(labels=None, valid=None)
        return pair_costs(inputs, call.head, groups, temperature)
    q, p = (u / temperature for u in call.dense_logits(slice(None)))
    return [(q[rows].softmax(-1)[:, None] - p[rows].softmax(-1)).abs().sum(-1) for rows in groups]


def _touch(inputs: LensInputs) -> Tensor:
    """Return a 0 that depends on the student's tensors, of whatever numbers."""
    student = (inputs.student_hidden[0], inputs.student_weight, inputs.student_bias)
    return sum(t[:0].sum() for t in student if t is not None)
