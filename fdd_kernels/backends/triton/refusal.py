"""Specs that the Triton kernels cannot compute. Needs no triton."""

from __future__ import annotations

from fdd_kernels.lens.spec import NLL, Layers, LensSpec

# Divergences with an elementwise pair in `elementwise.py`.
DIVERGENCES = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv", "alpha_beta")


def refusal(spec: LensSpec) -> str | None:
    """Say which part of the spec the kernels cannot compute; None if they can compute all of it."""
    names = sorted({request.divergence for request in spec.requests} - {None, NLL})
    for name in names:
        if name not in DIVERGENCES:
            return f"the divergence {name!r} has no Triton kernel"
    for request in spec.requests:
        if request.teacher_mix != 1 and request.divergence not in ("kl", None, NLL):
            return (
                f"the divergence {request.divergence!r} with a teacher that is mixed with the "
                f"student (teacher_mix={request.teacher_mix:g})"
            )
    besides_kl = [name for name in names if name != "kl"]
    if len(besides_kl) > 1:
        return f"two divergences besides kl in one call, {' and '.join(besides_kl)}"
    teacher_of: dict[int, int] = {}
    for student, teacher in layer_pairs(spec):
        if teacher_of.setdefault(student, teacher) != teacher:
            return (
                f"student layer {student} with teacher layers {teacher_of[student]} and {teacher}"
            )
    for pair in spec.moments:
        first, second = pair[:2]
        if first is not None and first.student != second.student - 1:
            return (
                f"moments of student layers {first.student} and {second.student}, which are not "
                "consecutive"
            )
    return None


def layer_pairs(spec: LensSpec) -> list[Layers]:
    """List the layers that requests and moments compare; NLL looks at no teacher."""
    pairs = [Layers(r.student_layer, r.teacher_layer) for r in spec.requests if r.divergence != NLL]
    return pairs + [layers for pair in spec.moments for layers in pair.layers]
