"""The agreement of a group's processes before any work: one refuses, all raise."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from fdd_kernels.engine.vocab_parallel import VocabShard
from fdd_kernels.lens.inputs import LensInputs


class Answer(NamedTuple):
    """What every process says before any work; the default is a refusal.

    Attributes:
        accepts: 1 if its arguments are good.
        student_rows, teacher_rows: rows of its parts of the heads.
        valid_rows: valid tokens; all tokens where counting them would wait for a device.
        block_rows: rows per block for the cached-logits path, 0 if it would not take it.
        fingerprint: differs between processes whose collectives would not fit together.
    """

    accepts: int = 0
    student_rows: int = 0
    teacher_rows: int = 0
    valid_rows: int = 0
    block_rows: int = 0
    fingerprint: int = 0

    @staticmethod
    def of(inputs: LensInputs, block_rows: int, description: object) -> Answer:
        """Accept; `description` is of whatever must be the same on every process."""
        counts_all = inputs.valid is None or inputs.device.type != "cpu"
        students = inputs.student_hidden
        of_grad = [h.requires_grad for h in students] if torch.is_grad_enabled() else None
        heads = inputs.student_weight, inputs.teacher_weight
        dtypes = [t.dtype for t in (*students, *inputs.teacher_hidden, *heads)]
        common = description, students[0].shape[-1], of_grad, dtypes
        return Answer(
            accepts=1,
            student_rows=len(inputs.student_weight),
            teacher_rows=len(inputs.teacher_weight),
            valid_rows=inputs.rows if counts_all else int(inputs.valid.sum()),
            block_rows=block_rows,
            fingerprint=zlib.crc32(repr(common).encode()),
        )


def check_group(group) -> None:
    """Refuse what no shard can be made of.

    Raises:
        RuntimeError: in compiled code.
        TypeError: no process group.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "with vocab_group the processes talk to one another in Python, which cannot be "
            "compiled: call the loss outside of the compiled function, or decorate its "
            "caller with torch.compiler.disable"
        )
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "vocab_group must be a torch.distributed.ProcessGroup that this process is in, got "
            f"{type(group).__name__}: pass torch.distributed.new_group(...) or "
            'device_mesh["tp"].get_group()'
        )


def agree(group, answer: Callable[[], Answer], vocab_size: int | None) -> tuple[VocabShard, int]:
    """Exchange the processes' answers before any work.

    Args:
        group: the process group that splits the heads.
        answer: checks this process's arguments and answers; may raise.
        vocab_size: how many tokens are compared; None for all.

    Returns:
        This process's shard, and the rows per block of the cached-logits path: the least of all
        processes, since they exchange the statistics of one row block after another.

    Raises:
        TypeError, ValueError: as `answer`; also parts of heads that do not fit together.
        RuntimeError: another process refused its arguments, or was given others than this one.
    """
    failure, own = None, Answer()
    try:
        own = answer()
    except Exception as error:  # the others wait for this process's answer, whatever went wrong
        failure = error
    answers = _exchange(group, own)
    if failure is not None:
        raise failure
    bounds, vocabulary = _agreed_bounds(vocab_size, answers)
    shard = VocabShard(group, group.rank(), bounds, vocabulary)
    return shard, min(answer.block_rows for answer in answers)


def _exchange(group: dist.ProcessGroup, own: Answer) -> list[Answer]:
    """Every rank's answer; on the host where the group has a backend for it, so that no device is
    waited for.
    """
    on_host = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor(own, dtype=torch.int64, device=device)
    answers = mine.new_empty((group.size(), len(own)))
    dist.all_gather(list(answers.unbind()), mine, group=group)
    return [Answer(*answer) for answer in answers.tolist()]


def _agreed_bounds(vocab_size: int | None, answers: list[Answer]) -> tuple[tuple[int, ...], int]:
    """Bounds of the columns of all ranks and the size of the student's vocabulary; raises the same
    on every process.
    """
    refused = [rank for rank, answer in enumerate(answers) if not answer.accepts]
    if refused:
        raise RuntimeError(
            f"ranks {refused} of vocab_group refused their arguments (see their own errors): "
            "nothing was computed"
        )
    _, student_rows, teacher_rows, valid_rows, _, fingerprints = zip(*answers)
    if len(set(valid_rows)) > 1:
        raise RuntimeError(
            f"the processes of vocab_group have {list(valid_rows)} valid tokens: hidden states, "
            "labels and mask must be the same on all"
        )
    if len(set(fingerprints)) > 1:
        other = next(rank for rank, f in enumerate(fingerprints) if f != fingerprints[0])
        raise RuntimeError(
            f"ranks 0 and {other} of vocab_group were called with different options, shapes, "
            "dtypes or requires_grad of the hidden states: call the loss alike on all"
        )
    vocabularies = sum(student_rows), sum(teacher_rows)
    columns = vocab_size
    if columns is None:
        if vocabularies[0] != vocabularies[1]:
            raise ValueError(
                f"over the processes of vocab_group student_weight has {vocabularies[0]} rows and "
                f"teacher_weight {vocabularies[1]}: the vocabularies differ. If one is only "
                f"padded, pass vocab_size=N (at most {min(vocabularies)}) to compare the first N "
                "tokens"
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
            f"{list(teacher_rows)} on the ranks of vocab_group do not cover the same columns of "
            f"{columns}: split both heads at the same tokens"
        )
    empty = [rank for rank, (a, b) in enumerate(zip(student, student[1:])) if a == b]
    if empty:
        raise ValueError(
            f"ranks {empty} of vocab_group hold no column below vocab_size={columns} (rows "
            f"{list(student_rows)}): split the heads so that each has one, or use fewer processes"
        )
    return student, vocabularies[0]


def _bounds(rows: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """First column of each rank, and the end, cut off at `columns`."""
    return tuple([min(sum(rows[:rank]), columns) for rank in range(len(rows) + 1)])
