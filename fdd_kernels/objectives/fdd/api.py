"""The public functions: check, plan, run the two operations, combine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from fdd_kernels.engine.autograd import LensStatistics, LossAndGradient, rows_to_keep, tensors_of
from fdd_kernels.engine.vocab_parallel import plan_shard
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan, check_labels, make_plan
from fdd_kernels.objectives.fdd.reference import dense_row_terms
from fdd_kernels.objectives.fdd.terms import (
    combine,
    normaliser_of,
    row_terms_from_statistics,
    static_deltas,
)

_OPTION_NAMES = tuple([f.name for f in fields(LossOptions)])  # compiled code cannot ask for them


def fused_fdd_loss(
    student_hidden: Sequence[Tensor] | Tensor,
    student_weight: Tensor,
    teacher_hidden: Sequence[Tensor] | Tensor,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    alpha: float = 1.0,
    beta: float = 1.0,
    output_kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    trajectory: str = "kl",
    derivative: str | None = "cosine",
    temperature: float = 1.0,
    output_temperature: float = 1.0,
    scale_by_t2: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    output_in_dynamics: bool = False,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    return_terms: bool = False,
    vocab_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor | FDDLossTerms:
    """Feature Dynamics Distillation loss, in memory that does not grow with tokens x vocabulary.

    With z^l = softcap(logit_scale * (h^l W^T + b)) / temperature for each sampled layer l of a
    model, p = softmax(z_t), q = softmax(z_s) and y^l = log_softmax(z^l), per token::

        trajectory = mean over layers of KL(p^l || q^l)
        derivative = mean over consecutive layers of 1 - cos(y_s^(l+1) - y_s^l, y_t^(l+1) - y_t^l)
        output_kd  = KL(p || q) of the final states at output_temperature
        loss       = output_kd_weight * output_kd + alpha * trajectory
                     + beta * derivative + ce_weight * CE(labels)

    Source: Gong et al., "Beyond Logits: Aligning Feature Dynamics for Effective Knowledge
    Distillation", ACL 2025.

    Gradient flows to the student's hidden states, weight and bias, each only if it requires one,
    never to the teacher. The loss can be differentiated once. On CPUs the gradients are formed in
    the forward pass where that saves work, and wait in memory for the backward pass: evaluate under
    `torch.no_grad()`. Where the upstream gradient is then no power of two (a loss divided by
    three), gradients of 16 bits are formed again, which takes as long, so as to be rounded once:
    pass `num_items_in_batch` instead. Products are taken of the tensors as given (under autocast,
    of float32 tensors cast to its dtype); sums, softmax and statistics are float32, or float64 if
    any input is.

    Args:
        student_hidden, teacher_hidden: L tensors (..., Ds) and (..., Dt) in depth order, paired by
            rank. The last is the model's final, already normed state; those before it are the
            sampled layers. A single tensor is L = 1: plain output distillation.
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt) as in `nn.Linear`.
            `teacher_weight=None` compares features instead of predictions: the student's weight
            then projects to the teacher's width, (Dt, Ds), there is no softmax and no output term,
            and `trajectory` must be "mse" or "cosine".
        labels: (...) int64 or int32 tokens. Positions equal to `ignore_index` drop out of every
            term.
        student_bias, teacher_bias: (V,) added to the products; -inf marks a token that cannot
            occur: its probability is 0 and it is left out of the deltas.
        mask: (...) bool or int; positions that are 0 drop out of every term. Never shifted.
        shift: labels are those of a causal LM, unshifted: position t is compared with labels[..., t
            + 1] and the last position drops out.
        alpha, beta, output_kd_weight, ce_weight: weights; a term with weight 0 costs nothing.
        trajectory: "kl" KL(p||q), "reverse_kl" KL(q||p), "jsd", "skew_kl" KL(p || 0.1 p + 0.9 q),
            or on the raw values "mse" (mean over columns) and "cosine".
        derivative: "cosine", "centered_cosine" (both deltas minus their mean over columns), "mse"
            (mean over columns of the squared difference of the deltas), or None. A delta of length
            0, as between two equal hidden states, has cosine 0 and gradient 0.
        temperature, output_temperature: divide the logits of the dynamics and of the output KD; CE
            uses 1.
        scale_by_t2: multiply output_kd by output_temperature squared.
        student_softcap, teacher_softcap: cap * tanh(logits / cap) after the scale (Gemma 2: 30).
        student_logit_scale, teacher_logit_scale: multiply the logits (Cohere; Granite: 1 /
            logits_scaling).
        output_in_dynamics: the final state is also the last layer of trajectory and derivative.
        reduction: "mean" over the positions that count, "sum", or "none": (...) with 0 at the
            others.
        num_items_in_batch: divide the sum by this number instead (gradient accumulation, data
            parallelism). A tensor of one number may be 0, for a loss of 0; to capture a CUDA graph
            let it be on the device.
        vocab_size: compare only the first `vocab_size` columns; needed where the vocabularies are
            padded unequally.
        backend: "auto", "reference", "torch", "cpu" or "triton".
        return_terms: return `FDDLossTerms` with the unweighted terms beside the loss.
        vocab_group: the process group over which both heads' rows are split (vocabulary
            parallelism): weights and biases are this process's rows, in the order of ranks, the
            student's and the teacher's of the same tokens, unequally many if need be. Hidden
            states, labels (tokens of the whole vocabulary), options and the upstream gradient must
            be the same on every process; so is the result. Gradients of the hidden states are
            complete on every process, those of the head are of this process's rows.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none"), or
            `FDDLossTerms`. Without
        a position that counts it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range, a teacher tensor
            that requires grad, or options that do not go together; named, before any work. Set
            FDD_KERNELS_DEBUG=1 to refuse NaN too.
        RuntimeError: the backend named cannot run here, with the reason and the remedy; another
            process of `vocab_group` refused its arguments, or was given others.
    """
    options = LossOptions(
        ignore_index=ignore_index,
        shift=shift,
        alpha=alpha,
        beta=beta,
        output_kd_weight=output_kd_weight,
        ce_weight=ce_weight,
        trajectory=trajectory,
        derivative=derivative,
        temperature=temperature,
        output_temperature=output_temperature,
        scale_by_t2=scale_by_t2,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        output_in_dynamics=output_in_dynamics,
        reduction=reduction,
        vocab_size=vocab_size,
        backend=backend,
    )
    arguments = (
        options,
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias,
        teacher_bias,
        mask,
        num_items_in_batch,
    )
    shard = None
    if vocab_group is None:
        plan, inputs, normaliser, cached_rows = _prepare(*arguments)
    else:
        shard, plan, inputs, normaliser, cached_rows = plan_shard(vocab_group, _prepare, *arguments)
    if inputs.labels is not None and not plan.feature_space:
        compared, vocabulary = plan.spec.columns, student_weight.shape[0]
        if shard is not None:
            compared, vocabulary = shard.bounds[-1], shard.vocabulary
        check_labels(inputs.labels, ignore_index, compared if ce_weight else vocabulary)
        if shard is not None:
            inputs = inputs._replace(labels=shard.own_labels(inputs.labels))

    if cached_rows:
        terms = FDDLossTerms(
            *LossAndGradient.apply(plan, cached_rows, shard, normaliser, *tensors_of(plan, inputs))
        )
        return terms if return_terms else terms.loss
    if plan.backend == "reference":
        rows = dense_row_terms(plan, *inputs)
    else:
        statistics = LensStatistics.apply(
            *plan.spec.encode(), plan.backend, shard, *tensors_of(plan, inputs)
        )
        request = (
            [states[layer] for layer in plan.layers]
            for states in (inputs.student_hidden, inputs.teacher_hidden)
        )
        rows = row_terms_from_statistics(plan, *statistics, static_deltas(plan, *request))
    terms = combine(rows, options, inputs.valid, plan.leading_shape, normaliser)
    return terms if return_terms else terms.loss


@functools.wraps(fused_fdd_loss)
def fdd_loss_reference(*args, **kwargs):
    return fused_fdd_loss(*args, **(kwargs | {"backend": "reference"}))


fdd_loss_reference.__name__ = fdd_loss_reference.__qualname__ = "fdd_loss_reference"
fdd_loss_reference.__signature__ = inspect.signature(fused_fdd_loss)
fdd_loss_reference.__doc__ = """The same loss, dense, in any dtype up to float64: the specification.

    Takes the arguments of `fused_fdd_loss` (`backend` is ignored), returns the same and raises the
    same. It keeps several (tokens, vocabulary) tensors a layer and can be traced, compiled and
    differentiated any number of times.
    """


def _prepare(
    options: LossOptions,
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    labels,
    student_bias,
    teacher_bias,
    mask,
    num_items_in_batch,
) -> tuple[Plan, LensInputs, Tensor | float | None, int]:
    """Check the arguments; the plan, its tensors with the states of every layer, what divides the
    sums, `rows_to_keep`.
    """
    plan, students, teachers = make_plan(
        options,
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student_bias,
        teacher_bias,
        mask,
        num_items_in_batch,
    )
    students, teachers = (
        [h.reshape(-1, h.shape[-1]) for h in states] for states in (students, teachers)
    )
    students, teachers = (
        [_autocast(h) if layer in plan.layers else h for layer, h in enumerate(states)]
        for states in (students, teachers)
    )
    heads = (_autocast(t) for t in (student_weight, student_bias, teacher_weight, teacher_bias))
    student_weight, student_bias, teacher_weight, teacher_bias = heads
    inputs = LensInputs(
        students,
        student_weight,
        student_bias,
        teachers,
        teacher_weight,
        teacher_bias,
        *_rows_that_count(options, labels, mask),
    )
    normaliser = normaliser_of(
        options, inputs.rows, inputs.valid, num_items_in_batch, inputs.device
    )
    return plan, inputs, normaliser, rows_to_keep(plan, normaliser, *tensors_of(plan, inputs))


def _autocast(tensor: Tensor | None) -> Tensor | None:
    """Under autocast, float32 tensors in its dtype, as `nn.Linear` would see them."""
    if (
        tensor is None
        or tensor.dtype != torch.float32
        or not torch.is_autocast_enabled(tensor.device.type)
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _rows_that_count(
    options: LossOptions, labels: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`valid` (R,) bool, None if every row counts, and the labels (R,), shifted if asked for."""
    valid = None
    if labels is not None:
        if options.shift:
            last = torch.full_like(labels[..., :1], options.ignore_index)
            labels = torch.cat([labels[..., 1:], last], dim=-1)
        labels = labels.reshape(-1)
        valid = labels != options.ignore_index
    if mask is not None:
        mask = mask.reshape(-1) != 0
        valid = mask if valid is None else valid & mask
    return valid, labels


class FusedFDDLoss(nn.Module):
    """`fused_fdd_loss` with its options fixed: `FusedFDDLoss(alpha=0.5)(student_hidden,
    student_weight, ...)`.

    Args:
        **options: any of ignore_index, shift, alpha, beta, output_kd_weight, ce_weight, trajectory,
            derivative, temperature, output_temperature, scale_by_t2, the soft caps and logit
            scales, output_in_dynamics, reduction, vocab_size, backend; see `fused_fdd_loss`.
        return_terms: return `FDDLossTerms`.

    Raises:
        TypeError, ValueError: at construction, for an unknown option or one out of range.
    """

    def __init__(self, *, return_terms: bool = False, **options) -> None:
        super().__init__()
        self.options = LossOptions(**options)
        self.return_terms = return_terms

    def forward(
        self,
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels=None,
        *,
        student_bias=None,
        teacher_bias=None,
        mask=None,
        num_items_in_batch=None,
        vocab_group=None,
    ) -> Tensor | FDDLossTerms:
        """See `fused_fdd_loss`."""
        return fused_fdd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            mask=mask,
            num_items_in_batch=num_items_in_batch,
            return_terms=self.return_terms,
            vocab_group=vocab_group,
            **{name: getattr(self.options, name) for name in _OPTION_NAMES},
        )

    def extra_repr(self) -> str:
        defaults = LossOptions()
        changed = [
            f.name
            for f in fields(LossOptions)
            if getattr(self.options, f.name) != getattr(defaults, f.name)
        ]
        return ", ".join(f"{name}={getattr(self.options, name)!r}" for name in changed)
