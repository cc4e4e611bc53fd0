"""A teacher's sufficient statistics for one frozen student head, from disk; see
`fdd_kernels.objectives.fdd.summary`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdd_kernels.data import Windows
from fdd_kernels.hf.model_reader import ModelLens
from fdd_kernels.hf.positions import counted_positions, next_labels
from fdd_kernels.hf.teachers import LiveTeacher, StudentSide
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.summary import (
    StatisticsLoss,
    StatisticsMaker,
    check_options,
    statistics_widths,
)
from fdd_kernels.teacher_cache.cache import WindowCache
from fdd_kernels.teacher_cache.index import ArraySpec
from fdd_kernels.teacher_cache.writer import OfLayers, write_cache

KIND = "statistics"
# What the statistics depend on besides both models' heads; the rest of the loss's options may vary
# from run to run.
_FIXED = ("temperature", "output_temperature", "output_in_dynamics", "vocab_size")


def head_digest(weight: Tensor, bias: Tensor | None) -> str:
    """SHA-256 of a head's numbers, in float32 so that a wider dtype of the same numbers is the same
    head.
    """
    digest = hashlib.sha256()
    for tensor in (weight, bias):
        if tensor is not None:
            digest.update(repr(tuple(tensor.shape)).encode())
            for part in tensor.detach().split(2**16):
                digest.update(part.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class TeacherStatistics(OfLayers):
    """What the loss of one student head needs of a teacher, and nothing of the teacher's width.

    Args:
        layers: 1-based layers of the teacher; as many as the student's that they will be compared
            with.
        apply_final_norm: read the sampled layers through the model's final norm.
        student: the student, whose head is read; it must not be trained afterwards.
        options: temperatures, `output_in_dynamics` and `vocab_size`, which cannot be changed later.

    Raises:
        ValueError: layers that the teacher does not have, options or a head that cannot be served.
    """

    kind = KIND

    def __init__(
        self,
        teacher: LiveTeacher,
        layers: Sequence[int],
        *,
        apply_final_norm: bool,
        student: ModelLens,
        options: LossOptions,
    ) -> None:
        super().__init__(teacher, layers, apply_final_norm)
        self.options = replace(
            options,
            student_softcap=student.transform.softcap,
            student_logit_scale=student.transform.scale,
            teacher_softcap=teacher.transform.softcap,
            teacher_logit_scale=teacher.transform.scale,
        )
        check_options(self.options)
        self.weight, self.bias, *_ = student.read_head()
        vocabularies = len(self.weight), teacher.vocabulary
        if (options.vocab_size is None and len(set(vocabularies)) > 1) or (
            options.vocab_size or 0
        ) > min(vocabularies):
            raise ValueError(
                f"vocab_size={options.vocab_size}, but the student's head has {vocabularies[0]} "
                "rows and the teacher's "
                f"{vocabularies[1]}: give the number of tokens to compare, at most "
                f"{min(vocabularies)}"
            )
        self._make: StatisticsMaker | None = None
        self.dtype = torch.float32
        widths = statistics_widths(self.options, len(self.layers) + 1, self.weight.shape[1])
        self.arrays = {name: ArraySpec(width, "float32") for name, width in widths.items()}
        self.contents = self.about_the_teacher() | {
            "student_head": head_digest(self.weight, self.bias),
            "options": {name: getattr(options, name) for name in _FIXED},
        }
        self.once = {}

    def rows(self, batch: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        states = self.teacher.states(batch, self.layers, apply_final_norm=self.apply_final_norm)
        weight, bias = self.teacher.head()
        hidden = [
            state.flatten(0, 1)[places.to(state.device)].to(weight.device) for state in states
        ]
        if self._make is None:  # where the teacher's head is
            student = [
                None if t is None else t.detach().to(weight.device)
                for t in (self.weight, self.bias)
            ]
            self._make = StatisticsMaker(self.options, *student)
        return self._make(hidden, weight, bias)


def write_statistics_cache(
    folder: str | Path,
    teacher: nn.Module,
    student: nn.Module,
    windows: Windows,
    *,
    layers: Sequence[int],
    apply_final_norm: bool = True,
    options: LossOptions | None = None,
    **storage,
) -> StatisticsCache:
    """Run a teacher over windows and store its statistics for the student's head.

    Args:
        teacher, student: transformers causal LMs; the teacher where it is to run.
        layers, apply_final_norm, options: see `TeacherStatistics`.
        **storage: batch_size, shard_size, tokenizer, data, resume, advance; see `write_cache`.

    Raises:
        as `write_teacher_cache` and `TeacherStatistics`.
    """
    quantity = TeacherStatistics(
        LiveTeacher(teacher, student=student),
        layers,
        apply_final_norm=apply_final_norm,
        student=ModelLens(student, "student"),
        options=options or LossOptions(),
    )
    write_cache(Path(folder), quantity, windows, **storage)
    return StatisticsCache(folder)


class CachedRows(NamedTuple):
    """Rows of every array for a batch, and the positions, in the flattened (batch, sequence), that
    they belong to.
    """

    places: Tensor
    statistics: dict[str, Tensor]


class StatisticsCache(WindowCache):
    """A teacher's sufficient statistics at every position that counts, for one frozen student head;
    stands in for the teacher.

    Training takes neither the teacher nor its head, and the loss is still that over the whole
    vocabulary. It serves trajectory="kl", any derivative and any weights; the student's head must
    be the one that it was made for, linear and not trained (LoRA without the head, or
    train_head=False); layers, temperatures, `output_in_dynamics` and `vocab_size` are fixed. For
    the rest see `WindowCache`.
    """

    kind = KIND

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._fixed: dict[str, Any] = self.reader.contents["options"]
        self._loss: tuple[Any, StatisticsLoss] | None = None

    def require(self, config: FDDConfig, options: LossOptions, layers: tuple[int, ...]) -> None:
        if layers and layers != self.layers:
            raise ValueError(
                f"the run compares teacher layers {list(layers)}, but the statistics in "
                f"{self.path} are of {list(self.layers)} "
                "and of the changes between them: give the same layers, or cache the teacher again"
            )
        super().require(config, options, layers)
        check_options(options)
        for name, value in self._fixed.items():
            if getattr(options, name) != value:
                raise ValueError(
                    f"{name}={getattr(options, name)!r}, but the statistics in {self.path} were "
                    f"made with {name}={value!r}: "
                    "give the same, or cache the teacher again"
                )

    def states(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
    ) -> CachedRows:
        windows, places = self.table.match(batch)
        device = batch["input_ids"].device
        read = {
            name: self.reader.rows(
                name, windows, self.table.rows, dtype=torch.float32, device=device
            )
            for name in self.reader.arrays
        }
        return CachedRows(places.to(device), read)

    def compare(
        self,
        student: StudentSide,
        states: CachedRows,
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None,
        vocab_group,
    ) -> FDDLossTerms:
        if vocab_group is not None:
            raise ValueError(
                "vocab_group splits the student's head, which a cache of statistics needs whole: "
                "use a cache of states"
            )
        count = len(self.layers) + 1
        loss = self._loss_for(student, options, count)
        final = student.states[-1]
        # without trajectory and derivative none is looked at
        sampled = student.states[:-1] or [final] * (count - 1)
        final = sampled[-1] if final is None else final
        hidden = [
            state.flatten(0, 1)[states.places].to(student.weight.device)
            for state in (*sampled, final)
        ]
        labels = next_labels(batch, options.ignore_index).flatten()[states.places]
        # a run may leave out some
        counts = counted_positions(batch, options.ignore_index).flatten()[states.places]
        statistics = states.statistics
        if not bool(counts.all()):
            hidden, labels = [h[counts] for h in hidden], labels[counts]
            statistics = {name: rows[counts] for name, rows in statistics.items()}
        return loss(hidden, statistics, labels, num_items_in_batch=num_items_in_batch)

    def _loss_for(self, student: StudentSide, options: LossOptions, layers: int) -> StatisticsLoss:
        """The loss for a head, which is compared with the cache's when it is first met, or met
        somewhere else or changed.
        """
        met = (student.weight.data_ptr(), student.weight._version, options)
        if self._loss is None or self._loss[0] != met:
            if head_digest(student.weight, student.bias) != self.reader.contents["student_head"]:
                raise ValueError(
                    f"the student's head is not the one that the statistics in {self.path} were "
                    "made for (SHA-256 differs): "
                    "statistics serve one frozen head. Freeze the head and cache the teacher "
                    "again, or use a cache of states"
                )
            self._loss = met, StatisticsLoss(options, layers, student.weight, student.bias)
        return self._loss[1]
