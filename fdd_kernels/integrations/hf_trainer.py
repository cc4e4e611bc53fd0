"""Hugging Face Trainer with the FDD loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import Trainer

from fdd_kernels.common.atomic import remove_directory
from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.hf.positions import SHIFT_LABELS, ignore_rows_from
from fdd_kernels.hf.teachers import Teacher, place_teacher, require_model
from fdd_kernels.hf.wrappers import unwrap
from fdd_kernels.integrations.checkpoints import NOT_FINITE, PREFIX, AtomicCheckpoints, checkpoints
from fdd_kernels.integrations.finite import (
    NonFiniteLossError,
    all_finite,
    require_finite,
    warn_of_nothing,
)
from fdd_kernels.integrations.model_card import TAGS, distillation_section
from fdd_kernels.integrations.sums import StepSums, WeightedSums
from fdd_kernels.objectives.fdd.options import FDDConfig

# How many steps in a row float16's scaler may skip: it halves its scale, 65536 at first, each time.
_SKIPPED_STEPS = 20


class FDDTrainerMixin(AtomicCheckpoints):
    """Puts the FDD loss in the place of the loss of a `transformers.Trainer` or a trainer built on
    one.

    Mix it in first: `class MyTrainer(FDDTrainerMixin, SomeTrainer)`. See `FDDTrainer` for what it
    adds.
    """

    # The loss is divided by the number of tokens of the whole step: see `get_batch_samples`.
    loss_is_scaled_for_ga = True

    def __init__(
        self, *args, teacher: nn.Module | Teacher, fdd_config: FDDConfig | None = None, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                f"{name}'s loss is the FDD loss: leave label_smoothing_factor=0 and "
                "compute_loss_func=None"
            )
        if self.compute_metrics is not None:
            raise ValueError(
                f"{name} computes no logits, which compute_metrics needs: leave "
                "compute_metrics=None"
            )
        self.teacher, self.fdd_config = teacher, fdd_config
        place_teacher(teacher, self.args.device)
        self.distiller = Distiller(self.model, teacher, fdd_config)
        ddp = self.accelerator.ddp_handler
        if (
            ddp is not None
            and self.args.ddp_find_unused_parameters is None
            and self.distiller.parameters_without_gradient()
        ):
            ddp.find_unused_parameters = True
        # What versions without `loss_is_scaled_for_ga` go by.
        self.model_accepts_loss_kwargs = True
        self._means = WeightedSums()
        self._step = StepSums()
        self._skipped_steps = 0  # in a row
        # Micro-batches of a stream that came to its end in the middle of a step: the next step's
        # first.
        self._held_over: list = []
        self._epoch_iterator = None
        # The folder whose oldest checkpoints are to be removed once the newest has proved to be
        # good.
        self._unproven: Path | None = None

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the columns that the loss and the teacher read, which the student's forward does
        not name.
        """
        super()._set_signature_columns_if_needed()
        read = (SHIFT_LABELS, *self.distiller.teacher.batch_columns)
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *read]))

    def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
        """The micro-batches of one optimizer step and the number of positions that count in them,
        on all devices.

        A stream whose end leaves a step incomplete goes on with it in the next pass, so that every
        step is one mean.

        Raises:
            ValueError: a whole pass has fewer batches than one step.
        """
        resumed = self._epoch_iterator is None and self.state.global_step > 0
        first, self._epoch_iterator = self._epoch_iterator is not epoch_iterator, epoch_iterator
        held, self._held_over = self._held_over, []
        batches = (
            held
            + super().get_batch_samples(
                epoch_iterator, max(num_batches - len(held), 0), *args, **kwargs
            )[0]
        )
        if len(batches) < num_batches and not self._is_at_its_end:
            if first and batches and not resumed:
                raise ValueError(
                    f"the data gives {len(batches)} batches in a pass, but a step takes "
                    "gradient_accumulation_steps="
                    f"{num_batches}: none would ever be complete. Lower "
                    "gradient_accumulation_steps or the batch size"
                )
            self._held_over, batches = batches, []
            self.control.should_epoch_stop = True
        if not batches:
            return [], None
        count = sum(
            (self.distiller.count_positions(batch).cpu() for batch in batches),
            torch.zeros((), dtype=torch.int64),
        )
        count = self.accelerator.reduce(count.to(self.args.device), "sum")
        if not count.item():
            warn_of_nothing(self.state.global_step + 1)
        self._step = StepSums()
        # Processes between which context parallelism will split these batches have all counted the
        # same.
        copies = self.get_cp_size() if hasattr(self, "get_cp_size") else 1
        return batches, count.clamp(min=1) // copies

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The FDD loss of one micro-batch, its terms recorded for the next log."""
        if unwrap(self.model) is not self.distiller.student.model:  # a new student: `model_init`
            self.distiller = Distiller(self.model, self.teacher, self.fdd_config)
        with self.accelerator.autocast():
            terms = self.distiller(inputs, num_items_in_batch=num_items_in_batch, student=model)
        loss = terms.loss
        if not model.training:
            self._means.add(terms.named(), self.distiller.count_positions(inputs))
        elif num_items_in_batch is None:
            self._means.add(terms.named(), torch.ones(()))
        else:
            self._step.add(
                terms.named(), self.distiller.count_positions(inputs), num_items_in_batch
            )
            # gradients are averaged over processes, but the shares must add up
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None, *args, **kwargs):
        """One micro-batch; after a step's last, its mean is put right if the trainer has changed
        batches, and checked.

        A trainer that generates (on-policy distillation) makes other batches than those that
        `get_batch_samples` counted.

        Raises:
            NonFiniteLossError: the step's loss is not finite, on any device; no step is taken.
        """
        loss, step = (
            super().training_step(model, inputs, num_items_in_batch, *args, **kwargs),
            self._step,
        )
        if not step.has_terms:
            return loss
        step.returned.append(loss)
        if len(step.returned) < self.current_gradient_accumulation_steps:
            return loss
        means, scale, finite = step.finish(self.accelerator.reduce)
        if finite:
            self._skipped_steps = 0
            self._means.add(means, torch.ones(()))
            self._remove_oldest()
        else:
            self._skipped_steps += 1
            # float16's scaler skips such a step, and lowers its scale for the next.
            if self.accelerator.scaler is None or self._skipped_steps > _SKIPPED_STEPS:
                self._stop(f"step {self.state.global_step + 1}", means)
        if scale != 1:
            self._scale_gradients(scale)
            # so that the trainer's sum of them is right too
            loss = scale * loss + (scale - 1) * sum(step.returned[:-1])
        return loss

    def _scale_gradients(self, scale: float) -> None:
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                f"{type(self).__name__} trains on other positions than its data set's, as trainers "
                "do that generate, and "
                "DeepSpeed holds the gradients, which would have to be scaled: use "
                "DistributedDataParallel or FSDP2"
            )
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)

    def _stop(self, when: str, means: Mapping[str, float | Tensor]) -> None:
        """Raise NonFiniteLossError, once a checkpoint of the very weights that gave such a loss has
        been put aside.
        """
        require_finite(when, means, kept=self._put_last_aside())

    def _put_last_aside(self) -> str:
        """Rename the checkpoint of the weights as they are, if this run wrote one; says what is
        left to go on from.
        """
        run = Path(self._get_output_dir(None))
        bad = run / f"{PREFIX}{self.state.global_step}"
        aside = bad.with_name(bad.name + NOT_FINITE)
        self.accelerator.wait_for_everyone()
        if self._unproven is not None and bad.is_dir():
            if aside.exists():
                remove_directory(aside)
            bad.rename(aside)
        self.accelerator.wait_for_everyone()
        good = [folder for folder in checkpoints(run) if folder != bad]
        kept = (
            f"{good[-1].name} is the last good checkpoint" if good else "nothing was saved before"
        )
        return kept + (
            f" ({bad.name}, of these weights, is now {aside.name})" if aside.is_dir() else ""
        )

    def _rotate(self, run: Path) -> None:
        """Waits for the next finite loss, which shows that the newest checkpoint is good."""
        self._unproven = run

    def _remove_oldest(self) -> None:
        run, self._unproven = self._unproven, None
        if run is not None:
            super()._rotate(run)

    def train(self, *args, **kwargs):
        """As `AtomicCheckpoints.train`.

        Raises:
            NonFiniteLossError: a loss, or in the end a weight, is not finite; says which checkpoint
                is the last good one.
        """
        self._held_over, self._epoch_iterator, self._skipped_steps = [], None, 0
        result = super().train(*args, **kwargs)
        finite = torch.tensor(float(all_finite(self.model.parameters())), device=self.args.device)
        if self.accelerator.reduce(finite, "sum") < self.accelerator.num_processes:
            raise NonFiniteLossError(
                f"the student's weights after step {self.state.global_step} are not finite; "
                f"{self._put_last_aside()}"
            )
        self._remove_oldest()
        return result

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the mean of each term since the last training log."""
        if "loss" in logs:
            (means, _), self._means = self._means.means(self.accelerator.reduce), WeightedSums()
            logs |= {name: value for name, value in means.items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Adds the terms to the loop's metrics, before they are logged, and weighs the loss by
        tokens as they are.

        Raises:
            NonFiniteLossError: in training, before a checkpoint is written of such a student.
        """
        training, self._means = self._means, WeightedSums()
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            means, weight = self._means.means(self.accelerator.reduce)
        finally:
            self._means = training
        if not weight:
            warnings.warn(
                f"no position counts in the data of {metric_key_prefix}_loss, which is given as 0",
                stacklevel=2,
            )
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        )
        if self.is_in_train and not math.isfinite(means.get("loss", 0.0)):
            self._stop(f"the evaluation after step {self.state.global_step}", means)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of one batch; there are no logits to return."""
        inputs = self._without_repeats(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _without_repeats(self, inputs):
        """The batch with nothing that counts in rows that accelerate repeats, so that all processes
        have as many.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if (
            processes == 1
            or not self.accelerator.even_batches
            or not state.end_of_dataloader
            or state.remainder == 0
        ):
            return inputs
        if state.remainder < 0:
            warnings.warn(
                "the data of this evaluation has no length, and accelerate does not say which rows "
                "of its last batch repeat "
                f"earlier ones for the sake of {processes} processes: they count twice. Give data "
                "with a length, or "
                'accelerator_config={"dispatch_batches": True}',
                stacklevel=2,
            )
            return inputs
        rows = len(next(iter(inputs.values())))
        own = min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
        return (
            inputs
            if own == rows
            else ignore_rows_from(inputs, own, self.distiller.config.ignore_index)
        )

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
        *args, **kwargs: as for `transformers.Trainer`; `model` is the student. Only the student is
            saved.
        teacher: a transformers causal LM; put in evaluation mode, never trained, and moved to the
            student's device unless it has a place of its own (loaded with a device_map, offloaded
            by accelerate, quantised). Or a teacher cache, with
            `train_dataset=cache.dataset("train")` and `data_collator=fdd_kernels.data.pad_windows`.
        fdd_config: layers and loss options.

    Every term is logged beside the loss, in training (means since the last log) and in evaluation
    (`eval_loss`, `eval_output_kd`, ...: means over all tokens that count). In training the loss is
    the sum over all tokens that count in an optimizer step divided by their number, also under
    gradient accumulation and data parallelism, and of the batches that were used, if the trainer
    makes others than its data set's. A student with experts and `output_router_logits` adds its
    router loss, logged as `router`.

    A checkpoint is there completely or not at all, and only a complete one is gone on from: see
    `AtomicCheckpoints`.

    Raises:
        ValueError: label smoothing, `compute_loss_func` or `compute_metrics` was asked for: they
            would be ignored.
        TypeError, ValueError: see `Distiller`.
        CheckpointError: while training, a checkpoint could not be written; those before it are
            intact.
        NonFiniteLossError: while training, the loss is infinite or no number; the last good
            checkpoint is kept.
    """

    def __init__(self, model: nn.Module | None = None, *args, **kwargs) -> None:
        if model is not None:
            require_model("model", model)
        super().__init__(model, *args, **kwargs)
