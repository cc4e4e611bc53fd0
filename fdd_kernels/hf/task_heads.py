"""Compare classifiers and models for question answering: their predictions at the output, and the
states of sampled layers.

There are few classes, so logits are dense: the heads of `fused_fdd_loss` are the identity.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.hf.comparison import Comparison
from fdd_kernels.hf.features import FeatureLoss, Rows
from fdd_kernels.hf.positions import (
    SHIFT_LABELS,
    TOKEN_WEIGHTS,
    VALID_ROWS,
    attended_tokens,
)
from fdd_kernels.hf.targets import StudentSide
from fdd_kernels.hf.task_checks import refuse_logit_options
from fdd_kernels.hf.tasks import require_causal_lm
from fdd_kernels.hf.teachers import LiveTeacher, Teacher
from fdd_kernels.hf.wrappers import evaluating
from fdd_kernels.objectives.fdd.loss import fdd_call
from fdd_kernels.objectives.fdd.options import FDDConfig, FDDLossTerms, LossOptions
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.reduction import loss_denominator, reduce_rows

# The logit of a token that is no answer: its probability is 0 in any floating point.
_NO_ANSWER = -(2.0**20)


class TaskLoss(FeatureLoss):
    """The loss of a task without a vocabulary; its rows are sequences.

    The student's final state is what it predicts. A subclass compares it in `_output_kd` and, with
    labels, in `_ce`. Every token of a sequence has the same share of the sequence's weight in
    trajectory and derivative, so that all terms are means over sequences.

    Raises:
        TypeError: a teacher cache.
    """

    def __init__(self, config: FDDConfig, student, teacher: Teacher, *rest) -> None:
        if not isinstance(teacher, LiveTeacher):
            require_causal_lm(student.task, f"a {type(teacher).__name__}")
        super().__init__(config, student, teacher, *rest)
        self._unreached: dict[tuple, list[str]] = {}

    def require(self, teacher: Teacher, possible: Iterable[LossOptions]) -> None:
        """Require nothing: what runs is the whole model."""

    def valid_rows(self, view: Mapping[str, Tensor]) -> Tensor:
        return view[VALID_ROWS]

    def without_gradient(self, options: LossOptions, *, whole: bool = False) -> list[str]:
        """Find the names by a backward pass of a few tokens, once for the terms that have a weight
        and the parameters that train.
        """
        model = self.student.model
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        needs = self._needs_final(options), self._sampled(self._student_layers, options)
        key = (*needs, *[name for name, _ in named])
        if key not in self._unreached:
            with torch.enable_grad(), evaluating(model):
                states = self.student_side(self.student.example(), options).states
                total = sum(state.sum() for state in states if state is not None)
                found = [None] * len(named)
                if isinstance(total, Tensor) and total.requires_grad:
                    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
            self._unreached[key] = [n for (n, _), g in zip(named, found) if g is None]
        return self._unreached[key]

    def _with_head(self, states: list[Tensor | None]) -> StudentSide:
        return StudentSide(states, None, None, self.student.vocabulary)

    def _rows(
        self, view: Mapping[str, Tensor], options: LossOptions, items: Tensor | float | None
    ) -> Rows:
        valid, attended = self.valid_rows(view), attended_tokens(view)
        valid = valid.to(attended.device)
        counts = attended.sum(1, keepdim=True).clamp(min=1)
        weights = attended / counts.double()
        return Rows(attended & valid[:, None], weights, _denominator(options, valid, items))

    def _output(
        self,
        student: StudentSide,
        teacher: Teacher,
        target: Tensor | None,
        batch: Mapping[str, Tensor],
        options: LossOptions,
        num_items_in_batch: Tensor | float | None,
    ) -> FDDLossTerms:
        logits = _at_least_float32(student.states[0])
        valid = self.valid_rows(batch).to(logits.device)
        items = _denominator(options, valid, num_items_in_batch)
        output_kd = ce = zero = logits.new_zeros(())
        # Autocast would round logits to 16 bits.
        with torch.autocast(logits.device.type, enabled=False):
            if options.output_kd_weight:
                if target is None:
                    raise ValueError(
                        "teacher_states has no predictions, which output_kd_weight="
                        f"{options.output_kd_weight} asks for: take the teacher_states of this "
                        "distiller"
                    )
                targets = _at_least_float32(target.to(logits.device))
                output_kd = self._output_kd(logits, targets, batch, valid, options, items)
            if options.ce_weight:
                ce = self._ce(logits, batch, valid, options, items)
        loss = options.output_kd_weight * output_kd + options.ce_weight * ce
        return FDDLossTerms(loss, output_kd, zero, zero, ce)

    @abstractmethod
    def _output_kd(
        self,
        logits: Tensor,
        targets: Tensor,
        view: Mapping[str, Tensor],
        valid: Tensor,
        options: LossOptions,
        items: Tensor | float,
    ) -> Tensor:
        """Compare predictions: a sum over the valid rows divided by `items`."""

    @abstractmethod
    def _ce(
        self,
        logits: Tensor,
        view: Mapping[str, Tensor],
        valid: Tensor,
        options: LossOptions,
        items: Tensor | float,
    ) -> Tensor:
        """Compute the model's own loss of the labels in the same way."""

    def _labels(self, view: Mapping[str, Tensor], name: str, device: torch.device) -> Tensor:
        labels = view.get(name)
        if labels is None:
            name = "labels" if name == SHIFT_LABELS else name
            raise ValueError(
                f"the batch has no {name}, which ce_weight={self.config.ever('ce_weight'):g} "
                "needs: give them, or ce_weight=0"
            )
        return labels.to(device)


class ClassificationLoss(TaskLoss):
    """Classes of sequences: one of C, several, or numbers, by `config.problem_type` of the student,
    or else of the teacher, and, as in transformers, by the number of classes and the dtype of the
    labels.

    Raises:
        ValueError: options of distributions for models that predict numbers.
    """

    def __init__(self, config: FDDConfig, student, teacher: Teacher, *rest) -> None:
        super().__init__(config, student, teacher, *rest)
        models = student.model, teacher.reader.model
        given = (getattr(model.config, "problem_type", None) for model in models)
        self._problem_type = next(filter(None, given), None)
        if self._problem(None) != "regression" or not config.ever("output_kd_weight"):
            return
        refuse_logit_options(config, "models with problem_type=regression, or with one label,")
        if config.output_divergence != "kl":
            raise ValueError(
                f"output_divergence={config.output_divergence!r} compares distributions, but the "
                "models predict numbers (problem_type=regression, or one label), which are "
                'compared by their squared error: leave it at "kl"'
            )

    def valid_rows(self, view: Mapping[str, Tensor]) -> Tensor:
        valid, labels = view[VALID_ROWS], view.get("labels")
        if labels is None or self._problem(labels) != "single_label_classification":
            return valid
        self._check_shape(labels, valid.shape)
        return valid & (labels != self.config.ignore_index).to(valid.device)

    def _check_shape(self, labels: Tensor, shape: torch.Size) -> None:
        """Raise ValueError unless the labels have `shape`."""
        if labels.shape != shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, but {self._problem(labels)} needs "
                f"{tuple(shape)}: correct the labels, or set problem_type in the student's config"
            )

    def _problem(self, labels: Tensor | None) -> str:
        if self._problem_type is not None:
            return self._problem_type
        if self.student.vocabulary == 1:
            return "regression"
        several = labels is not None and labels.is_floating_point()
        return "multi_label_classification" if several else "single_label_classification"

    def _output_kd(self, logits, targets, view, valid, options, items):
        problem = self._problem(view.get("labels"))
        if problem == "regression":
            return _summed((logits - targets).square().mean(-1), valid, items)
        if problem == "multi_label_classification":  # a softmax over z and 0 is Bernoulli's
            logits, targets = (torch.stack([z, torch.zeros_like(z)], -1) for z in (logits, targets))
            valid = valid[:, None].expand(logits.shape[:-1])
        return _class_terms(logits, targets, None, valid, options, items).output_kd

    def _ce(self, logits, view, valid, options, items):
        labels = self._labels(view, "labels", logits.device)
        problem = self._problem(labels)
        if problem == "single_label_classification":
            return _class_terms(logits, None, labels, valid, options, items).ce
        self._check_shape(labels, logits.shape[:1] if logits.shape[1] == 1 else logits.shape)
        labels = labels.to(logits.dtype).view_as(logits)
        losses = {
            "regression": F.mse_loss,
            "multi_label_classification": F.binary_cross_entropy_with_logits,
        }
        return _summed(losses[problem](logits, labels, reduction="none").mean(-1), valid, items)


class TokenClassificationLoss(TaskLoss):
    """Classes of tokens, whose rows are those with a label."""

    def valid_rows(self, view: Mapping[str, Tensor]) -> Tensor:
        return Comparison.valid_rows(self, view)

    def _rows(self, view, options, items):
        return FeatureLoss._rows(self, view, options, items)

    def _output_kd(self, logits, targets, view, valid, options, items):
        weights = view.get(TOKEN_WEIGHTS)
        return _class_terms(logits, targets, None, valid, options, items, weights).output_kd

    def _ce(self, logits, view, valid, options, items):
        labels = self._labels(view, SHIFT_LABELS, logits.device)
        weights = view.get(TOKEN_WEIGHTS)
        return _class_terms(logits, None, labels, valid, options, items, weights).ce


class AnswerLoss(TaskLoss):
    """The first and last token of an answer, whose terms are averaged: logits (batch, 2, sequence).

    Output KD is of distributions over the tokens without padding; the model's own loss has the
    padding among its classes.
    """

    def _output_kd(self, logits, targets, view, valid, options, items):
        padding = ~attended_tokens(view).to(logits.device)[:, None]
        logits, targets = (z.masked_fill(padding, _NO_ANSWER) for z in (logits, targets))
        return self._mean_of_both(logits, targets, None, valid, options, items).output_kd

    def _ce(self, logits, view, valid, options, items):
        names = self.student.task.targets
        labels = torch.stack([self._labels(view, name, logits.device) for name in names], 1)
        # As in transformers: an answer that was cut off is left out.
        inside = (labels >= 0) & (labels < logits.shape[-1])
        labels = labels.masked_fill(~inside, options.ignore_index)
        return self._mean_of_both(logits, None, labels, valid, options, items).ce

    def _mean_of_both(self, logits, targets, labels, valid, options, items):
        halves = logits.new_full(logits.shape[:2], 0.5)
        valid = valid[:, None].expand(halves.shape)
        return _class_terms(logits, targets, labels, valid, options, items, halves)


def _class_terms(
    logits: Tensor,
    targets: Tensor | None,
    labels: Tensor | None,
    valid: Tensor,
    options: LossOptions,
    items: Tensor | float,
    weights: Tensor | None = None,
) -> FDDLossTerms:
    """Compute output KD of logits (..., C) where there are targets, and the cross-entropy of labels
    (...) where there are these.
    """
    heads = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    inputs = LossInputs(
        [logits],
        heads,
        [logits.detach() if targets is None else targets],
        heads,
        labels,
        mask=valid,
        num_items_in_batch=items,
        token_weights=None if weights is None else weights.to(logits.device),
    )
    terms = {"output_kd_weight": float(targets is not None), "ce_weight": float(labels is not None)}
    return FDDLossTerms(*evaluate(fdd_call(inputs, replace(options, **terms))))


def _denominator(
    options: LossOptions, valid: Tensor, items: Tensor | float | None
) -> Tensor | float:
    """Return what divides the sum over a batch's rows."""
    if items is None and options.reduction == "sum":
        return 1.0
    return valid.sum().double() if items is None else items


def _summed(rows: Tensor, valid: Tensor, items: Tensor | float) -> Tensor:
    denominator = loss_denominator("mean", len(rows), valid, rows.device, items)
    return reduce_rows(rows, valid, None, denominator)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
