"""The two sides of the loss: a student's states with its head, and a teacher's targets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StudentSide(NamedTuple):
    """A student's states and its head.

    Attributes:
        states: (batch, sequence, Ds) each, ready for the head, in depth order. The last is the
            final state, or None where the loss does not need it.
        weight, bias: the head (V, Ds), (V,); under `vocab_group` this rank's rows. None for a task
            without a vocabulary, whose final state is what the model predicts.
        vocabulary: V of the whole head.
    """

    states: list[Tensor | None]
    weight: Tensor | None
    bias: Tensor | None
    vocabulary: int


class SummaryTargets(NamedTuple):
    """A teacher's summary at the valid positions of a batch; see `objectives.fdd.summary`.

    Attributes:
        places: (R,) int64, the positions as indices into the flattened (batch, sequence).
        summary: the arrays (R, width) by name.
        layers: number of hidden states that were summarised, the final one included.
        head: SHA-256 of the student's head that it holds for; see `head_digest`.
        source: the path of its cache, for errors.
    """

    places: Tensor
    summary: dict[str, Tensor]
    layers: int
    head: str
    source: str


# Hidden states (batch, sequence, Dt), ready for the teacher's head, in depth order; the last is the
# final state, or None where the loss does not need it. Values at positions that are not valid are
# undefined, but finite.
HiddenTargets = list[Tensor | None]


class States(HiddenTargets):
    """Hidden states as in `HiddenTargets`.

    Attributes:
        encoder: the states of an encoder's sampled blocks, L x (batch, tokens of the text, width);
            empty without `FDDConfig.encoder_weight`.
    """

    encoder: list[Tensor]


Targets = HiddenTargets | SummaryTargets
