"""The options of `fdd-kernels distill`. Imports no torch."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdd_kernels.cli.parsing import require_at_least, require_choice, require_fraction
from fdd_kernels.cli.teacher_options import DTYPES, TeacherOptions
from fdd_kernels.common.errors import UserError
from fdd_kernels.objectives.fdd.options import FDDConfig

# The schedulers of transformers that need the number of steps only.
SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
RUN_FILE = "run.json"
# Defaults of `FDDConfig` in an earlier release, where they differ from today's.
_FORMER_DEFAULTS = {"derivative": "cosine"}


def former_defaults(output: Path) -> dict[str, Any]:
    """Return the options of the run in `output` that have the default of an earlier release: the
    run resumes with them, unless the command gives others.
    """
    try:
        run = json.loads((output / RUN_FILE).read_text("utf-8"))
        return {n: old for n, old in _FORMER_DEFAULTS.items() if run.get(f"config.{n}") == old}
    except (OSError, ValueError, AttributeError):  # no run, or `settle_run` says what is wrong
        return {}


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TeacherOptions):
    """Options of a distillation.

    Args:
        student: a directory or name of a transformers causal LM; a directory with a config.json and
            no weights is initialised at random.
        data: files, a directory of them, or a data set by its name or folder; see
            `fdd_kernels.data.open_source`.
        eval_data: likewise, the validation split; then data is used for training only.
        teacher_cache: a directory written by cache-teacher, instead of teacher and data; it sets
            the windows, their length and the validation split.
        output: the directory for checkpoints, student/, metrics.json and run.json.
        config: layers and loss.
        epochs: passes over the data.
        max_steps: optimizer steps; wins over epochs.
        learning_rate: the peak of the learning rate.
        warmup: steps until the peak, or a fraction of all steps if below 1; a thirtieth of them
            unless given.
        scheduler: of the learning rate after warmup: cosine, linear, constant,
            constant_with_warmup, cosine_with_restarts, polynomial or inverse_sqrt.
        weight_decay: of AdamW.
        batch_size: windows in a batch of one process.
        gradient_accumulation: batches in a step.
        max_length: tokens in a window; unless given 512, or the fewest positions of the models.
        dtype: of the computation: auto, float32 or bfloat16; the student's own weights stay float32
            (under LoRA, its adapters). auto is bfloat16 on a GPU that has it.
        teacher_dtype: of the teacher alone: auto, float32 or bfloat16; as dtype unless given.
        seed: of everything random.
        eval_fraction: fraction of the windows for validation; 0.05 unless given.
        lora_rank: train LoRA adapters of this rank; 0 trains all weights.
        lora_alpha: scale of the adapters times rank; twice the rank unless given.
        lora_targets: which modules, as in q_proj,v_proj; all-linear is every linear one but the
            head.
        gradient_checkpointing: recompute activations: less memory, more time.
        save_steps: steps between checkpoints, and evaluations.
        log_steps: steps between reports of the loss.
        report_to: also report to tensorboard, wandb or others that transformers knows.
        resume: resume the same run in output, which is the default; without it the run is removed
            and started again.
    """

    student: str
    output: Path
    data: Path | None = None
    eval_data: Path | None = None
    teacher_cache: Path | None = None
    config: FDDConfig = field(default_factory=FDDConfig)
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 1e-4
    warmup: float | None = None
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int | None = None
    dtype: str = "auto"
    teacher_dtype: str | None = None
    seed: int = 0
    eval_fraction: float | None = None
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ("all-linear",)
    gradient_checkpointing: bool = False
    save_steps: int = 100
    log_steps: int = 10
    report_to: tuple[str, ...] = ()
    resume: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, batch_size=1, gradient_accumulation=1, max_length=2, max_steps=1)
        require_at_least(self, save_steps=1, log_steps=1, lora_rank=0, seed=0)
        for name in ("epochs", "learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be greater than 0")
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name}={value} must be at least 0")
        require_choice(self, scheduler=SCHEDULERS)
        self._check_source()
        self._check_loss()
        require_fraction(self, "eval_fraction")
        for name in ("dtype", "teacher_dtype"):
            if getattr(self, name) == "float16":
                raise UserError(
                    f"{name}=float16 has not been tried with this command: use bfloat16 (--bf16) "
                    "or float32"
                )
        require_choice(self, dtype=DTYPES, teacher_dtype=DTYPES)
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_targets"):
                value = getattr(self, name)
                if value not in (None, ("all-linear",)):
                    raise UserError(f"{name}={value} is for LoRA: give lora_rank too")
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise UserError(f"lora_rank={self.lora_rank} needs peft: pip install peft")

    def _check_source(self) -> None:
        """Require teacher and data, or a cache that replaces both."""
        if self.teacher_cache is None:
            for name in ("teacher", "data"):
                if getattr(self, name) is None:
                    raise UserError(
                        f"--{name} is missing: give --teacher and --data, or --teacher-cache"
                    )
            if self.eval_data is not None and self.eval_fraction:
                raise UserError(
                    f"eval_fraction={self.eval_fraction} was given beside eval_data: leave one of "
                    "them out"
                )
            if self.eval_fraction is None:
                object.__setattr__(
                    self, "eval_fraction", 0.0 if self.eval_data is not None else 0.05
                )
            return
        for name in (
            "teacher",
            "data",
            "eval_data",
            "max_length",
            "eval_fraction",
            "teacher_dtype",
            "teacher_quantization",
            "teacher_device_map",
        ):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name}={getattr(self, name)} was given beside teacher_cache, which holds "
                    "windows of its own: leave it out, or make another cache"
                )

    def _check_loss(self) -> None:
        """Require a term of nonzero weight that has the layers it needs."""
        config, layers = self.config, self.config.dynamics_layers
        terms = {
            "output_kd_weight": True,
            "ce_weight": True,
            "alpha": layers >= 1,
            "beta": layers >= 2 and config.derivative is not None,
        }
        if any(config.ever(name) and possible for name, possible in terms.items()):
            return
        if not config.beta or config.derivative is None:
            given = ", ".join(f"{name}={getattr(config, name):g}" for name in terms)
            raise UserError(f"{given}: there is nothing to learn; give one of them a weight")
        raise UserError(
            f"beta={config.beta:g} alone needs two layers to compare a change between, and there "
            f"are {layers}: give num_layers=2 or more"
        )
