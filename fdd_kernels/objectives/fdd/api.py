"""The public functions of FDD."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.objectives.fdd.loss import fdd_call
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.inputs import LossInputs


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
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    alpha: float = 1.0,
    beta: float = 1.0,
    output_kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    trajectory: str = "kl",
    derivative: str | None = "cosine",
    output_divergence: str = "kl",
    layer_weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
    derivative_layers: Sequence[int] | None = None,
    temperature: float = 1.0,
    derivative_temperature: float | None = None,
    output_temperature: float = 1.0,
    teacher_mix: float = 1.0,
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
    never to the teacher. The loss can be differentiated once. Where that saves work, gradients are
    formed in the forward pass and wait in memory for the backward pass: evaluate under
    `torch.no_grad()`. If the upstream gradient is then no power of two (a loss divided by three),
    16-bit gradients are formed again on CPUs, so that they are rounded once; pass
    `num_items_in_batch` instead. GEMMs take the tensors as given, or cast by autocast. Sums,
    softmax and statistics are float32, or float64 if any input is.

    Args:
        student_hidden, teacher_hidden: L tensors (..., Ds) and (..., Dt) in depth order, paired by
            rank unless `layer_weights` are of pairs: then as many as each model has. The last is
            the model's final, already normed state; those before it are the sampled layers. A
            single tensor is L = 1: plain output distillation.
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt) as in `nn.Linear`.
            `teacher_weight=None` compares features instead of predictions: the student's weight
            then projects to the teacher's width, (Dt, Ds), there is no softmax and no output term,
            and `trajectory` must be "mse" or "cosine".
        labels: (...) int64 or int32 tokens. Positions equal to `ignore_index` drop out of every
            term.
        student_bias, teacher_bias: (V,) added to the GEMM's result; -inf marks a token that cannot
            occur: its probability is 0 and it is left out of the deltas.
        mask: (...) bool or int; positions that are 0 drop out of every term. Never shifted.
        token_weights: (...) constants, at least 0, that multiply every term of a position; the
            divisor of a mean stays the number of valid tokens. Never shifted.
        shift: labels are those of a causal LM, unshifted: position t is compared with labels[..., t
            + 1] and the last position drops out.
        alpha, beta, output_kd_weight, ce_weight: weights; a term with weight 0 costs nothing.
        trajectory: a divergence as text, perhaps with parameters: "kl" KL(p||q); "reverse_kl"
            KL(q||p); "jsd:b" b KL(p||m) + (1-b) KL(q||m) with m = b p + (1-b) q (as TRL: 0 is KL, 1
            reverse KL; default 0.5); "skew_kl:a" KL(p || a p + (1-a) q) and "skew_reverse_kl:a"
            KL(q || (1-a) p + a q) (DistiLLM; 0.1); "tv" sum |p-q| / 2; "alpha_beta:a,b"
            -sum(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b) (ABKD; 0.2,0.7). Or on the
            logits themselves "mse" (mean over the vocabulary) and "cosine".
        derivative: "cosine", "centered_cosine" (both deltas minus their mean over the vocabulary),
            "weighted_cosine" (the same with each token weighted by the teacher's probability at the
            later layer: the cosine is then not ruled by the thousands of tokens that nobody
            predicts; ours), "mse" (mean of the squared difference of the deltas), or None. A delta
            of length 0, as between two equal hidden states, has cosine 0 and gradient 0.
        output_divergence: the divergence of the output KD, as those of `trajectory`.
        layer_weights: one number per layer of the trajectory, at least 0: it is then their weighted
            sum over the number of layers. Or W (Ls, Lt), a number for each pair of a student and a
            teacher layer: sum over i, j of W_ij KL(p^j || q^i) / Ls, such as Ls times the weights
            of `align_layers`. The models may then have unequal numbers of layers; the final states
            count only with `output_in_dynamics`. A tensor is taken as constants, which waits for
            its device. Triton computes one teacher layer for each student layer alone.
        derivative_layers: j(i) for each student layer of the trajectory, never decreasing: deltas
            y_s^(i+1) - y_s^i are compared with y_t^j(i+1) - y_t^j(i). Counted from 0 among the
            teacher's layers of the trajectory. None: by rank, or with W the path of the largest sum
            of W_i,j(i), nearest to the diagonal where several have it. Where j(i+1) = j(i) the
            teacher's delta has length 0.
        temperature, derivative_temperature, output_temperature: divide the logits of the
            trajectory, of the derivative (None: as `temperature`) and of the output KD; CE uses 1.
        teacher_mix: t in [0, 1]: KL of output and trajectory is to softmax((1 - t) z_s + t z_t)
            with the student's part constant (TAID, Shing et al., ICLR 2025), not to the teacher.
            The other divergences refuse it.
        scale_by_t2: multiply output_kd by output_temperature squared.
        student_softcap, teacher_softcap: cap * tanh(logits / cap) after the scale (Gemma 2: 30).
        student_logit_scale, teacher_logit_scale: multiply the logits (Cohere; Granite: 1 /
            logits_scaling).
        output_in_dynamics: the final state is also the last layer of trajectory and derivative.
        reduction: "mean" over valid tokens, "sum", or "none": (...) with 0 at the others.
        num_items_in_batch: divide the sum by this number instead (gradient accumulation, data
            parallelism). A tensor of one number may be 0, for a loss of 0; to capture a CUDA graph
            let it be on the device.
        vocab_size: compare only the first `vocab_size` tokens; needed where the vocabularies are
            padded unequally.
        backend: "auto", "reference", "torch", "cpu" or "triton".
        return_terms: return `FDDLossTerms` with the unweighted terms beside the loss.
        vocab_group: the process group over which both heads' rows are split (vocabulary
            parallelism): weights and biases are this process's rows, in the order of ranks, the
            student's and the teacher's of the same tokens, unequally many if need be. Hidden
            states, labels (tokens of the whole vocabulary), mask, token_weights, options and the
            upstream gradient must be the same on every process; so is the result. Gradients of the
            hidden states are complete on every process, those of the head are of this process's
            rows.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none"), or
        `FDDLossTerms`. Without a valid token it is 0, with gradients of 0.

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
        output_divergence=output_divergence,
        layer_weights=layer_weights,
        derivative_layers=derivative_layers,
        temperature=temperature,
        derivative_temperature=derivative_temperature,
        output_temperature=output_temperature,
        teacher_mix=teacher_mix,
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
    inputs = LossInputs(
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        labels=labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        mask=mask,
        num_items_in_batch=num_items_in_batch,
        token_weights=token_weights,
    )
    terms = FDDLossTerms(*evaluate(fdd_call(inputs, options, vocab_group)))
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


class FusedFDDLoss(nn.Module):
    """`fused_fdd_loss` with its options fixed: `FusedFDDLoss(alpha=0.5)(student_hidden,
    student_weight, ...)`.

    Args:
        **options: any of ignore_index, shift, alpha, beta, output_kd_weight, ce_weight, trajectory,
            derivative, output_divergence, layer_weights, derivative_layers, temperature,
            derivative_temperature, output_temperature, teacher_mix, scale_by_t2, the soft caps and
            logit scales, output_in_dynamics, reduction, vocab_size, backend; see `fused_fdd_loss`.
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
        student_hidden: Sequence[Tensor] | Tensor,
        student_weight: Tensor,
        teacher_hidden: Sequence[Tensor] | Tensor,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        vocab_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor | FDDLossTerms:
        """See `fused_fdd_loss`."""
        inputs = LossInputs(
            student_hidden=student_hidden,
            student_weight=student_weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            labels=labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            mask=mask,
            num_items_in_batch=num_items_in_batch,
            token_weights=token_weights,
        )
        terms = FDDLossTerms(*evaluate(fdd_call(inputs, self.options, vocab_group)))
        return terms if self.return_terms else terms.loss

    def extra_repr(self) -> str:
        defaults = LossOptions()
        changed = [
            f.name
            for f in fields(LossOptions)
            if getattr(self.options, f.name) != getattr(defaults, f.name)
        ]
        return ", ".join(f"{name}={getattr(self.options, name)!r}" for name in changed)
