"""Vocabulary-parallel heads: each process of a group holds some rows of both LM heads, and all see
the same tokens.

A process takes the statistics of `spec.py` over its own columns. They are gathered, 2 L + 3 reads +
7 moments numbers a row and process, and merged by every process (`merge.py`), so that the terms are
the same everywhere. With the merged statistics in the place of its own, `lens_grad` gives a process
its rows of the head's gradient and its share of the hidden states' gradients, whose sum over the
group is complete. Divergences whose parts cannot be merged (jsd, skew_kl) are summed in a second
pass, once the log-sum-exps of all columns are known.

Where a backend keeps values between the two operations, all that is done for one block of rows
after another. The blocks must be the same on all processes, which say before any work how many rows
they would keep; the least is taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.engine import ops
from fdd_kernels.engine.shards import merge_statistics
from fdd_kernels.lens.divergences import needs_second_pass
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import GRAD_SUM, VALUE, Statistics
from fdd_kernels.lens.spec import NLL, LensSpec
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import Plan

SENT_REQUEST_STATS = 3  # LSE_S, LSE_T and VALUE; the GRAD_SUM of all columns follows from the VALUE


@dataclass(frozen=True)
class VocabShard:
    """A process's place among the columns: rank r of `group` holds columns bounds[r] to bounds[r +
    1].

    `vocabulary` is the number of rows of the student's whole head, of which bounds[-1] are
    compared.
    """

    group: dist.ProcessGroup
    rank: int
    bounds: tuple[int, ...]
    vocabulary: int

    def own_labels(self, labels: Tensor) -> Tensor:
        """Labels (R,) as positions among this process's columns; -1, which is no column, where
        another one has it.
        """
        first, last = self.bounds[self.rank], self.bounds[self.rank + 1]
        return torch.where((labels >= first) & (labels < last), labels - first, -1)

    def statistics(self, inputs: LensInputs, spec: LensSpec, backend: str) -> Statistics:
        """The statistics of all columns, the same on every process; `inputs` and `spec` are this
        process's.
        """
        return self.merged(
            inputs, spec, ops.lens_stats(*inputs, *first_pass(spec).encode(), backend)
        )

    def merged(self, inputs: LensInputs, spec: LensSpec, own: Statistics) -> Statistics:
        """`statistics` from this process's own."""
        own = part_statistics(inputs, spec, own)
        packed = torch.cat([t.flatten(0, 1) for t in own])
        parts = packed.new_empty((self.group.size(), *packed.shape))
        if packed.numel():
            dist.all_gather(list(parts.unbind()), packed, group=self.group)
        split = parts.split([len(t.flatten(0, 1)) for t in own], dim=1)
        shifts, requests, moments = merge_statistics(
            spec, *[p.unflatten(1, t.shape[:2]) for p, t in zip(split, own)]
        )
        if later := second_pass_requests(spec):
            sums = second_pass_sums(inputs, spec, shifts, requests)
            if sums.numel():
                dist.all_reduce(sums, group=self.group)
            requests[later, VALUE], requests[later, GRAD_SUM] = sums.unbind(1)
        if inputs.valid is not None:
            shifts, requests, moments = (
                torch.where(inputs.valid, t, 0.0) for t in (shifts, requests, moments)
            )
        return shifts, requests, moments

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Sum over the group, in place and at least in float32: the shares of the hidden states'
        gradients.
        """
        for gradient in gradients:
            if gradient.numel():
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                dist.all_reduce(wide, group=self.group)
                if wide is not gradient:
                    gradient.copy_(wide)


class _Answer(NamedTuple):
    """What every process says before any work."""

    accepts: int = 0
    student_rows: int = 0
    teacher_rows: int = 0
    positions: int = 0
    cached_rows: int = 0
    fingerprint: int = 0


def plan_shard(
    group, prepare: Callable, options: LossOptions, *arguments
) -> tuple[VocabShard, Plan, LensInputs, Tensor | float | None, int]:
    """`prepare(options, *arguments)` for this process's rows of the heads, once all processes of
    `group` agree to begin.

    `arguments` are those of `make_plan`; `prepare` returns a plan, its inputs, what divides the
    sums, and how many rows' values would be kept at a time (0: none), of which all processes take
    the least, since they exchange the statistics of a block of rows at a time. If one process
    refuses its arguments, every process of the group raises.

    Raises:
        TypeError, ValueError: as `prepare`; also rows that do not fit together, or no process
            group.
        RuntimeError: another process refused its arguments, or was given others than this one;
            compiled code.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "with vocab_group the processes talk to one another in Python, which cannot be "
            "compiled: call fused_fdd_loss "
            "outside of the compiled function, or decorate its caller with torch.compiler.disable"
        )
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "vocab_group must be a torch.distributed.ProcessGroup that this process is in, got "
            f"{type(group).__name__}: pass "
            'torch.distributed.new_group(...) or device_mesh["tp"].get_group()'
        )
    failure, own = None, _Answer()
    try:
        plan, inputs, normaliser, cached_rows = _prepare_rows(prepare, options, *arguments)
        rows = len(inputs.student_weight), len(inputs.teacher_weight)
        own = _Answer(
            1, *rows, _count_positions(inputs), cached_rows, _fingerprint(options, plan, inputs)
        )
    except Exception as error:  # the others wait for this process's answer, whatever went wrong
        failure = error
    answers = _exchange(group, own)
    if failure is not None:
        raise failure
    bounds, vocabulary = _agreed_bounds(options, answers)
    shard = VocabShard(group, group.rank(), bounds, vocabulary)
    columns = bounds[shard.rank + 1] - bounds[shard.rank]
    plan = replace(plan, options=options, spec=replace(plan.spec, columns=columns))
    return shard, plan, inputs, normaliser, min(answer.cached_rows for answer in answers)


def _prepare_rows(
    prepare: Callable,
    options: LossOptions,
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *others,
):
    """`prepare` for this process's rows alone; how many of them are compared is not known yet."""
    if teacher_weight is None:
        raise ValueError(
            "vocab_group splits LM heads over processes, but teacher_weight=None means feature "
            "space: a projection is small, "
            "keep all of it on every process and leave vocab_group=None"
        )
    if options.backend == "reference":
        raise ValueError(
            'backend="reference" keeps dense tensors of one process and knows no vocab_group: '
            "gather the heads, or use another "
            "backend"
        )
    heads = [
        w.shape[0]
        for w in (student_weight, teacher_weight)
        if isinstance(w, Tensor) and w.ndim == 2
    ]
    if len(heads) == 2 and min(heads) > 0:
        options = replace(options, vocab_size=min(heads))
    return prepare(options, student_hidden, student_weight, teacher_hidden, teacher_weight, *others)


def _count_positions(inputs: LensInputs) -> int:
    """Positions that count; all of them where counting would wait for a device."""
    return (
        inputs.rows
        if inputs.valid is None or inputs.device.type != "cpu"
        else int(inputs.valid.sum())
    )


def _fingerprint(options: LossOptions, plan: Plan, inputs: LensInputs) -> int:
    """A number that differs between processes whose collectives would not fit together."""
    students = inputs.student_hidden
    of_grad = [h.requires_grad for h in students] if torch.is_grad_enabled() else None
    dtypes = [
        t.dtype
        for t in (*students, inputs.student_weight, *inputs.teacher_hidden, inputs.teacher_weight)
    ]
    common = (
        replace(options, backend="auto"),
        plan.leading_shape,
        students[0].shape[-1],
        of_grad,
        dtypes,
    )
    return zlib.crc32(repr((replace(plan.spec, columns=0), common)).encode())


def _exchange(group: dist.ProcessGroup, own: _Answer) -> list[_Answer]:
    """Every rank's answer; on the host where the group has a backend for it, so that no device is
    waited for.
    """
    on_host = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(own, dtype=torch.int64, device=device)
    answers = mine.new_empty((group.size(), len(own)))
    dist.all_gather(list(answers.unbind()), mine, group=group)
    return [_Answer(*answer) for answer in answers.tolist()]


def _agreed_bounds(options: LossOptions, answers: list[_Answer]) -> tuple[tuple[int, ...], int]:
    """Bounds of the columns of all ranks and the size of the student's vocabulary; raises the same
    on every process.
    """
    refused = [rank for rank, answer in enumerate(answers) if not answer.accepts]
    if refused:
        raise RuntimeError(
            f"ranks {refused} of vocab_group refused their arguments (see their own errors): "
            "nothing was computed"
        )
    _, student_rows, teacher_rows, positions, _, fingerprints = zip(*answers)
    if len(set(positions)) > 1:
        raise RuntimeError(
            f"the processes of vocab_group have {list(positions)} positions that count: hidden "
            "states, labels and mask must be "
            "the same on all"
        )
    if len(set(fingerprints)) > 1:
        other = next(rank for rank, f in enumerate(fingerprints) if f != fingerprints[0])
        raise RuntimeError(
            f"ranks 0 and {other} of vocab_group were called with different options, shapes, "
            "dtypes or requires_grad of the "
            "hidden states: call fused_fdd_loss alike on all"
        )
    vocabularies = sum(student_rows), sum(teacher_rows)
    columns = options.vocab_size
    if columns is None:
        if vocabularies[0] != vocabularies[1]:
            raise ValueError(
                f"over the processes of vocab_group student_weight has {vocabularies[0]} rows and "
                "teacher_weight "
                f"{vocabularies[1]}: the vocabularies differ. If one is only padded, pass "
                "vocab_size=N (at most "
                f"{min(vocabularies)}) to compare the first N tokens"
            )
        columns = vocabularies[0]
    if columns > min(vocabularies):
        raise ValueError(
            f"vocab_size={columns} is larger than a vocabulary (student {vocabularies[0]}, teacher "
            f"{vocabularies[1]})"
        )
    student, teacher = (_bounds(rows, columns) for rows in (student_rows, teacher_rows))
    if student != teacher:
        raise ValueError(
            f"the rows of student_weight {list(student_rows)} and of teacher_weight "
            f"{list(teacher_rows)} on the ranks of "
            f"vocab_group do not cover the same columns of {columns}: split both heads at the same "
            "tokens"
        )
    empty = [rank for rank, (a, b) in enumerate(zip(student, student[1:])) if a == b]
    if empty:
        raise ValueError(
            f"ranks {empty} of vocab_group hold no column below vocab_size={columns} (rows "
            f"{list(student_rows)}): split the "
            "heads so that each has one, or use fewer processes"
        )
    return student, vocabularies[0]


def _bounds(rows: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """First column of each rank, and the end, cut off at `columns`."""
    return tuple([min(sum(rows[:rank]), columns) for rank in range(len(rows) + 1)])


def second_pass_requests(spec: LensSpec) -> list[int]:
    """The requests whose VALUE and GRAD_SUM need the log-sum-exps of all columns."""
    return [
        index
        for index, request in enumerate(spec.requests)
        if needs_second_pass(request.divergence)
    ]


def first_pass(spec: LensSpec) -> LensSpec:
    """The spec without the second pass, which would be over a process's own columns."""
    later = second_pass_requests(spec)
    requests = [
        request._replace(divergence=None) if index in later else request
        for index, request in enumerate(spec.requests)
    ]
    return replace(spec, requests=tuple(requests))


def part_statistics(inputs: LensInputs, spec: LensSpec, own: Statistics) -> Statistics:
    """What a process has to say of its `own` statistics: of requests the first three.

    The VALUE of a cross-entropy is -inf where the label is another's; that of a request of the
    second pass says nothing.
    """
    shifts, requests, moments = own
    requests = requests[:, :SENT_REQUEST_STATS].clone()
    for index, request in enumerate(spec.requests):
        if request.divergence == NLL:
            requests[index, VALUE].masked_fill_(inputs.labels < 0, -torch.inf)
    return shifts, requests, moments


def second_pass_sums(
    inputs: LensInputs, spec: LensSpec, shifts: Tensor, requests: Tensor
) -> Tensor:
    """VALUE and GRAD_SUM of the requests of the second pass over this process's columns: (requests
    of the pass, 2, R).

    In plain PyTorch, tile by tile, whatever the backend is: kernels that know both log-sum-exps
    only from their own columns have no such operation.
    """
    requests = requests.clone()
    with torch.autocast(inputs.device.type, enabled=False):
        torch_stream.add_second_pass(inputs, spec, shifts, requests)
    return requests[second_pass_requests(spec)][:, [VALUE, GRAD_SUM]]
