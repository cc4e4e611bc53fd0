"""The options of `fdd-kernels cache-teacher`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from fdd_kernels.cli.parsing import require_at_least, require_choice, require_fraction
from fdd_kernels.cli.teacher_options import DTYPES, TeacherOptions
from fdd_kernels.common.errors import UserError
from fdd_kernels.objectives.fdd.options import LAYER_GRIDS
from fdd_kernels.teacher_cache import SHARD_SIZE

KINDS = ("states", "statistics")
STORED = ("float32", "bfloat16", "int8", "float8")  # the names of `codec.CODECS`


@dataclass(frozen=True, kw_only=True)
class CacheOptions(TeacherOptions):
    """Options of a teacher cache.

    Args:
        data: files, a directory of them, or a data set by its name or folder; see
            `fdd_kernels.data.open_source`.
        output: the directory of the cache.
        kind: states (for any student and objective), or statistics: for the frozen head of student
            and KL.
        student: for statistics, the model whose head is used.
        temperature: for statistics, divides the logits of the trajectory.
        derivative_temperature: for statistics, divides the logits of the derivative; as temperature
            if not given.
        output_temperature: for statistics, divides the logits of the output KD.
        output_in_dynamics: for statistics, include the output in the layers of trajectory and
            derivative.
        vocab_size: for statistics, compare the first tokens only (set automatically where heads are
            padded unequally).
        num_layers: number of layers.
        layer_grid: which layers: floor (the paper's) or linspace.
        teacher_layers: these layers instead, as in 4,8,12.
        apply_final_norm: apply the final norm to the states of every layer.
        dtype: dtype of stored states: float32, bfloat16 (unless given), int8 or float8 (both with a
            scale per position). Statistics are float32.
        teacher_dtype: dtype of the teacher's computation: auto, float32 or bfloat16; auto is
            bfloat16 on a GPU that has it.
        max_length: tokens in a window; unless given 512, or the positions of the teacher.
        batch_size: windows in one forward pass of the teacher.
        eval_fraction: fraction of the windows for validation.
        seed: of the choice of validation windows.
        shard_size: bytes of a file, as in 512MiB.
        resume: resume the same cache in output, which is the default; without it the cache is
            removed and started again.
        verify: compare checksums at the end; with output alone, those of an existing cache.
    """

    data: Path
    output: Path
    kind: str = "states"
    student: str | None = None
    temperature: float = 1.0
    derivative_temperature: float | None = None
    output_temperature: float = 1.0
    output_in_dynamics: bool = False
    vocab_size: int | None = None
    num_layers: int = 4
    layer_grid: str = "floor"
    teacher_layers: tuple[int, ...] | None = None
    apply_final_norm: bool = True
    dtype: str | None = None
    teacher_dtype: str = "auto"
    max_length: int | None = None
    batch_size: int = 8
    eval_fraction: float = 0.05
    seed: int = 0
    shard_size: int = SHARD_SIZE
    resume: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, num_layers=0, max_length=2, batch_size=1, seed=0, shard_size=1)
        require_fraction(self, "eval_fraction")
        require_choice(self, kind=KINDS, dtype=STORED, teacher_dtype=DTYPES, layer_grid=LAYER_GRIDS)
        if self.kind == "statistics":
            if self.student is None:
                raise UserError(
                    "kind='statistics' needs student: a summary is made for the head of one student"
                )
            if self.dtype not in (None, "float32"):
                raise UserError(
                    f"dtype={self.dtype!r}: a summary is stored in float32, since the loss "
                    "subtracts nearly equal numbers"
                )
            return
        defaults = {f.name: f.default for f in fields(self)}
        for name in (
            "student",
            "temperature",
            "derivative_temperature",
            "output_temperature",
            "output_in_dynamics",
            "vocab_size",
        ):
            if getattr(self, name) != defaults[name]:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is for kind='statistics'; states serve any "
                    "student and loss"
                )
