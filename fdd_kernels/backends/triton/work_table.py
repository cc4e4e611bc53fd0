"""A `LensSpec` as a table of integers: one compiled kernel serves any layers, requests and pairs.

A slot is a student layer at a temperature, with the parameters of a divergence or the shares of a
mixed teacher: softmax requests of the same slot share its exponentials. The rows of the table,
padded to one width:

    SLOT_BEGIN     (L + 1)   layer l has the slots SLOT_BEGIN[l] .. SLOT_BEGIN[l + 1]
    SLOT_FLAGS     (slots)   WANTS_STUDENT: the student's expectation of the difference of logits is
                             summed; WANTS_LABEL: the student's z at the label is looked up;
                             IS_MIXED: `Request.teacher_mix` is below 1
    SLOT_INVERSE   (slots)   1 / temperature; this and the other numbers are the bits of a float32
    SLOT_A, SLOT_B (slots)   the two numbers of the divergence's formulas (`numbers_of`); of a mixed
                             teacher the teacher's and the student's share
    REQUEST_BEGIN  (slots + 1), REQUEST_INDEX, REQUEST_KIND: the requests of a slot
    PART_BEGIN     (L + 1), PART_INDEX, PART_ROLE: the pairs of `PairMoments` that a layer is part
                             of: OWN_LAYER alone, SECOND of two layers, or FIRST. The walk over
                             layers has the whole pair at the SECOND
    PAIR_INVERSE   (pairs)   1 / temperature of a pair
    PAIR_WEIGHTED  (pairs)   1 where its tokens have weights, else 0
    SECOND_REQUEST, SECOND_LAYER, SECOND_SLOT: the requests that take a second pass
    TEACHER_LAYER  (L)       the teacher layer that student layer l is compared with
    SHIFT_LAYER    (L)       the student layer whose state defines the shift of that teacher layer:
                             one for all student layers that share it, with a slot if any has one
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdd_kernels.backends.triton.refusal import layer_pairs
from fdd_kernels.lens.divergences import needs_second_pass
from fdd_kernels.lens.spec import NLL, LensSpec

SLOT_BEGIN = tl.constexpr(0)
SLOT_FLAGS = tl.constexpr(1)
SLOT_INVERSE = tl.constexpr(2)
REQUEST_BEGIN = tl.constexpr(3)
REQUEST_INDEX = tl.constexpr(4)
REQUEST_KIND = tl.constexpr(5)
PART_BEGIN = tl.constexpr(6)
PART_INDEX = tl.constexpr(7)
PART_ROLE = tl.constexpr(8)
SECOND_REQUEST = tl.constexpr(9)
SECOND_LAYER = tl.constexpr(10)
SECOND_SLOT = tl.constexpr(11)
TEACHER_LAYER = tl.constexpr(12)
SHIFT_LAYER = tl.constexpr(13)
SLOT_A = tl.constexpr(14)
SLOT_B = tl.constexpr(15)
PAIR_INVERSE = tl.constexpr(16)
PAIR_WEIGHTED = tl.constexpr(17)
TABLE_ROWS = 18

WANTS_STUDENT = tl.constexpr(1)
WANTS_LABEL = tl.constexpr(2)
IS_MIXED = tl.constexpr(4)

# Kinds of requests: log-sum-exps alone, a label's cross-entropy, KL(p || q), or the divergence
# DIVERGENCE of the kernel.
KIND_LSE = tl.constexpr(0)
KIND_NLL = tl.constexpr(1)
KIND_KL = tl.constexpr(2)
KIND_OTHER = tl.constexpr(3)

OWN_LAYER = tl.constexpr(0)
SECOND = tl.constexpr(1)
FIRST = tl.constexpr(2)

SMALLEST = 2.0**-126  # float32's smallest normal number


@triton.jit
def table_entry(table, table_width, ROW: tl.constexpr, index):
    """Load an integer of the table."""
    return tl.load(table + ROW * table_width + index)


@triton.jit
def table_float(table, table_width, ROW: tl.constexpr, index):
    """Load a float32 of the table."""
    return tl.load(table + ROW * table_width + index).to(tl.float32, bitcast=True)


@dataclass(frozen=True)
class Table:
    """The table on a device, and its facts for launches.

    `second_pass` counts the requests that take one. `divergence` is the one besides KL, else "kl".
    `has_kl` and `has_labels` tell whether a request is of KL, of the cross-entropy at the label,
    `has_weights` whether the tokens of a pair have weights, `has_mixtures` whether a slot has a
    mixed teacher.
    """

    values: Tensor
    width: int
    slots: int
    second_pass: int
    divergence: str
    has_kl: bool
    has_labels: bool
    has_weights: bool
    has_mixtures: bool

    @property
    def one_pass_divergence(self) -> str:
        """Return the divergence besides KL that one pass over the vocabulary sums, else "kl"."""
        return "kl" if self.second_pass else self.divergence


def _bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def _prefix(groups: list[list]) -> list[int]:
    ends = [0]
    for group in groups:
        ends.append(ends[-1] + len(group))
    return ends


class Slot(NamedTuple):
    """A student layer at a temperature, and the parameters of the divergence that needs some.

    Those with a mixed teacher, whose share is the only parameter, are the last of a layer.
    """

    layer: int
    is_mixed: bool
    temperature: float
    parameters: tuple[float, ...]


def numbers_of(parameters: tuple[float, ...]) -> tuple[float, float]:
    """Return the two numbers that the formulas of `elementwise.py` take.

    Two parameters are themselves. One, a share a, comes with 1 - a, which float32 would lose beside
    an `a` near 1. A positive number that float32 rounds to 0 is its smallest normal one.
    """
    if len(parameters) == 1:
        parameters = (parameters[0], 1.0 - parameters[0])
    a, b = parameters or (0.0, 0.0)
    return tuple([max(number, SMALLEST) if number > 0 else number for number in (a, b)])


def _slots_of(spec: LensSpec) -> list[Slot]:
    """Find the slot of each request.

    Requests without parameters share the slot of one that has some.
    """
    found = []
    for request in spec.requests:
        is_mixed = request.teacher_mix != 1 and request.divergence != NLL
        parameters = (request.teacher_mix,) if is_mixed else request.parameters
        found.append(Slot(request.student_layer, is_mixed, request.temperature, parameters))
    with_parameters = {slot[:3]: slot for slot in reversed(found) if slot.parameters}
    return [slot if slot.parameters else with_parameters.get(slot[:3], slot) for slot in found]


_captured: list[Table] = []  # tables whose addresses CUDA graphs hold: never freed


def table_for(spec: LensSpec, layers: int, device: torch.device) -> Table:
    """Build and upload the table of a spec that `refusal` accepts; cached for the next calls.

    The upload is the backend's only copy from host to device: capture a CUDA graph after a first,
    ordinary step.
    """
    table = _built_table(spec, layers, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table


def _teacher_layers(spec: LensSpec, layers: int, with_slots: set[int]) -> tuple[list, list]:
    """Fill the rows TEACHER_LAYER and SHIFT_LAYER; `with_slots` are student layers with a slot."""
    teacher_of = dict(zip(range(layers), range(layers)))
    teacher_of |= dict(layer_pairs(spec))
    of_shift = []
    for student in range(layers):
        sharing = [other for other in range(layers) if teacher_of[other] == teacher_of[student]]
        of_shift.append(min(sharing, key=lambda other: (other not in with_slots, other)))
    return list(teacher_of.values()), of_shift


@functools.lru_cache(maxsize=64)
def _built_table(spec: LensSpec, layers: int, device: torch.device) -> Table:
    slot_of = _slots_of(spec)
    slots = sorted(set(slot_of))
    requests_of = [[i for i, own in enumerate(slot_of) if own == slot] for slot in slots]
    kinds = {None: KIND_LSE.value, NLL: KIND_NLL.value, "kl": KIND_KL.value}
    flags = {NLL: WANTS_LABEL.value, "reverse_kl": WANTS_STUDENT.value}
    parts: list[list[tuple[int, int]]] = [[] for _ in range(layers)]
    for index, pair in enumerate(spec.moments):
        second = pair.second.student
        parts[second].append((index, OWN_LAYER.value if pair.first is None else SECOND.value))
        if pair.first is not None:
            parts[pair.first.student].append((index, FIRST.value))
    second_pass = [
        (index, request)
        for index, request in enumerate(spec.requests)
        if needs_second_pass(request.divergence)
    ]

    rows: list[list[int]] = [[] for _ in range(TABLE_ROWS)]
    rows[SLOT_BEGIN.value] = _prefix(
        [[slot for slot in slots if slot.layer == layer] for layer in range(layers)]
    )
    rows[SLOT_FLAGS.value] = [
        functools.reduce(
            int.__or__,
            (flags.get(spec.requests[i].divergence, 0) for i in requests),
            IS_MIXED.value * slot.is_mixed,
        )
        for slot, requests in zip(slots, requests_of)
    ]
    rows[SLOT_INVERSE.value] = [_bits(1.0 / slot.temperature) for slot in slots]
    for number, row in enumerate((SLOT_A, SLOT_B)):
        rows[row.value] = [_bits(numbers_of(slot.parameters)[number]) for slot in slots]
    rows[REQUEST_BEGIN.value] = _prefix(requests_of)
    rows[REQUEST_INDEX.value] = [i for requests in requests_of for i in requests]
    rows[REQUEST_KIND.value] = [
        kinds.get(spec.requests[i].divergence, KIND_OTHER.value)
        for requests in requests_of
        for i in requests
    ]
    rows[PART_BEGIN.value] = _prefix(parts)
    rows[PART_INDEX.value] = [index for part in parts for index, _ in part]
    rows[PART_ROLE.value] = [role for part in parts for _, role in part]
    rows[SECOND_REQUEST.value] = [index for index, _ in second_pass]
    rows[SECOND_LAYER.value] = [request.student_layer for _, request in second_pass]
    rows[SECOND_SLOT.value] = [slots.index(slot_of[index]) for index, _ in second_pass]
    rows[PAIR_INVERSE.value] = [_bits(1.0 / pair.temperature) for pair in spec.moments]
    rows[PAIR_WEIGHTED.value] = [int(pair.weighted) for pair in spec.moments]
    with_slots = {slot.layer for slot in slots}
    rows[TEACHER_LAYER.value], rows[SHIFT_LAYER.value] = _teacher_layers(spec, layers, with_slots)
    width = max(len(row) for row in rows)
    values = torch.tensor(
        [row + [0] * (width - len(row)) for row in rows], dtype=torch.int32, device=device
    )
    divergences = {request.divergence for request in spec.requests}
    return Table(
        values=values,
        width=width,
        slots=len(slots),
        second_pass=len(second_pass),
        divergence=next(iter(divergences - {NLL, None, "kl"}), "kl"),
        has_kl="kl" in divergences,
        has_labels=NLL in divergences,
        has_weights=any(pair.weighted for pair in spec.moments),
        has_mixtures=any(slot.is_mixed for slot in slots),
    )
