"""Train a distiller's projection in a Trainer, which knows the student's parameters alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fdd_kernels.hf.wrappers import all_processes
from fdd_kernels.integrations.proven import ProvenCheckpoints

# In a checkpoint and beside the student, the weights of `Distiller.projection`.
PROJECTION_FILE = "fdd_projection.safetensors"


class TrainedProjection(ProvenCheckpoints):
    """`ProvenCheckpoints` that also train, save and resume `self.distiller.projection`, if there is
    one: it is no part of the model that is wrapped for data parallelism.
    """

    @property
    def _projection(self) -> nn.Module | None:
        self._follow_model()
        return self.distiller.projection

    def _require_whole_projection(self) -> None:
        """Raise ValueError under a plugin that owns the optimizer or its parameters."""
        plugins = {"DeepSpeed": self.is_deepspeed_enabled, "FSDP": self.is_fsdp_enabled}
        for name in [name for name, is_used in plugins.items() if is_used]:
            if self._projection is not None:
                raise ValueError(
                    f"{name} holds the student's parameters alone, but the projection of "
                    'space="feature" or encoder_weight trains beside them: use '
                    'DistributedDataParallel, models of equal width with projection="auto", or '
                    'space="lens" and encoder_weight=0'
                )

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Add the projection as a group of its own to an optimizer that is made here, with the same
        value in all processes.
        """
        is_given, projection = self.optimizer is not None, self._projection
        optimizer = super().create_optimizer(*args, **kwargs)
        if projection is None or is_given:
            return optimizer
        weights, decay = list(projection.parameters()), self.args.weight_decay
        if all_processes() is not None:
            for weight in weights:
                torch.distributed.broadcast(weight.data, 0)
        optimizer.add_param_group({"params": weights, "weight_decay": decay})
        return optimizer

    def get_batch_samples(self, *args, **kwargs):
        """Begin a step: Trainer sets the gradients of its model alone to 0."""
        if self._projection is not None:
            self._projection.zero_grad()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        """Train on one micro-batch. After a step's last one, average the projection's gradient over
        processes, as DistributedDataParallel does with the student's.
        """
        loss = super().training_step(*args, **kwargs)
        projection = self._projection
        if projection is not None and self.accelerator.sync_gradients:
            for weight in projection.parameters():
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad, "mean")
        return loss

    def _trained_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        projection = self._projection
        return [*model.parameters(), *([] if projection is None else projection.parameters())]

    def _clip_grad_norm(self, model):
        if self._projection is None:
            return super()._clip_grad_norm(model)
        parameters = self._trained_parameters(model)
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _save(self, output_dir: str | None = None, *args, **kwargs) -> None:
        super()._save(output_dir, *args, **kwargs)
        if self._projection is not None and self.args.should_save:
            state = self._projection.state_dict()
            weights = {name: weight.cpu().contiguous() for name, weight in state.items()}
            save_file(weights, Path(output_dir or self.args.output_dir) / PROJECTION_FILE)

    def _missing(self, folder: Path) -> list[str]:
        missing = super()._missing(folder)
        if self._projection is not None and not (folder / PROJECTION_FILE).is_file():
            missing.append(f"{PROJECTION_FILE} (which a training in feature space writes)")
        return missing

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_projection(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_projection(self.state.best_model_checkpoint)

    def _load_projection(self, folder: str | None) -> None:
        if self._projection is not None and folder is not None:
            self._projection.load_state_dict(load_file(Path(folder) / PROJECTION_FILE))
