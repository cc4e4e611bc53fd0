"""Distillation of a preference-tuned policy: two reverse divergences of one student."""

from __future__ import annotations

from torch import Tensor

from fdd_kernels.objectives.fdd.api import fused_fdd_loss

_OPTIONS = (
    "student_bias",
    "mask",
    "token_weights",
    "ignore_index",
    "shift",
    "scale_by_t2",
    "student_softcap",
    "teacher_softcap",
    "student_logit_scale",
    "teacher_logit_scale",
    "reduction",
    "num_items_in_batch",
    "vocab_size",
    "backend",
)


def advantage_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    policy_hidden: Tensor,
    policy_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    labels: Tensor | None = None,
    *,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    temperature: float = 1.0,
    **options,
) -> Tensor:
    """Raise the advantage that a preference-tuned teacher gives to the student's predictions.

    With q the student, p a policy trained by preferences (DPO) and r its reference model, the
    advantage of a token is log p - log r. Per position::

        loss = -E_q[log p - log r] = KL(q || p) - KL(q || r)

    Two calls of `fused_fdd_loss` with output_divergence="reverse_kl"; its value may be negative,
    and loses digits where policy and reference hardly differ.

    Source: Gao et al., "Advantage-Guided Distillation for Preference Alignment in Small Language
    Models" (ADPA), ICLR 2025.

    Args:
        student_hidden, policy_hidden, reference_hidden: (..., width), final normed states of one
            text; the widths may differ.
        student_weight, policy_weight, reference_weight: LM heads (V, width).
        labels: (...) tokens; positions equal to `ignore_index` are left out.
        policy_bias, reference_bias: (V,), or None.
        temperature: divides all logits.
        **options: student_bias, mask, token_weights, ignore_index, shift, scale_by_t2, the soft
            caps and logit scales (teacher_... is of policy and reference), reduction,
            num_items_in_batch, vocab_size, backend; see `fused_fdd_loss`.

    Returns:
        The loss, reduced as in `fused_fdd_loss`.

    Raises:
        TypeError, ValueError: an unknown option, or as `fused_fdd_loss`.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"{unknown[0]} is not an option of advantage_kd: use {', '.join(_OPTIONS)}")
    for name, hidden in (
        ("student_hidden", student_hidden),
        ("policy_hidden", policy_hidden),
        ("reference_hidden", reference_hidden),
    ):
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type(hidden).__name__}: pass the final state"
            )

    def reverse_kl(teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None):
        return fused_fdd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            teacher_bias=teacher_bias,
            alpha=0.0,
            beta=0.0,
            output_divergence="reverse_kl",
            output_temperature=temperature,
            **options,
        )

    return reverse_kl(policy_hidden, policy_weight, policy_bias) - reverse_kl(
        reference_hidden, reference_weight, reference_bias
    )
