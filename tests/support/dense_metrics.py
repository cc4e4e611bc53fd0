"""The metrics of an evaluation from whole logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.inputs import LossInputs
from tests.support.dense import final_norm, logits_of


def logits_of_inputs(inputs: LossInputs, options: LossOptions) -> tuple[list[Tensor], ...]:
    """Both models' logits (..., V) of every layer and of the output."""
    sides = (
        (inputs.student_hidden, inputs.student_weight, inputs.student_bias, "student"),
        (inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, "teacher"),
    )
    found = []
    for states, weight, bias, name in sides:
        scale, cap = (getattr(options, f"{name}_{what}") for what in ("logit_scale", "softcap"))
        logits = [scale * (h @ weight.T + (0.0 if bias is None else bias)) for h in states]
        found.append(logits if cap is None else [cap * torch.tanh(u / cap) for u in logits])
    return tuple(found)


@torch.no_grad()
def layer_logits(
    model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[int]
) -> list[Tensor]:
    """A model's logits (batch, sequence, V) at layers, with its final norm, and at the output."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = model(**inputs, output_hidden_states=True)
    norm = final_norm(model)
    return [*(logits_of(model, norm(found.hidden_states[k])) for k in layers), found.logits]


def dense_metrics(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Tensor,
    layers: Sequence[int],
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Every metric of each position, (batch, sequence), whatever it is where none is valid.

    Args:
        student, teacher: logits at `layers` and at the output.
        labels: of the next token.
    """
    log_q = student[-1].log_softmax(-1)
    pairs = [(z_s[..., :vocab_size], z_t[..., :vocab_size]) for z_s, z_t in zip(student, teacher)]
    kl = []
    for z_s, z_t in pairs:
        log_p = z_t.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - z_s.log_softmax(-1))).sum(-1))
    agreement = pairs[-1][0].argmax(-1) == pairs[-1][1].argmax(-1)
    return {
        "nll": -log_q.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "accuracy": (student[-1].argmax(-1) == labels).double(),
        "kl": kl[-1],
        "agreement": agreement.double(),
        **{f"kl_layer_{layer}": value for layer, value in zip(layers, kl[:-1], strict=True)},
    }
