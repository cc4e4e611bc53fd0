"""What a model predicts: what the loss sees of a batch, and what the model takes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fdd_kernels.hf.batches import check_batch
from fdd_kernels.hf.positions import SHIFT_LABELS, TEACHER_INDEX, TOKEN_WEIGHTS, ignore_rows_from

NOT_MODEL_INPUTS = ("labels", SHIFT_LABELS, TOKEN_WEIGHTS, "num_items_in_batch", TEACHER_INDEX)
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


class Task:
    """One kind of models. The causal LM's methods are the default: a batch is used as it is.

    Attributes:
        name: as in messages, such as "causal_lm".
        has_lens: whether the head gives a distribution over a vocabulary at each position, so that
            sampled states can be compared through it.
    """

    has_lens = True

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def loss_view(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Check a batch, and return it as the loss sees it: the functions of `positions` find its
        labels and valid positions there.

        Raises:
            TypeError, ValueError: see `check_batch`; labels that the task needs are missing.
        """
        check_batch(batch)
        return batch

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a model's forward: a batch without labels, weights and names of
        windows.

        Args:
            model: the transformers model inside wrappers.
        """
        return {key: value for key, value in batch.items() if key not in NOT_MODEL_INPUTS}

    def example(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return arguments of a model's forward for `tokens` (batch, sequence) without padding, at
        which the model predicts.
        """
        return {"input_ids": tokens, "attention_mask": tokens.new_ones(tokens.shape)}

    def without_rows_from(
        self, batch: Mapping[str, Any], first: int, ignore_index: int
    ) -> dict[str, Any]:
        """Return the batch, of the same shape, without valid positions in rows `first` and later:
        those that a data loader repeats.
        """
        return ignore_rows_from(batch, first, ignore_index)


class WithoutLens(Task):
    """A task whose models have no head over a vocabulary."""

    has_lens = False


CAUSAL_LM = Task("causal_lm")
TASKS = {
    "causal_lm": CAUSAL_LM,
    "masked_lm": Task("masked_lm"),
    "seq2seq_lm": Task("seq2seq_lm"),
    "sequence_classification": WithoutLens("sequence_classification"),
    "token_classification": WithoutLens("token_classification"),
    "question_answering": WithoutLens("question_answering"),
    "embedding": WithoutLens("embedding"),
}


def task_of(model: nn.Module) -> Task:
    """Return the task of a transformers model inside wrappers.

    By transformers' lists of classes, which also know the base classes of a user's own class; then
    by the config. Any other model is taken for a causal LM, and `ModelReader` looks at its logits.
    """
    found, config = _listed(model), model.config
    if found in ("sequence_classification", "token_classification", "question_answering"):
        return TASKS[found]
    if getattr(config, "is_encoder_decoder", False):
        return TASKS["embedding" if found == "embedding" else "seq2seq_lm"]
    # Audio LMs are listed as sequence-to-sequence, and a masked LM may be configured as a decoder.
    if found in (None, "seq2seq_lm") or (
        found == "masked_lm" and getattr(config, "is_decoder", False)
    ):
        return CAUSAL_LM
    return TASKS[found]


def _listed(model: nn.Module) -> str | None:
    """Return the task in whose lists the model's class is, or its nearest base class in any list;
    of a class outside of transformers the task by its config's `auto_map`. None without one.
    """
    from transformers.models.auto import modeling_auto

    lists = [(task, _names(getattr(modeling_auto, mapping))) for task, mapping, _ in _LISTS]
    for base in type(model).__mro__:
        for task, names in lists:
            if base.__name__ in names:
                return task
    own, name = getattr(model.config, "auto_map", None) or {}, type(model).__name__
    return next((task for task, _, auto in _LISTS if name in str(own.get(auto, ""))), None)


def _names(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    """Return the names of classes in one of transformers' lists; a model type may have several."""
    several = [names if isinstance(names, tuple) else (names,) for names in mapping.values()]
    return {name for names in several for name in names}
