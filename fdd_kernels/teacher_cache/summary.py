"""The cache of a teacher's summary for one frozen student head; see
`fdd_kernels.objectives.fdd.summary`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdd_kernels.data import Windows
from fdd_kernels.hf.heads import head_digest
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.targets import SummaryTargets
from fdd_kernels.hf.tasks import require_causal_lm
from fdd_kernels.hf.teachers import LiveTeacher
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions
from fdd_kernels.objectives.fdd.summary import SummaryMaker, check_options, summary_widths
from fdd_kernels.teacher_cache.format import ArraySpec
from fdd_kernels.teacher_cache.identity import describe_teacher
from fdd_kernels.teacher_cache.reader import WindowCache
from fdd_kernels.teacher_cache.writer import CachedQuantity, write_cache

KIND = "statistics"  # of the index: its name on disk
# Options that decide the summary, besides both heads; all others may vary from run to run.
_FIXED = (
    "temperature",
    "output_temperature",
    "output_in_dynamics",
    "vocab_size",
    "derivative_temperature",
)


def _fixed_options(options: LossOptions) -> dict[str, Any]:
    """Return the options that decide the summary. A `derivative_temperature` that is the
    temperature is left out: indexes of earlier releases have none.
    """
    found = {name: getattr(options, name) for name in _FIXED}
    if options.temperature_of_deltas == options.temperature:
        del found["derivative_temperature"]
    return found


def teacher_summary(
    teacher: LiveTeacher,
    layers: Sequence[int],
    *,
    apply_final_norm: bool,
    student: ModelReader,
    options: LossOptions,
) -> CachedQuantity:
    """Describe the cache of what the loss of one student head needs of a teacher.

    Args:
        layers: 1-based layers of the teacher, one for each layer of the student to compare.
        apply_final_norm: apply the teacher's final norm to sampled layers.
        student: its head must not be trained afterwards.
        options: temperatures, `output_in_dynamics` and `vocab_size`, which are fixed from then on.

    Raises:
        ValueError: layers that the teacher does not have, options or a head that a summary cannot
            serve.
    """
    full = replace(
        options,
        student_softcap=student.transform.softcap,
        student_logit_scale=student.transform.scale,
        teacher_softcap=teacher.transform.softcap,
        teacher_logit_scale=teacher.transform.scale,
    )
    check_options(full)
    weight, bias, *_ = student.read_head()
    sizes = len(weight), teacher.vocabulary
    differ = options.vocab_size is None and sizes[0] != sizes[1]
    if differ or (options.vocab_size or 0) > min(sizes):
        raise ValueError(
            f"vocab_size={options.vocab_size}, but the student's head has {sizes[0]} rows and the "
            f"teacher's {sizes[1]}: give the number of tokens to compare, at most {min(sizes)}"
        )
    about = describe_teacher(teacher, layers, apply_final_norm)

    @cache
    def maker(device: torch.device) -> SummaryMaker:
        head = [None if t is None else t.detach().to(device) for t in (weight, bias)]
        return SummaryMaker(full, *head)

    def rows(batch: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        states = teacher.targets(batch, tuple(layers), apply_final_norm=apply_final_norm)
        hidden = [state.flatten(0, 1)[places.to(state.device)] for state in states]
        teacher_weight, teacher_bias = teacher.head()
        device = teacher_weight.device  # the student's head is brought to the teacher's
        return maker(device)([h.to(device) for h in hidden], teacher_weight, teacher_bias)

    widths = summary_widths(full, len(layers) + 1, weight.shape[1])
    return CachedQuantity(
        kind=KIND,
        arrays={name: ArraySpec(width, "float32") for name, width in widths.items()},
        dtype=torch.float32,
        contents=about
        | {
            "student_head": head_digest(weight, bias),
            "options": _fixed_options(options),
        },
        once={},
        rows=rows,
    )


def write_summary_cache(
    folder: str | Path,
    teacher: nn.Module,
    student: nn.Module,
    windows: Windows,
    *,
    layers: Sequence[int],
    apply_final_norm: bool = True,
    options: LossOptions | None = None,
    **storage,
) -> SummaryCache:
    """Run a teacher over windows and store its summary for the student's head.

    Args:
        teacher, student: transformers causal LMs, the teacher on the device where it is to run.
        layers, apply_final_norm, options: see `teacher_summary`.
        **storage: batch_size, shard_size, tokenizer, data, resume, advance; see `write_cache`.

    Raises:
        as `write_teacher_cache` and `teacher_summary`.
    """
    live = LiveTeacher(teacher, student=student)
    require_causal_lm(live.task, "a teacher cache")
    quantity = teacher_summary(
        live,
        layers,
        apply_final_norm=apply_final_norm,
        student=ModelReader(student, "student"),
        options=options or LossOptions(),
    )
    write_cache(Path(folder), quantity, windows, **storage)
    return SummaryCache(folder)


class SummaryCache(WindowCache):
    """A teacher's summary at every valid position, for one frozen student head; replaces the
    teacher.

    Training needs neither the teacher nor its head, and the loss is still over the whole
    vocabulary. Serves KL at trajectory and output, any derivative but "weighted_cosine", and any
    weights of terms, layers and tokens. The student's head must be the one that the cache was made
    for, linear and not trained (LoRA without the head, or train_head=False). Layers, temperatures,
    `output_in_dynamics` and `vocab_size` are fixed. For the rest see `WindowCache`.
    """

    kind = KIND

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._fixed: dict[str, Any] = self.files.contents["options"]

    def require(self, config: FDDConfig, options: LossOptions, layers: tuple[int, ...]) -> None:
        if layers and layers != self.layers:
            raise ValueError(
                f"the run compares teacher layers {list(layers)}, but the summary in "
                f"{self.path} is of {list(self.layers)} and of the changes between them: give the "
                "same layers, or cache the teacher again"
            )
        super().require(config, options, layers)
        if config.layer_alignment != "rank":
            raise ValueError(
                f"layer_alignment={config.layer_alignment!r} compares every layer of the student "
                "with every layer of the teacher, but a summary has pairs by rank alone: use the "
                "teacher, or a cache of its states"
            )
        check_options(options)
        given = _fixed_options(options)
        for name in _FIXED:
            if given.get(name) != self._fixed.get(name):
                raise ValueError(
                    f"{name}={getattr(options, name)!r}, but the summary in {self.path} was made "
                    f"with {name}={self._fixed.get(name)!r}: give the same, or cache the teacher "
                    "again"
                )

    def targets(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
    ) -> SummaryTargets:
        """Load the summary of a batch of the cache's windows; raises as `TeacherCache.targets`."""
        windows, places = self.table.match(batch)
        options = {"dtype": torch.float32, "device": batch["input_ids"].device}
        summary = {
            name: self.files.rows(name, windows, self.table.rows, **options)
            for name in self.files.arrays
        }
        return SummaryTargets(
            places=places.to(options["device"]),
            summary=summary,
            layers=len(self.layers) + 1,
            head=self.files.contents["student_head"],
            source=str(self.path),
        )


# Names of earlier releases.
StatisticsCache = SummaryCache
write_statistics_cache = write_summary_cache
