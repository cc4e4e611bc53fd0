"""Hugging Face Trainer with the FDD loss."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import Trainer

from fdd_kernels.config import FDDConfig, FDDLossTerms
from fdd_kernels.distiller import Distiller
from fdd_kernels.integrations.checkpoints import AtomicCheckpoints
from fdd_kernels.integrations.model_card import TAGS, distillation_section
from fdd_kernels.models.lens import unwrap
from fdd_kernels.models.teachers import Teacher, place_teacher

TERMS = FDDLossTerms._fields


class FDDTrainerMixin(AtomicCheckpoints):
    """Puts the FDD loss in the place of the loss of a `transformers.Trainer` or a trainer built on one.

    Mix it in first: `class MyTrainer(FDDTrainerMixin, SomeTrainer)`. See `FDDTrainer` for what it adds.
    """

    # The loss is divided by the number of tokens of the whole step: see `get_batch_samples`.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, teacher: nn.Module | Teacher, fdd_config: FDDConfig | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(f"{name}'s loss is the FDD loss: leave label_smoothing_factor=0 and compute_loss_func=None")
        if self.compute_metrics is not None:
            raise ValueError(f"{name} computes no logits, which compute_metrics needs: leave compute_metrics=None")
        self.teacher, self.fdd_config = teacher, fdd_config
        place_teacher(teacher, self.args.device)
        self.distiller = Distiller(self.model, teacher, fdd_config)
        # What versions without `loss_is_scaled_for_ga` go by.
        self.model_accepts_loss_kwargs = True
        self._weighted_sums: Tensor | None = None

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that the teacher reads, which the student's forward does not name."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.distiller.teacher.batch_columns]))

    def get_batch_samples(self, *args, **kwargs):
        """The micro-batches of one optimizer step and the number of positions that count in them, on all devices."""
        batches = super().get_batch_samples(*args, **kwargs)[0]
        count = sum((self.distiller.count_positions(batch).cpu() for batch in batches), torch.zeros((), dtype=torch.int64))
        return batches, self.accelerator.reduce(count.to(self.args.device), "sum").clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The FDD loss of one micro-batch, its terms recorded for the next log."""
        if unwrap(self.model) is not self.distiller.student.model:  # a new student: `model_init`
            self.distiller = Distiller(self.model, self.teacher, self.fdd_config)
        with self.accelerator.autocast():
            terms = self.distiller(inputs, num_items_in_batch=num_items_in_batch, student=model)
        if not model.training:
            self._record(terms, self.distiller.count_positions(inputs))
        elif num_items_in_batch is None:
            self._record(terms, torch.ones(()))
        else:  # one of the step's shares, which add up to its mean
            shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            self._record(FDDLossTerms(*(term * shares for term in terms)), torch.tensor(1 / shares))
        loss = terms.loss
        if num_items_in_batch is not None:  # gradients are averaged over processes, but the shares must add up
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _record(self, terms: FDDLossTerms, weight: Tensor) -> None:
        """Add weight * terms, and the weight, to the running sums: (6,) float64."""
        values = torch.stack([*(term.detach().double() for term in terms), torch.ones_like(terms.loss, dtype=torch.float64)])
        values = values * weight.to(values.device)
        self._weighted_sums = values if self._weighted_sums is None else self._weighted_sums + values

    def _take_means(self) -> dict[str, float]:
        """The weighted mean of each term, over all processes; sums start again."""
        sums, self._weighted_sums = self._weighted_sums, None
        if sums is None:
            return {}
        *sums, weight = self.accelerator.reduce(sums, "sum").tolist()
        return {name: value / max(weight, 1e-300) for name, value in zip(TERMS, sums)}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the mean of each term since the last training log."""
        if "loss" in logs:
            logs |= {name: value for name, value in self._take_means().items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Adds the terms to the loop's metrics, before they are logged, and weighs the loss by tokens as they are."""
        training_sums, self._weighted_sums = self._weighted_sums, None
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._take_means().items()})
        finally:
            self._weighted_sums = training_sums
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of one batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def create_model_card(self, *args, **kwargs) -> None:
        """As the trainer's own, with a section and tags about the distillation."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = ModelCard.load(path)
            card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
            card.text += "\n" + distillation_section(self.distiller)
            card.save(path)


class FDDTrainer(FDDTrainerMixin, Trainer):
    """A `transformers.Trainer` whose loss is Feature Dynamics Distillation from `teacher`.

    Args:
        *args, **kwargs: as for `transformers.Trainer`; `model` is the student. Only the student is saved.
        teacher: a transformers causal LM; put in evaluation mode, never trained, and moved to the student's device unless it
            has a place of its own (loaded with a device_map, offloaded by accelerate, quantised). Or a teacher cache, with
            `train_dataset=cache.dataset("train")` and `data_collator=fdd_kernels.data.pad_windows`.
        fdd_config: layers and loss options.

    Every term is logged beside the loss, in training (means since the last log) and in evaluation (`eval_loss`,
    `eval_output_kd`, ...: means over all tokens that count). In training the loss is the sum over all tokens that count
    in an optimizer step divided by their number, also under gradient accumulation and data parallelism.

    A checkpoint is there completely or not at all, and only a complete one is gone on from: see `AtomicCheckpoints`.

    Raises:
        ValueError: label smoothing, `compute_loss_func` or `compute_metrics` was asked for: they would be ignored.
        TypeError, ValueError: see `Distiller`.
        CheckpointError: while training, a checkpoint could not be written; those before it are intact.
    """
