"""Tell by class names and config what a transformers model predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Task, one of transformers' lists of classes, and the Auto class of code outside of transformers.
_LISTS = (
    (
        "sequence_classification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForSequenceClassification",
    ),
    (
        "token_classification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForTokenClassification",
    ),
    (
        "question_answering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        "AutoModelForQuestionAnswering",
    ),
    ("seq2seq_lm", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    ("causal_lm", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    ("causal_lm", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    ("masked_lm", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    ("embedding", "MODEL_MAPPING_NAMES", "AutoModel"),
    ("embedding", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES", "AutoModelForTextEncoding"),
)
_CLASSIFIERS = ("sequence_classification", "token_classification", "question_answering")


def task_name(classes: Iterable[str], config: Any) -> str:
    """Return causal_lm, masked_lm, seq2seq_lm, sequence_classification, token_classification,
    question_answering or embedding (a base model without a head).

    By transformers' lists of classes, then by the config. Any other model is taken for a causal LM.

    Args:
        classes: names of the model's class and of its base classes, the nearest first; of a saved
            model `config.architectures`.
        config: the model's config, or None.
    """
    found = _listed(tuple(classes), config)
    if found in _CLASSIFIERS:
        return found
    if getattr(config, "is_encoder_decoder", False):
        return "embedding" if found == "embedding" else "seq2seq_lm"
    # Audio LMs are listed as sequence-to-sequence, and a masked LM may be configured as a decoder.
    if found in (None, "seq2seq_lm"):
        return "causal_lm"
    is_decoder = found == "masked_lm" and getattr(config, "is_decoder", False)
    return "causal_lm" if is_decoder else found


def saved_task(config: Any) -> str:
    """Return the task of the model that a config was saved with; see `task_name`.

    A base model is taken for a causal LM: a head that is tied to its embeddings is not saved.
    """
    found = task_name(getattr(config, "architectures", None) or (), config)
    return "causal_lm" if found == "embedding" else found


def _listed(classes: tuple[str, ...], config: Any) -> str | None:
    """Return the task in whose lists the first class is that is in any; of a class outside of
    transformers the task by the config's `auto_map`. None without one.
    """
    from transformers.models.auto import modeling_auto

    lists = [(task, _names(getattr(modeling_auto, mapping))) for task, mapping, _ in _LISTS]
    for name in classes:
        for task, names in lists:
            if name in names:
                return task
    own = getattr(config, "auto_map", None) or {}
    found = (task for task, _, auto in _LISTS if classes and classes[0] in str(own.get(auto, "")))
    return next(found, None)


def _names(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    """Return the names of classes in one of transformers' lists; a model type may have several."""
    several = [names if isinstance(names, tuple) else (names,) for names in mapping.values()]
    return {name for names in several for name in names}
