"""A Lightning module with the FDD loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
            'FDDLightningModule needs Lightning: pip install "fdd_kernels[lightning]"', name="lightning"
        ) from error

from fdd_kernels.config import FDDConfig, FDDLossTerms
from fdd_kernels.distiller import Distiller
from fdd_kernels.models.teachers import Teacher, place_teacher

_ADAMW = functools.partial(torch.optim.AdamW, lr=1e-4)


class FDDLightningModule(pl.LightningModule):
    """Distils `teacher` into `student` under a Lightning `Trainer`, with automatic optimisation.

    Args:
        student: a transformers causal LM. Only it is a submodule: the teacher is in no parameter list, state dict or
            checkpoint, and is never trained.
        teacher: as for `FDDTrainer`: a transformers causal LM, which `fit`, `validate` or `test` move to their device unless
            it has a place of its own; or a teacher cache, whose windows `fdd_kernels.data.pad_windows` makes batches of.
        fdd_config: layers and loss options.
        optimizer: makes, from the student's trainable parameters, what `configure_optimizers` may return; default AdamW with
            a learning rate of 1e-4.

    Batches are mappings as `Distiller` takes them. Every term is logged as `train_loss`, `train_output_kd`, ... each step and
    as `val_...`, `test_...`, means over all tokens that count, in evaluation.

    An optimizer step follows the mean over all tokens that count in its micro-batches, on all processes: Lightning's division
    by `accumulate_grad_batches` and its averaging over processes, both of which weigh tokens of short batches more, are taken
    back before gradients are clipped. `module.student.save_pretrained(...)` writes the student.

    Raises:
        ModuleNotFoundError: neither `lightning` nor `pytorch_lightning` is installed.
        ValueError: at `fit`, a strategy other than one device or DDP.
        TypeError, ValueError: see `Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher,
        fdd_config: FDDConfig | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Any] = _ADAMW,
    ) -> None:
        super().__init__()
        self.student = student
        # Neither a Distiller nor a tuple is a module: so the teacher stays out of parameters() and state_dict().
        self._teacher = (teacher,)
        self.distiller = Distiller(student, teacher, fdd_config)
        self._optimizer = optimizer
        # Of the current optimizer step: tokens that count, in all and in its first micro-batch, on all processes.
        self._tokens: Tensor | None = None
        self._first_tokens: Tensor | None = None

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"strategy={type(strategy).__name__}: FDDLightningModule runs on one device or with DDPStrategy. For "
                "models that are sharded use FDDTrainer or an accelerate loop with FSDP2"
            )
        place_teacher(*self._teacher, strategy.root_device)

    def configure_optimizers(self):
        return self._optimizer([p for p in self.student.parameters() if p.requires_grad])

    def on_fit_start(self) -> None:
        self.student.train()  # from_pretrained gives models in evaluation mode, and Lightning would leave them there
        self._tokens = None

    def forward(self, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | float | None = None) -> FDDLossTerms:
        """The loss of one batch: see `Distiller`."""
        return self.distiller(batch, num_items_in_batch=num_items_in_batch)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        count, processes = self.distiller.count_positions(batch), self.trainer.world_size
        tokens = self.trainer.strategy.reduce(count.to(self.device), reduce_op="sum").clamp(min=1)
        terms = self(batch, tokens / processes)  # its mean over processes is the mean over their tokens
        self._log("train", terms, len(next(iter(batch.values()))), sync_dist=processes > 1)
        if self._tokens is None:
            self._tokens, self._first_tokens = tokens, tokens
        else:
            self._tokens = self._tokens + tokens
        # Sums over tokens may be added up over micro-batches. Their common divisor keeps them of the size of a mean.
        return terms.loss * (tokens / self._first_tokens).to(terms.loss.dtype)

    def on_before_optimizer_step(self, optimizer) -> None:
        scale = self.trainer.accumulate_grad_batches * self._first_tokens / self._tokens
        self._tokens = None
        with torch.no_grad():
            for parameter in self.student.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale.to(parameter.grad.dtype))

    def _log(self, stage: str, terms: FDDLossTerms, weight: int, **options) -> None:
        values = {f"{stage}_{name}": value.detach() for name, value in terms._asdict().items()}
        self.log_dict(values, batch_size=weight, prog_bar=True, **options)

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        tokens = int(self.distiller.count_positions(batch))
        self._log(stage, self(batch), tokens, on_step=False, on_epoch=True, sync_dist=True)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)
