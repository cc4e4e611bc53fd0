"""Hugging Face Trainer with the FDD loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Trainer

from fdd_kernels.config import FDDConfig, FDDLossTerms
from fdd_kernels.distiller import Distiller


class FDDTrainer(Trainer):
    """A `transformers.Trainer` whose loss is Feature Dynamics Distillation from `teacher`.

    Args:
        *args, **kwargs: as for `transformers.Trainer`; `model` is the student. Only the student is saved.
        teacher: a transformers causal LM; moved to the student's device, put in evaluation mode, never trained.
        fdd_config: layers and loss options.

    Every term is logged beside the loss, in training (means since the last log) and in evaluation (`eval_output_kd`,
    ...). With labels in the batch the loss is the sum over all valid tokens of an optimizer step divided by their number,
    also under gradient accumulation.
    """

    def __init__(self, *args, teacher: nn.Module, fdd_config: FDDConfig | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        teacher.to(self.args.device)
        self.distiller = Distiller(self.model, teacher, fdd_config)
        # The loss takes num_items_in_batch whatever the student's own forward does.
        self.model_accepts_loss_kwargs = True
        self._term_sums: dict[str, Tensor] = {}
        self._terms_seen: dict[str, int] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The FDD loss of one micro-batch, its terms recorded for the next log."""
        terms = self.distiller(inputs, num_items_in_batch=num_items_in_batch)
        # Under accumulation each micro-batch holds a share of the step's mean, so shares add up to it.
        share = num_items_in_batch is not None and model.training
        self._record(terms, 1 / self.current_gradient_accumulation_steps if share else 1.0, model.training)
        return (terms.loss, {"loss": terms.loss}) if return_outputs else terms.loss

    def _record(self, terms: FDDLossTerms, steps: float, training: bool) -> None:
        for name in ("output_kd", "trajectory", "derivative", "ce"):
            key = name if training else f"eval_{name}"
            value = getattr(terms, name).detach()
            self._term_sums[key] = self._term_sums.get(key, 0.0) + value
            self._terms_seen[key] = self._terms_seen.get(key, 0) + steps

    def _take_means(self, prefix: str) -> dict[str, float]:
        keys = [key for key in self._term_sums if key.startswith("eval_") == bool(prefix)]
        return {key: float(self._term_sums.pop(key)) / self._terms_seen.pop(key) for key in keys}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the mean of each term since the last training log."""
        if "loss" in logs:
            logs |= self._take_means("")
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Adds the mean over evaluation batches of each term to the metrics."""
        self._take_means("eval_")
        return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        """Adds the terms to the loop's metrics, before they are logged."""
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics.update(self._take_means("eval_"))
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of one batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None
