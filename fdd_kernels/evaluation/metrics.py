"""The metrics of a held-out text: loss, perplexity, accuracy, and KL to a teacher at the output and
by layer. `fdd-kernels evaluate` and the trainers compute them here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.hf.loss import hidden_inputs, student_inputs
from fdd_kernels.hf.targets import StudentSide, SummaryTargets, Targets
from fdd_kernels.objectives.alignment.methods import RANK
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.logits.statistics import RowStatistics, row_statistics

NLL, ACCURACY, KL, AGREEMENT = "nll", "accuracy", "kl", "agreement"
PERPLEXITY = "perplexity"
# At the student's layer k: "kl_layer_k".
OF_LAYER = "kl_layer_"
# exp of more is infinite in float64.
_LARGEST_EXPONENT = 709.0


class SequenceSums(NamedTuple):
    """Sums over the valid positions of each sequence of a batch, float64 (batch,).

    Attributes:
        weight: of the positions' `token_weights`, or their number.
        sums: of weight * metric, by name.
    """

    weight: Tensor
    sums: dict[str, Tensor]


def is_metric(name: str) -> bool:
    """Say whether an evaluation's number of this name is a metric, as terms of the loss are not."""
    return name in (PERPLEXITY, ACCURACY, KL, AGREEMENT) or name.startswith(OF_LAYER)


def perplexity(nll: float) -> float:
    """Return exp(nll) of the mean negative log-likelihood of a token, in nats."""
    return math.exp(nll) if nll <= _LARGEST_EXPONENT else math.inf


def bits_per_byte(nll: float, size: int) -> float:
    """Return the negative log-likelihood of a whole text, `nll` in nats, in bits per byte of it."""
    return nll / math.log(2) / size if size else math.nan


def with_perplexity(means: Mapping[str, float]) -> dict[str, float]:
    """Replace the mean negative log-likelihood among metrics by the perplexity."""
    rest = {name: value for name, value in means.items() if name != NLL}
    return {PERPLEXITY: perplexity(means[NLL]), **rest} if NLL in means else rest


def pairs_by_rank(distiller: Distiller) -> bool:
    """Say whether each sampled layer of the student predicts tokens and has one of the teacher to
    be compared with.
    """
    config = distiller.config
    ranked = config.space == "lens" and config.layer_alignment == RANK
    return ranked and len(distiller.student_layers) == len(distiller.teacher_layers)


@torch.no_grad()
def observed_sums(
    distiller: Distiller,
    student: StudentSide,
    targets: Targets,
    batch: Mapping[str, Tensor],
    options: LossOptions,
) -> SequenceSums:
    """Compute the metrics of a batch from what an `Observer` of `distiller` sees.

    A cached summary has no teacher's head, so that there is no KL. There is none by layer where
    layers are not paired by rank, or where their states are missing.
    """
    layers = distiller.student_layers if pairs_by_rank(distiller) else ()
    alone = student._replace(states=student.states[-1:])
    if isinstance(targets, SummaryTargets) or targets[-1] is None:
        return sequence_sums(student_inputs(alone, batch, options), options)
    if not len(student.states) == len(targets) == len(layers) + 1:
        student, targets, layers = alone, targets[-1:], ()
    inputs = hidden_inputs(student, distiller.teacher, targets, batch, options)
    return sequence_sums(inputs, options, layers)


@torch.no_grad()
def sequence_sums(
    inputs: LossInputs, options: LossOptions, layers: Sequence[int] = ()
) -> SequenceSums:
    """Sum the metrics of `token_metrics` over the valid positions of each sequence.

    Args:
        inputs: with a mask (batch, sequence) of the valid positions.
    """
    weight = (inputs.mask != 0).double()
    if inputs.token_weights is not None:
        weight = weight * inputs.token_weights.to(weight)
    found = token_metrics(inputs, options, layers)
    # Not a product alone: 0 times the infinite loss of a position of weight 0 is no number.
    sums = {
        name: torch.where(weight != 0, value.double() * weight, 0.0).sum(-1)
        for name, value in found.items()
    }
    return SequenceSums(weight.sum(-1), sums)


def token_metrics(
    inputs: LossInputs, options: LossOptions, layers: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Compute the metrics of each position, (batch, sequence); 0 where it is not valid.

    With labels: "nll", the negative log-likelihood of the label, and "accuracy", 1 where the label
    has the largest logit (the first of equal ones), both over the student's whole vocabulary. With
    a teacher: "kl", KL(teacher || student) of the next token at temperature 1, "agreement", 1 where
    both have the same largest logit, and "kl_layer_k", the KL of layer k's predictions, over the
    first `options.vocab_size` tokens. Every head product runs on blocks of rows; there are no
    logits of a batch.

    Args:
        inputs: the states of `layers` and the final states; the latter alone without layers. No
            teacher if `teacher_weight` is None.
        options: soft caps, logit scales and vocab_size.
        layers: the student's, to name them; paired by rank with the teacher's.
    """
    final = inputs.student_hidden[-1]
    if inputs.teacher_weight is None:
        return {} if inputs.labels is None else _of_labels(_alone(inputs, options, final))
    is_whole = options.vocab_size in (None, len(inputs.student_weight))
    states = list(zip(inputs.student_hidden, inputs.teacher_hidden, strict=True))
    output = _statistics(inputs, options, *states.pop(), labels=inputs.labels if is_whole else None)
    found = {KL: output.kl, AGREEMENT: output.agree}
    if inputs.labels is not None:
        found |= _of_labels(output if is_whole else _alone(inputs, options, final))
    for layer, pair in zip(layers, states, strict=True):
        found[f"{OF_LAYER}{layer}"] = _statistics(inputs, options, *pair).kl
    return found


def _of_labels(found: RowStatistics) -> dict[str, Tensor]:
    return {NLL: -found.label_logprob, ACCURACY: found.correct}


def _alone(inputs: LossInputs, options: LossOptions, state: Tensor) -> RowStatistics:
    """Compute the statistics of the student's whole vocabulary."""
    return row_statistics(
        state,
        inputs.student_weight,
        labels=inputs.labels,
        student_bias=inputs.student_bias,
        mask=inputs.mask,
        ignore_index=options.ignore_index,
        student_softcap=options.student_softcap,
        student_logit_scale=options.student_logit_scale,
    )


def _statistics(
    inputs: LossInputs,
    options: LossOptions,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
) -> RowStatistics:
    """Compute the statistics of both models at one layer."""
    return row_statistics(
        student,
        inputs.student_weight,
        teacher,
        inputs.teacher_weight,
        labels,
        student_bias=inputs.student_bias,
        teacher_bias=inputs.teacher_bias,
        mask=inputs.mask,
        ignore_index=options.ignore_index,
        student_softcap=options.student_softcap,
        teacher_softcap=options.teacher_softcap,
        student_logit_scale=options.student_logit_scale,
        teacher_logit_scale=options.teacher_logit_scale,
        vocab_size=options.vocab_size,
    )
