"""A Lightning module with the FDD loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

try:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lightning":
        raise
    try:
        import pytorch_lightning as pl
        from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'FDDLightningModule needs Lightning: pip install "fdd_kernels[lightning]"',
            name="lightning",
        ) from error

from fdd_kernels.hf.distiller import Distiller, DistillerTerms
from fdd_kernels.hf.teachers import Teacher, place_teacher
from fdd_kernels.integrations.finite import require_finite, warn_of_nothing
from fdd_kernels.integrations.saved_config import config_record, warn_of_another_config
from fdd_kernels.integrations.streamed_metrics import StreamedMetrics, watching
from fdd_kernels.objectives.fdd.options import FDDConfig

STATE = "fdd_state"  # in a checkpoint: see `Distiller.state_dict`
CONFIG = "fdd_config"  # likewise: the options of its training
_ADAMW = functools.partial(torch.optim.AdamW, lr=1e-4)


class FDDLightningModule(pl.LightningModule):
    """Distils `teacher` into `student` under a Lightning `Trainer`, with automatic optimisation.

    Args:
        student: a transformers model. Only it is a submodule, and the projection of feature
            space, if there is one: the teacher is in no parameter list, state dict or checkpoint,
            and is never trained.
        teacher: as for `FDDTrainer`: a model of the same task, which `fit`, `validate` or `test`
            move to their device unless it has a placement of its own; or a teacher cache, whose
            windows `fdd_kernels.data.pad_windows` collates.
        fdd_config: layers and loss options.
        optimizer: maps the student's trainable parameters, and the projection's, to the result of
            `configure_optimizers`; default AdamW with a learning rate of 1e-4.
        evaluation_metrics: as for `FDDTrainer`: log `val_perplexity`, `val_kl` and the others too.

    Batches are mappings as `Distiller` takes them. Every term is logged as `train_loss`,
    `train_output_kd`, ... each step and as `val_...`, `test_...`, means over all valid tokens, in
    evaluation. Options that change during training are logged under their names, and a checkpoint
    holds their state.

    The gradient of an optimizer step is that of the mean over all valid tokens of its
    micro-batches, on all processes. Lightning divides by `accumulate_grad_batches` and averages
    over processes, both of which weigh tokens of short batches more; this is undone before
    gradients are clipped. Evaluation ignores rows that a DistributedSampler repeats.
    `module.student.save_pretrained(...)` writes the student.

    Raises:
        ModuleNotFoundError: neither `lightning` nor `pytorch_lightning` is installed.
        ValueError: at `fit`, a strategy other than one device or DDP; DDP without
            `find_unused_parameters` for a loss that gives some parameters no gradient.
        NonFiniteLossError: while training, the loss is infinite or NaN.
        TypeError, ValueError: see `Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher,
        fdd_config: FDDConfig | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Any] = _ADAMW,
        evaluation_metrics: bool = True,
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple, which is no module: keeps the teacher out of parameters() and state_dict().
        self._teacher = (teacher,)
        self.distiller = Distiller(student, teacher, fdd_config)
        self.projection = self.distiller.projection
        self._optimizer = optimizer
        self.evaluation_metrics = evaluation_metrics
        self._metrics: dict[int, StreamedMetrics] = {}  # of an evaluation, by data loader
        self._begin_step()

    def _begin_step(self) -> None:
        # Valid tokens of an optimizer step on all processes, at least 1 per micro-batch: of all
        # micro-batches, and of the first.
        self._tokens: Tensor | None = None
        self._first_tokens: Tensor | None = None
        # The same without that minimum, and this process's terms that the gradient comes from.
        self._counted: Tensor | int = 0
        self._sums: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"strategy={type(strategy).__name__}: FDDLightningModule runs on one device or "
                "with DDPStrategy. For models that are sharded use FDDTrainer or an accelerate "
                "loop with FSDP2"
            )
        names = self._without_gradient() if stage == "fit" else []
        kwargs = getattr(strategy, "_ddp_kwargs", {})
        if isinstance(strategy, DDPStrategy) and names and not kwargs.get("find_unused_parameters"):
            raise ValueError(
                f"{len(names)} parameters that train, {names[0]} for one, get no gradient from "
                "this loss (train_head=False, or no term of the final state), and DDP would wait "
                'for it: give Trainer(strategy="ddp_find_unused_parameters_true"), or freeze them '
                "with requires_grad_(False)"
            )
        place_teacher(*self._teacher, strategy.root_device)

    def _without_gradient(self) -> list[str]:
        """Return the names of parameters that train and get no gradient at some step."""
        names = self.distiller.parameters_without_gradient()
        return names + [f"projection.{name}" for name in self.distiller.idle_projection()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG] = config_record(self.distiller.config)
        if self.distiller.config.changes:
            checkpoint[STATE] = self.distiller.state_dict()  # of all processes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the state of the options that change, and warn of another config.

        Raises:
            ValueError: there are such options, and the checkpoint has none of their state.
        """
        changes = self.distiller.config.changes
        if changes and STATE not in checkpoint:
            raise ValueError(
                f"the checkpoint lacks {STATE!r}, the state of {', '.join(changes)}: it is of a "
                "training without them. Load its student's weights alone, or give an fdd_config "
                "without them"
            )
        warn_of_another_config("the checkpoint", checkpoint.get(CONFIG), self.distiller.config)
        if changes:
            self.distiller.load_state_dict(checkpoint[STATE])

    def configure_optimizers(self):
        return self._optimizer([p for p in self.parameters() if p.requires_grad])

    def on_fit_start(self) -> None:
        # from_pretrained gives models in evaluation mode, and Lightning would leave them there
        self.student.train()
        self._begin_step()

    def forward(
        self,
        batch: Mapping[str, Tensor],
        num_items_in_batch: Tensor | float | None = None,
        step: int | None = None,
    ) -> DistillerTerms:
        """Compute the loss of one batch: see `Distiller`."""
        return self.distiller(batch, num_items_in_batch=num_items_in_batch, step=step)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        count, processes = self.distiller.count_positions(batch), self.trainer.world_size
        counted = self.trainer.strategy.reduce(count.to(self.device), reduce_op="sum")
        tokens = counted.clamp(min=1)
        # The average of these losses over processes is the mean over their tokens.
        terms = self(batch, tokens / processes, self.trainer.global_step)
        self._log("train", terms, len(next(iter(batch.values()))), sync_dist=processes > 1)
        self.log_dict(self.distiller.logged(), batch_size=1)
        if self._tokens is None:
            self._tokens, self._first_tokens = tokens, tokens
        else:
            self._tokens = self._tokens + tokens
        self._counted = self._counted + counted
        # Make the denominator of all micro-batches that of the first, so that they can be added.
        share = (tokens / self._first_tokens).to(terms.loss.dtype)
        for name, term in terms.named().items():
            self._sums[name] = self._sums.get(name, 0.0) + term.detach() * share
        return terms.loss * share

    def on_before_optimizer_step(self, optimizer) -> None:
        """Rescale the gradient to that of the mean over the step's tokens, and check the loss.

        Raises:
            NonFiniteLossError: the loss is not finite on some process; no step is taken.
        """
        mean = self._first_tokens / self._tokens
        sums = torch.stack([value.double() for value in self._sums.values()]) * mean.double()
        means = dict(zip(self._sums, self.trainer.strategy.reduce(sums, reduce_op="mean").tolist()))
        if not self._counted:
            warn_of_nothing(self.trainer.global_step + 1)
        self._begin_step()
        # float16's scaler skips a step that is not finite.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            require_finite(f"step {self.trainer.global_step + 1}", means)
        scale = self.trainer.accumulate_grad_batches * mean
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale.to(parameter.grad.dtype))

    def _log(self, stage: str, terms: DistillerTerms, weight: int, **options) -> None:
        values = {f"{stage}_{name}": value.detach() for name, value in terms.named().items()}
        self.log_dict(values, batch_size=weight, prog_bar=True, **options)

    def _evaluate(
        self, stage: str, batch: Mapping[str, Tensor], batch_idx: int, loaders: Any, which: int
    ) -> None:
        loader = loaders[which] if isinstance(loaders, (list, tuple)) else loaders
        batch = _without_repeats(batch, batch_idx, loader, self.distiller)
        tokens = int(self.distiller.count_positions(batch))
        metrics = self._metrics.setdefault(which, StreamedMetrics(self.distiller))
        with watching(self.distiller, self.evaluation_metrics, metrics):
            terms = self(batch)
        self._log(stage, terms, tokens, on_step=False, on_epoch=True, sync_dist=True)

    def _log_metrics(self, stage: str) -> None:
        """Log the metrics of all batches of an evaluation, named like Lightning's own means."""
        metrics, self._metrics = self._metrics, {}
        strategy = self.trainer.strategy
        for which, of_loader in metrics.items():
            found = of_loader.results(lambda sums, how: strategy.reduce(sums, reduce_op=how))
            end = f"/dataloader_idx_{which}" if len(metrics) > 1 else ""
            named = {f"{stage}_{name}{end}": value for name, value in found.items()}
            self.log_dict(named, add_dataloader_idx=False)

    def on_validation_epoch_start(self) -> None:
        self._metrics = {}

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        self._metrics = {}

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def validation_step(
        self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate("val", batch, batch_idx, self.trainer.val_dataloaders, dataloader_idx)

    def test_step(
        self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluate("test", batch, batch_idx, self.trainer.test_dataloaders, dataloader_idx)


def _without_repeats(
    batch: Mapping[str, Tensor], index: int, loader: Any, distiller: Distiller
) -> Mapping[str, Tensor]:
    """Return the batch without valid positions in rows that a DistributedSampler repeats to give
    every process as many.

    Row i of process r is row i * processes + r of the data set; the sampler repeats the first rows
    at the end.
    """
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or size is None:
        return batch
    rows = len(next(iter(batch.values())))
    own = -(-(len(sampler.dataset) - sampler.rank) // sampler.num_replicas) - index * size
    return batch if own >= rows else distiller.without_rows_from(batch, max(own, 0))
