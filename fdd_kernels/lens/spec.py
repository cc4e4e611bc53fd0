"""What the two operations compute, as plain data: which layers are read how, and which vectors'
moments are taken.

Both operations (see `ops.py`) see, for each layer l of L, raw values x = h^l W^T + b of shape (R,
C) and u = f(x) = softcap(logit_scale * x), never all of it at a time. All they return is relative
to a per-row `shift`, so that a common shift of the logits costs no precision: a layer that is read
has the row's largest u, so that a probability that matters is e to a small number, at any
temperature; others have any value near their logits.

A `Request` of a layer at temperature T looks at z = (u - shift) / T and yields four numbers per
    row: LSE_S, LSE_T   log-sum-exp of the student's and the teacher's z
    VALUE          the divergence; for NLL the student's cross-entropy at the label
    GRAD_SUM       sum over columns of the divergence's grad (a constant of its gradient)

A moment target (a, b) is the pair of vectors s = z_s^b - z_s^a and t = z_t^b - z_t^a (a = OWN: z^b
itself) at `moment_temperature`. With d = s - t it yields seven numbers per row, over the columns
where no bias is -inf in front of no soft cap (anything else that is not finite makes them NaN):
    COUNT, MEAN_S, MEAN_T and the sums of squares about the means M_SS, M_TT, M_ST, M_DD.
M_DD is summed on its own because M_SS + M_TT - 2 M_ST loses every digit when the models nearly
agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NLL = "nll"
OWN = -1

LSE_S, LSE_T, VALUE, GRAD_SUM = range(4)
REQUEST_STATS = 4
COUNT, MEAN_S, MEAN_T, M_SS, M_TT, M_ST, M_DD = range(7)
MOMENT_STATS = 7


class LensInputs(NamedTuple):
    """The tensors of one call: L hidden states (R, D) a model, heads (C', D) with C' >= columns,
    biases (C',).

    `teacher_weight` None is the identity; `valid` (R,) bool, None: every row counts; `labels` (R,)
    int for NLL alone.
    """

    student_hidden: list[Tensor]
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: list[Tensor]
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    valid: Tensor | None
    labels: Tensor | None

    @property
    def rows(self) -> int:
        return self.student_hidden[0].shape[0]

    def at(self, rows: Tensor) -> LensInputs:
        """The inputs of some rows, all of which count."""
        student, teacher = (
            [h[rows] for h in states] for states in (self.student_hidden, self.teacher_hidden)
        )
        labels = None if self.labels is None else self.labels[rows]
        return self._replace(
            student_hidden=student, teacher_hidden=teacher, valid=None, labels=labels
        )

    @property
    def device(self) -> torch.device:
        return self.student_weight.device

    @property
    def statistics_dtype(self) -> torch.dtype:
        """float64 if any input is, float32 otherwise: the dtype of products, sums and
        statistics.
        """
        tensors = (
            *self.student_hidden,
            self.student_weight,
            *self.teacher_hidden,
            self.teacher_weight,
        )
        return (
            torch.float64
            if any(t is not None and t.dtype == torch.float64 for t in tensors)
            else torch.float32
        )


class Request(NamedTuple):
    """One softmax reading of one layer; `divergence` None wants the log-sum-exps alone."""

    layer: int
    temperature: float
    divergence: str | None


def _parts(structure: str) -> tuple[list[list[str]], list[list[str]]]:
    """The reads and the moments of an encoded spec's structure."""
    requests, moments = (
        [part.split(",") for part in half.split(";") if part] for half in structure.split("|")
    )
    return requests, moments


def count_parts(structure: str) -> tuple[int, int]:
    """How many reads and how many moments an encoded spec has."""
    requests, moments = _parts(structure)
    return len(requests), len(moments)


@dataclass(frozen=True)
class LensSpec:
    """The whole job of one call of the two operations; layers count from 0 among the hidden states
    passed.
    """

    columns: int
    requests: tuple[Request, ...]
    moments: tuple[tuple[int, int], ...]
    moment_temperature: float
    student_logit_scale: float
    student_softcap: float | None
    teacher_logit_scale: float
    teacher_softcap: float | None

    @property
    def needs_teacher(self) -> bool:
        """False when only the student's cross-entropy is asked for."""
        return bool(self.moments) or any(request.divergence != NLL for request in self.requests)

    def encode(self) -> tuple[str, Tensor, int]:
        """The spec as operator arguments: its structure, its numbers, its columns.

        The numbers are a float64 tensor on the host: as Python numbers each of their values would
        compile the code anew.
        """
        requests = ";".join([f"{r.layer},{r.divergence or ''}" for r in self.requests])
        moments = ";".join([f"{a},{b}" for a, b in self.moments])
        caps = [0.0 if cap is None else cap for cap in (self.student_softcap, self.teacher_softcap)]
        scales = [self.student_logit_scale, self.teacher_logit_scale]
        numbers = [self.moment_temperature, *scales, *caps, *[r.temperature for r in self.requests]]
        # they may be symbols, which stay so in arithmetic with tensors alone
        if torch.compiler.is_compiling():
            one = torch.ones((), dtype=torch.float64, device="cpu")
            encoded = torch.stack([one * number for number in numbers])
        else:
            encoded = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return f"{requests}|{moments}", encoded, self.columns

    @staticmethod
    def decode(structure: str, numbers: Tensor, columns: int) -> LensSpec:
        """The inverse of `encode`."""
        requests, moments = _parts(structure)
        (
            temperature,
            student_scale,
            teacher_scale,
            student_cap,
            teacher_cap,
            *request_temperatures,
        ) = numbers.tolist()
        return LensSpec(
            columns=columns,
            requests=tuple(
                Request(int(layer), t, name or None)
                for (layer, name), t in zip(requests, request_temperatures)
            ),
            moments=tuple((int(a), int(b)) for a, b in moments),
            moment_temperature=temperature,
            student_logit_scale=student_scale,
            student_softcap=student_cap or None,
            teacher_logit_scale=teacher_scale,
            teacher_softcap=teacher_cap or None,
        )
