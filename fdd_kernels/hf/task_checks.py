"""Refuse options of a config that have no meaning for a task, before any work."""

from __future__ import annotations

from fdd_kernels.hf.tasks import Task
from fdd_kernels.lens.distances import DISTANCES
from fdd_kernels.objectives.fdd.options import FDDConfig

# Options of an output that is a distribution, with the values that have no effect.
_OF_LOGITS = {
    "output_temperature": 1,
    "teacher_mix": 1,
    "scale_by_t2": False,
    "student_softcap": None,
    "teacher_softcap": None,
    "student_logit_scale": None,
    "teacher_logit_scale": None,
}


def check_task_config(task: Task, config: FDDConfig) -> None:
    """Check the options of a config that depend on the task.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    is_embedding = task.name == "embedding"
    of_states = config.output_divergence in DISTANCES
    if of_states and not is_embedding:
        raise ValueError(
            f"output_divergence={config.output_divergence!r} compares embeddings, but the models "
            f'are of the task {task}: give a divergence of distributions, such as "kl"'
        )
    if config.pooling != FDDConfig.pooling and not is_embedding:
        raise ValueError(
            f"pooling={config.pooling!r} makes embeddings of sentences, but the models are of the "
            f"task {task}: leave it at {FDDConfig.pooling!r}"
        )
    if task.name == "seq2seq_lm" and config.ignore_index != FDDConfig.ignore_index:
        raise ValueError(
            f"ignore_index={config.ignore_index}: encoder-decoders make decoder tokens of labels, "
            f"where {FDDConfig.ignore_index} is no token: leave it at {FDDConfig.ignore_index}"
        )
    if task.has_lens:
        return
    if config.space == "lens" and (config.ever("alpha") or config.ever("beta")):
        raise ValueError(
            f'space="lens" compares predictions at sampled layers, which models of the task {task} '
            'do not make: give FDDConfig(space="feature", trajectory="mse") to compare their '
            "states, or alpha=0 and beta=0"
        )
    if config.vocab_size is not None:
        raise ValueError(
            f"vocab_size={config.vocab_size} is of a vocabulary, which models of the task {task} "
            "do not predict: leave it at None"
        )
    if not config.train_head:
        raise ValueError(
            f"train_head=False is of a language model's head, but the models are of the task {task}"
            ": freeze the head with requires_grad_(False) instead"
        )
    if not is_embedding:
        return
    refuse_logit_options(config, "embedding models")
    if config.ever("output_kd_weight") and not of_states:
        raise ValueError(
            f"output_divergence={config.output_divergence!r} compares distributions, but embedding "
            'models give vectors: give output_divergence="cosine" or "mse"'
        )
    if config.ever("ce_weight"):
        raise ValueError(
            f"ce_weight={config.ever('ce_weight'):g} needs labels, which embedding models do not "
            "predict: give ce_weight=0"
        )


def refuse_logit_options(config: FDDConfig, models: str) -> None:
    """Refuse options that change the logits of a distribution.

    Args:
        models: which have none, for the error.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    for values in config.values_at_turns():
        for name, neutral in _OF_LOGITS.items():
            value = values.get(name, getattr(config, name))
            if value != neutral:
                raise ValueError(
                    f"{name}={value} changes the logits of a distribution, which {models} do not "
                    f"predict: leave it at {neutral}"
                )
