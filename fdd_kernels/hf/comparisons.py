"""Choose how the models of a task are compared."""

from __future__ import annotations

from fdd_kernels.hf.comparison import Comparison
from fdd_kernels.hf.embeddings import EmbeddingLoss
from fdd_kernels.hf.features import FeatureLoss
from fdd_kernels.hf.loss import DistillationLoss
from fdd_kernels.hf.task_checks import check_task_config
from fdd_kernels.hf.task_heads import AnswerLoss, ClassificationLoss, TokenClassificationLoss
from fdd_kernels.hf.tasks import Task
from fdd_kernels.objectives.fdd.options import FDDConfig

_OF_TASK = {
    "sequence_classification": ClassificationLoss,
    "token_classification": TokenClassificationLoss,
    "question_answering": AnswerLoss,
    "embedding": EmbeddingLoss,
}


def comparison_of(task: Task, config: FDDConfig) -> type[Comparison]:
    """Return how models of a task are compared.

    Raises:
        ValueError: options that have no meaning for the task.
    """
    check_task_config(task, config)
    if task.has_lens:
        return FeatureLoss if config.space == "feature" else DistillationLoss
    return _OF_TASK[task.name]
