"""What a model predicts: what the loss sees of a batch, and what the model takes of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fdd_kernels.common.model_tasks import task_name
from fdd_kernels.hf.batches import check_batch
from fdd_kernels.hf.positions import (
    SHIFT_LABELS,
    TEACHER_INDEX,
    TOKEN_WEIGHTS,
    VALID_ROWS,
    ignore_rows_from,
    token_shape,
)

_LABELS = (SHIFT_LABELS, "labels")
_LABELS_TO_SHIFT = torch.tensor([[5, 6, 7]])
NOT_MODEL_INPUTS = (*_LABELS, TOKEN_WEIGHTS, "num_items_in_batch", TEACHER_INDEX)


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
        view = ignore_rows_from(self.loss_view(batch), first, ignore_index)
        return {**batch, SHIFT_LABELS: view[SHIFT_LABELS]}

    def require_alike(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ValueError if the models' own predictions are not of the same tokens."""


class MaskedLM(Task):
    """Labels are those of their own positions; -100 where no token was replaced."""

    def loss_view(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        check_batch(batch)
        labels = _own_labels(batch)
        if labels is None:
            raise ValueError(
                "the batch has no labels, which say where a masked LM is to predict: collate with "
                "transformers' DataCollatorForLanguageModeling(tokenizer, mlm=True), or give "
                "labels, or shift_labels=input_ids to compare all positions"
            )
        return {**batch, SHIFT_LABELS: labels}


class Seq2SeqLM(Task):
    """Positions are the decoder's. Labels are those of its predictions, and its inputs begin with
    the start token.
    """

    def loss_view(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the decoder's side of a batch under the names of a causal LM's."""
        check_batch({k: v for k, v in batch.items() if k not in (*_LABELS, TOKEN_WEIGHTS)})
        if batch.get("encoder_outputs") is not None:
            raise ValueError(
                "the batch has encoder_outputs, which are one model's: leave them out, and student "
                "and teacher run their own encoders"
            )
        labels = _own_labels(batch)
        if labels is None and not _has_decoder_tokens(batch):
            raise ValueError(
                "the batch has neither labels nor decoder_input_ids: an encoder-decoder needs one "
                "of them. Collate with transformers' DataCollatorForSeq2Seq"
            )
        if not _has_decoder_tokens(batch):
            batch = {**batch, "decoder_input_ids": labels}  # of the same shape
        check_batch(batch, "decoder_")
        names = ("input_ids", "inputs_embeds", "attention_mask")
        view = {name: batch.get(f"decoder_{name}") for name in names}
        texts, targets = token_shape(batch)[0], token_shape(view)[0]
        if texts != targets:
            raise ValueError(
                f"the batch has {texts} rows of tokens and {targets} of labels or decoder tokens: "
                "give each text its target"
            )
        return view | {SHIFT_LABELS: labels, TOKEN_WEIGHTS: batch.get(TOKEN_WEIGHTS)}

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add the decoder's tokens, made from the labels by the model's own rule, where the batch
        has none.
        """
        inputs = super().inputs(model, batch)
        if not _has_decoder_tokens(batch):
            labels = batch.get("labels")
            labels = _own_labels(batch) if labels is None else labels
            inputs["decoder_input_ids"] = _shifted_right(model, labels)
        return inputs

    def example(self, tokens: Tensor) -> dict[str, Tensor]:
        return super().example(tokens) | {"decoder_input_ids": tokens}

    def require_alike(self, student: nn.Module, teacher: nn.Module) -> None:
        try:
            ours, theirs = (_shifted_right(m, _LABELS_TO_SHIFT.clone()) for m in (student, teacher))
        except ValueError:  # then every batch must have decoder_input_ids
            return
        if not torch.equal(ours, theirs):
            raise ValueError(
                f"from the labels {_LABELS_TO_SHIFT[0].tolist()} the student "
                f"({type(student).__name__}) makes the decoder_input_ids {ours[0].tolist()} and "
                f"the teacher ({type(teacher).__name__}) {theirs[0].tolist()}: they must start "
                "with the same token. Set student.config.decoder_start_token_id to the teacher's "
                f"({getattr(teacher.config, 'decoder_start_token_id', None)})"
            )


class WithoutLens(Task):
    """A task whose models have no head over a vocabulary. The rows of its loss are sequences,
    unless a subclass says otherwise: views have `VALID_ROWS` (batch,) bool.

    Attributes:
        targets: names of the labels in a batch, one for each sequence.
    """

    has_lens = False
    targets: tuple[str, ...] = ("labels",)

    def loss_view(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        check_batch({k: v for k, v in batch.items() if k not in (*self.targets, *_LABELS)})
        if batch.get(TOKEN_WEIGHTS) is not None:
            raise ValueError(
                f"{TOKEN_WEIGHTS} are of tokens, but the rows of the task {self} are sequences: "
                "leave them out"
            )
        rows, found = token_shape(batch)[0], batch.get(VALID_ROWS)
        for name in self.targets:
            labels = batch.get(name)
            if labels is not None and not (
                isinstance(labels, Tensor) and labels.shape[:1] == (rows,)
            ):
                shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
                raise ValueError(
                    f"{name} has shape {shape}, but there are {rows} sequences: give a tensor with "
                    "one entry for each"
                )
        valid = torch.ones(rows, dtype=torch.bool) if found is None else found
        # As in transformers, a column of labels is one for each sequence.
        columns = {
            name: batch[name].squeeze(1)
            for name in self.targets
            if batch.get(name) is not None and batch[name].shape[1:] == (1,)
        }
        return {**batch, **columns, VALID_ROWS: valid}

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = super().inputs(model, batch)
        return {k: v for k, v in inputs.items() if k not in (*self.targets, VALID_ROWS)}

    def without_rows_from(
        self, batch: Mapping[str, Any], first: int, ignore_index: int
    ) -> dict[str, Any]:
        valid = self.loss_view(batch)[VALID_ROWS].clone()
        valid[first:] = False
        return {**batch, VALID_ROWS: valid}

    def output(self, output: Any) -> Tensor:
        """Return what a model predicts, from the result of its forward."""
        return output.logits


class SequenceClassification(WithoutLens):
    """One class, several, or a number for each sequence: `labels` (batch,) or (batch, C)."""

    def require_alike(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ValueError unless both predict as many labels, of the same kind.

        Warns:
            UserWarning: both name their labels, and differently.
        """
        for name in ("num_labels", "problem_type"):
            ours, theirs = (getattr(model.config, name, None) for model in (student, teacher))
            if ours != theirs and None not in (ours, theirs):
                raise ValueError(
                    f"the student has {name}={ours!r} and the teacher {name}={theirs!r}: load the "
                    f"student with {name}={theirs!r}"
                )
        names = [getattr(model.config, "id2label", None) or {} for model in (student, teacher)]
        named = [any(str(v) != f"LABEL_{k}" for k, v in own.items()) for own in names]
        if all(named) and names[0] != names[1]:
            warnings.warn(
                f"the student's labels are {names[0]} and the teacher's {names[1]}: logits are "
                "compared by their number. Give both the same config.id2label",
                stacklevel=5,
            )


class TokenClassification(SequenceClassification):
    """A class for each token: `labels` (batch, sequence), -100 where there is none. Rows are tokens
    with a label, or all that are attended in a batch without labels.
    """

    def loss_view(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        check_batch(batch)
        return {**batch, SHIFT_LABELS: _own_labels(batch)}

    def without_rows_from(
        self, batch: Mapping[str, Any], first: int, ignore_index: int
    ) -> dict[str, Any]:
        return Task.without_rows_from(self, batch, first, ignore_index)


class QuestionAnswering(WithoutLens):
    """The first and the last token of an answer in each sequence."""

    targets = ("start_positions", "end_positions")

    def output(self, output: Any) -> Tensor:
        return torch.stack([output.start_logits, output.end_logits], 1)


class Embedding(WithoutLens):
    """A base model: the final states of its tokens, of which a sentence's embedding is made."""

    targets = ()

    def output(self, output: Any) -> Tensor:
        return output.last_hidden_state


CAUSAL_LM = Task("causal_lm")
TASKS = {
    "causal_lm": CAUSAL_LM,
    "masked_lm": MaskedLM("masked_lm"),
    "seq2seq_lm": Seq2SeqLM("seq2seq_lm"),
    "sequence_classification": SequenceClassification("sequence_classification"),
    "token_classification": TokenClassification("token_classification"),
    "question_answering": QuestionAnswering("question_answering"),
    "embedding": Embedding("embedding"),
}


def task_of(model: nn.Module) -> Task:
    """Return the task of a transformers model inside wrappers; see `task_name`.

    Of a class that transformers does not know, `ModelReader` looks at the logits too.
    """
    classes = [base.__name__ for base in type(model).__mro__]
    return TASKS[task_name(classes, getattr(model, "config", None))]


def require_causal_lm(task: Task, what: str) -> None:
    """Raise TypeError unless `task` is the causal LM's.

    Args:
        what: is for causal LMs alone, for the error.
    """
    if task is not CAUSAL_LM:
        raise TypeError(
            f"{what} is for causal LMs, but the models are of the task {task}: use Distiller or "
            "FDDTrainer with both models"
        )


def _own_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the labels of the predictions at the same positions: `shift_labels` win."""
    return next((batch[name] for name in _LABELS if batch.get(name) is not None), None)


def _has_decoder_tokens(batch: Mapping[str, Any]) -> bool:
    names = ("decoder_input_ids", "decoder_inputs_embeds")
    return any(batch.get(name) is not None for name in names)


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """Return the decoder's tokens for labels, by the model's own rule.

    Raises:
        ValueError: it has none, or no start token.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    try:
        if prepare is not None:
            return prepare(labels=labels)
        why = "it has no prepare_decoder_input_ids_from_labels"
    except (TypeError, ValueError) as error:
        why = str(error)
    raise ValueError(
        f"{type(model).__name__} cannot make decoder_input_ids from labels ({why}): set "
        "config.decoder_start_token_id and config.pad_token_id, or give decoder_input_ids in the "
        "batch"
    )
