"""What the kernels compute, as plain data: softmax requests and pair moments.

The kernels see, per layer l of L, logits x = h^l W^T + b of shape (R, V) and u = f(x) =
softcap(logit_scale * x), never all of it at a time. What they return is relative to a shift per row
and layer, so that a common offset of the logits costs no precision. A layer with a request has the
row's largest u as its shift, so that e^z of every probability that matters is e to a small number,
at any temperature. Other layers have any number near their logits.

`layout.py` names the numbers that come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NLL = "nll"


class Layers(NamedTuple):
    """A layer of the student and the layer of the teacher that it is compared with."""

    student: int
    teacher: int


class Request(NamedTuple):
    """A softmax request: one layer of each model at one temperature, z = (u - shift) / temperature.

    `divergence` is a name of the registry, `NLL` for the student's cross-entropy at the label, or
    None for the log-sum-exps alone. `parameters` are the divergence's.

    With `teacher_mix` t below 1 a mixture takes the teacher's place: its logits are
    (1 - t) z_s + t z_t, where the student's are constants, and LSE_T is of these. A token that one
    of the two models excludes (-inf) has no part in it.
    """

    student_layer: int
    teacher_layer: int
    temperature: float
    divergence: str | None
    parameters: tuple[float, ...] = ()
    teacher_mix: float = 1.0


class PairMoments(NamedTuple):
    """Moments of the vectors s = z_s[second] - z_s[first] and t = z_t[second] - z_t[first].

    z is (u - shift) / `temperature`; with `first` None the vectors are z[second] themselves. Tokens
    with a bias of -inf in a model without soft cap are left out. Anything else that is not finite
    makes the moments NaN. With `weighted` every token has the weight softmax(z_t[second]) over the
    tokens that are not left out; without, the weight 1.
    """

    first: Layers | None
    second: Layers
    temperature: float = 1.0
    weighted: bool = False

    @property
    def layers(self) -> tuple[Layers, ...]:
        """List the one or two pairs of layers that are used."""
        return (self.second,) if self.first is None else (self.first, self.second)


@dataclass(frozen=True)
class LensSpec:
    """The whole job of one call; layers count from 0 among the hidden states of `LensInputs`."""

    columns: int
    requests: tuple[Request, ...]
    moments: tuple[PairMoments, ...]
    student_logit_scale: float
    student_softcap: float | None
    teacher_logit_scale: float
    teacher_softcap: float | None

    @property
    def needs_teacher(self) -> bool:
        """Say whether anything beside the student's cross-entropy is asked for."""
        return bool(self.moments) or any(request.divergence != NLL for request in self.requests)

    def encode(self) -> tuple[str, Tensor, int]:
        """Return the spec as operator arguments: its structure, its numbers, V.

        The numbers are a float64 tensor on the host. As Python numbers, each of their values would
        compile the code anew.
        """
        requests = ";".join(
            [
                f"{r.student_layer},{r.teacher_layer},{r.divergence or ''},{len(r.parameters)}"
                for r in self.requests
            ]
        )
        moments = ";".join(
            [
                ",".join([str(int(m.weighted)), *[f"{s},{t}" for s, t in m.layers]])
                for m in self.moments
            ]
        )
        caps = [0.0 if cap is None else cap for cap in (self.student_softcap, self.teacher_softcap)]
        scales = [self.student_logit_scale, self.teacher_logit_scale]
        numbers = [*scales, *caps]
        for request in self.requests:
            numbers += [request.temperature, *request.parameters, request.teacher_mix]
        numbers += [pair.temperature for pair in self.moments]
        return f"{requests}|{moments}", encode_numbers(numbers), self.columns

    @staticmethod
    def decode(structure: str, numbers: Tensor, columns: int) -> LensSpec:
        """Invert `encode`."""
        requests, moments = _parts(structure)
        student_scale, teacher_scale, student_cap, teacher_cap, *rest = numbers.tolist()
        rest = iter(rest)
        return LensSpec(
            columns=columns,
            requests=tuple(
                Request(
                    int(student),
                    int(teacher),
                    next(rest),
                    name or None,
                    tuple([next(rest) for _ in range(int(parameters))]),
                    next(rest),
                )
                for student, teacher, name, parameters in requests
            ),
            moments=tuple(
                _pair_moments([int(number) for number in part], next(rest)) for part in moments
            ),
            student_logit_scale=student_scale,
            student_softcap=student_cap or None,
            teacher_logit_scale=teacher_scale,
            teacher_softcap=teacher_cap or None,
        )


def encode_numbers(numbers: Sequence[float]) -> Tensor:
    """Return numbers as a float64 tensor on the host, an argument of operators."""
    if torch.compiler.is_compiling():
        # They may be symbols, which stay so in arithmetic with tensors alone.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * number for number in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def of_request(per_layer: Tensor, request: Request) -> Tensor:
    """Select a request's layers, student first: (..., 2, R) from logits or shifts (..., 2, L, R).

    A mixture is mixed here as its logits are.
    """
    student = per_layer[..., 0, request.student_layer, :]
    teacher, mix = per_layer[..., 1, request.teacher_layer, :], request.teacher_mix
    if mix < 1:
        teacher = (1 - mix) * student + mix * teacher
    return torch.stack((student, teacher), -2)


def of_pair(per_layer: Tensor, pair: PairMoments) -> Tensor:
    """Take a pair's difference of layers: (..., 2, R) from (..., 2, L, R), student first."""
    second, *first = (
        torch.stack([per_layer[..., model, layers[model], :] for model in (0, 1)], -2)
        for layers in reversed(pair.layers)
    )
    return second - first[0] if first else second


def count_parts(structure: str) -> tuple[int, int]:
    """Count the requests and the pair moments of an encoded spec."""
    requests, moments = _parts(structure)
    return len(requests), len(moments)


def _parts(structure: str) -> tuple[list[list[str]], list[list[str]]]:
    requests, moments = (
        [part.split(",") for part in half.split(";") if part] for half in structure.split("|")
    )
    return requests, moments


def _pair_moments(numbers: list[int], temperature: float) -> PairMoments:
    weighted, *layers = numbers
    pairs = [Layers(*layers[i : i + 2]) for i in range(0, len(layers), 2)]
    first = pairs[0] if len(pairs) == 2 else None
    return PairMoments(first, pairs[-1], temperature, bool(weighted))
