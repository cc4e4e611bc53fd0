"""What a student and a teacher must have in common, and what the loss takes from each."""

from __future__ import annotations

from torch import nn

from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.tasks import Task, task_of
from fdd_kernels.hf.teachers import Teacher
from fdd_kernels.hf.wrappers import unwrap
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions


def require_same_task(student: nn.Module, teacher: nn.Module | Teacher) -> Task:
    """Return the task of both models, perhaps inside wrappers.

    Raises:
        TypeError: they are of different tasks.
        ValueError: encoder-decoders that start with different tokens.
    """
    is_model = isinstance(teacher, nn.Module)
    student, teacher = unwrap(student), unwrap(teacher) if is_model else teacher
    own = task_of(student)
    of_teacher = task_of(teacher) if is_model else getattr(teacher, "task", own)
    if own is not of_teacher:
        raise TypeError(
            f"the student ({type(student).__name__}) is of the task {own} and the teacher "
            f"({type(teacher).__name__}) of the task {of_teacher}: their predictions cannot be "
            "compared. Load both with the same class of transformers (AutoModelForCausalLM, "
            "AutoModelForMaskedLM, AutoModelForSeq2SeqLM, ...)"
        )
    if is_model:
        own.require_alike(student, teacher)
    return own


def require_shared_vocabulary(config: FDDConfig, student: int, teacher: int) -> None:
    """Raise ValueError if the heads differ in size and `vocab_size` does not say what to compare.

    Args:
        student, teacher: rows of their heads.
    """
    if config.vocab_size is None and student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student} entries and the teacher's {teacher}: if one "
            f"is only padded, set FDDConfig(vocab_size=N) with N <= {min(student, teacher)} to "
            "compare the first N tokens"
        )
    if (config.vocab_size or 0) > min(student, teacher):
        raise ValueError(
            f"vocab_size={config.vocab_size} is larger than a vocabulary (student {student}, "
            f"teacher {teacher})"
        )


def options_for(config: FDDConfig, student: ModelReader, teacher: Teacher) -> LossOptions:
    """Return the config's loss options, with the models' soft caps and scales where it has none."""
    given = config.loss_options()
    for side, model in (("student", student), ("teacher", teacher)):
        if given[f"{side}_softcap"] is None:
            given[f"{side}_softcap"] = model.transform.softcap
        if given[f"{side}_logit_scale"] is None:
            given[f"{side}_logit_scale"] = model.transform.scale
    return LossOptions(**given)
