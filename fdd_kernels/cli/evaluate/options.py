"""The options of `fdd-kernels evaluate`. Imports no torch."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from fdd_kernels.cli.parsing import require_at_least, require_choice
from fdd_kernels.cli.teacher_options import DTYPES, TeacherOptions
from fdd_kernels.common.errors import UserError
from fdd_kernels.objectives.fdd.options import LAYER_GRIDS

_OF_LAYERS = ("num_layers", "student_layers", "teacher_layers")
_OF_ANSWERS = ("seeds", "temperature", "top_p", "max_new_tokens", "questions")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TeacherOptions):
    """Options of an evaluation.

    Args:
        model: a directory or name of a transformers causal LM with its tokenizer; may repeat: the
            others are compared with the first.
        data: files, a directory of them, or a data set by its name or folder; see
            `fdd_kernels.data.open_source`.
        json: the file for all numbers.
        html: the file for a page that compares the models.
        num_layers: number of layers whose predictions are compared with the teacher's; unless given
            4, or as many as the shallowest model has.
        layer_grid: which layers: floor (the paper's) or linspace.
        student_layers, teacher_layers: these layers instead, as in 2,4,6.
        apply_final_norm: apply the final norm to the states of every layer.
        vocab_size: KL is over the first tokens only (set automatically where heads are padded
            unequally).
        max_length: tokens in a window; unless given 512, or the fewest positions of the models.
        max_windows: evaluate only so many windows, the first ones.
        batch_size: windows, or questions, that a model runs over at once.
        dtype: of the models: auto, float32 or bfloat16; auto is bfloat16 on a GPU that has it.
        teacher_dtype: of the teacher alone; as dtype unless given.
        generate: generate an answer to each prompt of the data, and compare it with the reference
            by ROUGE-L.
        questions: how many prompts, the first ones; 100 unless given.
        seeds: sample with each of these seeds, as in 0,1,2; without them the most probable token is
            taken each time.
        temperature: of the sampling; 1 unless given.
        top_p: sample from the most probable tokens of this probability together; 1 unless given.
        max_new_tokens: of an answer; 256 unless given.
    """

    model: tuple[str, ...]
    data: Path
    json: Path | None = None
    html: Path | None = None
    num_layers: int | None = None
    layer_grid: str = "floor"
    student_layers: tuple[int, ...] | None = None
    teacher_layers: tuple[int, ...] | None = None
    apply_final_norm: bool = True
    vocab_size: int | None = None
    max_length: int | None = None
    max_windows: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    teacher_dtype: str | None = None
    generate: bool = False
    questions: int | None = None
    seeds: tuple[int, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model", tuple(self.model))
        self._check_models()
        require_at_least(self, num_layers=0, max_length=2, max_windows=1, batch_size=1)
        require_at_least(self, vocab_size=1, questions=1, max_new_tokens=1)
        require_choice(self, dtype=DTYPES, teacher_dtype=DTYPES, layer_grid=LAYER_GRIDS)
        self._check_layers()
        self._check_answers()

    def _check_models(self) -> None:
        """Refuse one model that is given twice, also by two paths of its folder."""
        seen: dict[str | Path, str] = {}
        for name in self.model:
            place = Path(name).resolve() if Path(name).is_dir() else name
            if place in seen:
                also = "" if seen[place] == name else f" (it is {seen[place]})"
                raise UserError(f"model={name} was given twice{also}: give each model once")
            seen[place] = name

    def _check_layers(self) -> None:
        for name in (*_OF_LAYERS, "teacher_dtype", "vocab_size"):
            value = getattr(self, name)
            if self.teacher is None and value is not None:
                raise UserError(f"{name}={value} was given without a teacher: give --teacher too")
        if (self.student_layers is None) != (self.teacher_layers is None):
            raise UserError(
                "student_layers and teacher_layers must be given together: they are compared"
            )
        if self.student_layers is not None and self.num_layers is not None:
            raise UserError(
                f"num_layers={self.num_layers} samples layers, but "
                f"student_layers={self.student_layers} names them: give one of the two"
            )

    def _check_answers(self) -> None:
        for name in _OF_ANSWERS:
            value = getattr(self, name)
            if value is not None and not self.generate:
                raise UserError(f"{name}={value} is for generated answers: give generate=True too")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is not None and self.seeds is None:
                raise UserError(f"{name}={value} is for sampling: give seeds too, as in 0,1,2")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be greater than 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if self.seeds is not None and (
            min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds)
        ):
            raise UserError(f"seeds={self.seeds} must be different numbers of at least 0")
        if self.generate and importlib.util.find_spec("rouge_score") is None:
            raise UserError('generate=True needs rouge-score: pip install "fdd_kernels[evaluate]"')
