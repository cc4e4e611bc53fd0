"""Hugging Face Trainer with the FDD loss."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import Trainer

from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.hf.positions import SHIFT_LABELS, TOKEN_WEIGHTS
from fdd_kernels.hf.teachers import Teacher, place_teacher, require_model
from fdd_kernels.hf.wrappers import unwrap
from fdd_kernels.integrations.finite import MASKED_LABELS, warn_of_nothing
from fdd_kernels.integrations.model_card import TAGS, distillation_section
from fdd_kernels.integrations.predictions import labels_of, predictions_of, require_logits
from fdd_kernels.integrations.preparation import forget_evaluation
from fdd_kernels.integrations.repeats import without_repeats
from fdd_kernels.integrations.saved_options import SavedOptions
from fdd_kernels.integrations.streamed_metrics import watching
from fdd_kernels.integrations.sums import StepSums, WeightedSums
from fdd_kernels.objectives.fdd.options import FDDConfig

# Steps in a row that float16's scaler may skip; each skip halves its scale, which starts at 65536.
_SKIPPED_STEPS = 20


class FDDTrainerMixin(SavedOptions):
    """Replace the loss of a `transformers.Trainer`, or of a trainer built on it, by the FDD loss.

    Mix it in first: `class MyTrainer(FDDTrainerMixin, SomeTrainer)`. See `FDDTrainer`.
    """

    # The denominator of the loss is the number of valid tokens of the whole optimizer step: see
    # `get_batch_samples`.
    loss_is_scaled_for_ga = True
    # Why a step may have no valid position, for the warning.
    _nothing = MASKED_LABELS

    def __init__(
        self,
        *args,
        teacher: nn.Module | Teacher,
        fdd_config: FDDConfig | None = None,
        evaluation_metrics: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                f"{name}'s loss is the FDD loss: leave label_smoothing_factor=0 and "
                "compute_loss_func=None"
            )
        self.teacher, self.fdd_config = teacher, fdd_config
        self.evaluation_metrics = evaluation_metrics
        place_teacher(teacher, self.args.device)
        self.distiller = Distiller(self.model, teacher, fdd_config)
        require_logits(name, self.distiller.task, self.compute_metrics)
        self._require_whole_projection()
        ddp = self.accelerator.ddp_handler
        if (
            ddp is not None
            and self.args.ddp_find_unused_parameters is None
            and self.distiller.parameters_without_gradient()
        ):
            ddp.find_unused_parameters = True
        # For versions of transformers without `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = True
        self._means = WeightedSums()
        self._sums = StepSums()
        self._skipped_steps = 0  # in a row
        # Micro-batches of a stream that ended within a step; the next step begins with them.
        self._held_over: list = []
        self._epoch_iterator = None

    def _set_signature_columns_if_needed(self) -> None:
        """Add the columns that the loss and the teacher need to those of the student's forward."""
        super()._set_signature_columns_if_needed()
        needed = (SHIFT_LABELS, TOKEN_WEIGHTS, *self.distiller.teacher.batch_columns)
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *needed]))

    def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
        """Return the micro-batches of one optimizer step, and the number of their valid positions
        on all devices.

        If a stream ends within a step, the next pass completes the step, so that every step is one
        mean.

        Raises:
            ValueError: a whole pass has fewer batches than one step.
        """
        resumed = self._epoch_iterator is None and self.state.global_step > 0
        first, self._epoch_iterator = self._epoch_iterator is not epoch_iterator, epoch_iterator
        held, self._held_over = self._held_over, []
        missing = max(num_batches - len(held), 0)
        batches = held + super().get_batch_samples(epoch_iterator, missing, *args, **kwargs)[0]
        if len(batches) < num_batches and not self._is_at_its_end:
            if first and batches and not resumed:
                raise ValueError(
                    f"the data gives {len(batches)} batches in a pass, but a step takes "
                    f"gradient_accumulation_steps={num_batches}: none would ever be complete. "
                    "Lower gradient_accumulation_steps or the batch size"
                )
            self._held_over, batches = batches, []
            self.control.should_epoch_stop = True
        if not batches:
            return [], None
        count = self.accelerator.reduce(self._count(batches).to(self.args.device), "sum")
        self._sums = StepSums()
        # Under context parallelism, the processes that will share these batches have counted the
        # same positions.
        copies = self.get_cp_size() if hasattr(self, "get_cp_size") else 1
        return batches, count.clamp(min=1) // copies

    def _count(self, batches: list) -> Tensor:
        """Count the valid positions of the data's micro-batches, an int64 scalar."""
        counts = (self.distiller.count_positions(batch).cpu() for batch in batches)
        return sum(counts, torch.zeros((), dtype=torch.int64))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the FDD loss of one micro-batch, and record its terms for the next log."""
        self._follow_model()
        step = self.state.global_step if torch.is_grad_enabled() else None
        with self.accelerator.autocast():
            terms = self.distiller(
                inputs, num_items_in_batch=num_items_in_batch, student=model, step=step
            )
        loss = terms.loss
        if not model.training:
            self._means.add(terms.named(), self.distiller.count_positions(inputs))
        elif num_items_in_batch is None:
            self._means.add(terms.named(), torch.ones(()))
        else:
            positions = self.distiller.count_positions(inputs)
            self._sums.add(terms.named(), positions, num_items_in_batch)
            # Data parallelism averages gradients over processes, but they must add up.
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _follow_model(self) -> None:
        """Make a new distiller for a new student: `model_init` makes one at each training."""
        if unwrap(self.model) is not self.distiller.student.model:
            self.distiller = Distiller(self.model, self.teacher, self.fdd_config)

    def training_step(self, model, inputs, num_items_in_batch=None, *args, **kwargs):
        """Train on one micro-batch. After a step's last one, check that the loss is finite, and
        rescale the gradient if the trainer has replaced batches.

        A trainer that generates (on-policy distillation) makes other batches than those that
        `get_batch_samples` counted.

        Raises:
            NonFiniteLossError: the step's loss is not finite, on any device; no step is taken.
        """
        loss = super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
        step = self._sums
        if not step.has_terms:
            return loss
        step.returned.append(loss)
        if len(step.returned) < self.current_gradient_accumulation_steps:
            return loss
        means, scale, finite = step.finish(self.accelerator.reduce)
        self._log_alignment()
        if not step.used:
            warn_of_nothing(self.state.global_step + 1, self._nothing)
        if finite:
            self._skipped_steps = 0
            self._means.add(means, torch.ones(()))
            self._remove_oldest()
        else:
            self._skipped_steps += 1
            # float16's scaler skips such a step and lowers its scale for the next.
            if self.accelerator.scaler is None or self._skipped_steps > _SKIPPED_STEPS:
                self._stop(f"step {self.state.global_step + 1}", means)
        if scale != 1:
            self._scale_gradients(scale)
            # The trainer sums the losses of the step; make that sum the mean too.
            loss = scale * loss + (scale - 1) * sum(step.returned[:-1])
        return loss

    def _log_alignment(self) -> None:
        """Add a pairing of layers that was found in this step to the history of logs: callbacks and
        reports take numbers alone.
        """
        found, step = self.distiller.alignment, self.state.global_step
        if found is not None and found.step == step:
            entry = {"layer_alignment": found.state_dict(), "epoch": self.state.epoch, "step": step}
            self.state.log_history.append(entry)

    def _scale_gradients(self, scale: float) -> None:
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                f"{type(self).__name__} trains on other positions than its data set's, as trainers "
                "do that generate, and DeepSpeed holds the gradients, which would have to be "
                "scaled: use DistributedDataParallel or FSDP2"
            )
        with torch.no_grad():
            for parameter in self._trained_parameters(self.model):
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)

    def train(self, *args, **kwargs):
        """As `AtomicCheckpoints.train`."""
        self._held_over, self._epoch_iterator, self._skipped_steps = [], None, 0
        forget_evaluation(self)
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the mean of each term since the last training log, and the options that change as
        they are now.
        """
        if "loss" in logs:
            (means, _), self._means = self._means.means(self.accelerator.reduce), WeightedSums()
            logs |= {name: value for name, value in means.items() if name != "loss"}
            logs |= self.distiller.logged()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Add the terms and metrics to the loop's, and make the loss a mean over tokens like them.

        Raises:
            NonFiniteLossError: during training, before a checkpoint of such a student is written.
        """
        self._follow_model()
        training, self._means = self._means, WeightedSums()
        try:
            with watching(self.distiller, self.evaluation_metrics) as metrics:
                output = super().evaluation_loop(
                    *args, metric_key_prefix=metric_key_prefix, **kwargs
                )
            means, weight = self._means.means(self.accelerator.reduce)
            found = metrics.results(self.accelerator.reduce)
        finally:
            self._means = training
        if not weight:
            warnings.warn(
                f"no position is valid in the data of {metric_key_prefix}_loss: it is given as 0",
                stacklevel=2,
            )
        found = means | found
        output.metrics.update({f"{metric_key_prefix}_{n}": mean for n, mean in found.items()})
        if self.is_in_train and not math.isfinite(means.get("loss", 0.0)):
            self._stop(f"the evaluation after step {self.state.global_step}", means)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss of one batch; of a task without a vocabulary, and if they are asked for,
        logits and labels.
        """
        inputs = without_repeats(self._prepare_inputs(inputs), self.accelerator, self.distiller)
        seeing = predictions_of(self.distiller, not prediction_loss_only)
        with torch.no_grad(), self.compute_loss_context_manager(), seeing as seen:
            loss = self.compute_loss(model, inputs)
        labels = None if seen.logits is None else labels_of(self.distiller.task, inputs)
        return loss.detach(), seen.logits, labels

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the trainer's own card, with a section and tags on the distillation."""
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
        *args, **kwargs: as for `transformers.Trainer`; `model` is the student. Only the student is
            saved.
        teacher: a transformers model of the student's task; put in evaluation mode, never trained,
            and moved to the student's device unless it has a placement of its own (loaded with a
            device_map, offloaded by accelerate, quantised). Or a teacher cache, with
            `train_dataset=cache.dataset("train")` and `data_collator=fdd_kernels.data.pad_windows`.
        fdd_config: layers and loss options.
        evaluation_metrics: add perplexity, token accuracy and KL to the teacher to every
            evaluation: `eval_perplexity`, `eval_accuracy`, `eval_kl`, `eval_agreement` and
            `eval_kl_layer_k` of the student's sampled layers; see docs/evaluate.md. They cost head
            products, in evaluation alone.

    Every term is logged beside the loss, in training (means since the last log) and in evaluation
    (`eval_loss`, `eval_output_kd`, ...: means over all valid tokens). The training loss is the mean
    over all valid tokens of an optimizer step, also under gradient accumulation and data
    parallelism, and over the batches that were used, if the trainer replaces its data set's. A
    student with experts and `output_router_logits` adds its router loss, logged as `router`.

    Options that change during training (`FDDConfig(schedules=...)` and others) follow the trainer's
    step; they are logged under their names, and a checkpoint holds their state. The projection of
    feature space is in the optimizer, unless that is given, and in every checkpoint. A checkpoint
    also holds the config, and a training that resumes from it with another one is warned.

    A checkpoint is complete or does not exist, and training resumes only from a complete one: see
    `AtomicCheckpoints`.

    Raises:
        ValueError: label smoothing, `compute_loss_func` or `compute_metrics` was asked for: they
            would be ignored.
        TypeError, ValueError: see `Distiller`.
        CheckpointError: while training, a checkpoint could not be written; those before it are
            intact.
        NonFiniteLossError: while training, the loss is infinite or not a number; the last good
            checkpoint is intact.
    """

    def __init__(self, model: nn.Module | None = None, *args, **kwargs) -> None:
        if model is not None:
            require_model("model", model)
        super().__init__(model, *args, **kwargs)
